"""A fit as JSON: what it was fitted to, its numbers with intervals, how far it is to be trusted; and back again."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe_ext.scaling.fit import Fit
from hf_moe_ext.scaling.fit_forms import find_form
from hf_moe_ext.scaling.fit_intervals import Bootstrap
from hf_moe_ext.scaling.fit_solver import Array
from hf_moe_ext.scaling.law_form import Form


class FitFileError(ValueError):
    """The file is no fit; the message says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class SavedFit:
    """What of a fit is needed to predict.

    Attributes:
        form: that was fitted.
        theta: its numbers, offsets at the centre of the runs.
        centres: of the features.
        ranges: smallest and largest value of each variable in the runs.
        rmse: on the runs, in the target's unit.
        num_runs: how many.
        source: file of the runs.
        warnings: what makes its coefficients meaningless.
    """

    form: Form
    theta: Array
    centres: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    rmse: float
    num_runs: int
    source: str
    warnings: tuple[str, ...] = ()

    def predict(self, data: Mapping[str, Any]) -> Array:
        """The target, [points], inside the range or not."""
        columns = {name: np.atleast_1d(np.asarray(data[name], dtype=float)) for name in self.form.variables}
        return np.exp(self.form.log_prediction(self.theta, self.form.prepare(columns, self.centres))[0])


def describe_fit(fitted: Fit, refits: Bootstrap, source: str, level: float = 0.9) -> dict[str, Any]:
    """All of a fit that can be said in JSON.

    Args:
        fitted: the fit.
        refits: its bootstrap.
        source: file of the runs.
        level: of the coefficients' intervals.
    """
    values, ends = fitted.coefficients, refits.coefficient_intervals(level)
    return {
        "form": fitted.form.name,
        "formula": fitted.form.title,
        "source": source,
        "tokenizer": fitted.runs.tokenizer,
        "num_runs": len(fitted.runs),
        "num_parameters": len(fitted.theta),
        "degrees_of_freedom": fitted.degrees_of_freedom,
        "coefficients": {name: {"value": values[name], "low": ends[name][0], "high": ends[name][1]} for name in values},
        "level": level,
        "num_resamples": len(refits.thetas),
        "rmse": fitted.rmse,
        "ranges": {name: list(ends) for name, ends in fitted.ranges.items()},
        "reach_errors": dict(refits.reach_errors),
        "warnings": list(fitted.warnings),
        "settings": dict(vars(fitted.settings)),
        "theta": [float(value) for value in fitted.theta],
        "centres": {name: float(value) for name, value in fitted.centres.items()},
    }


def read_fit(path: str | Path) -> SavedFit:
    """A fit that ``describe_fit`` described, from its file.

    Raises:
        FitFileError: it is none, or lacks something.
        OSError: no such file.
    """
    path = Path(path)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        form = find_form(told["form"])
        theta = np.array([float(value) for value in told["theta"]])
        centres = {name: float(told["centres"][name]) for name in form.features}
        ranges = {name: (float(told["ranges"][name][0]), float(told["ranges"][name][1])) for name in form.variables}
        saved = SavedFit(
            form, theta, centres, ranges, float(told["rmse"]), int(told["num_runs"]), str(told["source"]),
            tuple(map(str, told["warnings"])),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FitFileError(
            f"{path} is no fit as recipes/fit_law.py writes it ({type(error).__name__}: {error}); fit the runs again"
        ) from error
    if len(theta) != len(form.parameters):
        raise FitFileError(f"{path}: {form.name} has {len(form.parameters)} parameters, theta has {len(theta)}")
    numbers = [*theta, *centres.values(), saved.rmse, *(end for ends in ranges.values() for end in ends)]
    if not all(math.isfinite(number) for number in numbers):
        raise FitFileError(f"{path} holds numbers that are not finite; fit the runs again")
    return saved
