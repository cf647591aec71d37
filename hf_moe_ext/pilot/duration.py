"""How long the stages of a pilot take, from the measured speed of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_moe_ext.pilot.candidates import CONTROL_OF

# Rungs of successive halving, as shares of a finalist's steps.
FIRST_RUNG, SECOND_RUNG = 0.25, 0.5
RATES_IN_SECOND_RUNG = 2
SAFETY = 1.15


@dataclass(frozen=True)
class Speed:
    """What a short trial of a candidate measured, in seconds.

    Attributes:
        startup: Until the first step.
        step: Of one.
        choice: Losses of the rows that rates are chosen by.
        finish: What a finalist takes beyond its steps and its start.
    """

    startup: float
    step: float
    choice: float
    finish: float

    def rung(self, share: float, steps: int) -> float:
        """One arm of a rung, which trains that share of a finalist's steps."""
        return self.startup + self.choice + share * steps * self.step

    def final(self, steps: int) -> float:
        """One seed of a finalist."""
        return self.startup + self.finish + steps * self.step


def estimate_stages(
    kept: Sequence[str],
    speeds: Mapping[str, Speed],
    steps: Mapping[str, int],
    num_rates: Mapping[str, int],
    num_finalists: int,
    num_seeds: int,
    processes: int,
) -> float:
    """Seconds of all stages, one after another: none begins before every arm of the one before has ended.

    Args:
        kept: Names of the candidates.
        speeds: By name.
        steps: Of a finalist, by name.
        num_rates: Of the first rung, by name.
        num_finalists: Most of them; controls come on top.
        num_seeds: Of each.
        processes: Arms at a time.
    """
    first, second = [], []
    for name in kept:
        if num_rates[name] > 1:
            first += num_rates[name] * [speeds[name].rung(FIRST_RUNG, steps[name])]
        second += min(num_rates[name], RATES_IN_SECOND_RUNG) * [speeds[name].rung(SECOND_RUNG, steps[name])]
    seed = estimate_seed(kept, speeds, steps, num_finalists, processes)
    return SAFETY * (_span(first, processes) + _span(second, processes) + num_seeds * seed)


def estimate_seed(
    kept: Sequence[str], speeds: Mapping[str, Speed], steps: Mapping[str, int], num_finalists: int, processes: int
) -> float:
    """Seconds of one seed of the finalists, should they be the slowest; the controls of any come on top.

    Args:
        kept: Names of the candidates.
        speeds: By name.
        steps: Of a finalist, by name.
        num_finalists: Most of them.
        processes: Arms at a time.
    """
    final = {name: speeds[name].final(steps[name]) for name in kept}
    controls = [final[name] for name in kept if CONTROL_OF.get(name) in final]
    others = sorted((final[name] for name in kept if CONTROL_OF.get(name) not in final), reverse=True)
    return _span(controls + others[:num_finalists], processes)


def _span(arms: Sequence[float], processes: int) -> float:
    """Seconds of a stage: its arms by length, so many at a time, and each round as long as its longest.

    That is the pool's own time for arms of one length, and never above `work / processes + longest`.
    """
    return sum(sorted(arms, reverse=True)[::processes])
