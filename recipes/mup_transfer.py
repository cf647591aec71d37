"""Where the best learning rate goes as a model grows along one axis, with and without µP, trained with the plain Trainer.

    python recipes/mup_transfer.py [--axis hidden_size --values 32 64 128 256] [--modes mup none] [--seeds 0 1 2] [--flag ...]

Without arguments: a Mixtral-like model at widths 32 to 256 on the bytes of Python's standard library, no network. Each run
is a cell of its own; finished cells are kept, so a study that was stopped goes on when it is started again. What comes out
is `results.json`, `results.md` and `results.png` in the output folder.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cell_pool import run_in_processes
from finetune_arguments import UserError
from hf_moe_ext.mup import Cell, Sweep, draw_sweep, find_cell, record_training_arguments, run_cell, summarize
from mup_transfer_arguments import build_sweep, parse_transfer_arguments
from mup_transfer_card import judge, render


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code is 2 for a mistake of the user's."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse_transfer_arguments(words)
        sweep = build_sweep(arguments)
        check_cells(sweep, arguments)
        if not arguments.report_only:
            run_study(sweep, arguments)
        write_report(sweep, arguments, words)
    except UserError as error:
        print(f"mup_transfer.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def check_cells(sweep: Sweep, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of the finished cells.

    Raises:
        UserError: The folder holds cells of other settings.
    """
    try:
        found = [find_cell(sweep, cell, arguments.output_dir / "cells") for cell in sweep.cells()]
    except ValueError as error:
        raise UserError(f"--output_dir: {error}") from error
    return [record for record in found if record is not None]


def run_study(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """All cells that are not there yet, several processes side by side."""
    folder, cells = arguments.output_dir / "cells", sweep.cells()
    run = functools.partial(_run_one, sweep, arguments, folder)

    def report(number: int, cell: Cell, record: dict[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        print(f"[{number}/{len(cells)}] {cell.name}: {loss} ({record['seconds']:.0f} s)", flush=True)

    run_in_processes(run, cells, arguments.num_processes, arguments.num_threads, report)


def write_report(sweep: Sweep, arguments: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """JSON, Markdown and picture of the cells there are.

    Raises:
        UserError: There is none of a base yet.
    """
    from reporting import write_metrics

    records = check_cells(sweep, arguments)
    try:
        arms = summarize(records, sweep.values[0])
    except ValueError as error:
        raise UserError(f"--report: {error}") from error
    if not arms:
        raise UserError(f"--report_only: {arguments.output_dir / 'cells'} holds no finished cell of this study.")
    results = {"command": _format_command(words), **describe_study(sweep, arguments), "arms": arms}
    results["num_finished_cells"], results["num_cells"] = len(records), len(sweep.cells())
    results["cells"] = [record["cell"] | {"loss": record["loss"], "seconds": record["seconds"]} for record in records]
    stem = arguments.output_dir / "results" if arguments.report is None else arguments.report
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = {ending: stem.parent / f"{stem.name}.{ending}" for ending in ("json", "png", "md")}
    draw_sweep(sorted(arms, key=lambda arm: (arm["max_steps"], arm["mode"] != "mup")), paths["png"], arguments.axis)
    write_metrics(results, paths["json"])
    paths["md"].write_text(render(results, paths["json"].name, paths["png"].name), encoding="utf-8")
    for bar, measured, holds in judge(results):
        print(f"{'holds' if holds else 'FAILS'}: {bar}: {measured}")
    print(f"Everything is in {paths['md']}, {paths['json'].name}, {paths['png'].name}")
    return results


def describe_study(sweep: Sweep, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the cells have in common."""
    import torch
    import transformers

    return {
        "source": "recipes/mup_transfer.py",
        "axis": sweep.axis,
        "device": describe_device(arguments),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": sweep.base_config.to_dict(),
        "head_dim": arguments.head_dim,
        "settings": dict(sweep.settings),
        # What `hf-moe transfer` takes over.
        "base_configs": {
            mode: sweep.configure(Cell(mode, sweep.values[0], 1.0)).to_dict() for mode in sweep.learning_rates
        },
        "training_arguments": read_training_arguments(arguments, max(sweep.max_steps)),
    }


def read_training_arguments(arguments: argparse.Namespace, max_steps: int) -> dict[str, Any]:
    """The cells' training arguments, less the cell's own."""
    from mup_transfer_training import training_arguments

    args = training_arguments(arguments, Cell("none", 1, 1.0, 0, max_steps))
    return record_training_arguments(args, arguments.length)


def describe_device(arguments: argparse.Namespace) -> str:
    """What the report says it was made on."""
    import torch

    if torch.cuda.is_available() and not arguments.use_cpu:
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {arguments.num_processes} process(es) of {arguments.num_threads} thread(s)"


def _format_command(words: Sequence[str]) -> str:
    """The command that makes the cells and this report."""
    return shlex.join(["python", "recipes/mup_transfer.py", *(word for word in words if word != "--report_only")])


def _run_one(sweep: Sweep, arguments: argparse.Namespace, folder: Path, cell: Cell) -> dict[str, Any]:
    """One cell, in a process of the pool."""
    import torch

    from mup_transfer_training import TransferTraining

    torch.set_num_threads(arguments.num_threads)
    return run_cell(sweep, cell, TransferTraining(arguments), folder)


if __name__ == "__main__":
    sys.exit(main())
