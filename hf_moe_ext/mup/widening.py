"""The same model at another width, or with other experts: what a coordinate check and a learning rate sweep compare."""

from collections.abc import Callable, Mapping
from typing import Any

from hf_moe_ext.mup.roles import MULTIPLIER, MUP, NONE
from hf_moe_ext.mup.settings import read_head_dim


def widen(config: Any, hidden_size: int, hold_latent: bool = False) -> Any:
    """A copy of a configuration at another width: experts, shared expert and latent in proportion, heads of the same size.

    Base sizes stay; multipliers that hang on the width are carried over.

    Args:
        config: an ``*_ext`` configuration.
        hidden_size: of the copy.
        hold_latent: keep a DCCA block's latent at its size; its experts then grow with the square.

    Raises:
        ValueError: a size of the copy would not be whole, or the configuration refuses it.
    """
    ratio = hidden_size / config.hidden_size
    sizes = {
        "hidden_size": ratio,
        "intermediate_size": ratio,
        "num_attention_heads": ratio,
        "num_key_value_heads": ratio,
    }
    if getattr(config, "moe_intermediate_size", None) is not None:
        sizes["moe_intermediate_size"] = ratio
    if config.moe_latent_size is not None:
        latent = 1.0 if hold_latent else ratio
        sizes |= {"moe_latent_size": latent, "moe_expert_intermediate_size": ratio * ratio / latent}
    if config.moe_shared_expert_intermediate_size:
        sizes["moe_shared_expert_intermediate_size"] = ratio
    changes: dict[str, Any] = {
        name: _whole(name, getattr(config, name) * by, hidden_size) for name, by in sizes.items()
    }
    if (
        getattr(config, "head_dim", None) is None
        and read_head_dim(config) * changes["num_attention_heads"] != hidden_size
    ):
        raise ValueError(f"hidden_size={hidden_size} is no multiple of the head dimension {read_head_dim(config)}")
    if config.mup != NONE and config.mup_form == MULTIPLIER:
        changes["logits_scaling"] = config.logits_scaling * ratio
        if config.mup == MUP:
            changes["router_logits_scaling"] = config.router_logits_scaling * ratio
    return change(config, changes)


def add_experts(config: Any, num_experts: int) -> Any:
    """A copy with another number of experts."""
    return change(config, {_expert_key(config): num_experts})


def choose_top_k(config: Any, top_k: int) -> Any:
    """A copy with another number of active experts."""
    return change(config, {"num_experts_per_tok": top_k})


def cut_experts(config: Any, granularity: int) -> Any:
    """A copy with each expert cut into so many: as many times the experts, of them active, and narrower by as much."""
    width = "intermediate_size" if getattr(config, "moe_intermediate_size", None) is None else "moe_intermediate_size"
    changes = {
        _expert_key(config): getattr(config, _expert_key(config)) * granularity,
        "num_experts_per_tok": config.num_experts_per_tok * granularity,
        width: _whole(width, getattr(config, width) / granularity, granularity),
    }
    if config.mup != NONE:
        # Held to the base's own: then the narrower expert counts as narrower, and its fan-in keys its last matrix.
        changes["mup_base_intermediate_size"] = config.mup_base_intermediate_size
    if config.moe_expert_intermediate_size is not None:
        inner = config.moe_expert_intermediate_size / granularity
        changes["moe_expert_intermediate_size"] = _whole("moe_expert_intermediate_size", inner, granularity)
    return change(config, changes)


# Axis of a sweep, by the name of the configuration's key or of the thing itself -> a copy with that value.
AXES: Mapping[str, Callable[[Any, int], Any]] = {
    "hidden_size": widen,
    "num_experts": add_experts,
    "top_k": choose_top_k,
    "granularity": cut_experts,
}


def change(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a configuration with some keys changed, checked as a new one is."""
    return type(config).from_dict(config.to_dict() | dict(changes))


def _expert_key(config: Any) -> str:
    return "num_local_experts" if "num_local_experts" in config.to_dict() else "num_experts"


def _whole(name: str, value: float, target: int) -> int:
    if value < 1 or abs(value - round(value)) > 1e-9:
        raise ValueError(f"{name} would be {value} in the copy for {target}; choose a value for which it is whole")
    return round(value)
