"""What a pilot is asked: checked before anything is read."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

MIN_SEEDS_FOR_SPREAD = 2
# Neither changes what an arm computes: a pilot may be gone on with under other values of them.
_FREE = ("hardware", "hardware_file", "price", "currency", "full_epochs", "budget_minutes", "ray_address")


@dataclass(frozen=True)
class PilotRequest:
    """All settings of a pilot.

    Attributes:
        model: Hub id or folder of a causal language model.
        data: Data set of the Hub, folder, or file.
        held_out: File of rows to measure on; None: the data set's test split, or a tenth of its rows.
        budget_minutes: Wall-clock time for all of it.
        processes: Arms at a time.
        threads: Of one arm; None shares the cores out.
        seed: Of everything drawn; seeds of the finalists count on from it.
        num_seeds: Of every finalist.
        candidates: See `candidates.choose_candidates`; empty for all that fit.
        learning_rates: In place of every candidate's own grid.
        equal: What every arm gets alike.
        steps: Of a finalist; None: as many as the budget holds. Fixes the plan, so that two runs have equal losses.
        min_steps: Of the shortest arm.
        num_finalists: Most candidates that are trained with every seed.
        batch_size: Rows of a step.
        max_length: Tokens of a row.
        max_train_rows: Draw so many; None for all.
        max_held_out_rows: The same for the held-out rows.
        metric: `evaluate` id, local module, or "choices" for the accuracy among answer choices.
        metric_rows: Held-out rows that the metric is measured on.
        max_new_tokens: Of a written answer.
        dtype: Type the model is loaded in.
        hardware: Row of the hardware table, for the cost at full size.
        hardware_file: TOML of more rows.
        price: Of a device for an hour.
        currency: Of the price.
        full_epochs: Passes over all train rows of the full job.
        ray_address: Cluster to run the arms on.
    """

    model: str
    data: str
    held_out: str | None = None
    budget_minutes: float = 20.0
    processes: int = 2
    threads: int | None = None
    seed: int = 0
    num_seeds: int = 3
    candidates: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    equal: Literal["tokens", "time"] = "tokens"
    steps: int | None = None
    min_steps: int = 16
    num_finalists: int = 4
    batch_size: int = 8
    max_length: int = 256
    max_train_rows: int | None = None
    max_held_out_rows: int | None = 512
    metric: str | None = None
    metric_rows: int = 128
    max_new_tokens: int = 16
    dtype: str = "float32"
    hardware: str | None = None
    hardware_file: Path | None = None
    price: float | None = None
    currency: str = "USD"
    full_epochs: float = 3.0
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name in (
            *("processes", "num_seeds", "min_steps", "batch_size", "max_new_tokens", "metric_rows"),
            *("threads", "steps", "max_train_rows", "max_held_out_rows"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.max_length < 2:
            raise ValueError(f"--max-length must be at least 2, got {self.max_length}.")
        if self.num_finalists < 1:
            raise ValueError(f"--finalists must be at least 1, got {self.num_finalists}.")
        if not self.budget_minutes > 0:
            raise ValueError(f"--budget-minutes must be above 0, got {self.budget_minutes}.")
        if not self.full_epochs > 0:
            raise ValueError(f"--full-epochs must be above 0, got {self.full_epochs}.")
        if any(not 0 < rate < float("inf") for rate in self.learning_rates):
            raise ValueError(f"--learning-rates must be above 0, got {list(self.learning_rates)}.")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"--learning-rates has one twice: {list(self.learning_rates)}. Leave one out.")
        if self.equal not in ("tokens", "time"):
            raise ValueError(f"--equal must be tokens or time, got {self.equal!r}.")
        if self.steps is not None and self.steps < 4 * self.min_steps:
            raise ValueError(
                f"--steps {self.steps} must be at least four times --min-steps {self.min_steps}: the first round trains a "
                "quarter of them."
            )
        if self.steps is not None and self.equal == "time":
            raise ValueError("--steps fixes the steps and --equal time lets them differ. Leave one of them out.")
        if self.price is not None and self.hardware is None:
            raise ValueError("--price needs --hardware: the row of the device that is rented.")
        if self.price is not None and self.price < 0:
            raise ValueError(f"--price must be at least 0, got {self.price}.")

    def describe(self) -> dict[str, Any]:
        """What makes this pilot this one: settings that change an arm, and the content of local files."""
        values = {key: value for key, value in asdict(self).items() if key not in _FREE}
        for name in ("data", "held_out"):
            path = Path(values[name]) if values[name] else None
            if path is not None and path.is_file():
                values[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        config = Path(self.model) / "config.json"
        if config.is_file():
            values["model_config_sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
        return values

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a setting."""
        return next(f.default for f in fields(cls) if f.name == name)
