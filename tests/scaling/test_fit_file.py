"""A fit as a file: what comes back predicts the same, and what is no fit is refused by name."""

import json
import warnings

import numpy as np
import pytest

from hf_moe_ext.scaling.fit import DegenerateFitWarning, Fit, fit
from hf_moe_ext.scaling.fit_file import FitFileError, describe_fit, read_fit
from hf_moe_ext.scaling.fit_intervals import bootstrap
from hf_moe_ext.scaling.fit_solver import FitSettings
from hf_moe_ext.scaling.laws import joint
from hf_moe_ext.scaling.runs import make_runs


@pytest.fixture(scope="module")
def fitted() -> Fit:
    """The joint form, whose features saturate and multiply, on 60 noisy runs of the joint law."""
    draw = np.random.default_rng(0)
    columns = {
        "active_parameters": np.exp(draw.uniform(18, 22, 60)), "num_tokens": np.exp(draw.uniform(22, 25, 60)),
        "num_experts": 2.0 ** draw.integers(0, 6, 60),
    }  # fmt: skip
    columns["loss"] = joint.loss(*columns.values()) * np.exp(0.002 * draw.normal(size=60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateFitWarning)
        return fit("joint", make_runs(columns, ["bytes"] * 60), FitSettings(num_starts=4, num_finalists=2))


@pytest.fixture(scope="module")
def told(fitted):
    """As JSON has it."""
    return json.loads(json.dumps(describe_fit(fitted, bootstrap(fitted, 5), "runs.csv", level=0.8), allow_nan=False))


def test_what_comes_back_predicts_the_same(fitted, told, tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps(told))
    saved = read_fit(tmp_path / "fit.json")
    assert saved.predict(fitted.runs.columns) == pytest.approx(fitted.predict(fitted.runs.columns), rel=1e-12)
    assert saved.ranges == fitted.ranges
    assert (saved.form, saved.rmse, saved.num_runs) == (fitted.form, fitted.rmse, 60)
    assert saved.warnings == fitted.warnings
    # Beyond the runs too: a law is asked there, and flags it.
    beyond = {"active_parameters": [1e12], "num_tokens": [1e13], "num_experts": [64.0]}
    assert saved.predict(beyond) == pytest.approx(fitted.predict(beyond, extrapolate=True), rel=1e-12)


def test_everything_of_a_fit_is_said(fitted, told):
    assert told["degrees_of_freedom"] == 60 - 11
    assert told["tokenizer"] == "bytes"
    assert told["level"] == 0.8
    assert told["num_resamples"] == 5
    assert {name: one["value"] for name, one in told["coefficients"].items()} == fitted.coefficients
    assert all(one["low"] <= one["high"] for one in told["coefficients"].values())
    assert told["settings"]["num_starts"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.pop("theta"), "KeyError: 'theta'"),
        (lambda told: told["theta"].pop(), "joint has 11 parameters, theta has 10"),
        (lambda told: told.update(form="wishful"), "form must be one of"),
        (lambda told: told.update(rmse=float("nan")), "holds numbers that are not finite"),
        (lambda told: told["theta"].__setitem__(0, float("inf")), "holds numbers that are not finite"),
        (lambda told: told["centres"].clear(), "is no fit as recipes/fit_law.py writes it"),
        (lambda told: told["ranges"].update(num_tokens=[1]), "IndexError"),
    ],
)
def test_a_file_that_is_no_fit_is_refused(told, tmp_path, change, message):
    wrong = json.loads(json.dumps(told))
    change(wrong)
    (tmp_path / "fit.json").write_text(json.dumps(wrong))
    with pytest.raises(FitFileError, match=message):
        read_fit(tmp_path / "fit.json")


def test_no_json_and_no_file(tmp_path):
    (tmp_path / "fit.json").write_text("{")
    with pytest.raises(FitFileError, match="is no fit"):
        read_fit(tmp_path / "fit.json")
    with pytest.raises(FileNotFoundError):
        read_fit(tmp_path / "none.json")
