"""The fitter on synthetic runs whose truth is known, and what it refuses."""

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from hf_moe_ext.scaling.fit import DegenerateFitWarning, ExtrapolationError, fit
from hf_moe_ext.scaling.fit_checks import find_outliers, hold_out
from hf_moe_ext.scaling.fit_forms import FORMS, find_form
from hf_moe_ext.scaling.fit_intervals import bootstrap
from hf_moe_ext.scaling.fit_solver import FitSettings, Problem, start_points
from hf_moe_ext.scaling.law_form import START_GRID
from hf_moe_ext.scaling.laws import abnar, fine_grained, joint, leverage, routed
from hf_moe_ext.scaling.runs import RunsError, make_runs
from support.deepmind_runs import needs_data, standard_runs

FEW = FitSettings(num_starts=12, num_finalists=4)


def random_columns(num_runs=24, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "total_parameters": np.exp(draw.uniform(18, 23, num_runs)),
        "active_parameters": np.exp(draw.uniform(18, 22, num_runs)),
        "dense_parameters": np.exp(draw.uniform(17, 21, num_runs)),
        "num_tokens": np.exp(draw.uniform(22, 25, num_runs)),
        "sparsity": draw.choice([0, 0.5, 0.75, 0.9, 0.97], num_runs),
        "num_experts": 2.0 ** draw.integers(0, 9, num_runs),
        "granularity": 2.0 ** draw.integers(0, 4, num_runs),
        "activation_ratio": draw.uniform(0.02, 1, num_runs),
        "budget_flops": 10 ** draw.uniform(18, 21, num_runs),
    }


# The same laws, written elsewhere with the papers' coefficients.
PUBLISHED = {
    "abnar": (
        {"a": abnar.A, "alpha": abnar.ALPHA, "b": abnar.B, "beta": abnar.BETA, "c": abnar.C, "lambda": abnar.LAMBDA,
         "d": abnar.D, "delta": abnar.DELTA, "gamma": abnar.GAMMA, "e": abnar.E},
        lambda c: abnar.loss(c["total_parameters"], c["num_tokens"], c["sparsity"]),
    ),
    "joint": (
        {"a": joint.A, "alpha": joint.ALPHA, "delta": joint.DELTA, "gamma": joint.GAMMA, "b": joint.B,
         "beta": joint.BETA, "omega": joint.OMEGA, "zeta": joint.ZETA, "c": joint.IRREDUCIBLE,
         "E_start": joint.E_START, "E_max": joint.E_MAX},
        lambda c: joint.loss(c["active_parameters"], c["num_tokens"], c["num_experts"]),
    ),
    "routed": (
        {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 314.478},
        lambda c: routed.ROUTERS["S-Base"].loss(c["dense_parameters"], c["num_experts"]),
    ),
    "fine_grained": (
        {"a": fine_grained.A, "alpha": fine_grained.ALPHA, "b": fine_grained.B, "beta": fine_grained.BETA,
         "g": fine_grained.G, "gamma": fine_grained.GAMMA, "c": fine_grained.IRREDUCIBLE},
        lambda c: fine_grained.loss(c["total_parameters"], c["num_tokens"], c["granularity"]),
    ),
    "chinchilla": (
        {"a": fine_grained.DENSE_A, "alpha": fine_grained.DENSE_ALPHA, "b": fine_grained.DENSE_B,
         "beta": fine_grained.DENSE_BETA, "e": fine_grained.IRREDUCIBLE},
        lambda c: fine_grained.dense_loss(c["total_parameters"], c["num_tokens"]),
    ),
    "leverage": (
        {"a": leverage.A, "d": leverage.D, "gamma": leverage.GAMMA, "beta": leverage.BETA,
         "E_start": leverage.A_START, "E_max": leverage.A_MAX},
        lambda c: leverage.efficiency_leverage(c["activation_ratio"], c["granularity"], c["budget_flops"]),
    ),
}  # fmt: skip


def published_theta(form, values):
    fitted = []
    for parameter in form.parameters:
        value = values[parameter.name]
        if parameter.name == "E_max":
            value -= values["E_start"]
        fitted.append(np.log(value) if parameter.is_log else value / parameter.unit)
    return np.array(fitted)


