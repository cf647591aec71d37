"""Logits of a model whose experts share a base against those of its export, on random tokens."""

from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.convert.export_plan import ExportPlan
from hf_moe_ext.convert.export_report import ExportReport
from hf_moe_ext.convert.logit_check import bound, draw_tokens, load_plain
from hf_moe_ext.ders.delta_stacks import DeltaStack, QuantizedStack
from hf_moe_ext.ders.experts import DersExperts
from hf_moe_ext.ders.forward import materialised
from hf_moe_ext.ops.delta_measures import merge_out

# Layer -> matrix -> type in which base plus delta is stored.
Stored = dict[int, dict[str, torch.dtype]]


@torch.no_grad()
def compare(plan: ExportPlan, folder: Path, stored: Stored, report: ExportReport) -> None:
    """Note how far the result's logits are from the source's; raise if rounding base plus delta does not explain it.

    All is computed in at least float32: sums in 16 bits would drown a mistake. Base plus delta are rounded as they are stored,
    since that may send a token to another expert and so change its logits by any amount.

    Raises:
        ValueError: the source's own logits are not finite.
        RuntimeError: a difference.
    """
    types = (dtype for matrices in stored.values() for dtype in matrices.values())
    work = reduce(torch.promote_types, types, torch.float32)
    ids = draw_tokens(plan.config)
    # With matrices of base plus delta, as the result has them: fused, the same sums are rounded elsewhere.
    model = load_plain(plan.source, work, ders_forward="materialised")
    whole: Tensor = model(input_ids=ids).logits
    if not whole.isfinite().all():
        raise ValueError(f"{plan.source}: its own logits are not finite numbers; take an earlier checkpoint")
    for layer, matrices in stored.items():
        _round_sums(model.model.layers[layer].mlp.experts, matrices)
    wanted: Tensor = model(input_ids=ids).logits
    del model
    found: Tensor = load_plain(folder, work)(input_ids=ids).logits
    report.max_logit, report.rounding = float(whole.abs().max()), float((wanted - whole).abs().max())
    report.max_logit_difference = float((found - wanted).abs().max())
    allowed = bound(plan.config.num_hidden_layers, plan.config.hidden_size, report.max_logit)
    if not report.max_logit_difference <= allowed:
        raise RuntimeError(
            f"export: logits differ by up to {report.max_logit_difference:.3g}, where at most {allowed:.3g} is rounding; "
            "nothing was written. That is a mistake in this package: report it, with the source's config.json"
        )


def split_weights(experts: DersExperts) -> tuple[dict[str, Tensor], dict[str, DeltaStack]]:
    """Bases and deltas of "gate", "up" and "down"."""
    weights = experts.experts()
    bases = (*weights.first.split(weights.inner_size), weights.down)
    return dict(zip(experts.matrices, bases, strict=True)), dict(zip(experts.matrices, weights.deltas, strict=True))


def _round_sums(experts: DersExperts, stored: dict[str, torch.dtype]) -> None:
    """Let experts compute with what base plus delta is when stored: deltas become the differences, in full."""
    if all(dtype.itemsize >= 4 for dtype in stored.values()):
        return
    bases, stacks = split_weights(experts)
    deltas = []
    for matrix, dtype in stored.items():
        base, stack = bases[matrix], stacks[matrix]
        sums = [merge_out(base, stack.matrix(expert), dtype) for expert in range(stack.num_experts)]
        codes = torch.stack([each.to(base.dtype) - base for each in sums])
        deltas.append(QuantizedStack((base.shape[0], base.shape[1]), 16, 1, codes.dtype, codes, None))
    forward: Any = partial(materialised, experts=replace(experts.experts(), deltas=tuple(deltas)))
    experts.forward = forward  # type: ignore[method-assign]
