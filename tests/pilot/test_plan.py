"""What fits a budget, and what does not."""

import random
from dataclasses import replace

import pytest

from hf_moe_ext.pilot.candidates import TABLE
from hf_moe_ext.pilot.duration import Speed
from hf_moe_ext.pilot.plan import Plan, Room, fills_budget, make_plan

CANDIDATES = [candidate for candidate in TABLE if candidate.kind != "base" and candidate.needs != "dense"]
SPEEDS = {candidate.name: Speed(1.0, 0.1, 1.0, 5.0) for candidate in CANDIDATES}
RATES = {candidate.name: candidate.learning_rates for candidate in CANDIDATES}
ROOM = Room(
    seconds=1100.0, spent=100.0, processes=2, num_seeds=3, num_finalists=4, min_steps=16, steps=None, batch_size=8,
    train_rows=4000, equal_time=False, may_drop=True,
)  # fmt: skip


def _plan(**changes) -> Plan:
    return make_plan(CANDIDATES, SPEEDS, RATES, replace(ROOM, **changes), {})


def test_a_large_budget_takes_all_and_more_steps() -> None:
    small, large = _plan(), _plan(seconds=20000.0)
    assert len(large.candidates) == len(CANDIDATES)
    assert not large.left_out
    assert large.steps["perft-r"] > small.steps["perft-r"]
    for plan in (small, large):
        assert plan.estimate_s <= 20000
        assert plan.steps["perft-r"] % 64 == 0
        assert (plan.steps["perft-r"] // 64).bit_count() == 1


def test_a_small_budget_leaves_out_the_last_ones_and_says_so() -> None:
    plan = _plan(seconds=150.0)
    assert 2 <= len(plan.candidates) < len(CANDIDATES)
    assert plan.candidates == tuple(c.name for c in CANDIDATES[: len(plan.candidates)])
    assert set(plan.left_out) == {c.name for c in CANDIDATES[len(plan.candidates) :]}
    assert all("did not fit the budget" in reason for reason in plan.left_out.values())
    assert plan.estimate_s <= 150


def test_too_small_a_budget_is_refused_with_what_it_needs() -> None:
    with pytest.raises(
        ValueError, match=r"--budget-minutes 2 is too small: perft-r, lora-qv with 64 steps .* about [0-9.]+ minutes"
    ):
        _plan(seconds=20.0)
    needed = _plan(seconds=90.0)
    assert len(needed.candidates) >= 2


def test_candidates_asked_for_by_name_are_never_dropped() -> None:
    with pytest.raises(ValueError, match="too small"):
        _plan(seconds=150.0, may_drop=False)


def test_candidates_asked_for_by_name_get_the_least_steps_where_no_more_fit() -> None:
    roomy = _plan(seconds=1e5)
    least = next(s for s in range(50, 2000, 50) if _fits(seconds=float(s), may_drop=False))
    plan = _plan(seconds=float(least), may_drop=False)
    assert set(plan.candidates) == set(roomy.candidates)
    assert set(plan.steps.values()) == {64}


def test_trials_end_where_a_plan_of_all_would_leave_the_last_one_out() -> None:
    room = replace(ROOM, seconds=150.0)
    kept = len(_plan(seconds=150.0).candidates)
    for count in range(1, len(CANDIDATES) + 1):
        assert fills_budget(CANDIDATES[:count], SPEEDS, RATES, room) == (count > kept)
    assert not fills_budget(CANDIDATES, SPEEDS, RATES, replace(room, may_drop=False))
    assert not fills_budget(CANDIDATES[:1], SPEEDS, RATES, replace(room, seconds=1.0))


def test_under_equal_time_a_slow_candidate_does_not_end_the_trials() -> None:
    """A fast one after it lowers everyone's steps, so that all three fit where the first two alone would not."""
    room = replace(ROOM, seconds=3200.0, equal_time=True)
    first = CANDIDATES[:3]
    speeds = {c.name: Speed(1.0, step, 1.0, 5.0) for c, step in zip(first, (0.1, 10.0, 0.1), strict=True)}
    assert set(make_plan(first, speeds, RATES, room, {}).candidates) == {c.name for c in first}
    assert not fills_budget(first[:2], speeds, RATES, room)
    assert fills_budget(first[:2], speeds, RATES, replace(room, seconds=1000.0))  # not even with the least steps


@pytest.mark.parametrize("equal_time", [False, True])
def test_trials_that_end_early_leave_the_plan_as_it_would_have_been(equal_time: bool) -> None:
    draw = random.Random(0)
    ended = 0
    for _ in range(400):
        speeds = {c.name: Speed(draw.uniform(1, 10), 10 ** draw.uniform(-2, 1), 1.0, 5.0) for c in CANDIDATES}
        room = replace(
            ROOM, seconds=10 ** draw.uniform(2, 4.5), equal_time=equal_time, processes=draw.choice((1, 2, 8))
        )
        counts = range(1, len(CANDIDATES) + 1)
        enough = next((n for n in counts if fills_budget(CANDIDATES[:n], speeds, RATES, room)), len(CANDIDATES))
        ended += enough < len(CANDIDATES)
        assert _kept(CANDIDATES[:enough], speeds, room) == _kept(CANDIDATES, speeds, room)
    assert ended > 40


def _kept(candidates, speeds, room) -> tuple[str, ...]:
    try:
        return make_plan(candidates, speeds, RATES, room, {}).candidates
    except ValueError:
        return ()


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("num_seeds", [1, 3, 10])
def test_the_estimate_is_no_less_than_stage_after_stage_takes(processes: int, count: int, num_seeds: int) -> None:
    first = CANDIDATES[:count]
    room = replace(ROOM, seconds=1e5, steps=256, processes=processes, num_seeds=num_seeds)
    for steps_s in ((1.0,) * 4, (1.0, 0.3, 3.0, 0.5)):
        speeds = {c.name: Speed(5.0, step, 2.0, 10.0) for c, step in zip(first, steps_s, strict=False)}
        rungs = [
            [
                speeds[c.name].startup + speeds[c.name].choice + steps * speeds[c.name].step
                for c in first
                for _ in range(n)
            ]
            for steps, n in ((64, 3), (128, 2))
        ]
        finals = [speeds[c.name].final(256) for c in first]
        takes = sum(_simulate(arms, processes) for arms in (*rungs, *[finals] * num_seeds))
        estimate = make_plan(first, speeds, RATES, room, {}).estimate_s
        work = sum(sum(arms) for arms in (*rungs, *[finals] * num_seeds))
        assert takes <= estimate <= 1.15 * (work / processes + sum(map(max, rungs)) + num_seeds * max(finals))
        if len(set(steps_s)) == 1:
            assert estimate == pytest.approx(1.15 * takes)


def _simulate(arms: list[float], processes: int) -> float:
    """As the pool runs them: the next one where a process is free."""
    free = [0.0] * processes
    for seconds in arms:
        first = free.index(min(free))
        free[first] += seconds
    return max(free)


def _fits(**changes) -> bool:
    try:
        return bool(_plan(**changes))
    except ValueError:
        return False


def test_fixed_steps_stay() -> None:
    assert set(_plan(steps=200).steps.values()) == {200}


def test_steps_end_where_rows_would_be_read_too_often() -> None:
    plan = _plan(seconds=1e6, train_rows=512)
    assert plan.steps["perft-r"] * 8 <= 3 * 512
    assert plan.epochs["perft-r"] == plan.steps["perft-r"] * 8 / 512


def test_equal_time_gives_the_slow_ones_fewer_steps() -> None:
    speeds = {**SPEEDS, "full": Speed(1.0, 0.4, 1.0, 5.0), "perft-s": Speed(1.0, 0.05, 1.0, 5.0)}
    plan = make_plan(CANDIDATES, speeds, RATES, replace(ROOM, seconds=20000.0, equal_time=True), {})
    assert plan.steps["full"] * 4 == pytest.approx(plan.steps["perft-r"], abs=4)
    assert plan.steps["perft-s"] == 2 * plan.steps["perft-r"]


def test_a_plan_survives_json() -> None:
    import json

    plan = _plan()
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
