"""Abnar et al., arXiv 2501.12370: L(N, D, S), equation 6.

    L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e

lambda < 0, so the c-term falls with S while the d-term rises; delta and gamma are nearly equal, so the d-term is about a
power of N_a. Above 5.839e9 parameters the printed numbers let L fall with S at fixed (N, D), fewer FLOPs and a lower loss:
collinearity of c and d, flagged below ``artefact_sparsity``. Sparsity is to be optimised under a compute constraint only.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import log10
from typing import Any, Literal

from hf_moe_ext.scaling.laws.card import (
    OPTIMAL_SPARSITY,
    TOKENS_PER_ACTIVE,
    Answer,
    Counts,
    FittedRange,
    Flag,
    Law,
    LawCard,
    not_covered,
)
from hf_moe_ext.scaling.laws.layout import IdealLayout
from hf_moe_ext.scaling.laws.search import find_crossing, minimize_scale
from hf_moe_ext.scaling.shape import MoeShape

ALPHA, BETA, LAMBDA, DELTA, GAMMA = 0.5962, 0.3954, -0.1666, 0.1603, 0.1595
A, B, C, D, E = 16612.50, 5455.67, 0.4598, 17.26, 0.94

# What the paper trained; the S of the optimum may not be sought beyond.
SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
_SMALLEST_WIDTH, _LARGEST_WIDTH = 16.0, 1e6
_SMALLEST_BUDGET, _LARGEST_BUDGET = 1e12, 1e34
Layout = Literal["real", "proxy"]


@dataclass(frozen=True)
class LossTerms:
    """The five summands, nats per token of their tokenizer."""

    parameters: Any
    tokens: Any
    sparsity: Any
    interaction: Any
    irreducible: float

    @property
    def total(self) -> Any:
        """L."""
        return self.parameters + self.tokens + self.sparsity + self.interaction + self.irreducible


def loss_terms(total_parameters: Any, num_tokens: Any, sparsity: Any) -> LossTerms:
    """Equation 6 term by term; numbers or arrays. N counts everything, S = 1 - K/E of the experts.

    Raises:
        ValueError: S of 1 or more, or below 0; N or D not positive.
    """
    dense = 1 - sparsity
    if not _all(dense > 0) or not _all(dense <= 1):
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    if not _all(total_parameters > 0) or not _all(num_tokens > 0):
        raise ValueError(f"parameters and tokens must be positive, got {total_parameters} and {num_tokens}")
    return LossTerms(
        parameters=A / total_parameters**ALPHA,
        tokens=B / num_tokens**BETA,
        sparsity=C / dense**LAMBDA,
        interaction=D / (dense**DELTA * total_parameters**GAMMA),
        irreducible=E,
    )


def loss(total_parameters: Any, num_tokens: Any, sparsity: Any) -> Any:
    """L(N, D, S); for ranking and for tests, never beside another law's."""
    return loss_terms(total_parameters, num_tokens, sparsity).total


def _all(condition: Any) -> bool:
    return bool(condition) if isinstance(condition, bool) else bool(getattr(condition, "all", lambda: condition)())


def artefact_sparsity(total_parameters: float) -> float:
    """S_0(N): where L is lowest at fixed (N, D); below it the printed fit must not be believed. 0 up to 5.839e9."""
    ratio = D * DELTA / (C * -LAMBDA * total_parameters**GAMMA)
    return max(0.0, 1 - ratio ** (1 / (DELTA - LAMBDA)))


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal model of a budget and sparsity.

    Attributes:
        total_parameters: N.
        active_parameters: N_a.
        num_tokens: D.
        loss: L.
    """

    total_parameters: float
    active_parameters: float
    num_tokens: float
    loss: float


@lru_cache(maxsize=65536)
def optimum(budget_flops: float, expert_ratio: float, layout: Layout = "real") -> Optimum:
    """Lowest loss of a budget at E / K = ``expert_ratio``.

    Args:
        budget_flops: training FLOPs C.
        expert_ratio: 1 / (1 - S).
        layout: "real": widths and depths of ``IdealLayout``, F_tok D = C. "proxy": N_a = (1 - S) N and 6 N_a D = C, which
            inflates multipliers 1.5 to 1.9 times; for checks against tables, never for planning.
    """
    sparsity = 1 - 1 / expert_ratio

    def at(scale: float) -> Optimum:
        if layout == "proxy":
            total, active = scale, scale / expert_ratio
            tokens = budget_flops / (6 * active)
        else:
            model = IdealLayout(scale, expert_ratio)
            total, active = model.total_parameters, model.active_parameters
            tokens = budget_flops / model.training_flops
        return Optimum(total, active, tokens, loss(total, tokens, sparsity))

    bounds = (1e3, 1e18) if layout == "proxy" else (_SMALLEST_WIDTH, _LARGEST_WIDTH)
    return at(minimize_scale(lambda scale: at(scale).loss, *bounds))


def dense_budget(target_loss: float, layout: Layout = "real") -> float:
    """Training FLOPs at which the compute-optimal dense model has this loss; inf if none has."""
    return find_crossing(
        lambda budget: optimum(budget, 1, layout).loss, target_loss, _SMALLEST_BUDGET, _LARGEST_BUDGET, 1e-8
    )


def ideal_multiplier(budget_flops: float, expert_ratio: float, layout: Layout = "real") -> float:
    """C_dense / C at equal optimal loss."""
    return dense_budget(optimum(budget_flops, expert_ratio, layout).loss, layout) / budget_flops


def proxy_best_sparsity(total_parameters: float, budget_flops: float) -> float:
    """S*(N, C) under N_a = (1 - S) N, continuous; for checks against tables."""

    def at(dense: float) -> float:
        return loss(total_parameters, budget_flops / (6 * dense * total_parameters), 1 - dense)

    return max(0.0, 1 - minimize_scale(at, 1e-4, 1.0))


def real_best_sparsity(total_parameters: float, budget_flops: float) -> float:
    """S*(N, C) on the paper's grid of S, each at the ``IdealLayout`` width that gives N; 6 N_a D = C."""

    def at(sparsity: float) -> float:
        ratio = 1 / (1 - sparsity)
        width = 1 / find_crossing(
            lambda inverse: IdealLayout(1 / inverse, ratio).total_parameters, total_parameters, 1e-7, 1
        )
        active = IdealLayout(width, ratio).active_parameters
        return loss(total_parameters, budget_flops / (6 * active), sparsity)

    return min(SPARSITIES, key=at)


