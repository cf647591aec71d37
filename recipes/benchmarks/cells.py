"""Runs of a recipe as cells of a benchmark: several at a time, finished ones kept, so that a stopped study goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cell:
    """One run of a recipe: its folder's name, its arguments, and the script."""

    name: str
    arguments: tuple[str, ...]
    script: str = "finetune.py"


def run_cells(
    cells: Iterable[Cell], work_dir: Path, jobs: int, threads: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run the cells that have no metrics yet, several at a time; name -> metrics.

    Args:
        cells: The runs.
        work_dir: Where each has its folder and its log.
        jobs: Runs at a time.
        threads: Of one run; None shares the cores among the jobs.

    Raises:
        RuntimeError: A run failed; its output is in the work folder.
    """
    cells = list(cells)
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    work_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda cell: run_cell(cell, work_dir, threads), cells)
        return dict(zip([cell.name for cell in cells], results, strict=True))


def run_cell(cell: Cell, work_dir: Path, threads: int) -> dict[str, Any]:
    """Run one cell, or read what it left behind."""
    folder = work_dir / cell.name
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        arguments = (*cell.arguments, "--output_dir", str(folder.resolve()), "--overwrite_output_dir", "true")
        with (work_dir / f"{cell.name}.log").open("w", encoding="utf-8") as log:
            done = subprocess.run(
                [sys.executable, str(RECIPES / cell.script), *arguments],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{cell.name} failed; see {work_dir / cell.name}.log")
    result: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    print(f"{cell.name}: {result['loss']['before']:.4f} -> {result['loss']['after']:.4f}", flush=True)
    return result
