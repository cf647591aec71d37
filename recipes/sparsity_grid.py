"""Trains a grid of small MoE models over size N, sparsity S and budget C, and writes the table that a law is fitted to.

    python recipes/sparsity_grid.py [--smoke] [--num_processes 2] [--reasoning_file rows.jsonl.gz] [--flag value ...]

Without arguments: OLMoE-like models of 32,000 to 256,000 parameters, 2 to 32 experts of which a token passes 2 (S = 0 to
0.9375), three budgets, three seeds, on the bytes of Python's standard library; no network, less than an hour on two cores.
First a few runs choose a learning rate per number of experts at one width (µP carries it to the others). Each run is a cell
of its own; finished cells are kept, so a grid that was stopped goes on when it is started again. What comes out is
`runs.csv` (for `recipes/fit_law.py`) and `results.json`, `.md`, `.png` in the output folder.
"""

import argparse
import csv
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cell_pool import run_in_processes
from finetune_arguments import UserError
from sparsity_grid_arguments import (
    GridCell,
    choose_widths,
    describe_settings,
    list_grid_cells,
    list_search_cells,
    parse_grid_arguments,
)

TABLE = "runs.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse_grid_arguments(words)
        check_grid(arguments)
        settings = describe_settings(arguments)
        search = list_search_cells(arguments)
        if not arguments.report_only:
            run_missing(search, settings, arguments, "search")
        rates = choose_rates(search, find_cells(search, settings, arguments))
        grid = list_grid_cells(arguments, rates)
        if not arguments.report_only:
            run_missing(grid, settings, arguments, "grid")
        write_results(grid, search, rates, settings, arguments, words)
    except UserError as error:
        print(f"sparsity_grid.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def check_grid(arguments: argparse.Namespace) -> None:
    """Refuse, before anything runs, a size that no model has, and answers that cannot be read.

    Raises:
        UserError: naming it.
    """
    from sparsity_grid_training import read_answers

    for size in {*arguments.total_parameters, arguments.search_parameters}:
        for experts in arguments.num_experts:
            choose_widths(size, experts, arguments)
    for path in arguments.reasoning_file:
        read_answers(path, arguments.num_answer_rows, arguments.length)


def find_cells(
    cells: Sequence[GridCell], settings: dict[str, Any], arguments: argparse.Namespace
) -> dict[GridCell, dict[str, Any]]:
    """The finished ones of these cells.

    Raises:
        UserError: the folder holds cells of other settings.
    """
    from sparsity_grid_training import find_cell

    found = {cell: find_cell(cell, arguments, settings, arguments.output_dir / "cells") for cell in cells}
    return {cell: record for cell, record in found.items() if record is not None}


def run_missing(cells: Sequence[GridCell], settings: dict[str, Any], arguments: argparse.Namespace, title: str) -> None:
    """The cells that are not there yet, several processes side by side."""
    from sparsity_grid_training import run_cell

    finished = find_cells(cells, settings, arguments)
    missing = [cell for cell in cells if cell not in finished]
    run = functools.partial(run_cell, arguments, settings, arguments.output_dir / "cells")

    def report(number: int, cell: GridCell, record: dict[str, Any]) -> None:
        loss = record["run"]["loss"]
        shown = "not finite" if loss is None else f"{loss:.4f}"
        done = len(finished) + number
        print(f"{title} [{done}/{len(cells)}] {cell.name}: {shown} ({record['seconds']:.0f} s)", flush=True)

    if missing:
        run_in_processes(run, missing, arguments.num_processes, arguments.num_threads, report)


def choose_rates(search: Sequence[GridCell], found: dict[GridCell, dict[str, Any]]) -> dict[int, float]:
    """Number of experts -> the rate with the lowest held-out loss.

    Raises:
        UserError: none has finished, or none is finite.
    """
    rates: dict[int, tuple[float, float]] = {}
    for cell, record in found.items():
        loss = record["run"]["loss"]
        if loss is not None:
            best = rates.get(cell.num_experts, (float("inf"), 0.0))
            rates[cell.num_experts] = min(best, (loss, cell.learning_rate))
    lacking = sorted({cell.num_experts for cell in search} - rates.keys())
    if lacking:
        raise UserError(
            f"no finished run chooses the learning rate of {lacking[0]} experts. Run without --report_only."
        )
    return {experts: rate for experts, (_, rate) in rates.items()}


def write_results(
    grid: Sequence[GridCell],
    search: Sequence[GridCell],
    rates: dict[int, float],
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    words: Sequence[str],
) -> None:
    """The table of runs, and JSON, Markdown and picture of the cells there are.

    Raises:
        UserError: there is none.
    """
    from reporting import write_metrics
    from sparsity_grid_card import draw, render
    from sparsity_grid_summary import summarize

    found = find_cells(grid, settings, arguments)
    runs = [
        {"nominal_parameters": cell.total_parameters, **record["run"]}
        for cell, record in found.items()
        if record["run"]["loss"] is not None
    ]
    if not runs:
        raise UserError(f"--report_only: {arguments.output_dir / 'cells'} holds no finished cell of this grid.")
    write_table(runs, arguments.output_dir / TABLE)
    results = {
        "command": format_command(words, arguments),
        "source": "recipes/sparsity_grid.py",
        "settings": settings,
        "learning_rates": {str(experts): rate for experts, rate in sorted(rates.items())},
        "search": [record["cell"] | {"loss": record["run"]["loss"]} for record in find_cells(search, settings, arguments).values()],
        "num_cells": len(grid),
        "num_finished_cells": len(found),
        "seconds": round(sum(record["seconds"] for record in found.values())),
        "runs": runs,
        **summarize(runs),
        "fits": [read_fitted(path) for path in arguments.fits],
    }  # fmt: skip
    stem = arguments.output_dir / "results" if arguments.report is None else arguments.report
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = {ending: stem.parent / f"{stem.name}.{ending}" for ending in ("json", "png", "md")}
    draw(results, paths["png"])
    write_metrics(results, paths["json"])
    paths["md"].write_text(render(results, paths["json"].name, paths["png"].name), encoding="utf-8")
    print(
        f"Everything is in {paths['md']}, {paths['json'].name}, {paths['png'].name}; runs in {arguments.output_dir / TABLE}"
    )


def format_command(words: Sequence[str], arguments: argparse.Namespace) -> str:
    """The command that makes the cells; where a user keeps a file of questions is no matter, its hash is in the settings."""
    names = {str(path): path.name for path in arguments.reasoning_file}
    kept = [names.get(word, word) for word in words if word != "--report_only"]
    for option in ("--fits", "--report"):
        if option in kept:
            start = kept.index(option)
            end = next((i for i in range(start + 1, len(kept)) if kept[i].startswith("--")), len(kept))
            kept[start:end] = []
    return shlex.join(["python", "recipes/sparsity_grid.py", *kept])


def read_fitted(path: Path) -> dict[str, Any]:
    """A fit that `fit_law.py` wrote.

    Raises:
        UserError: it cannot be read.
    """
    from hf_moe_ext.scaling.fit_file import FitFileError, read_fit

    try:
        read_fit(path)
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, FitFileError) as error:
        raise UserError(f"--fits: {error}") from error


def write_table(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A row per run, as `hf_moe_ext.scaling.runs.read_runs` takes it."""
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(runs[0]))
        writer.writeheader()
        writer.writerows(runs)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
