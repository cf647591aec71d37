"""A plan as plain data: every number with what it was made from, so that a reader with the formulas can make it again."""

import csv
import io
from dataclasses import asdict
from math import isfinite
from typing import Any

from hf_moe_ext.scaling.activations import BlockBytes
from hf_moe_ext.scaling.equal_loss import EqualLossDense, compare_costs, find_equal_loss
from hf_moe_ext.scaling.layout import stage_parameters
from hf_moe_ext.scaling.plan_quality import RANKING, equivalent_budgets
from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.plan_result import Plan, PlanResult
from hf_moe_ext.scaling.precision import choose_precision
from hf_moe_ext.scaling.pricing import Run, Serving, Shortage, Training

FORMAT = 1
NOTES = {
    "layouts": "data parallelism (plain, ZeRO-1, FSDP) and expert parallelism were tried; tensor and pipeline were not",
    "efficiency": "shares of the peaks are assumptions until `hf-moe calibrate` has read a measured run",
    "memory": "allocated bytes; the reserve stands for what an allocator and libraries take on top",
    "laws": "each law counts in its own way; only quotients under one law are compared, and the spread is the error bar",
    "null": "never, for good, or not known",
}
_AUTOCAST = (
    "under autocast grouped products of the experts stay in float32, slower than the bfloat16 peak the roofline takes; "
    "measure grouped_flops_per_s"
)


def list_assumptions(request: PlanRequest) -> dict[str, str]:
    """What a reader must know beside the numbers."""
    slow = request.precision == "autocast" and request.hardware.grouped_flops_per_s is None
    return NOTES | ({"precision": _AUTOCAST} if slow else {})


def explain(result: PlanResult, details: bool = True) -> dict[str, Any]:
    """All of a result, for JSON; infinities become null.

    Args:
        result: of `planner.plan`.
        details: intermediate values too, which the numbers can be made again from.
    """
    request = result.request
    dense = find_equal_loss(result.recommended, request)
    savings = compare_costs(result.recommended, dense, request)
    told: dict[str, Any] = {
        "format": FORMAT,
        "request": asdict(request),
        "derived": {
            name: getattr(request, name)
            for name in ("usable_bytes", "rented_hours", "step_seconds", "expected_flops", "step_tokens")
        },
        "assumptions": list_assumptions(request),
        "num_candidates": result.num_candidates,
        "reason": result.reason,
        "binding": asdict(result.binding),
        "recommended": explain_plan(result.recommended, result, details),
        "dense_reference": explain_plan(result.dense, result, details),
        "equal_loss_dense": {law: _equal_loss(one, request, details) for law, one in dense.items()},
        "break_even": {
            name: asdict(one) | {"saved_over_demand": one.saved(request.inference.generated_tokens)}
            for name, one in savings.items()
            if request.inference is not None
        },
        "pareto": [
            row(one) | {"memory": one.training.memory.peak.as_dict(), "time": one.training.time.as_dict()}
            for one in result.pareto
        ],
        "plans": [row(one) for one in result.plans],
    }
    return _finite(told)


def explain_plan(plan: Plan, result: PlanResult, details: bool = True) -> dict[str, Any]:
    """One plan of a result."""
    shape, request = plan.candidate.shape, result.request
    found: dict[str, Any] = {
        **_explain_model(plan.candidate, plan.training, plan.run, plan.serving, request, details),
        "gains": plan.gains,
        "quality": plan.quality,
        "spread": plan.spread,
        "ranking_laws": RANKING,
        "laws_in_range": sum(plan.answers[name].in_range for name in RANKING),
        "uncovered": plan.uncovered,
        "cautions": [flag.message for flag in plan.cautions],
        "tokens_per_active_parameter": plan.run.num_tokens / shape.active_parameters,
        "laws": {
            name: {
                "compute_multiplier": answer.value,
                "in_range": answer.in_range,
                "flags": [asdict(flag) for flag in answer.flags],
                "counts": dict(plan.counts[name].values),
                "details": dict(answer.details),
                "source": result.laws[name].card.source,
                "counting": result.laws[name].card.counting,
                "provenance": result.laws[name].card.provenance,
                "error": result.laws[name].card.error,
                "caveat": result.laws[name].card.caveat,
            }
            for name, answer in plan.answers.items()
        },
    }
    found["equivalent_budgets"] = equivalent_budgets(plan.answers, plan.counts)
    return found