class AbnarLaw(Law):
    """Equation 6 with the coefficients of Table 3."""

    card = LawCard(
        name="abnar",
        title="Abnar et al.: loss from parameters, tokens and sparsity",
        source="arXiv 2501.12370, equation 6, Table 3",
        provenance="two secondary",
        variables={
            "total_parameters": "N, all parameters, embeddings presumably in",
            "num_tokens": "D, training tokens",
            "sparsity": "S = 1 - K/E of the MLP experts",
            "budget_flops": "C = F_tok D, exact FLOPs per token (appendix C)",
        },
        counting="N total with embeddings (tied or untied unverified); C = F_tok D; losses in nats per NeoX token",
        fitted=(
            FittedRange("budget_flops", 3e19, 1e21),
            FittedRange("sparsity", 0, 0.95),
            FittedRange("total_parameters", 1e8, 1e10),
        ),
        error="RMSE 0.024 inside, 0.076 at S = 0.98 (one secondary source); R^2 99 % and 68 %",
        caveat="one data set, compute-optimal tokens only; knows FLOPs and neither memory nor communication",
    )

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """N with embeddings, D, S, and C = F_tok D with F_tok as the paper's appendix counts it."""
        values = {
            "total_parameters": float(shape.total_parameters),
            "num_tokens": float(num_tokens),
            "sparsity": shape.sparsity,
            "budget_flops": shape.training_flops(context_length).total * num_tokens,
        }
        return Counts(self.card.name, values, not_covered(shape))

    def check(self, counts: Counts) -> tuple[Flag, ...]:
        """As every law, and the artefact of the printed coefficients."""
        return super().check(counts) + _artefact(counts["total_parameters"], counts["sparsity"])

    def compute_multiplier(self, counts: Counts) -> Answer:
        """Against the compute-optimal dense ``IdealLayout`` of equal loss."""
        return self.compare_with_dense(
            counts, lambda own: loss(own["total_parameters"], own["num_tokens"], own["sparsity"]), dense_budget
        )

    def tokens_per_active_parameter(self, budget_flops: float, expert_ratio: float) -> Answer:
        """D* / N_a* of the ``IdealLayout`` at this budget."""
        best = optimum(budget_flops, expert_ratio)
        flags = self._check_query(budget_flops, best.total_parameters, 1 - 1 / expert_ratio)
        return Answer(self.card.name, TOKENS_PER_ACTIVE, best.num_tokens / best.active_parameters, flags, vars(best))

    def optimal_sparsity(self, total_parameters: float, budget_flops: float) -> Answer:
        """On the paper's grid of S and ``IdealLayout`` models; never above 0.98."""
        value = real_best_sparsity(total_parameters, budget_flops)
        flags = self._check_query(budget_flops, total_parameters, value)
        return Answer(self.card.name, OPTIMAL_SPARSITY, value, flags)

    def _check_query(self, budget_flops: float, total_parameters: float, sparsity: float) -> tuple[Flag, ...]:
        values = {"budget_flops": budget_flops, "total_parameters": total_parameters, "sparsity": sparsity}
        return self.check(Counts(self.card.name, values))


def _artefact(total_parameters: float, sparsity: float) -> tuple[Flag, ...]:
    bound = artefact_sparsity(total_parameters)
    if sparsity >= bound:
        return ()
    return (
        Flag(
            "artefact",
            f"at 10^{log10(total_parameters):.2f} parameters the printed coefficients let the loss fall with S below "
            f"S = {bound:.3f} at equal tokens; S = {sparsity:.3f} is below",
        ),
    )
