"""Is one candidate really better than another? Paired over held-out rows and over seeds.

A difference has two kinds of noise. Other rows would have given another one: its deviation is that of a bootstrap that draws
whole rows, each with the losses of both candidates (Efron and Tibshirani 1993, chapter 13). Another seed would have given
another one too: its deviation is the spread between the seeds over the root of their number. Both are added, and the interval
is Student's with Welch and Satterthwaite's degrees of freedom: a bootstrap over three seeds would be far too narrow. Three
seeds can lie close together by chance, so none counts as less spread than the candidates are on average.
Probabilities of several comparisons are corrected after Holm (1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ArmLosses:
    """Held-out losses of one candidate.

    Attributes:
        nats: [seeds, rows] summed negative log-likelihood of each row's scored tokens.
        tokens: [rows] how many they are.
    """

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def by_seed(self) -> np.ndarray:
        """[seeds] nats per token."""
        return self.nats.sum(axis=1) / self.tokens.sum()

    @property
    def mean(self) -> float:
        """Nats per token over all seeds."""
        return float(self.by_seed.mean())


@dataclass(frozen=True)
class Comparison:
    """Candidate minus reference, in nats per token: below 0 the candidate is better.

    Attributes:
        difference: Mean over rows and seeds.
        low: Lower end of the interval.
        high: Upper end.
        row_deviation: Standard deviation over other rows.
        seed_deviation: The same over other seeds; None with one seed.
        p: Probability of a difference this large without a real one, for this comparison alone.
        adjusted_p: The same for all comparisons made at once.
    """

    difference: float
    low: float
    high: float
    row_deviation: float
    seed_deviation: float | None
    p: float
    adjusted_p: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def shown(self) -> bool:
        """Whether the difference is shown, all comparisons counted."""
        return self.adjusted_p < 1 - CONFIDENCE


def compare(
    candidate: ArmLosses, reference: ArmLosses, seed: int = 0, pooled: tuple[float, int] = (0.0, 1)
) -> Comparison:
    """One difference with its interval; `adjusted_p` is still that of this comparison alone.

    Args:
        candidate: Losses [seeds, rows].
        reference: The same rows; one seed (a model that was not trained), or as many as the candidate.
        seed: Of the bootstrap.
        pooled: Deviation between seeds over all candidates, and its degrees of freedom; taken where that of this
            candidate's own seeds is smaller.

    Raises:
        ValueError: The two do not score the same tokens.
    """
    from scipy import stats

    if not np.array_equal(candidate.tokens, reference.tokens):
        raise ValueError("two candidates can be compared only on the same tokens of the same rows")
    num_seeds = len(candidate.nats) if len(reference.nats) == 1 else min(len(candidate.nats), len(reference.nats))
    other = reference.nats if len(reference.nats) == 1 else reference.nats[:num_seeds]
    change = candidate.nats[:num_seeds] - other
    tokens = candidate.tokens.sum()
    by_seed = change.sum(axis=1) / tokens
    difference = float(by_seed.mean())
    rows = _row_deviation(change.mean(axis=0), candidate.tokens, seed)
    seeds, seed_freedom = None, 1
    if num_seeds > 1:
        own = (float(by_seed.std(ddof=1)), num_seeds - 1)
        deviation, seed_freedom = max(own, pooled)
        seeds = deviation / math.sqrt(num_seeds)
    error = math.hypot(rows, seeds or 0.0)
    if error == 0.0:  # the same numbers in every row: nothing was learnt, or there is nothing to learn
        return Comparison(difference, difference, difference, rows, seeds, 1.0, 1.0)
    freedom = error**4 / (rows**4 / (len(candidate.tokens) - 1) + (seeds or 0.0) ** 4 / seed_freedom)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(difference) / error, freedom))
    return Comparison(difference, difference - half, difference + half, rows, seeds, p, p)


def _pool_seeds(candidates: Sequence[ArmLosses]) -> tuple[float, int]:
    """Root of the mean variance between seeds, over all candidates with more than one, and its degrees of freedom."""
    variances = [one.by_seed.var(ddof=1) for one in candidates if len(one.nats) > 1]
    freedom = sum(len(one.nats) - 1 for one in candidates)
    return (float(np.sqrt(np.mean(variances))), freedom) if variances else (0.0, 1)


def _row_deviation(change: np.ndarray, tokens: np.ndarray, seed: int) -> float:
    """Deviation of summed change over summed tokens when rows are drawn with replacement."""
    generator = np.random.default_rng(seed)
    rows = len(tokens)
    counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return float(((counts @ change) / (counts @ tokens)).std(ddof=1))


def adjust(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons with `adjusted_p` after Holm."""
    order = sorted(comparisons, key=lambda name: comparisons[name].p)
    adjusted, largest = {}, 0.0
    for position, name in enumerate(order):
        one = comparisons[name]
        largest = max(largest, min(1.0, (len(order) - position) * one.p))
        adjusted[name] = Comparison(**{**one.as_dict(), "adjusted_p": largest})
    return {name: adjusted[name] for name in comparisons}


def compare_all(losses: Mapping[str, ArmLosses], base: str, seed: int = 0) -> dict[str, Any]:
    """Every candidate against the base, every candidate against the best, each family corrected by itself.

    Args:
        losses: By candidate, the base among them.
        base: Its name.
        seed: Of the bootstrap.

    Returns:
        `against_base` and `against_best`: name -> `Comparison`; `best`: name; `best` is None without a trained candidate.
    """
    trained: Sequence[str] = [name for name in losses if name != base]
    if not trained:
        return {"best": None, "against_base": {}, "against_best": {}}
    best = min(trained, key=lambda name: (losses[name].mean, name))
    pooled = _pool_seeds([losses[name] for name in trained])
    return {
        "best": best,
        "against_base": adjust({name: compare(losses[name], losses[base], seed, pooled) for name in trained}),
        "against_best": adjust(
            {name: compare(losses[name], losses[best], seed, pooled) for name in trained if name != best}
        ),
    }
