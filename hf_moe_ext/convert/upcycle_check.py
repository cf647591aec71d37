"""Step 0 of an upcycled model against its parent, on random tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.convert.logit_check import bound, draw_tokens, load_plain
from hf_moe_ext.convert.upcycle_plan import UpcyclePlan
from hf_moe_ext.convert.upcycle_report import UpcycleReport


def compare(plan: UpcyclePlan, folder: Path, dtype: torch.dtype, report: UpcycleReport) -> None:
    """Note how far the result's logits are from the parent's; raise where they should be equal and are not.

    Both are computed in float32 at least, so that 16-bit weights are compared as sharply; router arithmetic is float32 in
    any case, so float64 weights have the same bound.

    Raises:
        RuntimeError: the bound is missed.
    """
    ids = draw_tokens(plan.config)
    work = torch.promote_types(dtype, torch.float32)
    found, sums = _run_result(folder, ids, work, plan)
    wanted, scaled = _run_parent(plan, ids, work, sums)
    report.max_logit = float(wanted.abs().max())
    report.max_change = float((found - wanted).abs().max())
    report.max_logit_difference = float((found - scaled).abs().max())
    report.bound = bound(plan.parent.num_hidden_layers, plan.parent.hidden_size, report.max_logit)
    for layer, each in sums.items():
        report.layers[layer].gate_sum = float(each.mean())
    if not report.max_logit_difference <= report.bound:
        raise RuntimeError(
            f"upcycle: logits differ from the parent's by up to {report.max_logit_difference:.3g}, where at most "
            f"{report.bound:.3g} is rounding; nothing was written. That is a mistake in this package: report it, with the "
            "parent's config.json"
        )


@torch.no_grad()
def _run_result(folder: Path, ids: Tensor, work: torch.dtype, plan: UpcyclePlan) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits, and where gates do not sum to 1 each token's sum of them by layer, [rows, length, 1]."""
    model = load_plain(folder, work)
    sums: dict[int, Tensor] = {}
    if not plan.keeps_function:
        for layer in plan.layers:

            def note(_: Any, __: Any, output: Any, layer: int = layer) -> None:
                sums[layer] = output[1].sum(-1).view(*ids.shape, 1)

            model.model.layers[layer].mlp.gate.register_forward_hook(note)
    return model(input_ids=ids, output_router_logits=False).logits, sums


@torch.no_grad()
def _run_parent(plan: UpcyclePlan, ids: Tensor, work: torch.dtype, sums: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The parent's logits, and those with each FFN's output times the sums."""
    # Rounded as the result's weights were.
    model = load_plain(plan.source, plan.dtype or work).to(work)
    logits = model(input_ids=ids).logits
    if not sums:
        return logits, logits
    for layer, each in sums.items():

        def scale(_: Any, __: Any, output: Tensor, each: Tensor = each) -> Tensor:
            return output * each.to(output.dtype)

        model.model.layers[layer].mlp.register_forward_hook(scale)
    return logits, model(input_ids=ids).logits
