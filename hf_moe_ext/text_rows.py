"""Any data set as rows of `prompt` and `completion`, and such rows as tokens with the loss on the answer only.

The way of a data set: `read_source` (files, folders, the Hub) -> `choose_splits` -> `to_prompts` (one form for all) ->
`apply_chat_templates` -> `encode_rows`. `read_sides` goes the first three, `read_rows` the same for one split alone.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FILE_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
COLUMN_FORMS = "text | prompt, completion | instruction, [input,] output | messages"
KEPT_COLUMNS = ("answer", "choices", "group", "name", "module")
TEST_SPLIT = "test"
_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Args:
        name: Data set of the Hub, folder, or file ending in one of `FILE_BUILDERS` (also with .gz).
        config: Configuration of a data set of the Hub.
        train_split: Split to train on.
        test_split: Split to measure on; a tenth of the train split where the default one is missing.
        kept_columns: Columns that are kept beside `prompt` and `completion`, where the data set has them.
        option: What the user calls `name`, for messages.
        train_option: The same for `train_split`.
        test_option: The same for `test_split`.
    """

    name: str
    config: str | None = None
    train_split: str = "train"
    test_split: str = TEST_SPLIT
    kept_columns: tuple[str, ...] = KEPT_COLUMNS
    option: str = "--data"
    train_option: str = "--train-split"
    test_option: str = "--test-split"


def read_sides(
    source: RowSource, seed: int = 0, max_train_rows: int | None = None, max_test_rows: int | None = None
) -> dict[str, Dataset]:
    """Read a data set, choose its splits, and bring every row to `prompt`, `completion` (or `messages`).

    Args:
        source: The data set.
        seed: Of the rows that are held out where there is no test split, and of the rows that are drawn.
        max_train_rows: Draw so many; None for all.
        max_test_rows: The same for the test side.

    Returns:
        `{"train": rows, "test": rows}`.

    Raises:
        ValueError: The data cannot be read, is empty, or has no usable column.
    """
    sides = choose_splits(read_source(source), source, seed)
    limits = {"train": max_train_rows, "test": max_test_rows}
    return {side: prepare_side(part, side, source, limits[side], seed) for side, part in sides.items()}


def read_rows(source: RowSource, split: str | None = None) -> Dataset:
    """Every row of one split (of all splits, for None), brought to `prompt`, `completion` (or `messages`).

    Raises:
        ValueError: The data cannot be read, is empty, or has no usable column; there is no such split.
    """
    loaded = read_source(source)
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    if split is not None and split not in splits:
        raise ValueError(
            f"{source.name} has the splits {', '.join(map(str, splits))}, got {split!r}. Name one of them."
        )
    rows = splits[split] if split is not None else datasets.concatenate_datasets(list(splits.values()))
    return prepare_side(rows, split or "only", source)


def prepare_side(part: Dataset, side: str, source: RowSource, limit: int | None = None, seed: int = 0) -> Dataset:
    """One side's rows in one form, with text, and at most `limit` of them.

    Raises:
        ValueError: No row is left, or there is no usable column.
    """
    rows = draw_rows(to_prompts(part, source), limit, seed)
    if not len(rows):
        raise ValueError(f"{source.option} {source.name}: the {side} side has no row with text. Give more data.")
    return rows


def encode_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, description: str) -> Dataset:
    """Tokens and labels; the prompt is labelled -100, and too long a prompt loses its left end.

    Args:
        rows: Rows with `prompt` (empty for plain text) and `completion`, or with `messages`.
        tokenizer: The model's tokenizer.
        max_length: Longest row, in tokens.
        description: Shown beside the progress bar.

    Returns:
        Rows of `input_ids` and `labels`.

    Raises:
        ValueError: No row has a token that is scored.
    """

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        return encode_row(row["prompt"], row["completion"], tokenizer, max_length)

    encoded = rows.map(encode, remove_columns=rows.column_names, desc=description)
    if encoded and all(all(label == -100 for label in labels[1:]) for labels in encoded["labels"]):
        raise ValueError(f"max_length {max_length} leaves no answer token in any row. Raise it.")
    return encoded


