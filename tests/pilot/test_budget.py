"""Whole pilots on a clock that only arms move on: when they end, what they leave out, what they refuse."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_moe_ext.pilot import PilotRequest, run, stages
from hf_moe_ext.pilot.candidates import Candidate, choose_candidates
from hf_moe_ext.pilot.plan import Plan
from hf_moe_ext.pilot.pool import NO_LIMITS
from hf_moe_ext.pilot.progress import Progress

STARTUP_S, CHOICE_S, FINISH_S = 5.0, 2.0, 10.0
FACTS = {"train_rows": 100_000}


class Machine:
    """Runs arms by counting their seconds, as the pool hands them out; `failing` ones find no memory."""

    def __init__(self, processes: int, step_s: dict[str, float], startup_s: float, kept: dict[str, Any]) -> None:
        self.processes, self.step_s, self.startup_s, self.kept = processes, step_s, startup_s, kept
        self.seconds = 0.0
        self.failing: set[str] = set()
        self.ran: list[dict[str, Any]] = []

    def monotonic(self) -> float:
        return self.seconds

    def run(
        self, specs: Sequence[dict[str, Any]], on_done: Callable[[Any], None], limits: Mapping[str, float] = NO_LIMITS
    ) -> dict[str, Any]:
        free = [self.seconds] * self.processes
        results = {}
        for spec in specs:
            name, first = spec["id"], free.index(min(free))
            results[name] = result = self.kept.get(name) or self._result(spec)
            if name not in self.kept:
                self.ran.append(spec)
                free[first] += min(result["measured"]["wall_s"], limits.get(name, math.inf))
                if result["measured"]["wall_s"] > limits.get(name, math.inf):
                    results[name] = {"spec": spec, "status": "failed", "reason": f"longer than {limits[name]:.0f} s"}
                else:
                    self.kept[name] = result
            on_done(results[name])
        self.seconds = max(free)
        return results

    def close(self) -> None:
        pass

    def _result(self, spec: dict[str, Any]) -> dict[str, Any]:
        name = spec["candidate"]["name"]
        step_s = self.step_s.get(name, self.step_s["others"])
        wall_s = self.startup_s + (FINISH_S if spec["stage"] == "final" else CHOICE_S) + spec["max_steps"] * step_s
        measured = {"startup_s": self.startup_s, "step_s": step_s, "losses_s": CHOICE_S, "wall_s": wall_s}
        if name in self.failing:
            return {"spec": spec, "status": "failed", "reason": "no memory is left", "measured": measured}
        learnt = {"parameters": {"trainable": 100}, "loss": 1.0 if name == "perft-r" else 2.0}
        return {"spec": spec, "status": "done", "deterministic": learnt, "measured": measured}


class Pilot(run._Pilot):
    """A pilot without a model and without rows."""

    def __init__(self, folder: Path, machine: Machine, **settings: Any) -> None:
        super().__init__(PilotRequest("model", "data", processes=machine.processes, **settings), folder, Progress(True))
        self.pool, self.machine = machine, machine
        self.subject = SimpleNamespace(num_parameters=1000)  # type: ignore[assignment]
        self.candidates = choose_candidates(self.request.candidates, is_moe=True)

    def _settings(self, candidate: Candidate) -> dict[str, Any]:
        return {}

    def plan(self) -> tuple[dict[str, Any], Plan]:
        return self._plan(self.candidates, FACTS)

    def finish(self) -> tuple[Plan, list[str], int]:
        """The plan, the finalists and how many seeds of them there was time for."""
        trials, plan = self.plan()
        self.told = self._tell_other_budget(plan)
        kept = [c for c in self.candidates if c.name in plan.candidates]
        settings: dict[str, dict[str, Any]] = {c.name: {} for c in kept}
        found = stages.search_rates(self._run, kept, plan, settings, 0)
        names = stages.choose_finalists(found, self._num_finalists(plan, trials), dict.fromkeys(plan.candidates, 100))
        finalists = [(c, 1e-3) for name in names for c in kept if c.name == name]
        deadline = None if self.request.steps else self._deadline()
        return plan, names, stages.run_finalists(self._run, finalists, plan, settings, 0, deadline)[1]


@pytest.fixture
def pilot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Pilot]:
    """A pilot on its own clock; the second of a test goes on with the first."""
    kept: dict[str, Any] = {}

    def make(step_s: dict[str, float], processes: int = 2, startup_s: float = STARTUP_S, **settings: Any) -> Pilot:
        machine = Machine(processes, step_s, startup_s, kept)
        for module in (run, stages):
            monkeypatch.setattr(module, "time", machine)
        return Pilot(tmp_path, machine, **settings)

    return make


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "settings", [{}, {"candidates": ("perft-r", "lora-qv", "full")}, {"candidates": ("perft-r", "lora-qv"), "num_seeds": 5}]
)  # fmt: skip
def test_a_pilot_ends_within_its_budget_with_every_seed(pilot, processes: int, settings: dict[str, Any]) -> None:
    one = pilot({"others": 0.5}, processes, budget_minutes=20.0, **settings)
    plan, _, seeds = one.finish()
    assert seeds == plan.num_seeds
    assert one.machine.seconds <= 20 * 60


def test_a_control_is_paid_for_beside_the_finalists(pilot) -> None:
    names = ("perft-r", "lora-qv", "perft-r-frozen-router")
    one = pilot({"others": 0.5}, 1, candidates=names, num_finalists=1, steps=256, budget_minutes=60.0)
    _, plan = one.plan()
    before = one.machine.seconds
    plan, finalists, _ = one.finish()
    assert finalists == ["perft-r", "perft-r-frozen-router"]
    finals = [spec for spec in one.machine.ran if spec["stage"] == "final" and spec["max_steps"]]
    assert len(finals) == 6
    assert one.machine.seconds - before <= plan.estimate_s


def test_finalists_are_fewer_where_they_and_their_controls_no_longer_fit(pilot) -> None:
    names = ("perft-r", "lora-qv", "perft-s", "full", "perft-r-frozen-router")
    one = pilot({"others": 0.5}, 1, candidates=names, budget_minutes=120.0)
    trials, plan = one.plan()
    final_s = STARTUP_S + FINISH_S + 0.5 * plan.steps["full"]
    for fit in (5, 4, 3):  # a control among them
        one.machine.seconds = 120 * 60 - plan.num_seeds * fit * final_s - 1
        assert one._num_finalists(plan, trials) == fit - 1
    one.machine.seconds = 120 * 60
    assert one._num_finalists(plan, trials) == 2


NINE = ("perft-r", "lora-qv", "perft-s", "full", "perft-e", "lora-experts", "perft-d", "perft-r-many", "perft-r-wide")


def test_candidates_asked_for_by_name_are_refused_as_soon_as_that_is_certain(pilot) -> None:
    one = pilot({"others": 5.0}, startup_s=30.0, candidates=NINE, budget_minutes=1.0)
    told = r"too small: perft-r with 64 steps .*, without lora-qv, .*, perft-r-wide, not tried yet"
    with pytest.raises(ValueError, match=told) as caught:
        one.plan()
    assert [spec["candidate"]["name"] for spec in one.machine.ran] == ["base", "perft-r"]
    enough = int(str(caught.value).partition("the same command with --budget-minutes ")[2].split()[0])
    again = pilot({"others": 5.0}, startup_s=30.0, candidates=NINE, budget_minutes=enough)
    assert again.plan()[1].candidates == NINE


@pytest.mark.parametrize("equal", ["tokens", "time"])
def test_no_more_is_tried_where_not_even_the_first_two_fit(pilot, equal: str) -> None:
    one = pilot({"others": 5.0}, budget_minutes=1.0, equal=equal)
    with pytest.raises(ValueError, match="too small: perft-r with 64 steps"):
        one.plan()
    assert [spec["candidate"]["name"] for spec in one.machine.ran] == ["base", "perft-r"]


def test_under_equal_time_one_slow_candidate_asked_for_by_name_waits_for_the_others(pilot) -> None:
    """With the first two alone the steps of the fast one would be too many."""
    names = ("perft-r", "lora-qv", "perft-s")
    one = pilot({"others": 0.1, "lora-qv": 10.0}, 1, candidates=names, equal="time", budget_minutes=75.0)
    assert set(one.plan()[1].candidates) == set(names)


SHORT = {"min_steps": 1, "learning_rates": (1e-3,), "num_seeds": 1}


def test_a_refusal_names_the_slowest_trial_and_the_command_that_goes_on(pilot) -> None:
    slow = {"candidates": ("perft-r", "lora-qv"), **SHORT}
    one = pilot({"others": 0.5, "lora-qv": 60.0}, budget_minutes=6.0, **slow)
    with pytest.raises(ValueError, match="too small") as caught:
        one.plan()
    told = str(caught.value)
    assert "the slowest of them lora-qv with 307 s" in told
    again = int(told.partition("the same command with --budget-minutes ")[2].split()[0])
    plan, _, seeds = pilot({"others": 0.5, "lora-qv": 60.0}, budget_minutes=again, **slow).finish()
    assert (set(plan.candidates), seeds) == ({"perft-r", "lora-qv"}, 1)


def test_a_budget_that_trials_alone_have_spent_need_not_be_larger(pilot) -> None:
    one = pilot({"others": 0.1, "lora-qv": 130.0}, 1, candidates=("perft-r", "lora-qv"), **SHORT, budget_minutes=20.0)
    with pytest.raises(ValueError, match="kept: the same command goes on with it") as caught:
        one.plan()
    assert "the slowest of them lora-qv with 657 s" in str(caught.value)


@pytest.mark.parametrize(("processes", "limit"), [(1, 256), (2, 276), (4, 285), (16, 300)])
def test_a_slow_trial_ends_with_the_share_of_the_trials(pilot, processes: int, limit: int) -> None:
    steps = {"others": 0.5, "full": 300.0}
    one = pilot(steps, processes, budget_minutes=20.0)
    plan, _, seeds = one.finish()
    assert plan.left_out["full"] == f"longer than {limit} s"
    assert (len(plan.candidates) >= 3, seeds) == (True, 3)
    assert one.machine.seconds <= 20 * 60


def test_a_trial_no_slower_than_those_before_is_not_ended(pilot) -> None:
    """Half a minute before the share of the trials is over."""
    one = pilot({"others": 0.1}, 2, startup_s=70.0, budget_minutes=20.0)
    assert one._trial_limit({}) == 300
    one.machine.seconds = 270.0
    assert one._trial_limit({"perft-r": {"measured": {"wall_s": 72.5}}}) == 145
    named = pilot({"others": 0.1}, candidates=("perft-r",), budget_minutes=20.0)
    assert named._trial_limit({}) == math.inf


def test_gone_on_with_where_a_trial_fails_now(pilot, tmp_path: Path) -> None:
    """Another number of threads makes other arms, and the machine has less memory."""
    plan, _, _ = pilot({"others": 0.5}, budget_minutes=10.0).finish()
    assert "lora-qv" in plan.candidates
    one = pilot({"others": 0.5}, budget_minutes=10.0, threads=1)
    one.machine.kept, one.machine.failing = {}, {"lora-qv"}
    again, finalists, _ = one.finish()
    assert again.candidates == tuple(name for name in plan.candidates if name != "lora-qv")
    assert again.left_out == {**plan.left_out, "lora-qv": "no memory is left"}
    assert "lora-qv" not in {*again.steps, *again.rates, *again.epochs, *finalists}
    one.machine.kept, one.machine.failing = {}, set(plan.candidates)
    with pytest.raises(ValueError, match=r"no candidate can be trained here \(perft-r: no memory is left; "):
        one.plan()


def test_gone_on_with_under_another_budget_the_plans_own_is_told(pilot) -> None:
    one = pilot({"others": 0.5}, budget_minutes=10.0)
    one.finish()
    assert one.told is None
    again = pilot({"others": 0.5}, budget_minutes=120.0)
    plan, _, _ = again.finish()
    assert again.told == (
        "The plan was made for a budget of 10 minutes and is kept under 120: another --output makes another plan"
    )
    assert plan.left_out["lora-experts"] == "did not fit the budget of 10 minutes"


def test_fixed_steps_of_named_candidates_are_the_plan_of_every_budget(pilot) -> None:
    for budget in (30.0, 60.0):
        one = pilot({"others": 0.1}, candidates=("perft-r", "lora-qv"), steps=64, budget_minutes=budget)
        one.finish()
        assert one.told is None
