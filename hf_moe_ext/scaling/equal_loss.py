"""What a dense model of the same loss would take: the honest alternative to a sparse plan, by each law that can tell."""

from dataclasses import dataclass
from math import ceil

from hf_moe_ext.scaling.candidates import Candidate, enumerate_candidates
from hf_moe_ext.scaling.money import BreakEven, break_even
from hf_moe_ext.scaling.plan_quality import INVERTIBLE, loss_of, tokens_for_loss
from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.plan_result import Plan
from hf_moe_ext.scaling.pricing import (
    Run,
    Serving,
    Shortage,
    Training,
    choose_serving,
    choose_training,
    make_run,
)

# Of the shapes in order of their FLOPs: how many are priced. The least FLOPs need not be the least hours.
PRICED = 3


@dataclass(frozen=True)
class EqualLossDense:
    """A dense model that reaches a plan's loss by one law, at the fewest device hours of those that fit.

    Attributes:
        law: that says so.
        target_loss: of the plan, by that law.
        candidate: the shape.
        training: how it trains.
        run: steps, tokens, hours, cost.
        serving: one replica.
    """

    law: str
    target_loss: float
    candidate: Candidate
    training: Training
    run: Run
    serving: Serving | Shortage | None


def find_equal_loss(plan: Plan, request: PlanRequest) -> dict[str, EqualLossDense | None]:
    """By law; None where no dense shape that fits reaches the loss."""
    dense = [one for one in enumerate_candidates(request) if one.block == "dense"]
    return {law: _cheapest(law, plan, dense, request) for law in INVERTIBLE}


def _cheapest(law: str, plan: Plan, dense: list[Candidate], request: PlanRequest) -> EqualLossDense | None:
    target = loss_of(plan.counts[law])
    reaching = []
    for candidate in dense:
        tokens = tokens_for_loss(law, candidate.shape, target)
        if tokens is not None:
            reaching.append((candidate.shape.training_flops().total * tokens, tokens, candidate))
    found: list[EqualLossDense] = []
    for _, tokens, candidate in sorted(reaching, key=lambda one: one[0]):
        training = choose_training(candidate.shape, request)
        if isinstance(training, Shortage):
            continue
        run = make_run(request, training, max(1, ceil(tokens / request.step_tokens)))
        found.append(EqualLossDense(law, target, candidate, training, run, choose_serving(candidate, request)))
        if len(found) == PRICED:
            break
    return min(found, key=lambda one: one.run.gpu_hours, default=None)


def compare_costs(
    plan: Plan, dense: dict[str, EqualLossDense | None], request: PlanRequest
) -> dict[str, BreakEven]:  # fmt: skip
    """Break-even against the dense model of each law and against doing nothing; needs prices and a demand."""
    if request.prices is None or request.inference is None or plan.run.cost is None:
        return {}
    mine = _per_million(plan.serving)
    if mine is None:
        return {}
    found = {}
    for law, other in dense.items():
        theirs = None if other is None else _per_million(other.serving)
        if other is not None and theirs is not None and other.run.cost is not None:
            found[f"dense of equal loss ({law})"] = break_even(plan.run.cost.total, mine, other.run.cost.total, theirs)
    present = request.inference.present_cost_per_million
    if present is not None:
        found["doing nothing"] = break_even(plan.run.cost.total, mine, 0.0, present)
    return found


def _per_million(serving: Serving | Shortage | None) -> float | None:
    return serving.cost_per_million if isinstance(serving, Serving) else None
