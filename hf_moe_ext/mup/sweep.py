"""A learning rate sweep over the values of an axis: its cells, their configurations, and the file each leaves."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_moe_ext.mup.roles import NONE
from hf_moe_ext.mup.settings import PARAMETRISATIONS
from hf_moe_ext.mup.widening import AXES, change, widen

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
        lists: dict[str, tuple[float, ...]] = {"values": self.values, "seeds": self.seeds, "max_steps": self.max_steps}
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


def write_cell(sweep: Sweep, cell: Cell, loss: float, seconds: float, folder: str | os.PathLike[str]) -> dict[str, Any]:
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
