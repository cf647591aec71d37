"""Two ways to run the cells of a sweep with the plain Trainer.

One cell is one training run. What it trains on and how is the caller's: ``build_trainer(config, cell)`` returns a Trainer.
``run_cells`` goes through the cells one after another; ``search_cells`` hands the same cells to
``Trainer.hyperparameter_search``. Both leave one JSON file per finished cell, so that a study that was stopped goes on
where it was, and either can finish what the other began.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_moe_ext.mup.sweep import Cell, Sweep, find_cell, write_cell

_BACKENDS = ("optuna", "ray")
BuildTrainer = Callable[[Any, Cell], Trainer]


def run_cells(
    sweep: Sweep, build_trainer: BuildTrainer, folder: str | os.PathLike[str], cells: Iterable[Cell] | None = None
) -> list[dict[str, Any]]:
    """Run the cells that have no file yet, one after another; the records of all.

    Args:
        sweep: what is swept.
        build_trainer: configuration and cell -> a Trainer with the cell's ``learning_rate``, ``seed`` and ``max_steps`` in its
            arguments, a model of that configuration and rows to evaluate on. With ``model_init`` in place of a model it
            serves ``search_cells`` too.
        folder: of the cells' files.
        cells: some of the sweep's; None: all.

    Raises:
        ValueError: a file in the folder is of other settings, or the Trainer's arguments are not the cell's.
    """
    return [run_cell(sweep, cell, build_trainer, folder) for cell in (sweep.cells() if cells is None else cells)]


def run_cell(sweep: Sweep, cell: Cell, build_trainer: BuildTrainer, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Run one cell, or read the file it left; see ``run_cells``. Cells are independent: processes may share a folder."""
    known = find_cell(sweep, cell, folder)
    if known is not None:
        return known
    trainer = build_trainer(sweep.configure(cell), cell)
    _check_trainer(trainer, cell)
    began = time.monotonic()
    try:
        trainer.train()
        loss = _read_loss(trainer.evaluate(), sweep.metric)
    except FloatingPointError:  # how a DCCA model says that its numbers are none any more
        loss = math.nan
    return write_cell(sweep, cell, loss, time.monotonic() - began, folder)


def search_cells(
    sweep: Sweep,
    build_trainer: BuildTrainer,
    folder: str | os.PathLike[str],
    backend: str = "optuna",
    **options: Any,
) -> list[dict[str, Any]]:
    """The same cells through ``Trainer.hyperparameter_search``: one search per mode, value, seed and budget, a grid of rates.

    For clusters: Ray spreads the trials of a search over machines that share the folder.

    Args:
        sweep: what is swept.
        build_trainer: as for ``run_cells``, with ``model_init`` in place of a model. Where it uses ``trainer_optimizer``, give
            that the Trainer's own ``args`` and no ``lr``: the search sets ``args.learning_rate`` for each trial.
        folder: of the cells' files.
        backend: "optuna" or "ray".
        **options: for the search (Optuna's ``storage``, Ray's ``resources_per_trial`` ...).

    Raises:
        ImportError: the backend is not installed.
        ValueError: as ``run_cells``; or the Trainer has no ``model_init``.
    """
    _check_backend(backend)
    cells = sweep.cells()
    arms: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if find_cell(sweep, cell, folder) is None:
            arms.setdefault((cell.mode, cell.value, cell.seed, cell.max_steps), []).append(cell)
    for arm in arms.values():
        _search_arm(sweep, arm, build_trainer, Path(folder), backend, options)
    records = [find_cell(sweep, cell, folder) for cell in cells]
    return [record for record in records if record is not None]


def _search_arm(
    sweep: Sweep, arm: list[Cell], build_trainer: BuildTrainer, folder: Path, backend: str, options: dict[str, Any]
) -> None:
    trainer = build_trainer(sweep.configure(arm[0]), arm[0])
    _check_trainer(trainer, arm[0])
    if trainer.model_init is None:
        raise ValueError("search_cells: build_trainer must give its Trainer model_init in place of a model")
    by_rate = {cell.learning_rate: cell for cell in arm}
    clock = {"began": time.monotonic()}

    def write(metrics: dict[str, float]) -> float:
        seconds, clock["began"] = time.monotonic() - clock["began"], time.monotonic()
        loss = _read_loss(metrics, sweep.metric)
        write_cell(sweep, by_rate[trainer.args.learning_rate], loss, seconds, folder)
        return loss if math.isfinite(loss) else math.inf  # a NaN is a failed trial to Optuna

    rates = list(by_rate)
    if backend == "optuna":
        import optuna

        options = {"sampler": optuna.samplers.GridSampler({"learning_rate": rates}), **options}
        trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
            write,
            n_trials=len(rates),
            direction="minimize",
            backend=backend,
            **options,
        )
        return
    from ray import tune

    trainer.hyperparameter_search(
        lambda _: {"learning_rate": tune.grid_search(rates)},
        write,
        n_trials=1,  # samples of the whole grid
        direction="minimize",
        backend=backend,
        **options,
    )


def _check_backend(backend: str) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be {' or '.join(map(repr, _BACKENDS))}, got {backend!r}")
    if importlib.util.find_spec(backend) is None:
        package = "'hf_moe_ext[search]'" if backend == "optuna" else "'ray[tune]'"
        raise ImportError(
            f"backend={backend!r} is not installed: pip install {package}, or use the other of {', '.join(_BACKENDS)}, or "
            "run_cells, which needs neither"
        )


def _check_trainer(trainer: Trainer, cell: Cell) -> None:
    for name in ("learning_rate", "seed", "max_steps"):
        found, wanted = getattr(trainer.args, name), getattr(cell, name)
        if found != wanted:
            raise ValueError(
                f"build_trainer made a Trainer with args.{name}={found!r} for a cell with {name}={wanted!r}; pass the cell's "
                f"{name} to TrainingArguments"
            )


def _read_loss(metrics: Mapping[str, float], metric: str) -> float:
    if metric not in metrics:
        raise ValueError(f"metric must be one that Trainer.evaluate returns, {', '.join(metrics)}; got {metric!r}")
    return float(metrics[metric])
