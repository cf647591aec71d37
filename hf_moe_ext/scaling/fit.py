"""Fits a law's form to runs: logarithmic scales, log-sum-exp, Huber on the log-loss, L-BFGS from a grid of starts.

Analytic gradients (the softmax of the terms). What comes out is a prediction with an interval, never a coefficient to be
quoted: at S = 0 terms are collinear and single numbers drift widely. Outside the runs a prediction is refused unless asked
for, and then flagged and widened.
"""

import itertools
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from typing import Any

import numpy as np

from hf_moe_ext.scaling.fit_forms import START_GRID, Form, Prepared, find_form
from hf_moe_ext.scaling.runs import Runs, RunsError

HUBER_DELTA = 1e-3
NUM_STARTS = 60
SCREENING_ITERATIONS, MAX_ITERATIONS = 300, 4000
Array = np.ndarray
Solution = tuple[float, Array]


class DegenerateFitWarning(UserWarning):
    """Coefficients that mean nothing on their own; predictions inside the runs may still be good."""


class ExtrapolationError(ValueError):
    """A prediction outside the fitted runs that was not asked for as such."""


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
        wanted = cpu_count() or 1 if self.num_processes is None else self.num_processes
        return max(1, min(wanted, num_jobs // 8 if self.num_processes is None else num_jobs))


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted form.

    Attributes:
        form: what was fitted.
        theta: the numbers L-BFGS moved, offsets at the centre of the runs.
        runs: what it was fitted to.
        centres: of the features.
        objective: Huber loss reached, in units of ``huber_delta`` squared, mean over runs.
        rmse: root mean square error on the runs, in the target's unit (nats per token).
        settings: how.
        warnings: what makes its coefficients meaningless.
    """

    form: Form
    theta: Array
    runs: Runs
    centres: Mapping[str, float]
    objective: float
    rmse: float
    settings: FitSettings
    warnings: tuple[str, ...] = ()

    @property
    def coefficients(self) -> dict[str, float]:
        """By the paper's names; see ``warnings`` before believing one."""
        return self.form.coefficients(self.theta, self.centres)

    @property
    def degrees_of_freedom(self) -> int:
        """Runs less parameters."""
        return len(self.runs) - len(self.theta)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of each variable in the runs."""
        return {name: (float(self.runs[name].min()), float(self.runs[name].max())) for name in self.form.variables}

    def outside(self, data: Mapping[str, Any]) -> dict[str, Array]:
        """Which points lie outside the runs, by variable; only variables with such points."""
        found = {}
        for name, (low, high) in self.ranges.items():
            values = np.asarray(data[name], dtype=float)
            slack = 1e-9 * max(abs(low), abs(high))
            beyond = (values < low - slack) | (values > high + slack)
            if np.any(beyond):
                found[name] = beyond
        return found

    def predict(self, data: Mapping[str, Any], extrapolate: bool = False) -> Array:
        """The target, [points], by columns of the form's variables.

        Raises:
            ExtrapolationError: points outside the runs, without ``extrapolate``.
        """
        if not extrapolate:
            self._refuse_outside(data)
        columns = {name: np.atleast_1d(np.asarray(data[name], dtype=float)) for name in self.form.variables}
        return np.exp(self.form.log_prediction(self.theta, self.form.prepare(columns, self.centres))[0])

    def _refuse_outside(self, data: Mapping[str, Any]) -> None:
        for name, beyond in self.outside(data).items():
            low, high = self.ranges[name]
            raise ExtrapolationError(
                f"{int(np.sum(beyond))} points have {name} outside {low:.4g} to {high:.4g}, the runs; pass extrapolate=True "
                "for a flagged prediction with a wider interval, or fit runs that reach there"
            )

    def rmse_on(self, runs: Runs) -> float:
        """Root mean square error on other runs, inside the range or not."""
        errors = self.predict(runs.columns, extrapolate=True) - runs[self.form.target]
        return float(np.sqrt(np.mean(errors**2)))


# --- One start --------------------------------------------------------------------------------------------------------


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


# --- A fit ------------------------------------------------------------------------------------------------------------


def fit(form: Form | str, runs: Runs, settings: FitSettings | None = None) -> Fit:
    """The best of all starts.

    Args:
        form: or its name.
        runs: with the form's variables and its target.
        settings: how; None: 60 starts in this process.

    Raises:
        RunsError: too few runs, a variable that takes one value, a column missing or not positive.
        ImportError: no SciPy.

    Warns:
        DegenerateFitWarning: coefficients that mean nothing on their own.
    """
    form, settings = find_form(form) if isinstance(form, str) else form, settings or FitSettings()
    check_runs(form, runs)
    data = form.prepare(runs.columns)
    starts = start_points(form, data.centres, settings)
    problem = Problem(form.name, data, np.log(runs[form.target]), np.ones(len(runs)), settings)
    value, theta = search(problem, starts, settings)
    return make_fit(form, runs, data, theta, value, settings)


def make_fit(form: Form, runs: Runs, data: Prepared, theta: Array, objective: float, settings: FitSettings) -> Fit:
    """A result with its errors and its warnings."""
    predicted, slopes, shares = form.log_prediction(theta, data)
    errors = np.exp(predicted) - runs[form.target]
    found = tuple(_degeneracies(form, theta, data, slopes, shares))
    for message in found:
        warnings.warn(f"{form.name}: {message}", DegenerateFitWarning, stacklevel=3)
    return Fit(form, theta, runs, data.centres, objective, float(np.sqrt(np.mean(errors**2))), settings, found)


LARGEST_EXPONENT, LARGEST_LOG_SCALE, SMALLEST_SHARE, LARGEST_CONDITION = 1.5, 30.0, 1e-3, 1e6


def _degeneracies(form: Form, theta: Array, data: Prepared, slopes: Array, shares: Array) -> list[str]:
    natural = form.natural(theta, data.centres)
    messages, offsets = [], {term.offset for term in form.terms}
    for parameter, value in zip(form.parameters, natural, strict=True):
        if not parameter.is_log and parameter.name not in offsets and abs(value) > LARGEST_EXPONENT:
            messages.append(f"exponent {parameter.name} = {value:.2f} is degenerate")
        elif parameter.is_log and abs(value) > LARGEST_LOG_SCALE:
            messages.append(f"{parameter.name} = e^{value:.0f} is degenerate")
    for term, share in zip(form.terms, shares, strict=True):
        if len(form.terms) > 1 and share.max() < SMALLEST_SHARE:
            messages.append(f"term {term.offset} is nowhere more than {share.max():.0e} of the whole: it vanished")
    lengths = np.linalg.norm(slopes, axis=1, keepdims=True)
    if np.any(lengths == 0) or np.linalg.cond(slopes / lengths) > LARGEST_CONDITION:
        messages.append("the runs do not determine all coefficients: some trade against each other freely")
    return messages


def check_runs(form: Form, runs: Runs) -> None:
    """Refuse what cannot be fitted, before anything runs.

    Raises:
        RunsError: see ``fit``.
    """
    for name in (*form.variables, form.target):
        values = runs[name]
        lowest = 0.0 if name == "sparsity" else np.finfo(float).tiny
        if not np.all(np.isfinite(values)) or np.any(values < lowest):
            row = int(np.argmax(~np.isfinite(values) | (values < lowest)))
            rule = "from 0 to below 1" if name == "sparsity" else "finite and positive"
            raise RunsError(f"{name} must be {rule} to fit {form.name}, got {values[row]} in run {row}; leave it out")
        if name == "sparsity" and np.any(values >= 1):
            raise RunsError(f"sparsity must be from 0 to below 1 to fit {form.name}, got {values.max()}")
        if name == "num_experts" and np.any(values < 1):
            raise RunsError(f"num_experts must be at least 1 to fit {form.name}, got {values.min()}")
        if name != form.target and np.ptp(values) == 0:
            shorter = {"abnar": "abnar_size", "joint": "joint_size"}.get(form.name)
            hint = f"; fit {shorter!r}, which leaves it out" if name == "num_tokens" and shorter else ""
            raise RunsError(f"{name} is {values[0]:.4g} in every run, so {form.name} cannot be fitted{hint}")
    free = len(runs) - len(form.parameters)
    if free < 1:
        raise RunsError(
            f"{len(runs)} runs for the {len(form.parameters)} parameters of {form.name} leave {free} degrees of freedom; at "
            f"least {len(form.parameters) + 1} runs are needed, some {3 * len(form.parameters)} to be of use"
        )


# --- Bootstrap and intervals ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Interval:
    """Prediction intervals, [points] each.

    Attributes:
        low: lower end.
        high: upper end.
        level: of what share of new runs is meant to lie inside.
        outside: variables in which a point lies outside the runs, one tuple per point; these intervals are wider.
    """

    low: Array
    high: Array
    level: float
    outside: tuple[tuple[str, ...], ...] = field(default_factory=tuple)

    def covers(self, values: Array) -> float:
        """Share of values inside."""
        return float(np.mean((values >= self.low) & (values <= self.high)))


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Refits of resampled runs, and how wrong the form was when it had to extrapolate among the runs themselves.

    Attributes:
        fit: the fit they started from.
        thetas: [resamples, parameters].
        log_residuals: of the fit, [runs], scaled for its degrees of freedom.
        reach_errors: by variable: RMSE of log-loss, per unit of log distance, on the largest values held out of the runs.
        seed: of the draws.
    """

    fit: Fit
    thetas: Array
    log_residuals: Array
    reach_errors: Mapping[str, float]
    seed: int

    def coefficient_intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Where each coefficient lies in this share of the refits."""
        rows = [self.fit.form.coefficients(theta, self.fit.centres) for theta in self.thetas]
        tail = (1 - level) / 2
        ends = {name: np.quantile([row[name] for row in rows], (tail, 1 - tail)) for name in rows[0]}
        return {name: (float(low), float(high)) for name, (low, high) in ends.items()}

    def interval(
        self, data: Mapping[str, Any], level: float = 0.9, extrapolate: bool = False, num_draws: int = 4000
    ) -> Interval:
        """Where a new run's target is expected: refits, residuals and, beyond the runs, the error of reaching there.

        Raises:
            ExtrapolationError: points outside the runs, without ``extrapolate``.
            ValueError: a level that is none.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        if not extrapolate:
            self.fit._refuse_outside(data)
        form = self.fit.form
        columns = {name: np.atleast_1d(np.asarray(data[name], dtype=float)) for name in form.variables}
        prepared = form.prepare(columns, self.fit.centres)
        logs = np.stack([form.log_prediction(theta, prepared)[0] for theta in self.thetas])
        draws = np.random.default_rng(self.seed)
        num_points = logs.shape[1]
        picked = logs[draws.integers(len(logs), size=num_draws)]
        noise = draws.choice(self.log_residuals, size=(num_draws, num_points))
        reach = self._reach(columns) * draws.standard_normal((num_draws, num_points))
        tail = (1 - level) / 2
        low, high = np.exp(np.quantile(picked + noise + reach, (tail, 1 - tail), axis=0))
        beyond = self.fit.outside(columns)
        outside = tuple(tuple(n for n, flags in beyond.items() if flags[i]) for i in range(num_points))
        return Interval(low, high, level, outside)

    def _reach(self, columns: Mapping[str, Array]) -> Array:
        """Standard deviation of log-loss from going beyond the runs; 0 inside."""
        squares = np.zeros(len(next(iter(columns.values()))))
        for name, error in self.reach_errors.items():
            squares += (error * _distance_beyond(name, columns[name], self.fit.runs[name])) ** 2
        return np.sqrt(squares)


def _on_log_axis(name: str, values: Array) -> Array:
    return -np.log(np.maximum(1 - values, 1e-3)) if name == "sparsity" else np.log(values)


def _distance_beyond(name: str, values: Array, fitted: Array) -> Array:
    """How far values lie beyond the fitted ones, on the logarithm (of 1 - S for a sparsity)."""
    axis, inside = _on_log_axis(name, values), _on_log_axis(name, fitted)
    return np.maximum(0, axis - inside.max()) + np.maximum(0, inside.min() - axis)


def bootstrap(fitted: Fit, num_resamples: int = 100, settings: FitSettings | None = None) -> Bootstrap:
    """Refit resampled runs, each from the fit (a warm start), and measure the error of extrapolating.

    Args:
        fitted: the fit.
        num_resamples: refits.
        settings: None: the fit's own.
    """
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be at least 2, got {num_resamples}")
    settings = settings or fitted.settings
    form, runs = fitted.form, fitted.runs
    data = form.prepare(runs.columns, fitted.centres)
    target = np.log(runs[form.target])
    draws = np.random.default_rng(settings.seed)
    jobs = []
    for _ in range(num_resamples):
        weights = np.bincount(draws.integers(len(runs), size=len(runs)), minlength=len(runs)).astype(float)
        # Only runs that were drawn can pull; the others keep their place with weight 0.
        jobs.append(partial(Problem(form.name, data, target, weights, settings).solve, fitted.theta))
    thetas = np.stack([theta for _, theta in run_jobs(jobs, settings, f"{form.name}: bootstrap")])
    residuals = target - form.log_prediction(fitted.theta, data)[0]
    inflated = residuals * np.sqrt(len(runs) / max(1, fitted.degrees_of_freedom))
    return Bootstrap(fitted, thetas, inflated, _reach_errors(fitted, settings), settings.seed)


def _reach_errors(fitted: Fit, settings: FitSettings) -> dict[str, float]:
    """Hold out the largest sizes and sparsities of the fit's own runs, one level of each, and see how wrong a refit is."""
    form, errors = fitted.form, {}
    jobs, kept = [], []
    for name in filter(None, (form.size_variable, form.sparsity_variable)):
        split = _largest_level(name, fitted.runs[name], len(form.parameters))
        if split is None:
            continue
        runs = fitted.runs.keep(~split)
        data = form.prepare(runs.columns, fitted.centres)
        problem = Problem(form.name, data, np.log(runs[form.target]), np.ones(len(runs)), settings)
        jobs.append(partial(problem.solve, fitted.theta))
        kept.append((name, split))
    serial = FitSettings(**{**vars(settings), "num_processes": 1, "progress": False})
    for (name, split), (_, theta) in zip(kept, run_jobs(jobs, serial, ""), strict=True):
        held = fitted.runs.keep(split)
        prepared = form.prepare(held.columns, fitted.centres)
        residuals = form.log_prediction(theta, prepared)[0] - np.log(held[form.target])
        distance = _distance_beyond(name, held[name], fitted.runs.keep(~split)[name])
        errors[name] = float(np.sqrt(np.mean((residuals / distance) ** 2)))
    return errors


def _largest_level(name: str, values: Array, num_parameters: int) -> Array | None:
    """The runs of the largest values, at least three and clearly beyond the rest; None where too few would be left."""
    axis = _on_log_axis(name, values)
    for level in sorted(set(axis.tolist()), reverse=True):
        split = axis >= level
        if len(values) - split.sum() <= num_parameters:
            return None
        if split.sum() >= 3 and axis[split].min() - axis[~split].max() > 1e-6:
            return split
    return None


# --- Hold-outs and outliers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HoldOut:
    """A fit of the smaller runs and its error on the larger ones.

    Attributes:
        variable: what was held out by.
        bound: runs at or above it were held out.
        fit: of the others.
        held: the runs held out.
        rmse: on them, in the target's unit.
    """

    variable: str
    bound: float
    fit: Fit
    held: Runs
    rmse: float


def hold_out(
    form: Form | str, runs: Runs, variable: str, bound: float, settings: FitSettings | None = None, where: Any = None
) -> HoldOut:
    """Fit the runs below ``bound`` and measure on those at or above it.

    Args:
        form: or its name.
        runs: all of them.
        variable: column to split by; by size and by sparsity both should be reported.
        bound: where to split.
        settings: how to fit.
        where: only these runs (a mask) may be held out.

    Raises:
        RunsError: nothing is held out, or too few are left.
    """
    held = runs[variable] >= bound
    if where is not None:
        held &= np.asarray(where, dtype=bool)
    if not held.any():
        raise RunsError(f"no run has {variable} >= {bound:.4g}; the largest is {runs[variable].max():.4g}")
    fitted = fit(form, runs.keep(~held), settings)
    left_out = runs.keep(held)
    return HoldOut(variable, bound, fitted, left_out, fitted.rmse_on(left_out))


def find_outliers(fitted: Fit, significance: float = 0.05) -> Array:
    """Indices of runs whose residual is too large to be chance, worst first.

    Residuals of the log-loss over a robust scale (median of absolute values) and the run's own leverage, against Student's t
    with the level divided by the number of runs (Bonferroni).
    """
    require_scipy()
    from scipy.stats import t as student

    form, runs = fitted.form, fitted.runs
    data = form.prepare(runs.columns, fitted.centres)
    predicted, slopes, _ = form.log_prediction(fitted.theta, data)
    residuals = np.log(runs[form.target]) - predicted
    basis = np.linalg.svd(slopes, full_matrices=False)[2]
    leverage = np.minimum((basis**2).sum(axis=0), 0.99)
    freedom = max(1, fitted.degrees_of_freedom)
    scale = 1.4826 * np.median(np.abs(residuals)) * np.sqrt(len(runs) / freedom)
    if scale == 0:
        scale = np.finfo(float).tiny
    scores = np.abs(residuals) / (scale * np.sqrt(1 - leverage))
    bound = student.isf(significance / (2 * len(runs)), freedom)
    return np.array([i for i in np.argsort(-scores) if scores[i] > bound], dtype=int)
