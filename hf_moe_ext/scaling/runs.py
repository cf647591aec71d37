"""Training runs as columns of numbers: from CSV, JSON, JSON lines or an export of Weights & Biases.

A W&B export is the CSV of its table, or JSON rows with ``config`` and ``summary``; nested keys are joined with dots and found
by their last part too (``summary.eval_loss`` is ``eval_loss``), where that is unambiguous.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER_COLUMNS = ("tokenizer", "tokenizer_name", "tokenizer_name_or_path")


class RunsError(ValueError):
    """The runs cannot be read or used; the message says which and what to do."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Columns of equal length.

    Attributes:
        columns: numbers, [runs] each.
        tokenizer: of all runs, where the file says; losses of two tokenizers are never put into one fit.
    """

    columns: Mapping[str, np.ndarray]
    tokenizer: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise RunsError(f"the runs have no column {name!r}; they have: {', '.join(sorted(self.columns))}")
        return self.columns[name]

    def keep(self, mask: Any) -> "Runs":
        """The runs where the mask is true, or of these indices."""
        return Runs({name: values[mask] for name, values in self.columns.items()}, self.tokenizer)


def read_runs(
    path: str | Path,
    columns: Mapping[str, str] | Sequence[str],
    *,
    select: Mapping[str, Any] | None = None,
) -> Runs:
    """Read the named columns.

    Args:
        path: .csv, .json (a list of objects) or .jsonl.
        columns: what to read; or our name -> name in the file.
        select: only rows with these values, by the file's names.

    Raises:
        RunsError: no rows, a column that is missing or ambiguous, something that is no number, a loss that is not finite,
            runs of several tokenizers.
        OSError: no such file.
    """
    path = Path(path)
    rows = _read_rows(path)
    if select:
        rows = [row for row in rows if all(_same(_find(row, key, path), value) for key, value in select.items())]
    if not rows:
        raise RunsError(f"{path.name} has no runs" + (f" with {dict(select)}" if select else "") + "; nothing to fit")
    names = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    return make_runs(
        {ours: [_find(row, theirs, path) for row in rows] for ours, theirs in names.items()},
        tokenizers=[_tokenizer(row) for row in rows],
        source=path.name,
    )


def make_runs(
    columns: Mapping[str, Iterable[Any]], tokenizers: Iterable[str | None] = (), source: str = "the runs"
) -> Runs:
    """Columns in hand, with the same checks.

    Raises:
        RunsError: see ``read_runs``; columns of different lengths.
    """
    known = sorted({name for name in tokenizers if name})
    if len(known) > 1:
        raise RunsError(
            f"{source}: runs of {len(known)} tokenizers ({', '.join(known[:4])}) cannot go into one fit, because losses per "
            "token do not compare; select the runs of one"
        )
    numbers = {name: _numbers(name, list(values), source) for name, values in columns.items()}
    if len({len(values) for values in numbers.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in numbers.items())
        raise RunsError(f"{source}: columns differ in length: {lengths}")
    return Runs(numbers, known[0] if known else None)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix not in (".json", ".jsonl"):
        raise RunsError(f"{path.name}: runs are read from .csv, .json or .jsonl, got {path.suffix or 'no ending'!r}")
    try:
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:
        raise RunsError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunsError(f"{path.name} must be a list of objects, one per run")
    return [dict(_flatten(row)) for row in rows]


def _flatten(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping) and set(value) == {"value"}:  # W&B keeps its configuration so
            value = value["value"]
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
            continue
        yield f"{prefix}{key}", value


def _find(row: Mapping[str, Any], name: str, path: Path) -> Any:
    if name in row:
        return row[name]
    ending = [key for key in row if key.endswith(f".{name}")]
    if len(ending) == 1:
        return row[ending[0]]
    reason = f"is ambiguous: {', '.join(ending)}" if ending else f"is missing; there are: {', '.join(map(str, row))}"
    raise RunsError(f"{path.name}: column {name!r} {reason}")


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple | set | frozenset):
        return any(_same(found, one) for one in wanted)
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return str(found) == str(wanted)


def _tokenizer(row: Mapping[str, Any]) -> str | None:
    for key, value in row.items():
        if key.rpartition(".")[2] in TOKENIZER_COLUMNS and value:
            return str(value)
    return None


def _numbers(name: str, values: list[Any], source: str) -> np.ndarray:
    numbers, bad = [], []
    for row, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        numbers.append(number)
        if not isfinite(number):
            bad.append(f"{row} ({value!r})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise RunsError(
            f"{source}: column {name!r} has no finite number in row {', '.join(bad[:5])}{more} (rows from 0); leave these "
            "runs out"
        )
    return np.array(numbers)
