"""The optimiser of ``fit``: one Huber objective with its gradient, many starts of L-BFGS, in processes, under one bar."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from hf_moe_ext.cores import count_cores
from hf_moe_ext.scaling.fit_forms import find_form
from hf_moe_ext.scaling.law_form import START_GRID, Form, Prepared

HUBER_DELTA = 1e-3
NUM_STARTS = 60
SCREENING_ITERATIONS, MAX_ITERATIONS = 300, 4000
Array = np.ndarray
Solution = tuple[float, Array]


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    Attributes:
        num_starts: points of the start grid, drawn with the seed; the whole grid where it is smaller.
        huber_delta: where the residual of the log-loss turns from squares to absolute values.
        ridge: weight of half the squared exponents, against collinear terms.
        max_iterations: of L-BFGS from one start, before its memory is begun anew.
        num_finalists: starts that are followed to the end; the others stop after ``SCREENING_ITERATIONS``.
        num_processes: starts at a time; None: one per CPU, and never more than one per eight starts.
        progress: a bar on a terminal's standard error.
        seed: of the draw.
    """

    num_starts: int = NUM_STARTS
    huber_delta: float = HUBER_DELTA
    ridge: float = 0.0
    max_iterations: int = MAX_ITERATIONS
    num_finalists: int = 12
    num_processes: int | None = 1
    progress: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_starts", "max_iterations", "num_finalists"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be above 0, got {self.huber_delta}")
        if self.ridge < 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge}")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, or None for one per CPU, got {self.num_processes}")

    def count_processes(self, num_jobs: int) -> int:
        """Processes for so many starts."""
        wanted = count_cores() if self.num_processes is None else self.num_processes
        return max(1, min(wanted, num_jobs // 8 if self.num_processes is None else num_jobs))


@dataclass(frozen=True, eq=False)
class Problem:
    """What one start of L-BFGS needs; small, so that it travels to processes.

    Attributes:
        form: name of the form.
        data: features of the runs.
        log_target: [runs].
        weights: of the runs; times drawn in a bootstrap.
        settings: how.
    """

    form: str
    data: Prepared
    log_target: Array
    weights: Array
    settings: FitSettings

    def objective(self, theta: Array) -> tuple[float, Array]:
        """Weighted mean of Huber(residual / delta), twice, and its gradient [parameters]."""
        form, delta = find_form(self.form), self.settings.huber_delta
        with np.errstate(over="ignore", invalid="ignore"):
            predicted, slopes, _ = form.log_prediction(theta, self.data)
            scaled = (predicted - self.log_target) / delta
            pulls = np.minimum(np.maximum(scaled, -1), 1)
            weighted = self.weights * pulls / self.weights.sum()
            # s^2 up to 1, 2 |s| - 1 beyond.
            value = float(weighted @ (2 * scaled - pulls))
            gradient = slopes @ (2 / delta * weighted)
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            return 1e30, np.zeros_like(theta)
        if self.settings.ridge:
            exponents = np.array([not parameter.is_log for parameter in form.parameters]) * theta
            value += 0.5 * self.settings.ridge * float(exponents @ exponents)
            gradient = gradient + self.settings.ridge * exponents
        return value, gradient

    def solve(self, start: Array) -> Solution:
        """L-BFGS from one start to the end."""
        best = self.descend(start, self.settings.max_iterations)
        # Its memory goes stale in long flat valleys: begin anew from where it stopped, while that helps.
        for _ in range(3):
            value, theta = self.descend(best[1], self.settings.max_iterations)
            gained, best = best[0] - value, (value, theta)
            if gained <= 1e-4 * value:
                break
        return best

    def descend(self, start: Array, max_iterations: int) -> Solution:
        """One run of L-BFGS."""
        options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "maxcor": 30, "ftol": 1e-13, "gtol": 1e-9}
        result = require_scipy().minimize(self.objective, start, jac=True, method="L-BFGS-B", options=options)
        return float(result.fun), result.x

    def screen(self, start: Array) -> Solution:
        """One run, cut short."""
        return self.descend(start, min(SCREENING_ITERATIONS, self.settings.max_iterations))


def require_scipy() -> Any:
    """``scipy.optimize``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import scipy.optimize
    except ImportError as error:
        raise ImportError("fitting needs SciPy, which is not installed; run: pip install 'hf_moe_ext[plan]'") from error
    return scipy.optimize


def start_points(form: Form, centres: Mapping[str, float], settings: FitSettings) -> list[Array]:
    """Points of the printed grid, drawn without repetition; offsets moved to the centre of the runs."""
    axes = [START_GRID[parameter.kind] for parameter in form.parameters]
    size = int(np.prod([len(axis) for axis in axes]))
    drawn = random.Random(settings.seed)
    if size <= settings.num_starts:
        chosen = list(itertools.product(*axes))
    else:
        picks = drawn.sample(range(size), settings.num_starts)
        chosen = [_grid_point(axes, pick) for pick in picks]
    return [form.centre(np.array(point), centres) for point in chosen]


def _grid_point(axes: Sequence[Sequence[float]], pick: int) -> tuple[float, ...]:
    point = []
    for axis in axes:
        pick, position = divmod(pick, len(axis))
        point.append(axis[position])
    return tuple(point)


def run_jobs(jobs: Sequence[Callable[[], Solution]], settings: FitSettings, title: str) -> list[Solution]:
    """Every job's solution, in order; in processes, under one bar. Jobs are partial calls of a ``Problem``'s methods."""
    num_processes = settings.count_processes(len(jobs))
    with _progress(settings.progress, title, len(jobs)) as advance:
        if num_processes == 1:
            results = []
            for job in jobs:
                results.append(job())
                advance()
            return results
        # Spawned, not forked: the caller's process may have threads (torch has).
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(job): i for i, job in enumerate(jobs)}
            found: dict[int, Solution] = {}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                advance()
    return [found[i] for i in range(len(jobs))]


def search(problem: Problem, starts: Sequence[Array], settings: FitSettings) -> Solution:
    """All starts a little way, the best of them to the end."""
    form = problem.form
    screened = run_jobs([partial(problem.screen, start) for start in starts], settings, f"{form}: {len(starts)} starts")
    screened.sort(key=lambda solution: solution[0])
    finalists = [partial(problem.solve, theta) for _, theta in screened[: settings.num_finalists]]
    return min(run_jobs(finalists, settings, f"{form}: the best {len(finalists)}"), key=lambda solution: solution[0])


class _progress:
    """A bar while jobs run; nothing unless asked for."""

    def __init__(self, wanted: bool, title: str, total: int) -> None:
        self.wanted, self.title, self.total = wanted, title, total

    def __enter__(self) -> Callable[[], None]:
        if not self.wanted:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task(self.title, total=self.total)
        return lambda: self.bar.advance(task)

    def __exit__(self, *error: object) -> None:
        if self.wanted:
            self.bar.stop()