def _explain_model(
    candidate: Any, training: Training, run: Run, serving: Any, request: PlanRequest, details: bool
) -> dict[str, Any]:
    shape = candidate.shape
    found: dict[str, Any] = {
        "name": candidate.name,
        "block": candidate.block,
        "config": candidate.config,
        "sparsity": shape.sparsity,
        "parameters": asdict(shape.parameters)
        | {
            "total": shape.total_parameters,
            "active": shape.active_parameters,
            "active_without_input_embedding": shape.parameters.active(input_embedding=False),
        },
        "training_flops_per_token": shape.training_flops().total,
        "layout": asdict(training.layout)
        | {"world_size": training.layout.world_size, "expert_data": training.layout.expert_data},
        "step": asdict(training.step) | {"batch_tokens": request.step_tokens},
        "memory": training.memory.peak.as_dict() | {"moment": training.memory.moment},
        "time": training.time.as_dict(),
        "run": asdict(run) | {"total_cost": None if run.cost is None else run.cost.total},
        "serving": _serving(serving, details),
    }
    if details:
        found["intermediate"] = _intermediate(shape, training, request)
    return found


def _intermediate(shape: Any, training: Training, request: PlanRequest) -> dict[str, Any]:
    precision = choose_precision(training.step.precision, training.step.optimizer)
    blocks = BlockBytes(shape, training.step.tokens, training.layout, precision)
    return {
        "training_flops": asdict(shape.training_flops()),
        "forward_flops": asdict(shape.forward_flops()),
        "precision": asdict(precision),
        "parameters_on_rank": asdict(stage_parameters(shape, training.layout, 0)),
        "operations": {
            "embedding": [asdict(one) for one in blocks.embedding()],
            "layer": [asdict(one) for one in blocks.layer(0)],
            "head": [asdict(one) for one in blocks.head()],
        },
        "residual_stream_bytes": blocks.stream,
    }


def _serving(serving: Serving | Shortage | None, details: bool) -> dict[str, Any] | None:
    if serving is None:
        return None
    if isinstance(serving, Shortage):
        return {"fits": False, **asdict(serving)}
    return {
        "fits": True,
        "layout": asdict(serving.layout) | {"world_size": serving.layout.world_size},
        "memory": serving.memory.peak.as_dict(),
        "rates": asdict(serving.rates),
        "cost_per_million": serving.cost_per_million,
        "gpu_hours_per_million": serving.gpu_hours_per_million,
    }


def _equal_loss(one: EqualLossDense | None, request: PlanRequest, details: bool) -> dict[str, Any] | None:
    if one is None:
        return None
    model = _explain_model(one.candidate, one.training, one.run, one.serving, request, details)
    return {"law": one.law, "target_loss": one.target_loss, **model}


def row(plan: Plan) -> dict[str, Any]:
    """The numbers of a table."""
    shape, layout, step = plan.candidate.shape, plan.training.layout, plan.training.step
    low, high = plan.spread
    return {
        "name": plan.candidate.name,
        "block": plan.candidate.block,
        "quality": plan.quality,
        "quality_low": low,
        "quality_high": high,
        "covered": not plan.uncovered,
        "laws_in_range": sum(plan.answers[name].in_range for name in RANKING),
        "sparsity": shape.sparsity,
        "total_parameters": shape.total_parameters,
        "active_parameters": shape.active_parameters,
        "num_tokens": plan.run.num_tokens,
        "training_flops": shape.training_flops().total * plan.run.num_tokens,
        "memory_bytes": plan.training.memory.total,
        "step_s": plan.training.time.total,
        "binds": plan.training.time.binds,
        "all_to_all_share": plan.training.time.all_to_all / plan.training.time.total,
        "gpu_hours": plan.run.gpu_hours,
        "hours": plan.run.hours,
        "cost": None if plan.run.cost is None else plan.run.cost.total,
        "serving_gpu_hours_per_million": plan.serving_hours,
        "serving_cost_per_million": plan.serving.cost_per_million if isinstance(plan.serving, Serving) else None,
        "expert_ranks": layout.expert,
        "dispatch": layout.dispatch if layout.expert > 1 else "",
        "zero": layout.zero,
        "recompute": step.recompute,
        "micro_batch_sequences": step.tokens.num_sequences,
        "micro_batches": step.num_micro_batches,
    }


def as_csv(result: PlanResult) -> str:
    """All plans that were priced, best first, and which are of the Pareto set."""
    kept = {one.candidate for one in result.pareto}
    rows = [
        row(one) | {"pareto": one.candidate in kept, "recommended": one is result.recommended} for one in result.plans
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
