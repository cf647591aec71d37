"""Fits a law's form to runs: logarithmic scales, log-sum-exp, Huber on the log-loss, L-BFGS from a grid of starts.

Analytic gradients (the softmax of the terms). What comes out is a prediction with an interval, never a coefficient to be
quoted: at S = 0 terms are collinear and single numbers drift widely. Outside the runs a prediction is refused unless asked
for, and then flagged and widened.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_moe_ext.scaling.fit_forms import find_form
from hf_moe_ext.scaling.fit_solver import Array, FitSettings, Problem, search, start_points
from hf_moe_ext.scaling.law_form import Form, Prepared
from hf_moe_ext.scaling.runs import Runs, RunsError


class DegenerateFitWarning(UserWarning):
    """Coefficients that mean nothing on their own; predictions inside the runs may still be good."""


class ExtrapolationError(ValueError):
    """A prediction outside the fitted runs that was not asked for as such."""


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
            self.refuse_outside(data)
        columns = {name: np.atleast_1d(np.asarray(data[name], dtype=float)) for name in self.form.variables}
        return np.exp(self.form.log_prediction(self.theta, self.form.prepare(columns, self.centres))[0])

    def refuse_outside(self, data: Mapping[str, Any]) -> None:
        """Raise for the first variable with points outside the runs.

        Raises:
            ExtrapolationError: naming it.
        """
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
