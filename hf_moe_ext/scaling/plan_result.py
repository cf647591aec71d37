"""What a plan consists of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from hf_moe_ext.scaling.candidates import Candidate
from hf_moe_ext.scaling.laws import LAWS, Answer, Counts, Flag, Law
from hf_moe_ext.scaling.plan_quality import RANKING, mean_of
from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.pricing import Run, Serving, Shortage, Training


@dataclass(frozen=True)
class Plan:
    """A shape, how it trains, what comes of it.

    Attributes:
        candidate: the shape.
        training: layout, memory, step time.
        run: steps, tokens, hours, cost.
        counts: of every law.
        answers: compute multipliers of every law.
        gains: dense-equivalent budget over that of the dense reference, by law.
        serving: one replica; None without a demand, a shortage where it fits no node.
        cautions: findings about tasks.
    """

    candidate: Candidate
    training: Training
    run: Run
    counts: dict[str, Counts]
    answers: dict[str, Answer]
    gains: dict[str, float] = field(default_factory=dict)
    serving: Serving | Shortage | None = None
    cautions: tuple[Flag, ...] = ()

    @property
    def quality(self) -> float:
        """Geometric mean of the ranking laws' gains: what times the dense model's compute it is worth."""
        return mean_of(self.gains)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest gain of the ranking laws."""
        values = [self.gains[name] for name in RANKING]
        return min(values), max(values)

    @cached_property
    def uncovered(self) -> tuple[str, ...]:
        """Why no recommendation may rest on the laws here: shapes they never saw, sparsities beyond their fits."""
        kinds = {"dcca": "latent experts (DCCA)", "ders": "experts on a shared base (DeRS)"}
        reasons = [f"no law was fitted on {kinds[self.candidate.block]}"] if self.candidate.block in kinds else []
        for law, variable in (("abnar", "sparsity"), ("joint", "num_experts")):
            fitted = next(one for one in LAWS[law].card.fitted if one.variable == variable)
            flag = fitted.check(self.counts[law][variable])
            if flag is not None:
                reasons.append(f"{law}: {flag.message}")
        return tuple(reasons)

    @property
    def serving_hours(self) -> float | None:
        """Device hours per million generated tokens."""
        return self.serving.gpu_hours_per_million if isinstance(self.serving, Serving) else None


@dataclass(frozen=True)
class Binding:
    """What holds the recommended plan back.

    Attributes:
        constraint: "compute", "memory", "all_to_all", "data" (or "tensor", "pipeline").
        reason: a sentence with the numbers.
        step_shares: share of a step's time of each part.
        refused: shapes that promised more and did not fit: name, gain promised, bytes needed.
    """

    constraint: str
    reason: str
    step_shares: dict[str, float]
    refused: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class PlanResult:
    """The planner's answer.

    Attributes:
        request: the question.
        plans: all that were priced in full, best first.
        pareto: none of the others of its class is better in one of quality, memory, hours, serving and worse in none.
        recommended: one of them.
        dense: the reference of all gains.
        reason: why this one.
        binding: what holds it back.
        num_candidates: enumerated.
        laws: that were asked, by name.
    """

    request: PlanRequest
    plans: tuple[Plan, ...]
    pareto: tuple[Plan, ...]
    recommended: Plan
    dense: Plan
    reason: str
    binding: Binding
    num_candidates: int
    laws: Mapping[str, Law] = field(default_factory=lambda: LAWS)


@dataclass(frozen=True)
class Promise:
    """A shape before it is priced.

    Attributes:
        candidate: the shape.
        tokens: that it would read if only arithmetic took time.
        quality: mean of the dense-equivalent budgets it would reach, read off tables.
    """

    candidate: Candidate
    tokens: float
    quality: float
