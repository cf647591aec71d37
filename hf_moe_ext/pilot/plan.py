"""Which candidates, steps and seeds fit the budget, from the measured speed of a step; or why none do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from hf_moe_ext.pilot.candidates import Candidate
from hf_moe_ext.pilot.duration import Speed, estimate_stages

MIN_TRAINED = 2  # fewer is no comparison
COMFORTABLE_TRAINED, COMFORTABLE_FACTOR = 4, 2  # keep so many before steps go below so many times the least
MAX_EPOCHS = 3  # a pilot that reads its rows more often measures how they are memorised
RESTART_MINUTES = 1  # what a pilot that goes on takes until it knows again what it knew


@dataclass(frozen=True)
class Plan:
    """What will be run.

    Attributes:
        candidates: Names, the base left out, in the order of the table.
        steps: Of a finalist, by name.
        rates: Learning rates of the first rung, by name.
        left_out: Name -> why it is not among them.
        num_finalists: Most that are trained with every seed; controls come on top.
        num_seeds: Of each.
        estimate_s: For everything after the trial steps.
        epochs: Passes over the train rows of a finalist, by name.
        budget_minutes: That it was made for.
    """

    candidates: tuple[str, ...]
    steps: dict[str, int]
    rates: dict[str, tuple[float, ...]]
    left_out: dict[str, str]
    num_finalists: int
    num_seeds: int
    estimate_s: float
    epochs: dict[str, float]
    budget_minutes: float

    def without(self, failed: Mapping[str, str]) -> "Plan":
        """The plan of the others; the reasons are kept."""
        names = tuple(name for name in self.candidates if name not in failed)
        return replace(
            self,
            candidates=names,
            steps={name: self.steps[name] for name in names},
            rates={name: self.rates[name] for name in names},
            left_out={**self.left_out, **failed},
            epochs={name: self.epochs[name] for name in names},
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Plan":
        """The opposite of `as_dict`."""
        rates = {name: tuple(values) for name, values in saved["rates"].items()}
        return cls(**{**saved, "candidates": tuple(saved["candidates"]), "rates": rates})


@dataclass(frozen=True)
class Room:
    """What the plan must fit into.

    Attributes:
        seconds: Of the budget that are left.
        spent: That are gone, for the message.
        processes: Arms at a time.
        num_seeds: Of a finalist.
        num_finalists: Most of them; controls come on top.
        min_steps: Of the shortest arm.
        steps: Of a finalist, where they are fixed.
        batch_size: Rows of a step.
        train_rows: There are so many.
        equal_time: Give every candidate equal time instead of equal tokens.
        may_drop: Whether candidates may be left out: not those that were asked for by name.
        trial_s: Seconds of the trials, by name, for the message.
    """

    seconds: float
    spent: float
    processes: int
    num_seeds: int
    num_finalists: int
    min_steps: int
    steps: int | None
    batch_size: int
    train_rows: int
    equal_time: bool
    may_drop: bool
    trial_s: Mapping[str, float] = field(default_factory=dict)


def make_plan(
    candidates: Sequence[Candidate],
    speeds: Mapping[str, Speed],
    rates: Mapping[str, tuple[float, ...]],
    room: Room,
    left_out: Mapping[str, str],
) -> Plan:
    """The most candidates at a comfortable length, else at the least length; then as many steps as fit.

    Steps are the least number times a power of two, so that a small difference in speed gives the same plan.

    Args:
        candidates: In order of preference, without the base.
        speeds: Measured, by name.
        rates: Learning rates, by name.
        room: The budget.
        left_out: Candidates that are out already, with the reason.

    Raises:
        ValueError: The least pilot does not fit; the message says what it needs.
    """
    kept = list(candidates)
    while True:
        enough = len(kept) if not room.may_drop else min(MIN_TRAINED, len(candidates))
        steps = _least_steps(kept, room)
        needed = _estimate(kept, speeds, rates, room, _steps_of(kept, speeds, room, steps))
        if needed <= room.seconds:
            break
        if len(kept) <= enough:
            raise _too_small(kept, needed, room, steps, (), needed)
        kept.pop()
    while (
        room.steps is None
        and 2 * steps * room.batch_size <= MAX_EPOCHS * room.train_rows
        and _estimate(kept, speeds, rates, room, _steps_of(kept, speeds, room, 2 * steps)) <= room.seconds
    ):
        steps *= 2
    names = tuple(candidate.name for candidate in kept)
    by_name = _steps_of(kept, speeds, room, steps)
    late = {c.name: tell_budget(room) for c in candidates if c.name not in names}
    return Plan(
        names,
        by_name,
        {name: tuple(rates[name]) for name in names},
        {**left_out, **late},
        room.num_finalists,
        room.num_seeds,
        _estimate(kept, speeds, rates, room, by_name),
        {name: count * room.batch_size / room.train_rows for name, count in by_name.items()},
        (room.seconds + room.spent) / 60,
    )


def fills_budget(
    candidates: Sequence[Candidate],
    speeds: Mapping[str, Speed],
    rates: Mapping[str, tuple[float, ...]],
    room: Room,
) -> bool:
    """Whether `make_plan` would leave the last of these out, and with it all that come after: they need no trial."""
    if not room.may_drop or len(candidates) < MIN_TRAINED:
        return False
    return _estimate(candidates, speeds, rates, room, _shortest(candidates, room)) > room.seconds


def refuse_hopeless(
    candidates: Sequence[Candidate],
    speeds: Mapping[str, Speed],
    rates: Mapping[str, tuple[float, ...]],
    room: Room,
    waiting: Sequence[str],
) -> None:
    """Refuse as soon as `make_plan` is certain to, whatever is tried after these.

    Args:
        candidates: Tried so far.
        speeds: Measured, by name.
        rates: Learning rates, by name.
        room: The budget.
        waiting: Names of those that are not tried yet.

    Raises:
        ValueError: Those that may not be left out do not fit; the message says what they need.
    """
    kept = candidates[:MIN_TRAINED] if room.may_drop else candidates
    steps = _shortest(kept, room)
    needed = _estimate(kept, speeds, rates, room, steps)
    if not kept or needed <= room.seconds:
        return
    others = () if room.may_drop else waiting
    slowest = max(kept, key=lambda c: speeds[c.name].step).name
    names = [*(c.name for c in kept), *others]
    likely = estimate_stages(
        names, {**dict.fromkeys(others, speeds[slowest]), **speeds}, {**dict.fromkeys(others, steps[slowest]), **steps},
        {name: len(rates.get(name, rates[slowest])) for name in names}, room.num_finalists, room.num_seeds, room.processes,
    )  # fmt: skip
    trials = math.ceil(len(others) / room.processes) * max(room.trial_s.values(), default=0.0)
    raise _too_small(kept, needed, room, max(steps.values()), others, likely + trials)


def tell_budget(room: Room) -> str:
    """Why a candidate is left out that the budget has no room for."""
    return f"did not fit the budget of {(room.seconds + room.spent) / 60:g} minutes"


def _least_steps(kept: Sequence[Candidate], room: Room) -> int:
    if room.steps:
        return room.steps
    comfortable = (
        room.may_drop and len(kept) > COMFORTABLE_TRAINED
    )  # those asked for by name stay, if need be at the least
    return 4 * room.min_steps * (COMFORTABLE_FACTOR if comfortable else 1)


def _shortest(kept: Sequence[Candidate], room: Room) -> dict[str, int]:
    """No plan gives them fewer steps, whatever is tried after them.

    Under equal time the steps follow the middle step time, which a faster candidate that comes later lowers.
    """
    return dict.fromkeys((c.name for c in kept), 4 * room.min_steps if room.equal_time else _least_steps(kept, room))


def _steps_of(kept: Sequence[Candidate], speeds: Mapping[str, Speed], room: Room, steps: int) -> dict[str, int]:
    if not room.equal_time:
        return {candidate.name: steps for candidate in kept}
    middle = median(speeds[candidate.name].step for candidate in kept)
    return {c.name: max(4 * room.min_steps, round(steps * middle / speeds[c.name].step)) for c in kept}


def _estimate(
    kept: Sequence[Candidate],
    speeds: Mapping[str, Speed],
    rates: Mapping[str, tuple[float, ...]],
    room: Room,
    steps: Mapping[str, int],
) -> float:
    return estimate_stages(
        [c.name for c in kept], speeds, steps, {c.name: len(rates[c.name]) for c in kept}, room.num_finalists,
        room.num_seeds, room.processes,
    )  # fmt: skip


def _too_small(
    kept: Sequence[Candidate], needed: float, room: Room, steps: int, waiting: Sequence[str], likely: float
) -> ValueError:
    """The refusal; `likely` are the seconds with those that wait, were they as slow as the slowest that was tried."""
    budget = (room.seconds + room.spent) / 60
    names = ", ".join(candidate.name for candidate in kept)
    more = f", without {', '.join(waiting)}, not tried yet" if waiting else ""
    slowest = max(room.trial_s, key=lambda name: room.trial_s[name], default=None)
    slow = f", the slowest of them {slowest} with {room.trial_s[slowest]:.0f} s" if slowest else ""
    enough = math.ceil(likely / 60 + RESTART_MINUTES)
    larger = f"with --budget-minutes {enough} " if enough > budget else ""
    return ValueError(
        f"--budget-minutes {budget:g} is too small: {names} with {steps} steps and {room.num_seeds} seeds need about "
        f"{math.ceil(needed / 6) / 10:g} minutes on {room.processes} processes beyond the trial steps{more}. Those took "
        f"{room.spent:.0f} s until now{slow}. What was tried is kept: the same command {larger}goes on with it. Or give "
        "another --output and fewer --candidates, --seeds or --learning-rates, or shorter arms with --min-steps."
    )
