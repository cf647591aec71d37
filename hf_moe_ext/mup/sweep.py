"""A learning rate sweep over the values of an axis: the cells, and two ways to run them with the plain Trainer.

One cell is one training run. What it trains on and how is the caller's: ``build_trainer(config, cell)`` returns a Trainer.
``run_cells`` goes through the cells one after another; ``search_cells`` hands the same cells to
``Trainer.hyperparameter_search``. Both leave one JSON file per finished cell, so that a study that was stopped goes on
where it was, and either can finish what the other began.
"""

import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_moe_ext.mup.roles import NONE
from hf_moe_ext.mup.settings import PARAMETRISATIONS
from hf_moe_ext.mup.widening import AXES, change, widen

_BACKENDS = ("optuna", "ray")
# Keys of a configuration that say nothing about what is trained.
_BOOKKEEPING = ("transformers_version", "architectures", "_name_or_path")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        mode: parametrisation, a value of the configuration's key ``mup``.
        value: of the sweep's axis.
        learning_rate: at the base model.
        seed: of the first weights and of the order of the rows.
        max_steps: optimizer steps.
    """

    mode: str
    value: int
    learning_rate: float
    seed: int = 0
    max_steps: int = 150

    @property
    def name(self) -> str:
        """Its file's name, less the ending."""
        return f"{self.mode}-{self.value}-steps-{self.max_steps}-seed-{self.seed}-lr-{self.learning_rate!r}"


BuildTrainer = Callable[[Any, Cell], Trainer]


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        base_config: an ``*_ext`` configuration with ``mup="none"``: the model whose learning rate is tuned.
        axis: a name of ``mup.widening.AXES``.
        values: of the axis; the first is the one whose best learning rate the others are to take.
        learning_rates: by mode; modes run in this order.
        seeds: of the runs.
        max_steps: one budget or more, in optimizer steps.
        hidden_size: width of all cells where another axis is swept; None: the base model's, where all modes are the same.
        metric: what ``Trainer.evaluate`` calls the held-out loss. The Trainer's own ``eval_loss`` holds the auxiliary loss
            of the router, if the model computes one.
        settings: what else makes a run this run and no other (data, batch, schedule), as JSON takes it; stored and compared.

    Raises:
        ValueError: an unknown axis or mode, an empty or repeated list, a rate that is not a positive number.
    """

    base_config: Any
    axis: str
    values: tuple[int, ...]
    learning_rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (0,)
    max_steps: tuple[int, ...] = (150,)
    hidden_size: int | None = None
    metric: str = "eval_loss"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}; got {self.axis!r}")
        if self.base_config.mup != NONE:
            raise ValueError(
                f"base_config must have mup='none', got {self.base_config.mup!r}: the sweep sets mup itself, per mode"
            )
        unknown = [mode for mode in self.learning_rates if mode not in PARAMETRISATIONS]
        if unknown or not self.learning_rates:
            known = ", ".join(map(repr, PARAMETRISATIONS))
            raise ValueError(f"learning_rates must be given by mode, {known}; got {list(self.learning_rates)}")
        if self.axis == "hidden_size" and self.hidden_size is not None:
            raise ValueError(
                "hidden_size is the axis here; leave the sweep's own hidden_size out, or sweep another axis"
            )
        lists = {"values": self.values, "seeds": self.seeds, "max_steps": self.max_steps}
        lists |= {f"learning_rates of {mode!r}": rates for mode, rates in self.learning_rates.items()}
        for name, entries in lists.items():
            if not entries or len(set(entries)) != len(entries):
                raise ValueError(f"{name} must hold something, and nothing twice; got {list(entries)}")
            if name != "seeds" and not all(0 < entry < math.inf for entry in entries):
                raise ValueError(f"{name} must be positive numbers; got {list(entries)}")

    def cells(self) -> list[Cell]:
        """All of them; budget by budget, seed by seed, so that a study that is stopped can be judged on the first seed."""
        return [
            Cell(mode, value, rate, seed, max_steps)
            for max_steps in self.max_steps
            for seed in self.seeds
            for mode, rates in self.learning_rates.items()
            for value in self.values
            for rate in rates
        ]

    def configure(self, cell: Cell) -> Any:
        """The configuration of a cell.

        Raises:
            ValueError: the axis cannot take the value, or the configuration refuses it.
        """
        config = parametrise(self.base_config, cell.mode)
        if self.hidden_size is not None:
            config = widen(config, self.hidden_size)
        return AXES[self.axis](config, cell.value)

    def describe(self, cell: Cell) -> dict[str, Any]:
        """What makes a cell this cell and no other."""
        keys = {name: value for name, value in self.configure(cell).to_dict().items() if name not in _BOOKKEEPING}
        described = {"axis": self.axis, "metric": self.metric, "config": keys, "settings": dict(self.settings)}
        plain: dict[str, Any] = json.loads(json.dumps(described))
        return plain


def parametrise(base_config: Any, mode: str) -> Any:
    """The base model under another parametrisation: it is its own base.

    Args:
        base_config: with ``mup="none"``.
        mode: "none", "simplep" or "mup".
    """
    if mode == NONE:
        return change(base_config, {})
    return change(base_config, {"mup": mode, "mup_base_hidden_size": base_config.hidden_size})


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
    return _write_cell(sweep, cell, loss, time.monotonic() - began, folder)


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


def find_cell(sweep: Sweep, cell: Cell, folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of a finished cell, or None.

    Raises:
        ValueError: its file is of other settings, or no such file at all.
    """
    path = Path(folder) / f"{cell.name}.json"
    if not path.is_file():
        return None
    record = _read_record(path)
    for name, value in sweep.describe(cell).items():
        if (found := record["sweep"].get(name)) != value:
            if isinstance(value, dict) and isinstance(found, dict):
                key = next(key for key in sorted({*value, *found}) if value.get(key) != found.get(key))
                name, found, value = f"{name} {key!r}", found.get(key), value.get(key)
            raise ValueError(
                f"{path} was made with {name} {found!r}, not {value!r}; cells of different settings are not mixed: give the "
                "earlier setting, or another folder"
            )
    return record


def read_cells(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of all finished cells of a folder, in the order of their names.

    Raises:
        ValueError: a file is no record.
    """
    return [_read_record(path) for path in sorted(Path(folder).glob("*.json"))]


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
        _write_cell(sweep, by_rate[trainer.args.learning_rate], loss, seconds, folder)
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


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        Cell(**record["cell"])
        if not isinstance(record["sweep"], dict) or "loss" not in record:
            raise KeyError("sweep, loss")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no record of a sweep's cell ({type(error).__name__}: {error}); remove it"
        ) from error
    return dict(record)


def _write_cell(
    sweep: Sweep, cell: Cell, loss: float, seconds: float, folder: str | os.PathLike[str]
) -> dict[str, Any]:
    """Moved into place whole: a cell's file is a finished cell. A loss that is no number is null."""
    record = {
        "cell": asdict(cell),
        "loss": loss if math.isfinite(loss) else None,
        "seconds": round(seconds, 2),
        "sweep": sweep.describe(cell),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=folder)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    os.chmod(partial, 0o644)  # mkstemp's own is for its owner alone
    os.replace(partial, folder / f"{cell.name}.json")
    return record
