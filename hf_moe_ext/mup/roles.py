"""How much wider than its base a model is, and the role that gives each of its parameters."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_moe_ext.host import axes as host_axes
from hf_moe_ext.host.axes import Axes, clean_name, read_axes
from hf_moe_ext.host.families import expert_width
from hf_moe_ext.mup import rules
from hf_moe_ext.mup.rules import RULES, Rule

NONE, SIMPLEP, MUP = "none", "simplep", "mup"
MULTIPLIER, FOLDED = "multiplier", "folded"


@dataclass(frozen=True)
class TensorRole:
    """What a parameter is.

    Attributes:
        name: in the bare model.
        axes: what it maps from and to.
        role: row of the rule table.
        fan_in: width ratio of its input to the base's; 1 for an axis that does not grow.
        fan_out: the same of its output.
    """

    name: str
    axes: Axes
    role: str
    fan_in: float
    fan_out: float

    @property
    def rule(self) -> Rule:
        """Its row."""
        return RULES[self.role]

    @property
    def init_factor(self) -> float:
        """On the standard deviation its weights are drawn with."""
        return self.rule.init_std.at(self.fan_in, self.fan_out)

    def update_factors(self, optimiser: rules.Optimiser) -> tuple[float, float, float]:
        """On learning rate, independent weight decay and epsilon."""
        update = self.rule.updates[optimiser]
        return tuple(power.at(self.fan_in, self.fan_out) for power in (update.lr, update.weight_decay, update.eps))  # type: ignore[return-value]


def width_ratios(config: Any) -> dict[str, float]:
    """Axis -> how much wider than the base; axes that do not grow are left out.

    Heads are added as the width grows, or become wider with it: either way the attention's width grows as the hidden size.
    """
    hidden = config.hidden_size / config.mup_base_hidden_size
    inner = expert_width(config) / config.mup_base_intermediate_size
    ratios = {
        host_axes.HIDDEN: hidden,
        host_axes.ATTENTION: hidden,
        host_axes.INTERMEDIATE: inner,
        host_axes.SHARED_INTERMEDIATE: inner,
        # Dense layers of a width of their own, which no key of the base names, are taken to grow as the model does.
        host_axes.DENSE_INTERMEDIATE: inner if getattr(config, "moe_intermediate_size", None) is None else hidden,
    }
    if getattr(config, "moe_latent_size", None) is not None:
        latent = config.moe_latent_size / config.mup_base_latent_size
        if hidden == 1 or latent != 1:
            ratios[host_axes.LATENT] = latent
        ratios[host_axes.LATENT_INTERMEDIATE] = hidden * inner / latent
    return ratios


def base_sizes(config: Any) -> dict[str, float] | None:
    """The widths of the base model that a DCCA block's initial scales are taken at; None, the model's own, without µP."""
    if config.mup == NONE:
        return None
    return {
        "hidden_size": config.mup_base_hidden_size,
        "intermediate_size": config.mup_base_intermediate_size,
        "latent_size": config.mup_base_latent_size,
        "expert_intermediate_size": config.moe_expert_intermediate_size
        / width_ratios(config)[host_axes.LATENT_INTERMEDIATE],
    }


def read_role(name: str, config: Any) -> TensorRole:
    """The role of one parameter under the model's configuration.

    Raises:
        ValueError: its axes are not declared.
    """
    axes = read_axes(name, config)
    if getattr(config, "mup", NONE) == NONE:
        return TensorRole(clean_name(name), axes, rules.FINITE, 1.0, 1.0)
    ratios = width_ratios(config)
    fan_out = ratios.get(axes.fan_out)
    fan_in = None if axes.fan_in is None else ratios.get(axes.fan_in)
    if axes.fan_in is None:
        role = rules.FINITE if fan_out is None else rules.VECTOR
    elif fan_in is None:
        role = rules.FINITE if fan_out is None else rules.INPUT
    elif fan_out is not None:
        role = rules.HIDDEN
    else:
        role = _read_output_role(clean_name(name), axes, config)
    return TensorRole(clean_name(name), axes, role, fan_in or 1.0, fan_out or 1.0)


def _read_output_role(name: str, axes: Axes, config: Any) -> str:
    """Only the base model's own router and head have a multiplier, or are left as they are, and so what is added to them."""
    target = axes.adapts or axes
    own_router = target.fan_out == host_axes.EXPERTS and not (axes.adapts is None and ".perft_" in name)
    if target.fan_in != host_axes.HIDDEN or not (own_router or target.fan_out == host_axes.VOCAB):
        return rules.OUTPUT
    if own_router and config.mup == SIMPLEP:
        return rules.STANDARD_ROUTER
    return rules.OUTPUT_MULTIPLIER if config.mup_form == MULTIPLIER else rules.OUTPUT


def assign_roles(model: nn.Module, config: Any = None, trainable_only: bool = True) -> dict[str, TensorRole]:
    """Parameter name, as ``named_parameters`` gives it -> role.

    Args:
        model: bare, or wrapped by PEFT, DDP, FSDP2 or ``torch.compile``.
        config: the model's; None: ``find_config(model)``.
        trainable_only: leave frozen parameters out, which need no role.

    Raises:
        ValueError: a parameter whose axes are not declared.
    """
    config = find_config(model) if config is None else config
    return {
        name: read_role(name, config)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trainable_only
    }


def find_config(model: nn.Module) -> Any:
    """The configuration of the Transformers model inside any wrappers.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "hidden_size"):
            return config
    raise ValueError(f"{type(model).__name__} holds no Transformers model; µP reads the model's configuration")