@pytest.mark.parametrize("name", PUBLISHED)
def test_forms_are_the_laws(name):
    """A form with the paper's coefficients gives what the law's own module gives."""
    form, (values, law) = find_form(name), PUBLISHED[name]
    columns = random_columns()
    data = form.prepare(columns)
    theta = form.centre(published_theta(form, values), data.centres)
    predicted, _, shares = form.log_prediction(theta, data)
    np.testing.assert_allclose(np.exp(predicted), law(columns), rtol=1e-11)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    found = form.coefficients(theta, data.centres)
    assert found == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name):
    form, columns = find_form(name), random_columns()
    data = form.prepare(columns)
    settings = FitSettings(huber_delta=0.3, ridge=0.7)
    target = np.random.default_rng(1).normal(1, 0.3, 24)
    problem = Problem(name, data, target, np.arange(24) % 3 + 0.0, settings)
    step = 1e-6
    for start in start_points(form, data.centres, FitSettings(num_starts=4, seed=3)):
        shifts = np.eye(len(start)) * step
        slopes = np.stack(
            [form.log_prediction(start + s, data)[0] - form.log_prediction(start - s, data)[0] for s in shifts]
        )
        np.testing.assert_allclose(form.log_prediction(start, data)[1], slopes / (2 * step), rtol=1e-5, atol=1e-6)
        numeric = [(problem.objective(start + s)[0] - problem.objective(start - s)[0]) / (2 * step) for s in shifts]
        np.testing.assert_allclose(problem.objective(start)[1], numeric, rtol=1e-4, atol=1e-5)


def test_objective_is_the_huber_loss():
    form, columns = find_form("chinchilla"), random_columns()
    data = form.prepare(columns)
    theta = form.centre(published_theta(form, PUBLISHED["chinchilla"][0]), data.centres)
    residual = np.array([0.0, 5e-4, -1e-3, 3e-3, -0.2, *[0.0] * 19])
    target = np.log(PUBLISHED["chinchilla"][1](columns)) - residual
    value, _ = Problem("chinchilla", data, target, np.ones(24), FitSettings()).objective(theta)
    delta = 1e-3
    by_hand = [r * r / 2 if abs(r) <= delta else delta * (abs(r) - delta / 2) for r in residual]
    assert value == pytest.approx(2 * sum(by_hand) / 24 / delta**2, rel=1e-6)


def test_starts_are_points_of_the_printed_grid():
    form = find_form("abnar")
    points = start_points(form, dict.fromkeys("nds", 0.0), FitSettings(num_starts=60))
    assert len({tuple(point) for point in points}) == 60
    for point in points:
        assert all(value in START_GRID[p.kind] for p, value in zip(form.parameters, point, strict=True))
    assert np.exp(START_GRID["scale"]) == pytest.approx([30, 100, 300])
    assert START_GRID["exponent"] == (0.05, 0.25, 0.5)
    assert np.exp(START_GRID["irreducible"]) == pytest.approx([0.5, 1, 2])
    assert START_GRID["interaction"] == (-0.5, 0.0, 0.5)
    every = start_points(find_form("chinchilla"), dict.fromkeys("nd", 0.0), FitSettings(num_starts=1000))
    assert len({tuple(point) for point in every}) == len(every) == 3**5
    again = start_points(form, dict.fromkeys("nds", 0.0), FitSettings(num_starts=60))
    assert np.array_equal(points, again)


def abnar_runs(noise, seed=0):
    """Section 5.7: 5 budgets, 7 sparsities, 9 sizes."""
    rows = []
    for budget in (3e19, 6e19, 1e20, 3e20, 1e21):
        for sparsity in (0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98):
            for factor in np.exp(np.linspace(-1.2, 1.2, 9)):
                size = 0.64e9 * (budget / 1e20) ** 0.58 * (1 - sparsity) ** -0.84 * factor
                tokens = budget / (6 * (1 - sparsity) * size)
                rows.append((size, tokens, sparsity, abnar.loss(size, tokens, sparsity)))
    size, tokens, sparsity, truth = np.array(rows).T
    loss = truth * np.exp(noise * np.random.default_rng(seed).normal(size=len(truth)))
    return make_runs(
        {"total_parameters": size, "num_tokens": tokens, "sparsity": sparsity, "loss": loss, "truth": truth}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "seed", "inside_bound", "beyond_bound"),
    [
        (0, 0, 1e-6, 1e-6),
        (0.002, 0, 2e-3, 8e-3),
        (0.002, 1, 2e-3, 8e-3),
        (0.005, 0, 6e-3, 15e-3),
        (0.005, 1, 6e-3, 15e-3),
    ],
)
def test_synthetic_recovery(noise, seed, inside_bound, beyond_bound):
    runs = abnar_runs(noise, seed)
    inside = runs["sparsity"] <= 0.95
    fitted = fit("abnar", runs.keep(inside), FitSettings(num_starts=64))
    errors = fitted.predict(runs.columns, extrapolate=True) - runs["truth"]
    for part, bound in ((errors[inside], inside_bound), (errors[~inside], beyond_bound)):
        size = np.abs(part).max() if noise == 0 else np.sqrt(np.mean(part**2))
        assert size < bound
    if noise == 0:
        assert fitted.coefficients == pytest.approx(PUBLISHED["abnar"][0], rel=1e-4)
        assert fitted.warnings == ()


