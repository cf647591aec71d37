"""Kimi K2, arXiv 2507.20534, section 2.3: a statement, not a formula.

With 8 + 1 shared experts fixed and Muon, validation loss 1.5 takes 1.69, 1.39 and 1.15 times fewer FLOPs at E/K = 48 than at
8, 16 and 32. Own reading: saving = ratio^0.30 (0.29 to 0.34). K2 itself stops at 48 (384 experts) for infrastructure.
"""

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
from hf_moe_ext.scaling.shape import MoeShape

# FLOPs at E/K over FLOPs at 48, validation loss 1.5.
STATED_SAVINGS = {8: 1.69, 16: 1.39, 32: 1.15}
STATED_RATIO = 48
EXPONENT = 0.30
SAVING = "saving against E/K = 8"


def relative_flops(ratio: float, reference: float) -> float:
    """How many times fewer FLOPs E/K = ``ratio`` takes than ``reference``, at equal loss: (ratio / reference)^0.30."""
    if ratio < 1 or reference < 1:
        raise ValueError(f"E/K must be at least 1, got {ratio} and {reference}")
    return (ratio / reference) ** EXPONENT


class KimiLaw(Law):
    """Relative to E/K = 8; says nothing about dense models."""

    card = LawCard(
        name="kimi",
        title="Kimi K2: sparsity statement",
        source="arXiv 2507.20534, section 2.3",
        provenance="inferred",
        variables={"expert_ratio": "E / K, routed experts alone"},
        counting="training FLOPs at equal validation loss 1.5",
        fitted=(FittedRange("expert_ratio", 8, 48),),
        error="exponent 0.29 to 0.34 from three stated points",
        caveat="no formula is given; one loss level, one model family, Muon",
    )

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """E / K."""
        return Counts(
            self.card.name, {"expert_ratio": expert_ratio(shape)}, not_covered(shape, shared=False, dense_layers=False)
        )

    def compute_multiplier(self, counts: Counts) -> Answer:
        """No value: the statement compares sparse models with each other. See ``saving``."""
        return Answer(self.card.name, MULTIPLIER, None, (*self.check(counts), self._silent("dense models")))

    def saving(self, counts: Counts) -> Answer:
        """FLOPs at E/K = 8 over FLOPs of the shape at equal loss."""
        flags = (*self.check(counts), Flag("inferred", "the exponent 0.30 is read off three stated points"))
        return Answer(self.card.name, SAVING, relative_flops(counts["expert_ratio"], 8), flags)
