"""Keys of the latent block: checks, and what is filled in where they were left open."""

from dataclasses import fields
from typing import Any

from hf_moe_ext.host.families import expert_width

# What `grouped_mm` aligns rows to, 16 bytes, in elements of the narrowest dtype we train in (bfloat16).
ALIGNMENT = 8


def nearest_aligned(width: float) -> int:
    """The nearest width that ``grouped_mm`` aligns."""
    return max(ALIGNMENT, round(width / ALIGNMENT) * ALIGNMENT)


def equal_expert_width(hidden_size: int, intermediate_size: int, latent_size: int, gated: bool) -> int:
    """Inner width of a latent expert with as many parameters as a stock one, 3HI = 2RF or 3RF, rounded to alignment."""
    return nearest_aligned(3 * hidden_size * intermediate_size / ((3 if gated else 2) * latent_size))


def check_shared_width(config: Any) -> None:
    """Refuse a ``moe_shared_expert_intermediate_size`` that is no width; layers of two kinds of block read it.

    Raises:
        ValueError, TypeError: naming the value.
    """
    value = config.moe_shared_expert_intermediate_size
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"moe_shared_expert_intermediate_size must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"moe_shared_expert_intermediate_size must be 0 (none) or a width, got {value}")


def check_dcca_kinds(config: Any) -> None:
    """Refuse values of another kind.

    Raises:
        TypeError: naming the key.
    """
    for name in ("moe_latent_size", "moe_expert_intermediate_size"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    for name in ("moe_expert_gated", "moe_latent_norm"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")


def resolve_dcca(config: Any) -> None:
    """Fill in what was left open, and refuse what cannot be built.

    Raises:
        ValueError: naming the key, the rule and the value.
    """
    from transformers.activations import ACT2FN

    hidden_size = config.hidden_size
    if config.moe_latent_size is None:
        config.moe_latent_size = hidden_size // 4
        if config.moe_latent_size % ALIGNMENT:
            raise ValueError(
                f"moe_latent_size is hidden_size // 4 = {config.moe_latent_size} by default, which is not a multiple of "
                f"{ALIGNMENT}, as grouped_mm needs; write moe_latent_size={nearest_aligned(config.moe_latent_size)}"
            )
    latent_size = config.moe_latent_size
    if not 1 <= latent_size <= hidden_size:
        raise ValueError(f"moe_latent_size must be from 1 to hidden_size={hidden_size}, got {latent_size}")
    if config.moe_expert_intermediate_size is None:
        config.moe_expert_intermediate_size = equal_expert_width(
            hidden_size, expert_width(config), latent_size, config.moe_expert_gated
        )
    if config.moe_expert_act is None:
        config.moe_expert_act = config.hidden_act
    if config.moe_expert_act not in ACT2FN:
        raise ValueError(f"moe_expert_act must be an activation of Transformers, got {config.moe_expert_act!r}")
    if config.moe_expert_intermediate_size < 1:
        raise ValueError(f"moe_expert_intermediate_size must be at least 1, got {config.moe_expert_intermediate_size}")
    for name in ("moe_latent_size", "moe_expert_intermediate_size"):
        width = getattr(config, name)
        if width % ALIGNMENT:
            raise ValueError(
                f"{name}={width} is not a multiple of {ALIGNMENT}, which grouped_mm needs (rows of 16 bytes in "
                f"bfloat16); write {name}={nearest_aligned(width)}"
            )


def list_idle_keys(config: Any, keys: type, shared_expert_used: bool) -> list[str]:
    """Of the latent block's keys, those that were given although no layer has that block."""
    spared = {"moe_block"} | ({"moe_shared_expert_intermediate_size"} if shared_expert_used else set())
    names = [f for f in fields(keys) if f.name.startswith("moe_") and f.name not in spared]
    return [f.name for f in names if getattr(config, f.name) != f.default]
