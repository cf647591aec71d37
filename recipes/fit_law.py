"""Fits a scaling law to your own runs: CSV, JSON, or an export of Weights & Biases.

    python recipes/fit_law.py runs.csv --form abnar [--columns loss=eval_loss total_parameters=params] [--output fit.json]

Reads the columns that the form needs (`--help` lists forms and columns), fits from many starts, and says how far to trust it:
intervals of the coefficients from refits of resampled runs, errors on the largest sizes and sparsities held out, outliers.
What it writes can be given to `hf-moe plan --law`. Runs of several tokenizers, losses that are no number and too few runs are
refused with exit code 2.
"""

import argparse
import json
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from finetune_arguments import UserError
from hf_moe_ext.scaling.fit import DegenerateFitWarning, Fit, fit
from hf_moe_ext.scaling.fit_checks import find_outliers, hold_out
from hf_moe_ext.scaling.fit_file import describe_fit
from hf_moe_ext.scaling.fit_forms import FORMS, find_form
from hf_moe_ext.scaling.fit_intervals import bootstrap
from hf_moe_ext.scaling.fit_solver import FitSettings
from hf_moe_ext.scaling.runs import Runs, RunsError, read_runs

HELD_OUT_SHARE = 0.2  # of the distinct values of a variable, the largest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        given = parse_arguments(words)
        told = fit_runs(given)
        told["command"] = shlex.join(["python", "recipes/fit_law.py", *words])
        if given.output is not None:
            write_fit(told, given.output)
    except (UserError, RunsError, OSError) as error:
        print(f"fit_law.py: error: {error}", file=sys.stderr)
        return 2
    print(format_fit(told))
    if given.output is not None:
        print(f"\nWritten to {given.output}")
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an unknown argument, or a value outside its range.
    """
    forms = "; ".join(f"{form.name}: {form.target} from {', '.join(form.variables)}" for form in FORMS.values())
    parser = _Parser(prog="fit_law.py", allow_abbrev=False, description=__doc__, epilog=f"Forms: {forms}.")
    parser.add_argument("runs", type=Path, help="Table of runs: .csv, .json or .jsonl.")
    parser.add_argument("--form", choices=list(FORMS), default="abnar", help="What is fitted.")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="Columns that the file calls otherwise."
    )
    parser.add_argument("--select", nargs="+", default=[], metavar="COLUMN=VALUE[,VALUE]", help="Only these rows.")
    parser.add_argument(
        "--hold_out", nargs="+", metavar="VARIABLE=BOUND",
        help="Fit below, measure at and above. [default: the largest fifth of sizes, and of sparsities]",
    )  # fmt: skip
    parser.add_argument("--num_starts", type=int, default=60, help="Points of the start grid.")
    parser.add_argument("--num_processes", type=int, default=1, help="Starts at a time.")
    parser.add_argument("--num_resamples", type=int, default=100, help="Refits of the bootstrap.")
    parser.add_argument("--level", type=float, default=0.9, help="Of the intervals.")
    parser.add_argument("--seed", type=int, default=0, help="Of starts and draws.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of the fit.")
    given = parser.parse_args(list(words))
    for name, least in {"num_starts": 1, "num_processes": 1, "num_resamples": 2}.items():
        if getattr(given, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(given, name)}.")
    if not 0 < given.level < 1:
        raise UserError(f"--level must lie between 0 and 1, got {given.level}.")
    form = find_form(given.form)
    given.columns = _read_pairs("--columns", given.columns)
    needed = (*form.variables, form.target)
    unknown = sorted(set(given.columns) - set(needed))
    if unknown:
        raise UserError(f"--columns: {form.name} has no {unknown[0]!r}; it reads {', '.join(needed)}.")
    given.select = {name: value.split(",") for name, value in _read_pairs("--select", given.select).items()}
    if given.hold_out is not None:
        given.hold_out = [_read_bound(name, value) for name, value in _read_pairs("--hold_out", given.hold_out).items()]
        for name, _ in given.hold_out:
            if name not in form.variables:
                raise UserError(f"--hold_out: {form.name} has no {name!r}; it reads {', '.join(form.variables)}.")
    return given


def fit_runs(given: argparse.Namespace) -> dict[str, Any]:
    """The fit, its intervals, hold-outs and outliers; what the JSON holds.

    Raises:
        RunsError: the runs cannot be read or are too few.
        OSError: no such file.
    """
    form = find_form(given.form)
    names = {name: given.columns.get(name, name) for name in (*form.variables, form.target)}
    runs = read_runs(given.runs, names, select=given.select or None)
    settings = FitSettings(
        num_starts=given.num_starts, num_processes=given.num_processes, progress=not given.quiet, seed=given.seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateFitWarning)  # told with the results
        fitted = fit(form, runs, settings)
        told = describe_fit(fitted, bootstrap(fitted, given.num_resamples), given.runs.name, given.level)
        bounds = choose_bounds(fitted) if given.hold_out is None else given.hold_out
        told["hold_outs"] = [measure_hold_out(fitted, variable, bound, given) for variable, bound in bounds]
    told |= {"columns": names, "select": given.select, "outliers": describe_outliers(fitted)}
    return told


def choose_bounds(fitted: Fit) -> list[tuple[str, float]]:
    """The largest fifth of the distinct sizes, and of the distinct sparsities, at least one value."""
    bounds = []
    for name in filter(None, (fitted.form.size_variable, fitted.form.sparsity_variable)):
        values = np.unique(fitted.runs[name])
        bounds.append((name, float(values[-max(1, math.floor(HELD_OUT_SHARE * len(values)))])))
    return bounds


def measure_hold_out(fitted: Fit, variable: str, bound: float, given: argparse.Namespace) -> dict[str, Any]:
    """Error on runs that the fit did not see, beside the same form's error on all; why not, where it cannot be done."""
    told: dict[str, Any] = {"variable": variable, "bound": bound}
    try:
        held = hold_out(fitted.form, fitted.runs, variable, bound, fitted.settings)
        interval = bootstrap(held.fit, given.num_resamples).interval(held.held.columns, given.level, extrapolate=True)
    except RunsError as error:
        return told | {"refused": str(error)}
    covered = interval.covers(held.held[fitted.form.target])
    return told | {"num_fitted": len(held.fit.runs), "num_held": len(held.held), "rmse": held.rmse, "covered": covered}


