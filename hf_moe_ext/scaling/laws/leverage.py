"""Tian et al. (Ling), arXiv 2507.17702: efficiency leverage, C_dense / C_moe at equal loss.

    EL = A^^(a + d log10 C + gamma (log2 G)^2 + beta log2 G)

A^ saturates (``saturation``). The bases of the logarithms are not printed; 10 for C with 2 for G is the only choice that
gives the paper's own claims back (natural ones give some 5e3). The text calls d positive, the table negative; negative works.
"""

from typing import Any

import numpy as np

from hf_moe_ext.scaling.laws.card import (
    MULTIPLIER,
    Answer,
    Counts,
    FittedRange,
    Flag,
    Law,
    LawCard,
    granularity,
    not_covered,
)
from hf_moe_ext.scaling.laws.saturation import saturate
from hf_moe_ext.scaling.shape import MoeShape

A, D, GAMMA, BETA = 1.23, -7.61e-2, 1.67e-2, -1.17e-1
A_START, A_MAX = 1.63e-2, 5.28e16
LARGEST_FITTED = 6.0


def efficiency_leverage(activation_ratio: Any, granularity: Any, budget_flops: Any) -> Any:
    """EL(A, G, C); A = (E_a + E_s)/(E + E_s), G = 2 d / d_e, C = M D with forward FLOPs M without embeddings."""
    fine = np.log2(granularity)
    exponent = A + D * np.log10(budget_flops) + GAMMA * fine**2 + BETA * fine
    return saturate(activation_ratio, A_START, A_MAX) ** exponent


def best_granularity() -> float:
    """G of the largest EL, whatever A and C: 2^(-beta / (2 gamma))."""
    return 2 ** (-BETA / (2 * GAMMA))


def learning_rate(budget_flops: float) -> float:
    """1.1576 C^-0.1529."""
    return 1.1576 * budget_flops**-0.1529


def batch_tokens(budget_flops: float) -> float:
    """0.0694 C^0.3644; A from 4.7 to 10.9 %."""
    return 0.0694 * budget_flops**0.3644


def dense_allocation(budget_flops: float) -> tuple[float, float]:
    """Forward FLOPs per token M and tokens D of a dense model."""
    return 0.0655 * budget_flops**0.5422, 15.2582 * budget_flops**0.4578


def moe_allocation(budget_flops: float) -> tuple[float, float]:
    """M and D at A = 7.8 %, G = 2."""
    return 0.1915 * budget_flops**0.5095, 5.2232 * budget_flops**0.4905


class LeverageLaw(Law):
    """EL as it is: it is a compute multiplier."""

    card = LawCard(
        name="leverage",
        title="Tian et al. (Ling): efficiency leverage",
        source="arXiv 2507.17702",
        provenance="inferred",
        variables={
            "activation_ratio": "A = (E_a + E_s)/(E + E_s)",
            "granularity": "G = 2 d / d_e",
            "budget_flops": "C = M D, M forward FLOPs per token without embeddings",
        },
        counting="C is forward only (M D), though training is 3 times that; bases of the logarithms inferred",
        fitted=(FittedRange("budget_flops", 3e18, 3e20),),
        error="fitted where EL < 6, validated above",
        caveat="bases inferred; one small shared expert, trained some 3 times longer than optimal",
    )

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """A with shared experts in units of a routed one; G = 2 d / d_e; M without un-embedding."""
        terms = shape.forward_flops(context_length)
        chosen = sum(layer.top_k for layer in shape.moe_layers)
        experts = sum(layer.num_experts for layer in shape.moe_layers)
        shared = sum(
            layer.shared.intermediate_size / layer.intermediate_size
            for layer in shape.moe_layers
            if layer.shared is not None
        )
        values = {
            "activation_ratio": (chosen + shared) / (experts + shared) if experts else 1.0,
            "granularity": granularity(shape, 2 * shape.hidden_size) if experts else 2.0,
            "budget_flops": (terms.total - terms.unembedding) * float(num_tokens),
        }
        return Counts(self.card.name, values, not_covered(shape, shared=False, dense_layers=False))

    def compute_multiplier(self, counts: Counts) -> Answer:
        """EL."""
        flags = (*self.check(counts), Flag("inferred", "the bases of the law's logarithms are inferred"))
        value = float(efficiency_leverage(counts["activation_ratio"], counts["granularity"], counts["budget_flops"]))
        if value > LARGEST_FITTED:
            flags += (Flag("outside_range", f"leverage {value:.3g} is above {LARGEST_FITTED:.0f}, the largest fitted"),)
        return Answer(self.card.name, MULTIPLIER, value, flags, dict(counts.values))
