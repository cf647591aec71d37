"""Optimizer groups of a µP model, and what hands them to the Trainer."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, RAdam

from hf_moe_ext.host import axes as host_axes
from hf_moe_ext.mup.roles import TensorRole, assign_roles
from hf_moe_ext.mup.rules import OPTIMISERS, Optimiser

# Adam's update does not change when the gradient is multiplied by a number; that is what its column of the table is for.
_RULE_OF: dict[type[Optimizer], Optimiser] = {AdamW: "adam", Adam: "adam", NAdam: "adam", RAdam: "adam", SGD: "sgd"}
# Their weight decay is a term of the gradient.
_COUPLED = (Adam, NAdam, RAdam)
DEFAULT_EPS = 1e-8
# Of `TrainingArguments.lr_scheduler_type`: those that hold a floor in units of a learning rate, the same for every group.
_ABSOLUTE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class DecayPolicy:
    """What has weight decay, and how; the fields are arguments of ``param_groups``."""

    independent: bool = True
    embeddings: bool = True
    routers: bool = True

    def apply(self, role: TensorRole, factors: tuple[float, float, float]) -> tuple[float, float, float]:
        """Factors on learning rate, weight decay and epsilon, with the second as the policy wants it."""
        lr_factor, decay_factor, eps_factor = factors
        # The head has the vocabulary as its output.
        spared = (role.axes.fan_in == host_axes.VOCAB and not self.embeddings) or (
            role.axes.fan_out == host_axes.EXPERTS and not self.routers
        )
        if role.axes.fan_in is None or spared:
            return lr_factor, 0.0, eps_factor
        return lr_factor, decay_factor if self.independent else 1.0, eps_factor


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = DEFAULT_EPS,
    *,
    rule: Optimiser = "adam",
    independent_weight_decay: bool = True,
    decay_embeddings: bool = True,
    decay_routers: bool = True,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: one per distinct setting, and per device mesh, in an order that only the model decides.

    The first group has the learning rate ``lr`` itself where any has, so that what a Trainer logs is ``lr``. Each group has
    a ``lr_factor`` beside what the optimizer reads: its learning rate over ``lr``.

    Args:
        model: a model whose configuration has the µP keys, bare or wrapped; only what requires a gradient is taken.
        lr: learning rate, tuned at the base width.
        weight_decay: at the base width. Gains and biases have none.
        eps: Adam's epsilon at the base width; divided where gradients shrink with the width.
        rule: "adam" for Adam, AdamW and their kin, "sgd" for SGD.
        independent_weight_decay: each step takes the same share of a weight at every width (arXiv 2510.19093 finds that this
            is what makes transfer last). False: one coefficient for all, which Adam multiplies by the group's own rate.
        decay_embeddings: whether the embedding has weight decay.
        decay_routers: whether routers have.

    Raises:
        ValueError: a negative number, nothing to train, or a parameter without declared axes.
    """
    check_numbers(lr=lr, weight_decay=weight_decay, eps=eps)
    if rule not in OPTIMISERS:
        raise ValueError(f"param_groups: rule must be one of {', '.join(map(repr, OPTIMISERS))}; got {rule!r}")
    roles = assign_roles(model)
    if not roles:
        raise ValueError("param_groups: no parameter of this model requires a gradient")
    policy = DecayPolicy(independent_weight_decay, decay_embeddings, decay_routers)
    factors = {name: policy.apply(role, role.update_factors(rule)) for name, role in roles.items()}
    return gather_groups(dict(model.named_parameters()), factors, lr, weight_decay, eps if rule == "adam" else None)


def check_numbers(**numbers: float) -> None:
    """Refuse what is no number of at least 0.

    Raises:
        ValueError: naming it.
    """
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"param_groups: {name} must be a number of at least 0; got {value!r}")


