"""The pilot's rows: to train on, to choose rates by, and to compare finalists on; read once, tokenised once, kept on disk."""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from hf_moe_ext.pilot.folder import full_disk_told, read_json, write_json
from hf_moe_ext.pilot.request import PilotRequest
from hf_moe_ext.text_rows import (
    RowSource,
    apply_chat_templates,
    encode_rows,
    expand_choices,
    read_rows,
    read_sides,
)

TRAIN, CHOICE, HELD_OUT, CHOICES = "train", "choice", "held_out", "answer_choices"
ROWS, FACTS = "rows", "facts.json"
MIN_TRAIN_ROWS, MIN_HELD_OUT_ROWS = 48, 16
MAX_CHOICE_ROWS = 128
CHOICES_METRIC = "choices"


def prepare_rows(request: PilotRequest, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Read, split and tokenise the rows into `folder/rows`, once.

    Train rows that also stand among the held-out ones are dropped. The rows that rates are chosen by are split off the
    train side, so that the held-out rows decide nothing but the comparison.

    Returns:
        Facts for the report: rows of each side, dropped rows, mean tokens of a row.

    Raises:
        ValueError: The data cannot be read, or there is too little of it.
    """
    target = folder / ROWS
    facts = read_json(target / FACTS)
    if facts is not None:
        return dict(facts)
    sides = {side: apply_chat_templates(rows, tokenizer) for side, rows in _read(request).items()}
    known = {_key(row) for row in sides["test"]}
    kept = [i for i, row in enumerate(sides["train"]) if _key(row) not in known]
    dropped = len(sides["train"]) - len(kept)
    train, test = sides["train"].select(kept), sides["test"]
    _check_sizes(request, len(train), len(test))
    num_choice = min(MAX_CHOICE_ROWS, max(MIN_HELD_OUT_ROWS, len(train) // 10))
    parts = train.train_test_split(test_size=num_choice, seed=request.seed)
    encoded = {TRAIN: parts["train"], CHOICE: parts["test"], HELD_OUT: test}
    encoded = {
        side: encode_rows(rows, tokenizer, request.max_length, f"tokenize {side}") for side, rows in encoded.items()
    }
    # Longest first: little padding, and a batch that does not fit fails at once.
    order = sorted(range(len(test)), key=lambda i: -len(encoded[HELD_OUT][i]["input_ids"]))
    encoded[HELD_OUT], test = encoded[HELD_OUT].select(order), test.select(order)
    facts = {
        "train_rows": len(encoded[TRAIN]),
        "choice_rows": len(encoded[CHOICE]),
        "held_out_rows": len(test),
        "duplicates_dropped": dropped,
        "train_tokens_per_row": sum(map(len, encoded[TRAIN]["input_ids"])) / len(encoded[TRAIN]),
        "held_out_from": request.held_out or "the data set",
    }
    if request.metric == CHOICES_METRIC:
        step = max(1, len(test) // request.metric_rows)
        asked = test.select(range(0, len(test), step)[: request.metric_rows])  # some of every length
        rows, questions, right = expand_choices(asked)
        answers = encode_rows(rows, tokenizer, request.max_length, "tokenize answer choices")
        encoded[CHOICES] = answers.add_column("question", questions)
        facts["right_choices"] = right
    elif request.metric is not None and not any(test["prompt"]):
        raise ValueError(
            f"--metric {request.metric} is of written answers, and no held-out row has a prompt to answer."
        )
    _write(encoded, test, facts, target)
    return facts


def load_side(folder: Path, side: str) -> Dataset:
    """Tokenised rows of a side."""
    return load_from_disk(str(folder / ROWS / side))


def load_texts(folder: Path) -> Dataset:
    """The held-out rows as text, in the order of their tokens."""
    return load_from_disk(str(folder / ROWS / "texts"))


def load_facts(folder: Path) -> dict[str, Any]:
    """What `prepare_rows` returned."""
    return dict(read_json(folder / ROWS / FACTS))


def _read(request: PilotRequest) -> dict[str, Dataset]:
    source = RowSource(request.data)
    if request.held_out is None:
        return read_sides(source, request.seed, request.max_train_rows, request.max_held_out_rows)
    other = read_rows(RowSource(request.held_out, option="--held-out"))
    train = read_rows(source)
    return {
        "train": _draw(train, request.max_train_rows, request.seed),
        "test": _draw(other, request.max_held_out_rows, request.seed),
    }


def _draw(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    from hf_moe_ext.text_rows import draw_rows

    return draw_rows(rows, limit, seed)


def _key(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(f"{row['prompt']}\0{row['completion'] if not row['prompt'] else ''}".encode()).digest()


def _check_sizes(request: PilotRequest, num_train: int, num_held_out: int) -> None:
    if num_train < MIN_TRAIN_ROWS:
        raise ValueError(
            f"--data {request.data} leaves {num_train} train rows that are not held out; a pilot needs at least "
            f"{MIN_TRAIN_ROWS}. Give more rows."
        )
    if num_held_out < MIN_HELD_OUT_ROWS:
        raise ValueError(
            f"--data {request.data} gives {num_held_out} held-out rows; a comparison needs at least {MIN_HELD_OUT_ROWS}. "
            "Give more rows, or a file of them with --held-out."
        )


def _write(encoded: dict[str, Dataset], texts: Dataset, facts: dict[str, Any], target: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".rows-", dir=target.parent))
    try:
        with full_disk_told(target.parent):
            for side, rows in encoded.items():
                rows.save_to_disk(staging / side)
            texts.save_to_disk(staging / "texts")
            write_json(staging / FACTS, facts)
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