def dense_runs(noise=0.0, num_runs=40, seed=0, outliers=0, off=1.2):
    """The shape of the Chinchilla check: some runs badly under-trained."""
    draw = np.random.default_rng(seed)
    size, tokens = np.exp(draw.uniform(18, 22, num_runs)), np.exp(draw.uniform(22, 26, num_runs))
    loss = 1.8172 + 482 / size**0.3478 + 2085 / tokens**0.3658
    loss = loss * np.exp(noise * draw.normal(size=num_runs))
    loss[:outliers] *= off
    return make_runs({"total_parameters": size, "num_tokens": tokens, "loss": loss})


def test_dense_law_is_recovered_and_outliers_do_not_move_it():
    clean = fit("chinchilla", dense_runs(), FEW)
    truth = {"a": 482, "alpha": 0.3478, "b": 2085, "beta": 0.3658, "e": 1.8172}
    assert clean.coefficients == pytest.approx(truth, rel=1e-4)
    # Huber's loss sees 3 of 40 runs that are 20 % off, and goes by the others.
    touched = fit("chinchilla", dense_runs(outliers=3), FEW)
    # A mean of squares would move by some 3/40 of 20 %.
    np.testing.assert_allclose(touched.predict(touched.runs.columns), clean.predict(clean.runs.columns), rtol=2e-3)
    assert clean.degrees_of_freedom == 35
    assert clean.rmse < 1e-6


def test_outliers_are_found_and_clean_runs_are_not():
    noisy = dense_runs(noise=0.002, outliers=3)
    assert sorted(find_outliers(fit("chinchilla", noisy, FEW))) == [0, 1, 2]
    assert len(find_outliers(fit("chinchilla", dense_runs(noise=0.002), FEW))) == 0
    # Seven standard deviations are too many for 40 runs, too.
    assert set(find_outliers(fit("chinchilla", dense_runs(noise=0.002, outliers=3, off=1.016), FEW))) == {0, 1, 2}


def test_processes_and_bar_change_nothing(capfd):
    runs = dense_runs(noise=0.002)
    alone = fit("chinchilla", runs, FitSettings(num_starts=8, num_finalists=2))
    together = fit("chinchilla", runs, FitSettings(num_starts=8, num_finalists=2, num_processes=2, progress=True))
    assert np.array_equal(alone.theta, together.theta)
    assert capfd.readouterr().out == ""


def test_number_of_processes():
    assert FitSettings(num_processes=3).count_processes(60) == 3
    assert FitSettings(num_processes=3).count_processes(2) == 2
    assert FitSettings(num_processes=None).count_processes(8) == 1


def test_predictions_outside_are_refused_or_flagged_and_wider():
    runs = dense_runs(noise=0.002)
    fitted = fit("chinchilla", runs, FEW)
    inside = {"total_parameters": [1e9], "num_tokens": [1e11]}
    outside = {"total_parameters": [1e9, 1e12], "num_tokens": [1e11, 1e11]}
    assert fitted.predict(inside).shape == (1,)
    with pytest.raises(ExtrapolationError, match="1 points have total_parameters outside"):
        fitted.predict(outside)
    assert fitted.predict(outside, extrapolate=True)[0] == fitted.predict(inside)[0]
    resampled = bootstrap(fitted, 30)
    with pytest.raises(ExtrapolationError):
        resampled.interval(outside)
    interval = resampled.interval(outside, extrapolate=True)
    assert interval.outside == ((), ("total_parameters",))
    width = interval.high - interval.low
    assert width[1] > 2 * width[0] > 0
    # The error of reaching beyond, measured among the runs themselves, is part of it; inside the runs it is none.
    assert resampled.reach_errors.keys() == {"total_parameters"}
    short = replace(resampled, reach_errors={}).interval(outside, extrapolate=True)
    assert short.low[0] == interval.low[0]
    assert width[1] > short.high[1] - short.low[1]
    farther = resampled.interval({"total_parameters": [1e13], "num_tokens": [1e11]}, extrapolate=True)
    assert farther.high - farther.low > width[1]
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        resampled.interval(inside, level=1.5)


