"""The data sets a run can name without a file of its own: docstrings, arithmetic and reasoning."""

import gzip
import json
import re
from pathlib import Path

from datasets import Dataset

from finetune_arguments import SourceArguments, UserError
from quickstart.arithmetic import build_arithmetic_rows
from quickstart.corpus import Corpus, Module, is_held_out
from quickstart.docstrings import build_docstring_rows

REASONING_FILES = {"boolq": "boolq", "arc_easy": "ARC-Easy"}


def build_built_in(arguments: SourceArguments, corpus: Corpus | None) -> dict[str, Dataset]:
    """Rows of a built-in data set.

    Args:
        arguments: `dataset_name` is one of `BUILT_IN_DATASETS`.
        corpus: The source text, for `docstrings`; None for the others.

    Returns:
        `{"train": rows, "test": rows}`.

    Raises:
        UserError: A file of `reasoning` is not there.
    """
    if corpus is not None:
        return build_docstrings(corpus)
    if arguments.dataset_name == "arithmetic":
        return {side: Dataset.from_list(rows) for side, rows in build_arithmetic_rows().items()}
    return _build_reasoning(Path(str(arguments.data_dir)))


def build_docstrings(corpus: Corpus) -> dict[str, Dataset]:
    """Function source -> first sentence of its docstring; sides are modules that share nothing."""
    train, held_out = build_docstring_rows(corpus)
    if not train or not held_out:
        raise UserError(
            f"--dataset_name docstrings found {len(train)} train and {len(held_out)} held-out functions with a "
            "docstring; both must be more than none. Give --base_source_dir more source, or leave it out."
        )
    return {
        side: Dataset.from_list([vars(row) for row in rows]) for side, rows in (("train", train), ("test", held_out))
    }


def split_train_modules(corpus: Corpus) -> Corpus:
    """The train modules split once more, for choosing settings without a look at the held-out ones."""

    def chosen(module: Module) -> bool:
        return is_held_out(module.top_level, purpose="validation ")

    return Corpus(
        train=tuple(module for module in corpus.train if not chosen(module)),
        held_out=tuple(module for module in corpus.train if chosen(module)),
    )


def _build_reasoning(folder: Path) -> dict[str, Dataset]:
    sides: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for group, stem in REASONING_FILES.items():
        for side, rows in sides.items():
            rows += [{**row, "group": group} for row in _read_rows(folder / f"{stem}_{side}.jsonl.gz")]
    for side, arithmetic in build_arithmetic_rows().items():
        sides[side] += [{**row, "group": "arithmetic"} for row in arithmetic]
    # A few test questions also stand in train, word for word or but for punctuation.
    tested = {_normalised(row["instruction"]) for row in sides["test"]}
    sides["train"] = [row for row in sides["train"] if _normalised(row["instruction"]) not in tested]
    return {side: Dataset.from_list(rows) for side, rows in sides.items()}


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"--data_dir {path.parent} must hold {path.name}; it does not. Give the folder of that file.")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
            return [{name: row[name] for name in ("instruction", "output", "answer")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--data_dir: {path} must be gzipped JSON Lines with instruction, output and answer in every row; "
            f"reading it failed with {type(error).__name__}: {error}."
        ) from error


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"\W+", " ", text.lower()).split())
