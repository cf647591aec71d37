"""What a PERFT adapter trains, per module, with counts: shown when it is attached and by ``hf-moe doctor``."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hf_moe_ext.host.families import active_experts
from hf_moe_ext.host.quantization import UnquantisedExperts, unquantised_experts
from hf_moe_ext.perft.base_router import BaseRouterLayer
from hf_moe_ext.perft.layer import AdapterSettings, PerftLayer


@dataclass(frozen=True)
class TrainableRow:
    """One adapted module.

    Attributes:
        module: path of the experts module, or of the base router that is tuned with it.
        tensors: name -> shape of its adapter tensors.
        total: parameters stored.
        active: parameters one token uses (router included); None where the base model's top-k is unknown.
    """

    module: str
    tensors: dict[str, tuple[int, ...]]
    total: int
    active: int | None


def trainable_rows(model: nn.Module, adapter: str = "default") -> list[TrainableRow]:
    """One row per module that carries the adapter, in layer order.

    Per layer, with a = 2*hidden*r: S a; D M*a; R M*a + M*hidden stored, N*a + M*hidden active; E E*a stored, K*a active
    (fewer where only some experts have an adapter: then K is the most a token can meet). A shared A counts once.
    """
    rows = []
    for layer in model.modules():
        if isinstance(layer, BaseRouterLayer) and adapter in layer.scales:
            tensors = _tensors(layer, adapter)
            total = sum(math.prod(shape) for shape in tensors.values())
            rows.append(TrainableRow(layer.site.name, tensors, total=total, active=total))
        if not isinstance(layer, PerftLayer) or adapter not in layer.settings:
            continue
        settings = layer.settings[adapter]
        tensors = _tensors(layer, adapter)
        total = sum(math.prod(shape) for shape in tensors.values())
        active = _count_active(layer, settings)
        rows.append(TrainableRow(layer.site_name, tensors, total=total, active=active))
    return rows


def _count_active(layer: PerftLayer, settings: AdapterSettings) -> int | None:
    used = {"R": settings.top_k, "E": active_experts(layer.get_base_layer())}.get(
        settings.variant, settings.num_experts
    )
    if used is None:
        return None
    used = min(used, settings.num_experts)
    half, router = layer.in_features * settings.rank, layer.in_features * settings.num_experts
    return half * (1 if settings.shared_A else used) + half * used + (router if settings.variant == "R" else 0)


def _tensors(layer: BaseRouterLayer | PerftLayer, adapter: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(getattr(layer, name)[adapter].shape)
        for name in layer.adapter_layer_names
        if adapter in getattr(layer, name)
    }


def sum_rows(rows: Iterable[TrainableRow]) -> tuple[int, int | None]:
    """(stored, active) parameters of all rows; active None where a row does not know."""
    total, active = 0, 0
    known = True
    for row in rows:
        total += row.total
        active += row.active or 0
        known = known and row.active is not None
    return total, active if known else None


def count_trainable(model: nn.Module, adapter: str = "default") -> tuple[int, int | None]:
    """(stored, active) parameters of a PERFT adapter over all layers; (0, 0) for a model without it.

    Args:
        model: a model with PERFT adapters, wrapped or not.
        adapter: name of the adapter.

    Returns:
        What the adapter stores, and what one token uses of it; None for the latter where the base's top-k is unknown.
    """
    return sum_rows(trainable_rows(model, adapter))


def describe_trainable(model: nn.Module, adapter: str = "default") -> str:
    """The rows as text, with the totals, what else of the model trains, and what of a quantised base is not quantised."""
    rows = trainable_rows(model, adapter)
    lines = [
        f"  {row.module}: "
        + ", ".join(f"{name} {list(shape)}" for name, shape in row.tensors.items())
        + f" = {row.total:,} parameters"
        + ("" if row.active is None else f", {row.active:,} active per token")
        for row in rows
    ]
    total, active = sum_rows(rows)
    others = [name for name, p in model.named_parameters() if p.requires_grad and "perft_" not in name]
    lines.append(
        f"  {total:,} parameters in {len(rows)} modules" + ("" if active is None else f", {active:,} active per token")
    )
    if others:
        lines.append(f"  also trainable: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}")
    left = unquantised_experts(model)
    if left is not None:
        lines.append(f"  experts not quantised: {_describe_left(left)}")
    return "\n".join(lines)


def warn_unquantised(model: nn.Module) -> None:
    """Warn where the experts that a quantiser left in full precision are most of the model; the report names all.

    Args:
        model: the base model, with adapters or without.
    """
    left = unquantised_experts(model)
    if left is None or left.share <= 0.5:
        return
    warnings.warn(
        f"PERFT: the base model was quantised with {left.method}, but its experts were not: {_describe_left(left)}. "
        "The adapter trains all the same, the memory is not saved. Quantise the experts if your method can, or plan for "
        "these bytes; peft.prepare_model_for_kbit_training may turn them into float32 (it does for bitsandbytes), and "
        "PERFT does not need it: gradient_checkpointing=True in the training arguments is enough",
        stacklevel=2,
    )


def format_bytes(size: int) -> str:
    """Decimal units, as disks and model pages count: 1 MB = 1,000,000 bytes."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _describe_left(left: UnquantisedExperts) -> str:
    share = f"{format_bytes(left.expert_bytes)} of the model's {format_bytes(left.model_bytes)}"
    return f"{left.describe_tensors()}: {share} ({left.share:.0%})"
