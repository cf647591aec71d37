"""Any data set as rows of `prompt` and `completion`, and such rows as tokens with the loss on the answer only."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from finetune_arguments import BUILT_IN_DATASETS, ReadsRows, SourceArguments, UserError

logger = logging.get_logger("finetune")

FILE_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
COLUMN_FORMS = "text | prompt, completion | instruction, [input,] output | messages"
KEPT_COLUMNS = ("answer", "choices", "group", "name", "module")
_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")


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
    data = arguments.data
    if data.dataset_name in BUILT_IN_DATASETS:
        sides = built_in()
    else:
        sides = _choose_splits(_read(data), data, arguments.training.seed)
    limits = {"train": data.max_train_samples, "test": data.max_eval_samples}
    rows = {}
    for side, part in sides.items():
        part = _sample(to_prompts(part, data.dataset_name), limits[side], arguments.training.seed)
        if not len(part):
            raise UserError(
                f"--dataset_name {data.dataset_name}: the {side} side has no row with text. Give more data."
            )
        rows[side] = part
    return rows


def encode_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, description: str) -> Dataset:
    """Tokens and labels; the prompt is labelled -100, and too long a prompt loses its left end.

    Args:
        rows: Rows with `prompt` (empty for plain text) and `completion`, or with `messages`.
        tokenizer: The model's tokenizer.
        max_length: Longest row, in tokens.
        description: Shown beside the progress bar.

    Returns:
        Rows of `input_ids` and `labels`, each with at least one scored token.
    """

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        return encode_row(row["prompt"], row["completion"], tokenizer, max_length)

    encoded = rows.map(encode, remove_columns=rows.column_names, desc=description)
    if encoded and all(all(label == -100 for label in labels[1:]) for labels in encoded["labels"]):
        raise UserError(f"--max_length {max_length} leaves no answer token in any row. Raise it.")
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
    """One row per answer choice of every row, for `--answer_choices_metric`.

    Returns:
        Rows of `prompt` and `completion`; the question each belongs to; the right choice's position per question.

    Raises:
        UserError: A row has no answer, no choices, or its completion does not end with its answer.
    """
    expanded, question_of_row, right = [], [], []
    for number, row in enumerate(rows):
        answer = row.get("answer")
        form = _ANSWER_FORMAT.search(row["prompt"])
        choices = row.get("choices") or (form.group(1).split("/") if form else None)
        if not answer or not choices or answer not in choices or not row["completion"].endswith(answer):
            raise UserError(
                "--answer_choices_metric true needs, in every test row, 'answer' among 'choices' (or among a prompt's "
                f"'Answer format: a/b'), and a completion that ends with it; row {number} has answer {answer!r}, "
                f"choices {choices!r}, completion {row['completion'][-40:]!r}."
            )
        stem = row["completion"][: -len(answer)]
        expanded += [{"prompt": row["prompt"], "completion": stem + choice} for choice in choices]
        question_of_row += [number] * len(choices)
        right.append(list(choices).index(answer))
    return Dataset.from_list(expanded), question_of_row, right


def _read(data: SourceArguments) -> Dataset | DatasetDict:
    name, path = data.dataset_name, Path(data.dataset_name)
    suffix = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    try:
        if path.is_file():
            if suffix not in FILE_BUILDERS:
                raise UserError(
                    f"--dataset_name {name} ends in '{path.suffix}'; a file must end in "
                    f"{', '.join(FILE_BUILDERS)}, or the same with .gz."
                )
            if path.stat().st_size == 0:
                raise UserError(f"--dataset_name {name} is an empty file. Give a file with at least one row.")
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            return datasets.load_dataset(FILE_BUILDERS[suffix], data_files=str(path), **options)
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            return datasets.load_from_disk(str(path))
        if not path.exists() and (suffix in FILE_BUILDERS or name.startswith((".", "/", "~"))):
            raise UserError(f"--dataset_name {name}: there is no such file or folder. Check the path.")
        return datasets.load_dataset(name, data.dataset_config)
    except UserError:
        raise
    except Exception as error:  # every builder, file system and network client raises its own kinds
        cause = error.__cause__ or error
        raise UserError(
            f"--dataset_name {name} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}. "
            "Check the name, the file, and the network for a data set of the Hub."
        ) from error


def _choose_splits(loaded: Dataset | DatasetDict, data: SourceArguments, seed: int) -> dict[str, Dataset]:
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    train_name, test_name = data.dataset_train_split, data.dataset_test_split
    has = f"{data.dataset_name} has the splits {', '.join(map(str, splits))}"
    if train_name not in splits:
        raise UserError(f"--dataset_train_split {train_name}: {has}. Name one of them.")
    if test_name in splits:
        return {"train": splits[train_name], "test": splits[test_name]}
    if test_name != SourceArguments.dataset_test_split:
        raise UserError(
            f"--dataset_test_split {test_name}: {has}. Name one of them, or leave it out to hold out a tenth of "
            f"'{train_name}'."
        )
    rows = splits[train_name]
    if len(rows) < 2:
        raise UserError(
            f"--dataset_name {data.dataset_name} has {len(rows)} row(s) and no split '{test_name}'; at least 2 are "
            "needed, one of them to measure on. Give more data."
        )
    logger.warning("%s has no split '%s': a tenth of '%s' is held out.", data.dataset_name, test_name, train_name)
    parts = rows.train_test_split(test_size=max(1, len(rows) // 10), seed=seed)
    return {"train": parts["train"], "test": parts["test"]}


def to_prompts(rows: Dataset, name: str) -> Dataset:
    """Rows with `prompt` and `completion` (or `messages`), and of the other columns only what is used later."""
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
        raise UserError(
            f"--dataset_name {name} has the columns {', '.join(sorted(have)) or '(none)'}; one of these forms is "
            f"needed: {COLUMN_FORMS}. Rename its columns."
        )
    dropped = [column for column in rows.column_names if column not in KEPT_COLUMNS]
    rows = rows.map(convert, remove_columns=dropped, desc="read rows")
    return rows.filter(lambda row: bool(row.get("messages") or row.get("completion")), desc="drop empty rows")


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


def _sample(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(limit))
