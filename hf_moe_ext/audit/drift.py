"""How far routing has moved from another model's: the base without its adapters, or a model of the same shape.

It costs a second forward pass over the same batches, so it is a function of its own and nothing calls it by itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.audit.events import BASE, RoutingEvent, unwrap, unwrap_runners, watch_routing
from hf_moe_ext.audit.tally import counts_here
from hf_moe_ext.ops.reduction import sum_over_processes


@dataclass(frozen=True)
class RouterDrift:
    """One base router beside the reference's, mean over tokens, padding left out.

    Attributes:
        layer: path of the experts module.
        tokens: compared.
        overlap: share of the reference's chosen experts that are chosen still, 0 to 1.
        divergence: Kullback-Leibler divergence of the probabilities from the reference's, nats; None where probabilities
            cannot be had.
        load_shift: share of the choices that has changed experts (total variation of the load), 0 to 1.
    """

    layer: str
    tokens: int
    overlap: float
    divergence: float | None
    load_shift: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)


def measure_drift(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], reference: nn.Module | None = None
) -> tuple[RouterDrift, ...]:
    """Run both models over the batches, in evaluation mode and without gradients, and compare their base routers.

    Args:
        model: any MoE model, wrapped or not.
        batches: keyword arguments of the model, on its device; labels are left out.
        reference: a model of the same architecture; None: the model with its PEFT adapters off.

    Returns:
        One per layer, in order, over the batches of all processes, each of which must call it.

    Raises:
        ValueError: no reference and no adapter to turn off; a reference whose layers, experts or ``top_k`` are others; no batch.
    """
    if reference is None and not hasattr(unwrap(model), "peft_config"):
        raise ValueError(
            "reference=None compares with the model without its adapters, and it has none; give the model to compare with"
        )
    other = model if reference is None else reference
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), _evaluating(model), _evaluating(other):
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            now = _route(model, inputs)
            with _adapters_off(model) if reference is None else _nothing():
                before = _route(other, inputs)
            for layer, values in _compare(now, before).items():
                first = layer not in sums
                sums[layer] = values if first else tuple(a + b for a, b in zip(sums[layer], values, strict=True))  # type: ignore[assignment]
    if not sums:
        raise ValueError("batches must hold at least one batch, got none; give an iterable of the model's inputs")
    counted = counts_here(unwrap(model))
    return tuple(_read(layer, *values, counted) for layer, values in sums.items())


def _route(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, RoutingEvent]:
    events: dict[str, RoutingEvent] = {}

    def keep(event: RoutingEvent) -> None:
        if event.router == BASE:
            events[event.layer] = event

    with watch_routing(model, keep):
        model(**inputs)
    return events


def _compare(now: dict[str, RoutingEvent], before: dict[str, RoutingEvent]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> [4] sums of overlap, divergence, tokens with a divergence, tokens; [2, num_experts] counts before and now."""
    shapes = [{k: (e.num_experts, *e.index.shape) for k, e in events.items()} for events in (now, before)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "reference must have the model's layers, num_experts and top_k, and see the same tokens; got "
            f"{shapes[1]} for {shapes[0]}"
        )
    return {layer: _compare_router(event, before[layer]) for layer, event in now.items()}


def _compare_router(now: RoutingEvent, before: RoutingEvent) -> tuple[Tensor, Tensor]:
    rows, experts = len(now.index), now.num_experts
    chosen = [torch.zeros(rows, experts + 1, device=now.index.device) for _ in range(2)]
    for table, event in zip(chosen, (before, now), strict=True):
        served = (event.index >= 0) & (event.index < experts)
        table.scatter_(1, torch.where(served, event.index, experts).to(table.device), 1.0)
    mask = now.batch.mask
    keep = torch.ones(rows, device=now.index.device) if mask is None else mask.to(chosen[0].dtype)
    old, new = (table[:, :experts].to(torch.float64) * keep[:, None] for table in chosen)
    overlap = (old * new).sum(dim=1) / old.sum(dim=1).clamp(min=1)
    divergence, measured = torch.zeros_like(overlap), torch.zeros_like(overlap)
    if now.probabilities is not None and before.probabilities is not None:
        p, q = before.probabilities.to(torch.float64), now.probabilities.to(divergence.device, torch.float64)
        tiny = torch.finfo(torch.float32).tiny
        divergence = (torch.special.xlogy(p, p) - p * q.clamp(min=tiny).log()).sum(dim=1) * keep
        measured = keep.to(torch.float64)
    sums = torch.stack([overlap.sum(), divergence.sum(), measured.sum(), keep.sum().to(torch.float64)])
    return sums, torch.stack([old.sum(dim=0), new.sum(dim=0)])


def _read(layer: str, sums: Tensor, counts: Tensor, counted: bool) -> RouterDrift:
    flat = sum_over_processes(torch.cat([sums, counts.reshape(-1)]) * counted)
    overlap, divergence, measured, tokens = flat[:4].tolist()
    old, new = (row / row.sum().clamp(min=1) for row in flat[4:].view_as(counts))
    return RouterDrift(
        layer=layer,
        tokens=round(tokens),
        overlap=overlap / max(tokens, 1),
        divergence=divergence / measured if measured else None,
        load_shift=(new - old).abs().sum().item() / 2,
    )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    outer: Any = unwrap_runners(model)
    if hasattr(outer, "disable_adapter"):  # a PeftModel
        with outer.disable_adapter():
            yield
        return
    inner: Any = unwrap(model)  # adapters of model.add_adapter
    inner.disable_adapters()
    try:
        yield
    finally:
        inner.enable_adapters()
