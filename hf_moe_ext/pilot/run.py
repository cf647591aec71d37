"""A whole pilot: rows, trial steps, plan, rates, finalists, recommendation, report; each part kept as soon as it is there."""

import math
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hf_moe_ext.cores import count_cores
from hf_moe_ext.pilot import stages
from hf_moe_ext.pilot.candidates import Candidate, choose_candidates
from hf_moe_ext.pilot.duration import Speed, estimate_seed
from hf_moe_ext.pilot.folder import PLAN, RESULT, claim_folder, read_json, write_json
from hf_moe_ext.pilot.plan import MIN_TRAINED, Plan, Room, fills_budget, make_plan, refuse_hopeless, tell_budget
from hf_moe_ext.pilot.pool import NO_LIMITS, Pool, ProcessPool, Result, Spec
from hf_moe_ext.pilot.progress import Progress
from hf_moe_ext.pilot.request import PilotRequest
from hf_moe_ext.pilot.subject import load_tokenizer, read_subject
from hf_moe_ext.pilot.trials import BASE, Trials, leave_out_too_large, read_speeds, try_out

TRIAL_SHARE = 0.25  # of the budget; what was not tried by then is left out


def run_pilot(request: PilotRequest, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the pilot, or go on with the one in the folder.

    Args:
        request: What is asked.
        folder: Gets everything; a folder of the same settings is gone on with.
        progress: Shows what runs; None shows nothing.

    Returns:
        What `pilot.json` holds.

    Raises:
        ValueError: The request cannot be carried out, or not within its budget.
        NoSpaceError: The disk is full; what is finished is kept.
        RuntimeError: The frozen base itself could not be measured.
    """
    pilot = _Pilot(request, folder, progress or Progress(quiet=True))
    with _ending_on_sigterm():
        try:
            return pilot.run()
        finally:  # also on Ctrl-C
            if pilot.pool is not None:
                pilot.pool.close()


class _Pilot:
    """The state of one run."""

    def __init__(self, request: PilotRequest, folder: Path, progress: Progress) -> None:
        self.request, self.folder, self.progress = request, folder, progress
        self.began = time.monotonic()
        self.pool: Pool | None = None

    def run(self) -> dict[str, Any]:
        """All parts in order."""
        from hf_moe_ext.pilot import measures, rows
        from hf_moe_ext.pilot.summary import conclude

        request = self.request
        self.subject = read_subject(request.model)
        candidates = self._choose()
        if request.hardware is not None:  # a name that is none is told now and not at the end
            from hf_moe_ext.scaling.hardware import find_hardware

            find_hardware(request.hardware, request.hardware_file)
        if request.metric not in (None, rows.CHOICES_METRIC):
            measures.load_metric(str(request.metric))
        tokenizer = load_tokenizer(request.model)
        resumed = claim_folder(self.folder, request.describe())
        facts = rows.prepare_rows(request, tokenizer, self.folder)
        self.pool = self._open_pool()
        by_name = {candidate.name: candidate for candidate in candidates}
        with self.progress:
            trials, plan = self._plan(candidates, facts)
            other_budget = self._tell_other_budget(plan)
            if other_budget is not None:
                self.progress.console.print(other_budget)
            kept = [by_name[name] for name in plan.candidates]
            run: Callable[[str, Sequence[Spec]], dict[str, Result]] = self._run
            settings = {c.name: self._settings(c) for c in kept}
            found = stages.search_rates(run, kept, plan, settings, request.seed)
            counts = {n: int(t["deterministic"]["parameters"]["trainable"]) for n, t in trials.items()}
            names = stages.choose_finalists(found, self._num_finalists(plan, trials), counts)
            finalists = [(by_name[name], float(found[name].rate or 0.0)) for name in names]
            results, seeds_run = stages.run_finalists(
                run, finalists, plan, settings, request.seed, None if request.steps else self._deadline()
            )
        told = conclude(
            request, self.subject, facts, plan, trials, found, results, seeds_run, by_name,
            {"minutes": (time.monotonic() - self.began) / 60, "resumed": resumed, "machine": self._machine(),
             "other_budget": other_budget},
        )  # fmt: skip
        write_json(self.folder / RESULT, told)
        return told

    def _choose(self) -> list[Candidate]:
        """The candidates; a dense model needs a home to be upcycled into, or candidates that do without."""
        request, subject = self.request, self.subject
        candidates = choose_candidates(request.candidates, subject.is_moe, subject.why_not_moe)
        if subject.why_not_upcycled and any(c.kind == "upcycle" for c in candidates):
            raise ValueError(
                f"--model {request.model} is dense and cannot be upcycled: {subject.why_not_upcycled}. To compare what "
                "needs no experts, give --candidates lora-qv --candidates full."
            )
        return candidates

    def _open_pool(self) -> Pool:
        request = self.request
        limit_s = max(600.0, 60 * request.budget_minutes)
        if request.ray_address is not None:
            from hf_moe_ext.pilot.ray_pool import RayPool

            return RayPool(self.folder, request.ray_address, self._threads(), limit_s)
        return ProcessPool(self.folder, request.processes, self._threads(), limit_s)

    def _threads(self) -> int:
        return self.request.threads or max(1, count_cores() // self.request.processes)

    def _deadline(self) -> float:
        return self.began + 60 * self.request.budget_minutes

    def _settings(self, candidate: Candidate) -> dict[str, Any]:
        """What every arm of a candidate is told."""
        request = self.request
        return {
            "model": self._upcycle(candidate) if candidate.kind == "upcycle" else request.model,
            "folder": str(self.folder), "batch_size": request.batch_size, "max_length": request.max_length,
            "dtype": request.dtype, "threads": self._threads(), "metric": request.metric,
            "metric_rows": request.metric_rows, "max_new_tokens": request.max_new_tokens,
        }  # fmt: skip

    def _upcycle(self, candidate: Candidate) -> str:
        """The folder of the dense model with experts; made once."""
        from hf_moe_ext.convert import upcycle
        from hf_moe_ext.pilot.folder import full_disk_told

        target = self.folder / "upcycled" / candidate.name.replace(":", "-").replace(",", "-")
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with full_disk_told(self.folder):
                upcycle(self.request.model, target, form="ders", seed=self.request.seed, **candidate.settings)
        return str(target)

    def _plan(self, candidates: Sequence[Candidate], facts: dict[str, Any]) -> tuple[Trials, Plan]:
        """Trial steps of every candidate, then the plan; both are kept, so that a restart goes on with the same ones."""
        request, saved = self.request, read_json(self.folder / PLAN)
        if saved is not None:
            plan = Plan.from_dict(saved)
            wanted = [c for c in candidates if c.name in (BASE, *plan.candidates)]
            trials, failed = try_out(self._run, wanted, self._settings, request, lambda *_: None, lambda _: math.inf)
            plan = plan.without(failed)  # another machine, or a full one, may fail what the first one could do
            _refuse_none(plan.candidates, failed)
            return trials, plan
        fitting, large = leave_out_too_large(candidates, self.subject.num_parameters, request.dtype, request.processes)
        trials, left_out = try_out(
            self._run,
            fitting,
            self._settings,
            request,
            lambda trials, waiting: self._why_enough(fitting, trials, facts, waiting),
            self._trial_limit,
        )
        asked = self._asked(fitting, trials, facts)
        left_out = large | left_out
        _refuse_none(asked.candidates, left_out)
        plan = make_plan(*asked, left_out)
        write_json(self.folder / PLAN, plan.as_dict())
        return trials, plan

    def _tell_other_budget(self, plan: Plan) -> str | None:
        """One sentence where the plan was made for another budget and could be another one under this."""
        given = self.request.budget_minutes
        is_fixed = self.request.steps is not None and not plan.left_out
        if is_fixed or math.isclose(given, plan.budget_minutes, rel_tol=1e-6):
            return None
        return (
            f"The plan was made for a budget of {plan.budget_minutes:g} minutes and is kept under {given:g}: another --output "
            "makes another plan"
        )

    def _asked(self, candidates: Sequence[Candidate], trials: Trials, facts: dict[str, Any]) -> "_Asked":
        """What the plan is made of, as far as it is known by now."""
        request, speeds = self.request, read_speeds(trials)
        spent = time.monotonic() - self.began
        room = Room(
            60 * request.budget_minutes - spent, spent, request.processes, request.num_seeds, request.num_finalists,
            request.min_steps, request.steps, request.batch_size, facts["train_rows"], request.equal == "time",
            may_drop=not request.candidates, trial_s={n: t["measured"]["wall_s"] for n, t in trials.items()},
        )  # fmt: skip
        tried = [c for c in candidates if c.name in speeds]
        return _Asked(tried, speeds, {c.name: request.learning_rates or c.learning_rates for c in tried}, room)

    def _why_enough(
        self, candidates: Sequence[Candidate], trials: Trials, facts: dict[str, Any], waiting: Sequence[str]
    ) -> str | None:
        """Why no more candidates need be tried; None where they do.

        Raises:
            ValueError: No plan will fit the budget.
        """
        asked = self._asked(candidates, trials, facts)
        room = asked.room
        refuse_hopeless(*asked, waiting)
        if fills_budget(*asked):
            return tell_budget(room)
        if room.may_drop and len(trials) > 2 and room.spent > TRIAL_SHARE * (room.spent + room.seconds):
            return "its speed could not be tried within a quarter of the budget"
        return None

    def _trial_limit(self, trials: Trials) -> float:
        """Seconds for one more trial: what is left of the trials' share, or twice the slowest one before."""
        if self.request.candidates:
            return math.inf
        left = self.began + TRIAL_SHARE * 60 * self.request.budget_minutes - time.monotonic()
        return max(left, 2 * max((t["measured"]["wall_s"] for t in trials.values()), default=0.0))

    def _run(self, stage: str, specs: Sequence[Spec], limits: Mapping[str, float] = NO_LIMITS) -> dict[str, Result]:
        with self.progress.stage(stage, len(specs)) as done:
            assert self.pool is not None
            return self.pool.run(specs, done, limits)

    def _num_finalists(self, plan: Plan, trials: Trials) -> int:
        """Fewer than planned where the rounds before took longer than they should have."""
        if self.request.steps:
            return plan.num_finalists
        left, speeds = self._deadline() - time.monotonic(), read_speeds(trials)
        for count in range(plan.num_finalists, MIN_TRAINED, -1):
            seed = estimate_seed(plan.candidates, speeds, plan.steps, count, self.request.processes)
            if plan.num_seeds * seed <= left:
                return count
        return min(plan.num_finalists, MIN_TRAINED)

    def _machine(self) -> dict[str, Any]:
        return {
            "processor": platform.processor() or platform.machine(),
            "processes": self.request.processes,
            "threads": self._threads(),
        }


class _Asked(NamedTuple):
    """The first arguments of `make_plan`."""

    candidates: list[Candidate]
    speeds: dict[str, Speed]
    rates: dict[str, tuple[float, ...]]
    room: Room


def _refuse_none(candidates: Sequence[Any], left_out: Mapping[str, str]) -> None:
    if not candidates:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no candidate can be trained here ({told}). Give other --candidates.")


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that its arms end too."""

    def end(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: the caller's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
