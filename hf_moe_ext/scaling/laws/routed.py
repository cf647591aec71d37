"""Clark et al., arXiv 2202.01169: unified law of routed models, one set of coefficients per router.

    log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d

E^ saturates (``saturation``). Every run saw the same 131B tokens: D is no variable, and the law must never plan tokens.
The size N_cut at which routing stops paying is not offered: rounded coefficients give 1e12, 3.2e10 and 2.2e11 where
937B, 85B and 83B are quoted.
"""

from dataclasses import dataclass
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
    expert_ratio,
    not_covered,
)
from hf_moe_ext.scaling.laws.saturation import saturate
from hf_moe_ext.scaling.shape import MoeShape

NUM_TOKENS = 131e9


@dataclass(frozen=True)
class RouterCoefficients:
    """Of one router."""

    a: float
    b: float
    c: float
    d: float
    start: float
    limit: float

    def loss(self, dense_parameters: Any, num_experts: Any) -> Any:
        """L(N, E) at 131B tokens; N parameters per token without embeddings."""
        size, experts = np.log10(dense_parameters), np.log10(saturate(num_experts - 1, self.start, self.limit))
        return 10 ** (self.a * size + self.b * experts + self.c * size * experts + self.d)

    def effective_parameters(self, dense_parameters: Any, num_experts: Any) -> Any:
        """N of the dense model of equal loss at equal tokens."""
        at = np.log10(saturate(num_experts - 1, self.start, self.limit))
        dense = np.log10(self.start)
        size = np.log10(dense_parameters)
        # a x + b e_1 + c x e_1 = a n + b e + c n e, solved for x.
        return 10 ** ((self.a * size + self.b * (at - dense) + self.c * size * at) / (self.a + self.c * dense))


ROUTERS = {
    "S-Base": RouterCoefficients(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": RouterCoefficients(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "Hash": RouterCoefficients(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}


class RoutedLaw(Law):
    """The law of one router; S-Base unless told otherwise.

    Args:
        router: "S-Base", "RL-R" or "Hash".
    """

    card = LawCard(
        name="routed",
        title="Clark et al.: unified law of routed models",
        source="arXiv 2202.01169",
        provenance="two secondary",
        variables={
            "dense_parameters": "N, parameters per token with one expert, without embeddings",
            "num_experts": "E",
        },
        counting="N parameters per token without embeddings; D fixed at 131B tokens",
        fitted=(FittedRange("dense_parameters", 1.65e7, 1.31e9), FittedRange("num_experts", 1, 512)),
        error="RMSE 0.022 (S-Base), 0.044 (RL-R), 0.031 (Hash) nats on the published runs",
        caveat="D is no variable: never for token planning; half of the layers routed, top-1",
    )

    def __init__(self, router: str = "S-Base") -> None:
        if router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
        self.coefficients = ROUTERS[router]

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """N active without embeddings and routers; E = E / K."""
        count, ratio = shape.parameters, expert_ratio(shape)
        # A tied embedding is the un-embedding, and is counted as the input's.
        active = count.active(input_embedding=True) - count.input_embedding - count.output_embedding - count.router
        flags = list(not_covered(shape, dense_layers=False))
        if abs(num_tokens / NUM_TOKENS - 1) > 0.01:
            flags.append(Flag("not_covered", f"tokens are fixed at 131e9 in this law, got {num_tokens:.3g}"))
        if any(layer.top_k > 1 for layer in shape.moe_layers):
            flags.append(Flag("inferred", f"the law knows top-1 routing; E / K = {ratio:.4g} stands for E"))
        return Counts(self.card.name, {"dense_parameters": float(active), "num_experts": ratio}, tuple(flags))

    def compute_multiplier(self, counts: Counts) -> Answer:
        """N of the dense model of equal loss over N, at equal tokens: a ratio of FLOPs, but not between optima."""
        caution = Flag("caution", "at equal tokens, not between compute-optimal models")
        flags = (*self.check(counts), caution)
        size, experts = counts["dense_parameters"], counts["num_experts"]
        effective = float(self.coefficients.effective_parameters(size, experts))
        details = {"loss": float(self.coefficients.loss(size, experts)), "effective_parameters": effective}
        return Answer(self.card.name, MULTIPLIER, effective / size, flags, details)
