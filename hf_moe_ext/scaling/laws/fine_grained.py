"""Krajewski et al., arXiv 2402.07871: the law of granularity.

    L = c + (g/G^gamma + a)/N^alpha + b/D^beta

Fitted at one expansion rate E = 64 only (total over active expert parameters); G is the width of a dense FFN over that of
an expert. Exponents are not comparable with those of Chinchilla-type fits. A dense model has coefficients of its own.
"""

from dataclasses import dataclass
from typing import Any

from hf_moe_ext.scaling.laws.card import (
    MULTIPLIER,
    TOKENS_PER_ACTIVE,
    Answer,
    Counts,
    FittedRange,
    Flag,
    Law,
    LawCard,
    expert_ratio,
    granularity,
    not_covered,
)
from hf_moe_ext.scaling.laws.layout import HEAD_WIDTH
from hf_moe_ext.scaling.laws.search import find_crossing, minimize_scale
from hf_moe_ext.scaling.shape import MoeShape

A, ALPHA, B, BETA, G, GAMMA, IRREDUCIBLE = 18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47
DENSE_A, DENSE_ALPHA, DENSE_B, DENSE_BETA = 16.3, 0.126, 26.7, 0.127
EXPANSION = 64
FLOPS_PER_WEIGHT, ROUTER_FLOPS_PER_WEIGHT = 6, 14


def loss(total_parameters: Any, num_tokens: Any, granularity: Any) -> Any:
    """L(N, D, G) at E = 64; N total, without embeddings."""
    return IRREDUCIBLE + (G / granularity**GAMMA + A) / total_parameters**ALPHA + B / num_tokens**BETA


def dense_loss(total_parameters: Any, num_tokens: Any) -> Any:
    """L(N, D) of a dense model."""
    return IRREDUCIBLE + DENSE_A / total_parameters**DENSE_ALPHA + DENSE_B / num_tokens**DENSE_BETA


def ideal_parameters(hidden_size: float, expansion: float = EXPANSION) -> float:
    """N = d^2 (8 E + 4) n with n = d / 64; 12 d^2 n at E = 1."""
    return hidden_size**2 * (8 * expansion + 4) * hidden_size / HEAD_WIDTH


def ideal_flops(hidden_size: float, granularity: float, expansion: float = EXPANSION) -> float:
    """Per token: n (12 d^2 c_f + d E G c_r); no router at E = 1."""
    router = hidden_size * expansion * granularity * ROUTER_FLOPS_PER_WEIGHT if expansion > 1 else 0.0
    return hidden_size / HEAD_WIDTH * (12 * hidden_size**2 * FLOPS_PER_WEIGHT + router)


@dataclass(frozen=True)
class Optimum:
    """The best model of a budget."""

    hidden_size: float
    total_parameters: float
    num_tokens: float
    loss: float


def optimum(budget_flops: float, granularity: float | None) -> Optimum:
    """Lowest loss over the width, at E = 64 and this granularity; None: the dense law."""
    expansion = 1 if granularity is None else EXPANSION

    def at(width: float) -> Optimum:
        total = ideal_parameters(width, expansion)
        tokens = budget_flops / ideal_flops(width, granularity or 1, expansion)
        value = dense_loss(total, tokens) if granularity is None else loss(total, tokens, granularity)
        return Optimum(width, total, tokens, value)

    return at(minimize_scale(lambda width: at(width).loss, 1, 1e7))


def best_granularity(budget_flops: float, largest: int = 1024) -> int:
    """The power of two of lowest loss; it grows with the budget, as the router's cost fades."""
    choices = [2**power for power in range(largest.bit_length())]
    return min(choices, key=lambda choice: optimum(budget_flops, choice).loss)


def dense_budget(target_loss: float) -> float:
    """Training FLOPs at which the compute-optimal dense model has this loss."""
    return find_crossing(lambda budget: optimum(budget, None).loss, target_loss, 1e10, 1e40, 1e-8)


class FineGrainedLaw(Law):
    """The MoE form at E = 64 against the dense one."""

    card = LawCard(
        name="fine_grained",
        title="Krajewski et al.: granularity",
        source="arXiv 2402.07871",
        provenance="two secondary",
        variables={
            "total_parameters": "N, total, without embeddings",
            "num_tokens": "D, training tokens",
            "granularity": "G, width 4 d of a plain FFN over that of an expert",
            "expansion": "E, total over active expert parameters",
            "budget_flops": "C, 6 per weight and 14 per router weight, without attention scores",
        },
        counting="N total without embeddings (recalled); FLOPs (12 d^2 6 + d E G 14) D n, without un-embedding",
        fitted=(
            FittedRange("total_parameters", 129e6, 3.7e9),
            FittedRange("num_tokens", 16e9, 130e9),
            FittedRange("granularity", 1, 16),
            FittedRange("expansion", EXPANSION, EXPANSION),
        ),
        error="RMSE 0.015 fit, 0.019 validation (one secondary source)",
        caveat="one expansion rate; exponents not comparable with Chinchilla-type fits",
    )

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """N without embeddings; G against the width that has 8 d^2 parameters with the experts' own matrices."""
        count, terms = shape.parameters, shape.training_flops(context_length)
        gated = any(layer.gated for layer in shape.moe_layers)
        flops = terms.total - terms.attention_scores - terms.attention_values - terms.unembedding
        full_width = 8 * shape.hidden_size / (3 if gated else 2)
        values = {
            "total_parameters": float(count.total - count.input_embedding - count.output_embedding),
            "num_tokens": float(num_tokens),
            "granularity": granularity(shape, full_width),
            "expansion": expert_ratio(shape),
            "budget_flops": flops * num_tokens,
        }
        return Counts(self.card.name, values, not_covered(shape))

    def compute_multiplier(self, counts: Counts) -> Answer:
        """Against the compute-optimal dense model of equal loss; no value at another expansion rate than 64."""
        flags = self.check(counts)
        if abs(counts["expansion"] / EXPANSION - 1) > 1e-9:
            return Answer(self.card.name, MULTIPLIER, None, flags)
        return self.compare_with_dense(
            counts, lambda own: loss(own["total_parameters"], own["num_tokens"], own["granularity"]), dense_budget
        )

    def tokens_per_active_parameter(self, budget_flops: float, expert_ratio: float) -> Answer:
        """D* / N_a* at the best granularity, N_a = 12 d^2 n; only for E / K = 64."""
        if abs(expert_ratio / EXPANSION - 1) > 1e-9:
            flag = Flag("not_covered", f"fitted at expansion rate {EXPANSION} only, got {expert_ratio:.4g}")
            return Answer(self.card.name, TOKENS_PER_ACTIVE, None, (flag,))
        chosen = best_granularity(budget_flops)
        best = optimum(budget_flops, chosen)
        values = {"total_parameters": best.total_parameters, "num_tokens": best.num_tokens, "granularity": chosen}
        active = ideal_parameters(best.hidden_size, 1)
        flags = self.check(Counts(self.card.name, values))
        return Answer(self.card.name, TOKENS_PER_ACTIVE, best.num_tokens / active, flags, values)