def gather_groups(
    parameters: Mapping[str, nn.Parameter],
    factors: Mapping[str, tuple[float, float, float]],
    lr: float,
    weight_decay: float,
    eps: float | None,
) -> list[dict[str, Any]]:
    """One group per distinct setting and device mesh, those at the base's rate first.

    Args:
        parameters: by name.
        factors: name -> on learning rate, weight decay and epsilon; other parameters are left out.
        lr: at the base width.
        weight_decay: at the base width.
        eps: at the base width; None for an optimizer without one.
    """
    grouped: dict[tuple[tuple[float, float, float], Any], list[nn.Parameter]] = defaultdict(list)
    for name, setting in factors.items():
        parameter: Any = parameters[name]
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        # One kernel call cannot take parameters of several meshes.
        grouped[setting if eps is not None else (*setting[:2], 1.0), mesh].append(parameter)
    groups = [
        {
            "params": members,
            "lr": lr * lr_factor,
            "weight_decay": weight_decay * decay_factor,
            **({"eps": eps * eps_factor} if eps is not None else {}),
            "lr_factor": lr_factor,
        }
        for ((lr_factor, decay_factor, eps_factor), _), members in grouped.items()
    ]
    return sorted(groups, key=lambda group: group["lr_factor"] != 1.0)


