"""What every law says about itself and how it answers.

Raw losses of two laws are never compared: tokenizers, data and irreducible terms differ (0.94, 1.36, 0.47). An ``Answer``
is dimensionless, and carries the reasons why it should not be believed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hf_moe_ext.scaling.shape import MoeShape

# "paper": its text was read. "two secondary": two independent secondary sources agree. "one secondary": one, unverified.
# "inferred": a constant or convention was worked out here because none is printed. "own runs": the user's fit.
Provenance = Literal["paper", "two secondary", "one secondary", "inferred", "own runs"]
FlagKind = Literal["outside_range", "artefact", "not_covered", "inferred", "caution"]


@dataclass(frozen=True)
class Flag:
    """A reason to doubt an answer.

    Attributes:
        kind: "outside_range": a variable is beyond what the law was fitted on. "artefact": the fit is known to be wrong
            there. "not_covered": the law has no word for what the shape has. "inferred": rests on a guess of ours.
            "caution": a finding that is no number.
        message: one sentence.
    """

    kind: FlagKind
    message: str


@dataclass(frozen=True)
class FittedRange:
    """Where a variable was fitted."""

    variable: str
    low: float
    high: float

    def check(self, value: float) -> Flag | None:
        """A flag outside; a billionth of slack for rounding at the ends."""
        slack = 1e-9 * max(abs(self.low), abs(self.high))
        if self.low - slack <= value <= self.high + slack:
            return None
        return Flag(
            "outside_range", f"{self.variable} = {value:.4g} is outside {self.low:.4g} to {self.high:.4g}, the fit"
        )


@dataclass(frozen=True)
class LawCard:
    """A law's identity.

    Attributes:
        name: short, for tables and options.
        title: authors and what it predicts.
        source: arXiv id and equation.
        provenance: how its numbers came here.
        variables: what it is a function of: meaning and unit of each.
        counting: how parameters and FLOPs are counted in it.
        fitted: ranges of the fit.
        error: its own reported error.
        caveat: what a reader must know beside the numbers.
    """

    name: str
    title: str
    source: str
    provenance: Provenance
    variables: Mapping[str, str]
    counting: str
    fitted: tuple[FittedRange, ...]
    error: str
    caveat: str


@dataclass(frozen=True)
class Counts:
    """A shape and its training in one law's own counting; another law refuses it.

    Attributes:
        law: whose.
        values: by variable.
        flags: what of the shape the law has no word for.
    """

    law: str
    values: Mapping[str, float]
    flags: tuple[Flag, ...] = ()

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclass(frozen=True)
class Answer:
    """One dimensionless number of one law, or None where it has none.

    Attributes:
        law: whose.
        quantity: what it is, as "compute multiplier".
        value: the number.
        flags: reasons to doubt it.
        details: numbers it was made from, in the law's own units; not for comparison between laws.
    """

    law: str
    quantity: str
    value: float | None
    flags: tuple[Flag, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def in_range(self) -> bool:
        """Whether the law was fitted where it was asked, and on what it was asked about."""
        return not any(flag.kind in ("outside_range", "artefact", "not_covered") for flag in self.flags)


MULTIPLIER = "compute multiplier"
TOKENS_PER_ACTIVE = "tokens per active parameter"
OPTIMAL_SPARSITY = "optimal sparsity"


class Law(ABC):
    """A law as a plugin. ``count`` a shape first, then ask."""

    card: LawCard

    @abstractmethod
    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """The law's variables for training this shape on so many tokens."""

    @abstractmethod
    def compute_multiplier(self, counts: Counts) -> Answer:
        """Training FLOPs of the compute-optimal dense model of equal loss over those of the shape."""

    def tokens_per_active_parameter(self, budget_flops: float, expert_ratio: float) -> Answer:
        """Compute-optimal D / N_a with E = ``expert_ratio`` K; no value where the law has no D."""
        return Answer(self.card.name, TOKENS_PER_ACTIVE, None, (self._silent("tokens"),))

    def optimal_sparsity(self, total_parameters: float, budget_flops: float) -> Answer:
        """S that minimises the loss at fixed total parameters and budget; no value where the law cannot tell."""
        return Answer(self.card.name, OPTIMAL_SPARSITY, None, (self._silent("total parameters at a fixed budget"),))

    def compare_with_dense(
        self, counts: Counts, loss: Callable[[Counts], float], dense_budget: Callable[[float], float]
    ) -> Answer:
        """The compute multiplier of a law that knows losses.

        Args:
            counts: of the shape, with ``budget_flops``.
            loss: of such counts.
            dense_budget: loss -> FLOPs at which the compute-optimal dense model has it.

        Raises:
            ValueError: counts of another law.
        """
        flags, value = self.check(counts), loss(counts)
        dense = dense_budget(value)
        details = {"loss": value, "dense_budget_flops": dense}
        return Answer(self.card.name, MULTIPLIER, dense / counts["budget_flops"], flags, details)

    def check(self, counts: Counts) -> tuple[Flag, ...]:
        """Flags of the shape and of every variable outside its fitted range.

        Raises:
            ValueError: counts of another law.
        """
        if counts.law != self.card.name:
            raise ValueError(
                f"the {self.card.name} law was given counts of the {counts.law} law; count the shape with "
                f"{self.card.name}'s own count()"
            )
        found = [
            fitted.check(counts[fitted.variable]) for fitted in self.card.fitted if fitted.variable in counts.values
        ]
        return counts.flags + tuple(flag for flag in found if flag is not None)

    def _silent(self, what: str) -> Flag:
        return Flag("not_covered", f"{self.card.title} does not tell about {what}")


def not_covered(
    shape: MoeShape, latent: bool = True, shared: bool = True, dense_layers: bool = True
) -> tuple[Flag, ...]:
    """Flags for what a shape has and no run of a law had.

    Args:
        shape: to look at.
        latent: flag latent experts and shared bases.
        shared: flag shared experts.
        dense_layers: flag dense layers among the MoE ones.
    """
    layers = shape.moe_layers
    flags = []
    if latent and any(layer.latent_size is not None for layer in layers):
        flags.append(Flag("not_covered", "no run of this law had latent experts (DCCA)"))
    if latent and any(layer.deltas is not None for layer in layers):
        flags.append(Flag("not_covered", "no run of this law had experts on a shared base (DeRS)"))
    if shared and any(layer.shared is not None or (layer.deltas and layer.deltas.share_universal) for layer in layers):
        flags.append(Flag("not_covered", "no run of this law had shared experts"))
    if dense_layers and layers and len(layers) < shape.num_layers:
        flags.append(Flag("not_covered", "no run of this law mixed dense and MoE layers"))
    return tuple(flags)


def expert_ratio(shape: MoeShape) -> float:
    """E / K over all MoE layers; 1 for a dense model."""
    return 1 / (1 - shape.sparsity)


def granularity(shape: MoeShape, full_width: float) -> float:
    """``full_width`` over the width of an expert, the mean over MoE layers; 1 for a dense model."""
    widths = [layer.intermediate_size for layer in shape.moe_layers]
    return full_width * len(widths) / sum(widths) if widths else 1.0
