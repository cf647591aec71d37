"""The rules of ``PerftConfig``: what each field may hold, alone and beside the others, and the defaults of a variant."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from packaging.version import Version

import hf_moe_ext

if TYPE_CHECKING:
    from hf_moe_ext.perft.config import PerftConfig

VARIANTS = ("R", "E", "D", "S")
ADAPTERS = ("lora", "parallel")
BASE_ROUTERS = ("frozen", "lora", "train")
SCOPES = ("batch", "sequence", "global")


def check_choices(config: PerftConfig) -> None:
    choices = {"variant": VARIANTS, "adapter": ADAPTERS, "bias": ("none", "all"), "base_router": BASE_ROUTERS}
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"PerftConfig: {name} must be one of {', '.join(allowed)}; got {value!r}")
    if config.init_weights not in (True, False, "paper"):
        raise ValueError(f"PerftConfig: init_weights must be True, False or 'paper'; got {config.init_weights!r}")
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ValueError("PerftConfig: layers_pattern names the list for layers_to_transform; set that too")
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            "PerftConfig: layers_to_transform works with target_modules as a list of names; "
            f"a regular expression ({config.target_modules!r}) can name the layers itself"
        )


def check_number(name: str, value: Any, kind: type, rule: str, holds: Callable[[Any], bool]) -> None:
    """Refuse what is no finite number of that kind, or breaks the rule."""
    whole = kind is int and isinstance(value, int)
    real = kind is float and isinstance(value, int | float) and math.isfinite(value)
    if isinstance(value, bool) or not (whole or real) or not holds(value):
        raise ValueError(f"PerftConfig: {name} must be {rule}; got {value!r}")


def check_sizes(config: PerftConfig) -> None:
    for name, ranks in (("r", {"": config.r}), ("rank_pattern", config.rank_pattern)):
        for pattern, rank in ranks.items():
            label = f"{name}[{pattern!r}]" if pattern else name
            check_number(label, rank, int, "a whole number of at least 1", lambda v: v >= 1)
    for name, alphas in (("lora_alpha", {"": config.lora_alpha}), ("alpha_pattern", config.alpha_pattern)):
        for pattern, alpha in alphas.items():
            label = f"{name}[{pattern!r}]" if pattern else name
            check_number(label, alpha, float, "positive", lambda v: v > 0)
    check_number("lora_dropout", config.lora_dropout, float, "a probability in [0, 1)", lambda v: 0 <= v < 1)
    if config.normalize_top_k not in (None, True, False):
        raise ValueError(f"PerftConfig: normalize_top_k must be None, True or False; got {config.normalize_top_k!r}")
    unscaled = config.adapter == "parallel" and config.base_router != "lora"
    if unscaled and (config.lora_alpha != 32 or config.alpha_pattern):
        warnings.warn("PerftConfig: lora_alpha has no effect on adapter='parallel', whose scale is 1", stacklevel=4)


def resolve_num_experts(config: PerftConfig) -> int:
    num_experts = 4 if config.num_experts is None else config.num_experts
    check_number("num_experts", num_experts, int, "a whole number of at least 1", lambda v: v >= 1)
    return num_experts


def resolve_router(config: PerftConfig) -> None:
    config.num_experts = resolve_num_experts(config)
    config.top_k = min(2, config.num_experts) if config.top_k is None else config.top_k
    check_number("top_k", config.top_k, int, "a whole number of at least 1", lambda v: v >= 1)
    if config.top_k > config.num_experts:
        raise ValueError(
            f"PerftConfig: top_k must be between 1 and num_experts={config.num_experts}; got {config.top_k}. "
            "Lower top_k or raise num_experts"
        )
    if config.normalize_top_k and config.top_k == 1:
        raise ValueError(
            "PerftConfig: normalize_top_k=True with top_k=1 makes every weight 1, so the router never learns from the "
            "model's loss; leave it out (None) or write False"
        )
    for name, default in (("router_aux_loss_coef", 0.01), ("router_z_loss_coef", 0.0)):
        value = getattr(config, name)
        value = default if value is None else value
        check_number(name, value, float, "a number of at least 0", lambda v: v >= 0)
        setattr(config, name, value)
    if config.router_aux_loss_scope is None:
        # No scope lowers the loss reliably; this one balances best and does not depend on batching
        # (model_cards/perft-router.md).
        config.router_aux_loss_scope = "sequence"
    if config.router_aux_loss_scope not in SCOPES:
        raise ValueError(
            f"PerftConfig: router_aux_loss_scope must be one of {', '.join(SCOPES)}; got {config.router_aux_loss_scope!r}"
        )
    if config.num_experts == 1:
        warnings.warn(
            "PerftConfig: variant='R' with num_experts=1 gives the one adapter weight 1, so its router learns nothing; "
            "it equals variant='S', which saves the router",
            stacklevel=4,
        )


def resolve_base_router(config: PerftConfig) -> None:
    if config.base_router == "frozen":
        if config.base_router_drift_coef is not None:
            raise ValueError(
                f"PerftConfig: base_router_drift_coef={config.base_router_drift_coef!r} holds back a base router that "
                "trains; leave it out, or choose base_router='lora' or 'train'"
            )
        return
    if config.base_router_drift_coef is None:
        config.base_router_drift_coef = 0.1
    check_number(
        "base_router_drift_coef", config.base_router_drift_coef, float, "a number of at least 0", lambda v: v >= 0
    )


def check_experts(config: PerftConfig) -> None:
    if config.shared_A not in (True, False):
        raise ValueError(f"PerftConfig: shared_A must be True or False; got {config.shared_A!r}")
    single = isinstance(config.expert_ids, list) and len(config.expert_ids) == 1
    if config.shared_A and (config.variant == "S" or config.num_experts == 1 or single):
        raise ValueError("PerftConfig: shared_A=True needs several adapters per layer to share it; leave it out")
    if config.expert_ids is None:
        return
    if config.variant != "E":
        raise ValueError(
            f"PerftConfig: expert_ids chooses among the base model's experts; variant={config.variant!r} has adapters of "
            "its own. Leave it out, or choose variant='E'"
        )
    lists = config.expert_ids.values() if isinstance(config.expert_ids, dict) else [config.expert_ids]
    for ids in lists:
        whole = isinstance(ids, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or not ids or len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(
                f"PerftConfig: expert_ids must be lists of different whole numbers of at least 0, none empty; got {ids!r}"
            )


def refuse_router(config: PerftConfig) -> None:
    variant = config.variant
    for name in ("top_k", "normalize_top_k", "router_aux_loss_coef", "router_z_loss_coef", "router_aux_loss_scope"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"PerftConfig: {name} belongs to the router of variant='R'; variant={variant!r} has none. "
                f"Leave {name} out, or choose variant='R'"
            )
    if variant == "D":
        config.num_experts = resolve_num_experts(config)
    elif config.num_experts is not None:
        instead = "has one adapter per base expert" if variant == "E" else "has a single adapter; for several use 'D'"
        raise ValueError(
            f"PerftConfig: num_experts={config.num_experts} means nothing here: variant={variant!r} {instead}"
        )


def check_version(config: PerftConfig) -> None:
    ours = Version(hf_moe_ext.__version__)
    if config.hf_moe_ext_version is None:
        config.hf_moe_ext_version = hf_moe_ext.__version__
    elif Version(config.hf_moe_ext_version).release[:2] > ours.release[:2]:
        warnings.warn(
            f"this PERFT adapter was written by hf_moe_ext {config.hf_moe_ext_version}, newer than the installed {ours}; "
            "upgrade hf_moe_ext if it does not load",
            stacklevel=4,
        )
