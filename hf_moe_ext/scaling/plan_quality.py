"""How good a shape is after its training, by several laws, in dimensionless numbers.

A law's dense-equivalent budget is its compute multiplier times the FLOPs that it counts: what the compute-optimal dense model of
equal loss would take. Two shapes are compared under one law by the quotient of theirs; losses of two laws never meet.
"""

from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from math import exp, log
from typing import Any

from hf_moe_ext.scaling.laws import LAWS, Answer, Counts, Law, abnar, joint
from hf_moe_ext.scaling.laws.layout import IdealLayout
from hf_moe_ext.scaling.laws.search import find_crossing
from hf_moe_ext.scaling.shape import MoeShape

# The laws every kind of shape gets a number from; quality is the geometric mean of these. Leverage knows sparsity and
# granularity but no size, the other two know size and no granularity.
RANKING = ("abnar", "joint", "leverage")
# Of these the loss at given tokens can be turned round: how many tokens a model needs for a loss.
INVERTIBLE = ("abnar", "joint")
_BUDGETS = tuple(10 ** (14 + 0.25 * i) for i in range(65))


def equivalent_budgets(answers: Mapping[str, Answer], counts: Mapping[str, Counts]) -> dict[str, float]:
    """Dense-equivalent FLOPs of a shape by each law that has a number, in that law's own counting."""
    return {
        name: answer.value * counts[name]["budget_flops"]
        for name, answer in answers.items()
        if answer.value is not None and "budget_flops" in counts[name].values
    }


def count_for_laws(shape: MoeShape, num_tokens: float, laws: Mapping[str, Law] = LAWS) -> dict[str, Counts]:
    """Each law's own counts."""
    return {name: law.count(shape, float(num_tokens)) for name, law in laws.items()}


def quick_equivalents(shape: MoeShape, num_tokens: float) -> dict[str, float]:
    """As `equivalent_budgets` for `RANKING`, read off tables; for choosing which shapes to price, never reported."""
    found = {}
    for name in INVERTIBLE:
        found[name] = _read_table(name, loss_of(LAWS[name].count(shape, num_tokens)))
    counts = LAWS["leverage"].count(shape, num_tokens)
    found["leverage"] = (LAWS["leverage"].compute_multiplier(counts).value or 0.0) * counts["budget_flops"]
    return found


def loss_of(counts: Counts) -> float:
    """The loss of an invertible law, to be compared with losses of the same law only."""
    if counts.law == "abnar":
        return float(abnar.loss(counts["total_parameters"], counts["num_tokens"], counts["sparsity"]))
    if counts.law == "joint":
        return float(joint.loss(counts["active_parameters"], counts["num_tokens"], counts["num_experts"]))
    raise ValueError(f"law must be one of {', '.join(INVERTIBLE)}, got {counts.law!r}")


def tokens_for_loss(law: str, shape: MoeShape, target_loss: float) -> float | None:
    """Tokens at which a shape reaches a loss by one law; None where it never does."""
    counts = LAWS[law].count(shape, 1.0)
    if law == "abnar":
        left = target_loss - float(abnar.loss(counts["total_parameters"], 1.0, counts["sparsity"])) + abnar.B
        return (abnar.B / left) ** (1 / abnar.BETA) if left > 0 else None
    form: Any = joint.form(counts["num_experts"])
    left = target_loss - float(form.loss(counts["active_parameters"], 1.0)) + float(form.k)
    return float((form.k / left) ** (-1 / form.nu)) if left > 0 else None


def multiplier_at_parameters(
    law: str, total_parameters: float, budget_flops: float, expert_ratio: float
) -> float | None:
    """Compute multiplier of the ideal layout with so many parameters in all; None where the law has none of that size."""
    if law == "joint":
        best = joint.constrained_optimum(budget_flops, expert_ratio, total_parameters)
        return None if best is None else joint.dense_budget(best.loss) / budget_flops
    width = 1 / find_crossing(
        lambda inverse: IdealLayout(1 / inverse, expert_ratio).total_parameters, total_parameters, 1e-7, 1
    )
    tokens = budget_flops / IdealLayout(width, expert_ratio).training_flops
    loss = abnar.loss(total_parameters, tokens, 1 - 1 / expert_ratio)
    return abnar.dense_budget(loss) / budget_flops


def mean_of(gains: Mapping[str, float]) -> float:
    """Geometric mean over `RANKING`."""
    return exp(sum(log(gains[name]) for name in RANKING) / len(RANKING))


@lru_cache
def _table(law: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Losses of optimal dense models, rising, and the logarithms of their budgets."""
    module: Any = {"abnar": abnar, "joint": joint}[law]
    losses = [module.optimum(budget, 1).loss for budget in _BUDGETS]
    return tuple(reversed(losses)), tuple(log(budget) for budget in reversed(_BUDGETS))


def _read_table(law: str, loss: float) -> float:
    losses, budgets = _table(law)
    i = min(max(bisect_left(losses, loss), 1), len(losses) - 1)
    share = (loss - losses[i - 1]) / (losses[i] - losses[i - 1])
    return exp(budgets[i - 1] + share * (budgets[i] - budgets[i - 1]))
