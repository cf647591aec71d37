"""How far a fit is to be trusted: hold-outs by size and by sparsity, and runs that do not belong."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_moe_ext.scaling.fit import Fit, fit
from hf_moe_ext.scaling.fit_solver import Array, FitSettings, require_scipy
from hf_moe_ext.scaling.law_form import Form
from hf_moe_ext.scaling.runs import Runs, RunsError


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