def trainer_optimizer(
    model: nn.Module,
    optimizer_class: type[Optimizer] = AdamW,
    *,
    args: Any = None,
    lr: float | None = None,
    adam_lr: float | None = None,
    weight_decay: float | None = None,
    eps: float | None = None,
    rule: Optimiser | None = None,
    independent_weight_decay: bool = True,
    decay_embeddings: bool = True,
    decay_routers: bool = True,
    **options: Any,
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, so that it builds its optimizer on the groups of ``param_groups``.

    Built when the Trainer asks, on the model it then has: under FSDP2, expert parallelism, a second training, or a search
    with ``model_init``. The Trainer passes none of its own settings on, so either give ``args`` or write the numbers here.
    What comes from ``args`` is read when the optimizer is built: a search changes them from trial to trial, and a number
    written here would hold for all of its trials.

    Args:
        model: a µP model; looked at now, so that mistakes come before training.
        optimizer_class: AdamW, Adam, NAdam, RAdam, SGD or Muon of torch; others with ``rule``. Muon takes the hidden matrices
            and AdamW the rest, stacked experts too (see ``hf_moe_ext/mup/muon.py``); ``betas`` and ``eps`` are AdamW's then.
        args: ``TrainingArguments``; their ``learning_rate``, ``weight_decay``, ``adam_epsilon`` and betas count where
            nothing else is given, and their schedule is checked.
        lr: at the base width.
        adam_lr: with Muon: AdamW's, at the base width. Left out: ``lr``, with ``adjust_lr_fn="match_rms_adamw"`` only.
        weight_decay: at the base width.
        eps: at the base width.
        rule: which column of the table an optimizer of another kind follows: "adam" if multiplying all gradients by a number
            does not change its update, "sgd" if the update is proportional to them.
        independent_weight_decay: see ``param_groups``.
        decay_embeddings: see ``param_groups``.
        decay_routers: see ``param_groups``.
        **options: for the optimizer (``betas``, ``momentum``, ``fused`` ...).

    Example:
        ``Trainer(model, args, ..., optimizer_cls_and_kwargs=trainer_optimizer(model, args=args))``

    Raises:
        ValueError: a schedule with an absolute floor, no learning rate, an unknown kind of optimizer.
    """
    with_muon = optimizer_class is Muon
    if with_muon and rule is not None:
        raise ValueError(f"trainer_optimizer: Muon has a rule of its own, got rule={rule!r}; leave it out")
    if not with_muon and adam_lr is not None:
        raise ValueError(
            f"trainer_optimizer: adam_lr is for Muon, got {optimizer_class.__name__}; write lr={adam_lr!r}"
        )
    if args is None and lr is None:
        raise ValueError("trainer_optimizer: give lr, or args=TrainingArguments(learning_rate=...)")
    if args is not None:
        _check_schedule(args)
    written = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
    settings: dict[str, Any] = {
        **{name: value for name, value in written.items() if value is not None},
        "independent_weight_decay": independent_weight_decay,
        "decay_embeddings": decay_embeddings,
        "decay_routers": decay_routers,
    }
    chosen: dict[str, Any] = {
        "optimizer_class": optimizer_class,
        "args": args,
        "settings": settings,
        "options": options,
    }
    numbers = {**_read_numbers(args), **settings}
    if with_muon:
        from hf_moe_ext.mup.muon import MuonWithAdamW, muon_groups

        own = {"adam_lr": adam_lr, "adjust_lr_fn": options.pop("adjust_lr_fn", None)}
        settings |= own
        MuonWithAdamW(muon_groups(model, **numbers, **own), numbers["lr"], **options)
        return MupOptimizerFactory, chosen | {"optimizer_class": MuonWithAdamW, "build_groups": muon_groups}
    settings["rule"] = _choose_rule(optimizer_class, rule)
    _check_decay(optimizer_class, numbers["weight_decay"], options)
    MupOptimizerFactory()(model, **chosen)
    return MupOptimizerFactory, chosen


class MupOptimizerFactory:
    """What the Trainer calls when it needs an optimizer; see ``trainer_optimizer``."""

    def __call__(
        self,
        model: nn.Module,
        optimizer_class: type[Optimizer],
        args: Any,
        settings: dict[str, Any],
        options: dict[str, Any],
        build_groups: Callable[..., list[dict[str, Any]]] = param_groups,
    ) -> Optimizer:
        """An optimizer on the groups of the model; ``defaults["lr"]`` is the base rate, which schedules with a floor divide by."""
        settings = {**_read_numbers(args), **settings}
        if (
            args is not None
            and "betas" in signature(AdamW if build_groups is not param_groups else optimizer_class).parameters
        ):
            options = {"betas": (args.adam_beta1, args.adam_beta2), **options}
        return optimizer_class(build_groups(model, **settings), lr=settings["lr"], **options)  # type: ignore[call-arg]


def _read_numbers(args: Any) -> dict[str, float]:
    """Of ``TrainingArguments`` as they are now; the defaults without."""
    if args is None:
        return {"weight_decay": 0.0, "eps": DEFAULT_EPS}
    return {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.adam_epsilon}


def _choose_rule(optimizer_class: type[Optimizer], rule: Optimiser | None) -> Optimiser:
    if rule is not None:
        return rule
    known = _RULE_OF.get(optimizer_class)
    if known is None:
        raise ValueError(
            f"trainer_optimizer: {optimizer_class.__name__} is none of {', '.join(c.__name__ for c in _RULE_OF)}; if "
            "multiplying all gradients by a number does not change its update, write rule='adam', if it changes it in "
            "proportion, rule='sgd'. An optimizer that chooses learning rates itself (Adafactor with relative_step, "
            "Prodigy, D-Adaptation) cannot keep µP's"
        )
    return known


def _check_decay(optimizer_class: type[Optimizer], weight_decay: float, options: dict[str, Any]) -> None:
    if optimizer_class in _COUPLED and weight_decay and not options.get("decoupled_weight_decay"):
        raise ValueError(
            f"trainer_optimizer: {optimizer_class.__name__} adds weight_decay={weight_decay} to the gradient and then divides "
            "by its size, so that no coefficient per group keeps its effect over widths; write AdamW, "
            "decoupled_weight_decay=True, or weight_decay=0"
        )


def _check_schedule(args: Any) -> None:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    floor = (args.lr_scheduler_kwargs or {}).get("min_lr", 1e-3 if name == "greedy" else 0)
    if name in _ABSOLUTE_SCHEDULES and floor:
        raise ValueError(
            f"lr_scheduler_type={name!r} holds every group above min_lr={floor}, which breaks the ratios between groups; "
            "write lr_scheduler_kwargs={'min_lr': 0}, or another schedule (cosine, linear, WSD, cosine_with_min_lr)"
        )
