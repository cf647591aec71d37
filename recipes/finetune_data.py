"""The rows of a run: built in, or read by `hf_moe_ext.text_rows`, whose refusals become the recipe's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune_arguments import BUILT_IN_DATASETS, ReadsRows, UserError
from hf_moe_ext import text_rows


def load_rows(arguments: ReadsRows, built_in: Callable[[], dict[str, Dataset]]) -> dict[str, Dataset]:
    """Read `--dataset_name`, choose the splits, and bring every row to `prompt`, `completion`.

    Args:
        arguments: The run's arguments.
        built_in: Makes the rows when the name is a built-in one.

    Returns:
        `{"train": rows, "test": rows}`.

    Raises:
        UserError: The data cannot be read, is empty, or has no usable column.
    """
    data, seed = arguments.data, arguments.training.seed
    source = text_rows.RowSource(
        data.dataset_name,
        data.dataset_config,
        data.dataset_train_split,
        data.dataset_test_split,
        option="--dataset_name",
        train_option="--dataset_train_split",
        test_option="--dataset_test_split",
    )
    limits = {"train": data.max_train_samples, "test": data.max_eval_samples}
    with _refusal():
        if data.dataset_name not in BUILT_IN_DATASETS:
            return text_rows.read_sides(source, seed, limits["train"], limits["test"])
        sides = built_in()
        return {side: text_rows.prepare_side(part, side, source, limits[side], seed) for side, part in sides.items()}


def encode_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, description: str) -> Dataset:
    """`text_rows.encode_rows`.

    Raises:
        UserError: No row has a token that is scored.
    """
    with _refusal("--"):
        return text_rows.encode_rows(rows, tokenizer, max_length, description)


def expand_choices(rows: Dataset) -> tuple[Dataset, list[int], list[int]]:
    """`text_rows.expand_choices`, for `--answer_choices_metric`.

    Raises:
        UserError: A row has no answer, no choices, or its completion does not end with its answer.
    """
    with _refusal("--answer_choices_metric true: "):
        return text_rows.expand_choices(rows)


@contextmanager
def _refusal(prefix: str = "") -> Iterator[None]:
    """Errors of the user's rows as the recipe's own."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error