def encode_row(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """One row's `input_ids` and `labels`; the answer ends with the end-of-text token."""
    ending = [tokenizer.eos_token_id]
    if not prompt:  # plain text: every token is scored, and what is too long loses its end
        ids = [*tokenizer(completion)["input_ids"], *ending][:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
    answer = (answer if answer[-1:] == ending else [*answer, *ending])[: max_length - 1]  # a template may end it itself
    question = encode_prompt(prompt, tokenizer, max_length - len(answer))
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The last `max_length` tokens of a prompt; a beginning-of-text token the tokenizer adds stays first."""
    begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)  # by a chat template
    ids = tokenizer(prompt, add_special_tokens=not begun)["input_ids"]
    if len(ids) <= max_length:
        return ids
    kept = ids[-max_length:]
    return [ids[0], *kept[1:]] if ids[0] == tokenizer.bos_token_id else kept


def apply_chat_templates(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows of `messages` as `prompt` and `completion`; the last message is the answer. Other rows stay as they are."""
    if "messages" not in rows.column_names:
        return rows
    if tokenizer.chat_template is None:
        logger.warning("The tokenizer has no chat template: a message is written as 'role: content' on a line.")
    return rows.map(lambda row: _split_messages(row["messages"], tokenizer), desc="chat template")


def expand_choices(rows: Dataset) -> tuple[Dataset, list[int], list[int]]:
    """One row per answer choice of every row.

    Returns:
        Rows of `prompt` and `completion`; the question each belongs to; the right choice's position per question.

    Raises:
        ValueError: A row has no answer, no choices, or its completion does not end with its answer.
    """
    expanded, question_of_row, right = [], [], []
    for number, row in enumerate(rows):
        answer = row.get("answer")
        form = _ANSWER_FORMAT.search(row["prompt"])
        choices = row.get("choices") or (form.group(1).split("/") if form else None)
        if not answer or not choices or answer not in choices or not row["completion"].endswith(answer):
            raise ValueError(
                "Accuracy among answer choices needs, in every row, 'answer' among 'choices' (or among a prompt's "
                f"'Answer format: a/b'), and a completion that ends with it; row {number} has answer {answer!r}, "
                f"choices {choices!r}, completion {row['completion'][-40:]!r}."
            )
        stem = row["completion"][: -len(answer)]
        expanded += [{"prompt": row["prompt"], "completion": stem + choice} for choice in choices]
        question_of_row += [number] * len(choices)
        right.append(list(choices).index(answer))
    return Dataset.from_list(expanded), question_of_row, right


def read_source(source: RowSource) -> Dataset | DatasetDict:
    """A data set as it is, with its splits where it has any.

    Raises:
        ValueError: It cannot be read.
    """
    path, called = Path(source.name), f"{source.option} {source.name}"
    suffix = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if path.is_file() and suffix not in FILE_BUILDERS:
        raise ValueError(
            f"{called} ends in '{path.suffix}'; a file must end in {', '.join(FILE_BUILDERS)}, or the same with .gz."
        )
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{called} is an empty file. Give a file with at least one row.")
    if not path.exists() and (suffix in FILE_BUILDERS or source.name.startswith((".", "/", "~"))):
        raise ValueError(f"{called}: there is no such file or folder. Check the path.")
    try:
        if path.is_file():
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            return datasets.load_dataset(FILE_BUILDERS[suffix], data_files=str(path), **options)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(source.name, source.config)
    except Exception as error:  # every builder, file system and network client raises its own kinds
        cause = error.__cause__ or error
        raise ValueError(
            f"{called} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}. "
            "Check the name, the file, and the network for a data set of the Hub."
        ) from error


def choose_splits(loaded: Dataset | DatasetDict, source: RowSource, seed: int) -> dict[str, Dataset]:
    """The train and the test side; without a test split, a tenth of the train split is held out.

    Raises:
        ValueError: A named split is not there, or there are too few rows to hold one out.
    """
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    train_name, test_name = source.train_split, source.test_split
    has = f"{source.name} has the splits {', '.join(map(str, splits))}"
    if train_name not in splits:
        raise ValueError(f"{source.train_option} {train_name}: {has}. Name one of them.")
    if test_name in splits:
        return {"train": splits[train_name], "test": splits[test_name]}
    if test_name != TEST_SPLIT:
        raise ValueError(
            f"{source.test_option} {test_name}: {has}. Name one of them, or leave it out to hold out a tenth of "
            f"'{train_name}'."
        )
    rows = splits[train_name]
    if len(rows) < 2:
        raise ValueError(
            f"{source.option} {source.name} has {len(rows)} row(s) and no split '{test_name}'; at least 2 are "
            "needed, one of them to measure on. Give more data."
        )
    logger.warning("%s has no split '%s': a tenth of '%s' is held out.", source.name, test_name, train_name)
    parts = rows.train_test_split(test_size=max(1, len(rows) // 10), seed=seed)
    return {"train": parts["train"], "test": parts["test"]}


def to_prompts(rows: Dataset, source: RowSource) -> Dataset:
    """Rows with `prompt` and `completion` (or `messages`), and of the other columns only what is kept.

    Raises:
        ValueError: No column has a known name.
    """
    have = set(rows.column_names)
    if {"prompt", "completion"} <= have:
        convert = _from_prompt
    elif {"instruction", "output"} <= have:
        convert = _from_instruction
    elif "messages" in have:
        convert = _from_messages
    elif "text" in have:
        convert = _from_text
    else:
        raise ValueError(
            f"{source.option} {source.name} has the columns {', '.join(sorted(have)) or '(none)'}; one of these forms is "
            f"needed: {COLUMN_FORMS}. Rename its columns."
        )
    dropped = [column for column in rows.column_names if column not in source.kept_columns]
    rows = rows.map(convert, remove_columns=dropped, desc="read rows")
    return rows.filter(lambda row: bool(row.get("messages") or row.get("completion")), desc="drop empty rows")


def draw_rows(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn by the seed; all, in their order, where that is no limit."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(limit))


def _from_prompt(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row["prompt"], list):  # a conversation, split in two
        answer = row["completion"]
        return {"messages": [*row["prompt"], *(answer if isinstance(answer, list) else [])]}
    return {"prompt": row["prompt"] or "", "completion": row["completion"] or ""}


def _from_instruction(row: dict[str, Any]) -> dict[str, str]:
    parts = [row["instruction"], row.get("input")]
    return {"prompt": "\n\n".join(part for part in parts if part) + "\n", "completion": row["output"] or ""}


def _from_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["messages"]}


def _from_text(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": "", "completion": (row["text"] or "").strip("\n")}


def _split_messages(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    if tokenizer.chat_template is None:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        lead = f"{messages[-1]['role']}: "
        return {"prompt": "".join(lines[:-1]) + lead, "completion": messages[-1]["content"]}
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    if not whole.startswith(prompt):  # templates that rewrite earlier turns: the last message's own text is the answer
        return {"prompt": prompt, "completion": messages[-1]["content"]}
    return {"prompt": prompt, "completion": whole.removeprefix(prompt)}
