"""Published scaling laws of sparse models as plugins: each counts in its own way and answers in dimensionless numbers.

``ask(shape, num_tokens)`` puts one shape to all of them. Losses are never compared; the spread of the compute multipliers,
1.5 to 2.5 times between laws, is the honest error bar.
"""

from hf_moe_ext.scaling.laws.abnar import AbnarLaw
from hf_moe_ext.scaling.laws.card import Answer, Counts, FittedRange, Flag, Law, LawCard
from hf_moe_ext.scaling.laws.fine_grained import FineGrainedLaw
from hf_moe_ext.scaling.laws.joint import JointLaw
from hf_moe_ext.scaling.laws.kimi import KimiLaw
from hf_moe_ext.scaling.laws.leverage import LeverageLaw
from hf_moe_ext.scaling.laws.routed import RoutedLaw
from hf_moe_ext.scaling.shape import MoeShape

LAWS: dict[str, Law] = {
    law.card.name: law for law in (AbnarLaw(), JointLaw(), FineGrainedLaw(), LeverageLaw(), RoutedLaw(), KimiLaw())
}

__all__ = ["LAWS", "Answer", "Counts", "FittedRange", "Flag", "Law", "LawCard", "add_law", "ask", "find_law", "spread"]


def find_law(name: str) -> Law:
    """One law by its short name.

    Raises:
        ValueError: there is none.
    """
    if name not in LAWS:
        raise ValueError(f"law must be one of {', '.join(LAWS)}, got {name!r}")
    return LAWS[name]


def add_law(own: Law | None) -> dict[str, Law]:
    """The published laws and one more.

    Raises:
        ValueError: it is called as one of them.
    """
    if own is None:
        return LAWS
    if own.card.name in LAWS:
        raise ValueError(f"law {own.card.name!r} is a published one's name; known: {', '.join(LAWS)}. Rename the file")
    return {**LAWS, own.card.name: own}


def ask(shape: MoeShape, num_tokens: float, context_length: int | None = None) -> dict[str, Answer]:
    """Compute multiplier of a shape by every law, each with its own counts."""
    return {name: law.compute_multiplier(law.count(shape, num_tokens, context_length)) for name, law in LAWS.items()}


def spread(answers: dict[str, Answer]) -> tuple[float, float] | None:
    """Smallest and largest value of the laws that are inside their range, or of all where none is; None without any."""
    values = [answer.value for answer in answers.values() if answer.value is not None]
    inside = [answer.value for answer in answers.values() if answer.value is not None and answer.in_range]
    chosen = inside or values
    return (min(chosen), max(chosen)) if chosen else None
