"""Text of a data set as batches of token ids that remember which example and slice each row is."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_moe_ext.text_rows import RowSource, apply_chat_templates, encode_row, prepare_side, read_source, to_prompts

SLICE_COLUMN = "slice"
MAX_SLICES = 64
_NUMBER_COLUMN = "routing_example_number"


@dataclass(frozen=True)
class Example:
    """One row of the data.

    Attributes:
        number: of the row in the data, from 0, rows without text counted too.
        slice: its slice; "-" where the data have none.
        input_ids: its tokens.
        labels: the same, -100 where the loss does not count (a prompt).
    """

    number: int
    slice: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class InspectedData:
    """What a model is shown.

    Attributes:
        name: of the file or data set.
        data_hash: SHA-256 of the text and slices of all its rows, not only of those drawn.
        num_rows: rows with text.
        slice_column: where the slices come from; None without.
        examples: those drawn, in the order of the data.
    """

    name: str
    data_hash: str
    num_rows: int
    slice_column: str | None
    examples: tuple[Example, ...]

    @property
    def num_tokens(self) -> int:
        """Of all examples drawn."""
        return sum(len(each.input_ids) for each in self.examples)


def read_text_rows(name: str, slice_column: str | None) -> tuple[Dataset, str | None]:
    """All rows with text of a file or data set, and the column that names their slices.

    Raises:
        ValueError: it cannot be read, has no text, or no such column.
    """
    source = RowSource(name)
    loaded = read_source(source)
    rows = loaded if isinstance(loaded, Dataset) else datasets.concatenate_datasets(list(loaded.values()))
    if slice_column is None and SLICE_COLUMN in rows.column_names:
        slice_column = SLICE_COLUMN
    if slice_column is not None and slice_column not in rows.column_names:
        raise ValueError(
            f"--slice-column {slice_column}: {name} has the columns {', '.join(rows.column_names)}; name one of them"
        )
    to_prompts(rows.select(range(min(1, len(rows)))), source)  # for its message, before there are columns of ours
    rows = rows.add_column(_NUMBER_COLUMN, list(range(len(rows))))
    if slice_column is not None:
        # A copy: the column may be one of those that become the text.
        rows = rows.add_column(SLICE_COLUMN + "_of_row", [str(value) for value in rows[slice_column]])
    kept = (_NUMBER_COLUMN, SLICE_COLUMN + "_of_row")
    return prepare_side(rows, "only", replace(source, kept_columns=kept)), slice_column


def read_examples(
    name: str,
    tokenizer: Any,
    *,
    slice_column: str | None = None,
    max_tokens: int = 20_000,
    max_length: int = 1024,
    seed: int = 0,
) -> InspectedData:
    """Draw rows of a data set at random, as tokens, until there are enough.

    Args:
        name: data set of the Hub, folder, or file: JSON, JSONL, CSV, TSV, parquet, text, also with .gz.
        tokenizer: the model's.
        slice_column: column that names each row's slice. [default: ``slice``, where there is one]
        max_tokens: how many in all, at most.
        max_length: longest row; what is longer is cut.
        seed: of the draw.

    Raises:
        ValueError: see ``read_text_rows``; more slices than ``MAX_SLICES``; no two tokens.
    """
    for option, value, least in (("--max-tokens", max_tokens, 2), ("--max-length", max_length, 2)):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    rows, slice_column = read_text_rows(name, slice_column)
    slices = list(rows[SLICE_COLUMN + "_of_row"]) if slice_column else ["-"] * len(rows)
    if len(set(slices)) > MAX_SLICES:
        raise ValueError(
            f"--slice-column {slice_column} has {len(set(slices))} different values in {name}, at most {MAX_SLICES} can be told "
            "apart; give a column of few values"
        )
    data_hash = _hash_rows(rows, slices)
    texts = apply_chat_templates(rows, tokenizer)
    examples: list[Example] = []
    left = max_tokens
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        encoded = encode_row(texts[i]["prompt"], texts[i]["completion"], tokenizer, min(max_length, left))
        if len(encoded["input_ids"]) < 2:
            continue
        number = rows[i][_NUMBER_COLUMN]
        examples.append(Example(number, slices[i], encoded["input_ids"], encoded["labels"]))
        left -= len(encoded["input_ids"])
        if left < 2:
            break
    if not examples:
        raise ValueError(f"--data {name}: the tokenizer makes no two tokens of any row; give more text")
    examples.sort(key=lambda each: each.number)
    return InspectedData(name, data_hash, len(rows), slice_column, tuple(examples))


def make_batches(
    examples: Sequence[Example], batch_size: int, pad_id: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[Example], dict[str, Tensor]]]:
    """Batches in the order of the examples, padded on the right.

    Yields:
        The examples, and ``input_ids``, ``attention_mask`` and ``labels``, each [batch, length].
    """
    for start in range(0, len(examples), batch_size):
        chosen = list(examples[start : start + batch_size])
        length = max(len(each.input_ids) for each in chosen)
        columns = {"input_ids": [], "attention_mask": [], "labels": []}  # type: dict[str, list[list[int]]]
        for each in chosen:
            missing = length - len(each.input_ids)
            columns["input_ids"].append(each.input_ids + [pad_id] * missing)
            columns["attention_mask"].append([1] * len(each.input_ids) + [0] * missing)
            columns["labels"].append(each.labels + [-100] * missing)
        yield chosen, {key: torch.tensor(value, device=device) for key, value in columns.items()}


def _hash_rows(rows: Dataset, slices: list[str]) -> str:
    total = hashlib.sha256()
    for row, name in zip(rows, slices, strict=True):
        text = {key: value for key, value in row.items() if key in ("prompt", "completion", "messages")}
        total.update(json.dumps([text, name], sort_keys=True).encode() + b"\n")
    return total.hexdigest()
