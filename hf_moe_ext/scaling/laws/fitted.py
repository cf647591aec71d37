"""A user's own fit (``recipes/fit_law.py``) as one more law: asked beside the published ones, in its own runs' range.

It never ranks: a recommendation rests on the published laws, and this one shows how far one's own runs agree with them.
"""

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe_ext.scaling.fit_file import SavedFit, read_fit
from hf_moe_ext.scaling.laws.card import (
    MULTIPLIER,
    Answer,
    Counts,
    FittedRange,
    Flag,
    Law,
    LawCard,
    expert_ratio,
    not_covered,
)
from hf_moe_ext.scaling.laws.layout import IdealLayout
from hf_moe_ext.scaling.laws.search import find_crossing, minimize_scale
from hf_moe_ext.scaling.shape import MoeShape

FORMS = ("abnar", "joint")  # those of size, tokens and sparsity; a plan needs all three
VARIABLES = {
    "total_parameters": "N, all parameters, both embeddings in",
    "active_parameters": "N_a, both embeddings in",
    "num_tokens": "D, training tokens",
    "sparsity": "S = 1 - K/E of the MLP experts",
    "num_experts": "E / K, dense is 1",
    "budget_flops": "C = F_tok D, exact FLOPs per token",
}
_BUDGETS = tuple(10 ** (8 + 0.5 * i) for i in range(45))
_SMALLEST_WIDTH, _LARGEST_WIDTH = 0.01, 1e6


class FittedLaw(Law):
    """A saved fit.

    Args:
        saved: of a form in ``FORMS``.
        name: for tables.

    Raises:
        ValueError: a form that knows no tokens or no sparsity.
    """

    def __init__(self, saved: SavedFit, name: str) -> None:
        form = saved.form
        if form.name not in FORMS:
            raise ValueError(
                f"a plan needs a law of size, tokens and sparsity, which {form.name} is not; fit one of {', '.join(FORMS)}"
            )
        self.saved = saved
        self.card = LawCard(
            name=name,
            title=f"own fit, {form.name}: {form.title}",
            source=f"{saved.num_runs} runs of {saved.source}",
            provenance="own runs",
            variables={key: VARIABLES[key] for key in (*form.variables, "budget_flops")},
            counting="as the runs' own columns count; here N with both embeddings, E / K for experts, C = F_tok D",
            fitted=tuple(FittedRange(key, *saved.ranges[key]) for key in form.variables),
            error=f"RMSE {saved.rmse:.4f} on its runs",
            caveat="; ".join(saved.warnings) or "predictions inside its runs only; single coefficients mean nothing",
        )
        self.optimal_loss = lru_cache(maxsize=None)(self._optimal_loss)
        self.dense_budget = lru_cache(maxsize=4096)(self._dense_budget)

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """What the form asks for, and C."""
        values = {
            "total_parameters": float(shape.total_parameters),
            "active_parameters": float(shape.active_parameters),
            "num_tokens": float(num_tokens),
            "sparsity": shape.sparsity,
            "num_experts": expert_ratio(shape),
        }
        chosen = {key: values[key] for key in self.saved.form.variables}
        chosen["budget_flops"] = shape.training_flops(context_length).total * num_tokens
        return Counts(self.card.name, chosen, not_covered(shape))

    def compute_multiplier(self, counts: Counts) -> Answer:
        """Against the compute-optimal dense ``IdealLayout`` of equal loss by the fit; no value where it has no such model."""
        answer = self.compare_with_dense(counts, self.loss, self.dense_budget)
        if answer.value is not None and 0 < answer.value < inf:
            return answer
        flag = Flag("not_covered", "by this fit no dense model of any budget has the same loss")
        return Answer(self.card.name, MULTIPLIER, None, (*answer.flags, flag), {"loss": answer.details["loss"]})

    def loss(self, values: Mapping[str, float] | Counts) -> float:
        """By the fit, inside its range or not; nats per token of its runs."""
        # numpy's exp of a far extrapolation may overflow to inf, which is then no value.
        with np.errstate(over="ignore"):
            return float(self.saved.predict({key: values[key] for key in self.saved.form.variables})[0])

    def _optimal_loss(self, budget_flops: float) -> float:
        """Of the best dense ``IdealLayout`` of a budget."""

        def at(width: float) -> float:
            model = IdealLayout(width, 1)
            values: dict[str, Any] = {
                "total_parameters": model.total_parameters, "active_parameters": model.active_parameters,
                "num_tokens": budget_flops / model.training_flops, "sparsity": 0.0, "num_experts": 1.0,
            }  # fmt: skip
            return self.loss(values)

        return at(minimize_scale(at, _SMALLEST_WIDTH, _LARGEST_WIDTH, 1e-4))

    def _dense_budget(self, target_loss: float) -> float:
        """Training FLOPs at which the best dense model has this loss; inf if none, 0 if all do, nan if it is not one budget."""
        losses = [self.optimal_loss(budget) for budget in _BUDGETS]
        if any(b >= a for a, b in pairwise(losses)):
            return float("nan")
        above = sum(loss > target_loss for loss in losses)
        if above in (0, len(losses)):
            return inf if above else 0.0
        return find_crossing(self.optimal_loss, target_loss, _BUDGETS[above - 1], _BUDGETS[above], 1e-6)


def read_law(path: str | Path) -> FittedLaw:
    """The law in a file of ``recipes/fit_law.py``, called as the file is.

    Raises:
        ValueError: no such fit, or a form that a plan cannot use.
        OSError: no such file.
    """
    return FittedLaw(read_fit(path), Path(path).stem)
