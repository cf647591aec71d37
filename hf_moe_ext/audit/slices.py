"""A column of the data set that says what part of the data an example is, on its way to the recorder.

``SliceCollator`` takes it out of the examples and puts a number per row into the batch: a tensor, so that it survives
DataLoader workers, pinning, sharding over processes and batches that are dispatched from one. The hook of the audit takes
it out of the batch again before the model sees it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hf_moe_ext.audit.batch import EXAMPLE_KEY, SLICE_KEY

_NEXT = "give TrainingArguments(remove_unused_columns=False), or RoutingRecorder.attach_to(trainer), which sees to it"


class SliceCollator:
    """A collator that passes on which slice, and which example, each row is.

    Args:
        collator: makes a batch of what is left of the examples; one row per example, in order.
        column: of the data set, with the slice's name.
        slices: all names that occur, such as ``sorted(set(data["source"]))``: the same in every process, whatever part
            of the data it reads.
        example_column: of the data set, with a whole number that identifies the example; None: none is passed on.
        columns: what else of an example the collator gets; None: all. The Trainer takes out other columns by itself only
            with ``remove_unused_columns=True``, which would take out ours too.

    Raises:
        ValueError: names that repeat, or none; when called: a missing column, or a name that was not given.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        column: str | None,
        slices: Sequence[str] = (),
        example_column: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.collator, self.column, self.example_column = collator, column, example_column
        self.numbers = number_slices(column, slices)
        self.columns = None if columns is None else frozenset(columns)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """A batch with the tags beside what the collator makes."""
        slices = [self._slice(example) for example in features] if self.column is not None else None
        examples = [_column(example, self.example_column) for example in features] if self.example_column else None
        own = {self.column, self.example_column}
        rest = [
            {key: v for key, v in example.items() if key not in own and (self.columns is None or key in self.columns)}
            for example in features
        ]
        batch = self.collator(rest)
        for key, values in ((SLICE_KEY, slices), (EXAMPLE_KEY, examples)):
            if values is not None:
                batch[key] = torch.tensor(values, dtype=torch.int64)
        return batch

    def _slice(self, example: Mapping[str, Any]) -> int:
        name = str(_column(example, self.column))
        if name not in self.numbers:
            raise ValueError(
                f"slices must name every value of the column {self.column!r}; {name!r} is not among "
                f"{list(self.numbers)}; add it"
            )
        return self.numbers[name]


def number_slices(column: str | None, slices: Sequence[str]) -> dict[str, int]:
    """Name -> number of each slice.

    Raises:
        ValueError: a column without names, names without a column, or a name twice.
    """
    if isinstance(slices, str):
        raise TypeError(f"slices must be a list of names, got the string {slices!r}; write [{slices!r}]")
    names = [str(name) for name in slices]
    if (column is None) != (not names):
        raise ValueError(
            f"slice_column and slices go together, got slice_column={column!r} and slices={names}; "
            "slices lists all names of the column, such as sorted(set(data[column]))"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"slices must not repeat a name, got {names}; write each once")
    return {name: number for number, name in enumerate(names)}


def _column(example: Mapping[str, Any], column: Any) -> Any:
    if column not in example:
        raise ValueError(f"the examples have no column {column!r}, only {sorted(example)}; {_NEXT}")
    return example[column]