def describe_outliers(fitted: Fit) -> list[dict[str, float]]:
    """Runs that do not belong, worst first, with their place in the table (rows from 0, after `--select`)."""
    runs: Runs = fitted.runs
    names = (*fitted.form.variables, fitted.form.target)
    predicted = fitted.predict(runs.columns)
    return [
        {"row": int(i), **{name: float(runs[name][i]) for name in names}, "predicted": float(predicted[i])}
        for i in find_outliers(fitted)
    ]


def format_fit(told: dict[str, Any]) -> str:
    """For people."""
    level = f"{told['level']:.0%}"
    lines = [
        f"{told['form']}: {told['formula']}",
        f"{told['num_runs']} runs, {told['num_parameters']} parameters, {told['degrees_of_freedom']} degrees of freedom; "
        f"RMSE {told['rmse']:.4f}",
        f"{'':10} {'value':>12} {level + ' of ' + str(told['num_resamples']) + ' refits':>28}",
    ]
    for name, one in told["coefficients"].items():
        lines.append(f"{name:10} {one['value']:12.5g} {one['low']:>14.5g} to {one['high']:<.5g}")
    for held in told["hold_outs"]:
        where = f"held out {held['variable']} >= {held['bound']:.4g}"
        if "refused" in held:
            lines.append(f"{where}: not possible, {held['refused']}")
            continue
        lines.append(
            f"{where}: RMSE {held['rmse']:.4f} on {held['num_held']} runs, fitted to {held['num_fitted']}; its {level} interval "
            f"covers {held['covered']:.0%}"
        )
    lines += [f"outlier: row {one['row']}, {one['predicted']:.4f} predicted" for one in told["outliers"]]
    lines += [f"warning: {message}" for message in told["warnings"]]
    ranges = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in told["ranges"].items())
    return "\n".join([*lines, f"Fitted for {ranges}; beyond it is an extrapolation."])


def write_fit(told: dict[str, Any], path: Path) -> None:
    """Moved into place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} must be NAME=VALUE, got {word!r}.")
        pairs[name] = value
    return pairs


def _read_bound(name: str, value: str) -> tuple[str, float]:
    try:
        return name, float(value)
    except ValueError as error:
        raise UserError(f"--hold_out {name} must be a number, got {value!r}.") from error


if __name__ == "__main__":
    sys.exit(main())