def test_bootstrap_intervals_hold_new_runs():
    runs = dense_runs(noise=0.005, num_runs=60)
    resampled = bootstrap(fit("chinchilla", runs, FEW), 40)
    fresh = dense_runs(noise=0.005, num_runs=400, seed=9)
    ranges = resampled.fit.ranges
    inside = np.all([(fresh[n] >= low) & (fresh[n] <= high) for n, (low, high) in ranges.items()], axis=0)
    fresh = fresh.keep(inside)
    interval = resampled.interval(fresh.columns, level=0.9)
    assert 0.8 < interval.covers(fresh["loss"]) < 0.98
    # Four and a half standard deviations of the noise would be far too wide.
    assert np.all(interval.high - interval.low < 4.5 * 0.005 * fresh["loss"])
    low, high = resampled.coefficient_intervals()["beta"]
    assert low < 0.3658 < high
    with pytest.raises(ValueError, match="num_resamples must be at least 2"):
        bootstrap(resampled.fit, 1)


def test_hold_out():
    runs = dense_runs(noise=0.002)
    result = hold_out("chinchilla", runs, "total_parameters", 1e9, FEW)
    assert (result.held["total_parameters"] >= 1e9).all()
    assert (result.fit.runs["total_parameters"] < 1e9).all()
    assert len(result.held) + len(result.fit.runs) == len(runs)
    assert 0 < result.rmse < 0.05
    only = hold_out("chinchilla", runs, "total_parameters", 1e9, FEW, where=np.arange(len(runs)) % 2 == 0)
    assert len(only.held) < len(result.held)
    with pytest.raises(RunsError, match=r"no run has total_parameters >= 1e\+15"):
        hold_out("chinchilla", runs, "total_parameters", 1e15, FEW)


