"""Intervals of a fit's predictions: refits of resampled runs, residuals and, beyond the runs, the error of reaching there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from hf_moe_ext.scaling.fit import Fit
from hf_moe_ext.scaling.fit_solver import Array, FitSettings, Problem, run_jobs


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
            self.fit.refuse_outside(data)
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