def test_degenerate_coefficients_warn():
    """Dense runs cannot tell the sparsity's terms apart."""
    runs = abnar_runs(0.0)
    nearly_dense = runs.keep(runs["sparsity"] <= 0.25)
    with pytest.warns(DegenerateFitWarning):
        fitted = fit("abnar", nearly_dense, FitSettings(num_starts=4, num_finalists=2, max_iterations=300))
    assert fitted.warnings


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("chinchilla", lambda r: r.keep(slice(5)), r"5 runs for the 5 parameters of chinchilla leave 0 degrees of freedom"),
        ("chinchilla", lambda r: r.keep(slice(3)), r"leave -2 degrees of freedom; at least 6 runs"),
        ("chinchilla", lambda r: change(r, "num_tokens", 1e10), "num_tokens is 1e[+]10 in every run, so chinchilla"),
        ("abnar", lambda r: change(r, "num_tokens", 1e10), "fit 'abnar_size', which leaves it out"),
        ("chinchilla", lambda r: change(r, "loss", np.nan), "loss must be finite and positive to fit chinchilla, got nan"),
        ("chinchilla", lambda r: change(r, "num_tokens", 0.0), "num_tokens must be finite and positive"),
        ("abnar", lambda r: change(r, "sparsity", -1.0), "sparsity must be from 0 to below 1 .* got -1"),
        ("abnar", lambda r: change(r, "sparsity", 1.0), "sparsity must be from 0 to below 1 .* got 1"),
        ("joint", lambda r: r, "the runs have no column 'active_parameters'; they have: loss"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_fitted(form, change, message):
    with pytest.raises(RunsError, match=message):
        fit(form, change(abnar_runs(0)), FEW)


def change(runs, name, value):
    return make_unchecked({**runs.columns, name: np.full(len(runs), value)})


def make_unchecked(columns):
    from hf_moe_ext.scaling.runs import Runs

    return Runs(columns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_starts": 0}, "num_starts must be at least 1, got 0"),
        ({"huber_delta": 0}, "huber_delta must be above 0"),
        ({"ridge": -1}, "ridge must be at least 0"),
        ({"num_processes": 0}, "num_processes must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**settings)
    with pytest.raises(ValueError, match="form must be one of abnar"):
        find_form("best")


def test_without_scipy_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['scipy'] = None; sys.modules['scipy.optimize'] = None\n"
        "import hf_moe_ext.scaling.fit_solver as f\n"
        "try: f.require_scipy()\n"
        "except ImportError as error: print(error, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == (
        "fitting needs SciPy, which is not installed; run: pip install 'hf_moe_ext[plan]' False"
    )


def test_fitting_loads_no_torch():
    code = (
        "import sys, numpy as np\nfrom hf_moe_ext.scaling.fit import *\nfrom hf_moe_ext.scaling.runs import make_runs\n"
        "n, d = np.exp(np.linspace(18, 22, 20)), np.exp(np.linspace(22, 26, 20) % 1.7 + 22)\n"
        "runs = make_runs({'total_parameters': n, 'num_tokens': d, 'loss': 1.8 + 482 / n**.35 + 2085 / d**.37})\n"
        "fit('chinchilla', runs, FitSettings(num_starts=2)); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("False\n", "")


# --- The published runs -----------------------------------------------------------------------------------------------

# scaling.md, section 5.6: RMSE of all, of E >= 256 held out, of dense N >= 1e9 held out.
REFITS = {
    ("routed", "S-Base"): (0.0189, 0.0285, 0.0409),
    ("routed", "RL-R"): (0.0184, 0.0281, 0.0504),
    ("routed", "Hash"): (0.0174, 0.0286, 0.0379),
    ("joint_size", "S-Base"): (0.0094, 0.0188, 0.0233),
    ("joint_size", "RL-R"): (0.0098, 0.0213, 0.0270),
    ("joint_size", "Hash"): (0.0088, 0.0134, 0.0237),
    ("abnar_size", "S-Base"): (0.0077, 0.0304, 0.0198),
    ("abnar_size", "RL-R"): (0.0079, 0.0411, 0.0222),
    ("abnar_size", "Hash"): (0.0053, 0.0126, 0.0099),
}
HELD_OUT = {"S-Base": (60, 11), "RL-R": (61, 12), "Hash": (59, 11)}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("form", "router"), REFITS)
def test_refits_of_published_runs(form, router):
    runs = standard_runs(router)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateFitWarning)
        fitted = fit(form, runs)
        sparse = hold_out(form, runs, "num_experts", 256)
        large = hold_out(form, runs, "dense_parameters", 1e9)
    assert (len(runs), len(sparse.held), len(large.held)) == (*HELD_OUT[router], 10)
    for value, printed in zip((fitted.rmse, sparse.rmse, large.rmse), REFITS[form, router], strict=True):
        assert value <= 1.1 * printed
    # Abnar's form interpolates best, with coefficients that mean nothing.
    assert bool(fitted.warnings) == (form == "abnar_size")
    check_intervals(sparse)


def check_intervals(sparse):
    """90 %: four in five of the held-out sparsest runs inside; in-range widths bounded; wider beyond."""
    resampled = bootstrap(sparse.fit, 60)
    beyond = resampled.interval(sparse.held.columns, 0.9, extrapolate=True)
    assert beyond.covers(sparse.held["loss"]) >= 0.8
    inside = resampled.interval(sparse.fit.runs.columns, 0.9)
    width = (inside.high - inside.low) / sparse.fit.runs["loss"]
    log_rmse = sparse.fit.rmse / sparse.fit.runs["loss"].mean()
    assert np.median(width) < 5 * log_rmse
    assert width.max() < 8 * log_rmse
    assert inside.covers(sparse.fit.runs["loss"]) >= 0.85
    assert np.median((beyond.high - beyond.low) / sparse.held["loss"]) > np.median(width)
    assert all("num_experts" in names or "sparsity" in names for names in beyond.outside)


@needs_data
def test_coefficients_of_a_refit():
    fitted = fit("routed", standard_runs("S-Base"), FEW)
    found = fitted.coefficients
    assert [round(found[name], 4) for name in "abcd"] == [-0.0872, -0.1405, 0.0125, 1.1508]
