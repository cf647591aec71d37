"""Every form of data set, and tokens with the loss on the answer only."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from finetune_arguments import UserError, parse_arguments
from finetune_data import (
    apply_chat_templates,
    encode_prompt,
    encode_row,
    encode_rows,
    expand_choices,
    load_rows,
)

ROWS = [{"instruction": f"add {i}", "input": "to one" if i % 2 else "", "output": f"it is {i + 1}"} for i in range(20)]


def _load(name: Path | str, *flags: str) -> dict[str, Dataset]:
    return load_rows(parse_arguments(["--dataset_name", str(name), *flags]), dict)


def _write(path: Path) -> Path:
    if path.suffixes[0] in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = _load(_write(tmp_path / name))
    assert (len(rows["train"]), len(rows["test"])) == (18, 2)
    pairs = {(row["prompt"], row["completion"]) for side in rows.values() for row in side}
    assert ("add 0\n", "it is 1") in pairs
    assert ("add 1\n\nto one\n", "it is 2") in pairs
    assert len(pairs) == 20


def test_folder_with_splits_and_saved_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    _write(folder / "train.jsonl")
    _write(folder / "test.jsonl")
    assert {side: len(rows) for side, rows in _load(folder).items()} == {"train": 20, "test": 20}
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(_load(tmp_path / "saved")["train"]) == 18


def test_plain_text_drops_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first line\n\nsecond line\n" * 5)
    rows = _load(path)
    assert {row["prompt"] for side in rows.values() for row in side} == {""}
    assert {row["completion"] for side in rows.values() for row in side} == {"first line", "second line"}


def test_samples_are_drawn_by_the_seed(json_file: Path) -> None:
    draws = [
        _load(json_file, "--max_train_samples", "3", "--seed", str(seed))["train"]["prompt"][:] for seed in (1, 1, 2)
    ]
    assert len(draws[0]) == 3
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("a.jsonl", '{"question": "a", "reply": "b"}\n' * 3, [], ["question, reply", "prompt, completion", "Rename"]),
        ("a.jsonl", "", [], ["empty file", "a.jsonl"]),
        ("a.txt", "\n\n\n", [], ["no row with text"]),
        ("a.jsonl", '{"text": "one"}\n', [], ["1 row(s)", "at least 2"]),
        ("a.jsonl", '{"text": ', [], ["cannot be read"]),
        ("a.xml", "<a/>", [], [".xml", ".parquet"]),
        ("a.jsonl", '{"text": "a"}\n' * 5, ["--dataset_train_split", "big"], ["--dataset_train_split big", "train"]),
        ("a.jsonl", '{"text": "a"}\n' * 5, ["--dataset_test_split", "dev"], ["--dataset_test_split dev", "train"]),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, name: str, content: str, flags: list[str], words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as raised:
        _load(path, *flags)
    assert all(word in str(raised.value) for word in ["--dataset", *words]), raised.value


def test_a_path_that_is_not_there_is_not_sought_on_the_hub() -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        _load("nowhere/rows.jsonl")


def test_loss_is_on_the_answer_and_its_end_only(tokenizer) -> None:
    row = encode_row("read the buffer\n", "it is read", tokenizer, 64)
    answer = tokenizer("it is read")["input_ids"] + [tokenizer.eos_token_id]
    assert [label for label in row["labels"] if label != -100] == answer
    assert tokenizer.decode(row["input_ids"]) == "read the buffer\nit is read<|endoftext|>"
    plain = encode_row("", "it is read", tokenizer, 64)
    assert plain["labels"] == plain["input_ids"] == answer


def test_too_long_a_prompt_loses_its_left_end(tokenizer) -> None:
    whole = encode_row("close the window " * 20, "done", tokenizer, 999)
    cut = encode_row("close the window " * 20, "done", tokenizer, 12)
    assert len(cut["input_ids"]) == 12
    assert cut["input_ids"] == whole["input_ids"][-12:]
    assert cut["labels"] == whole["labels"][-12:]
    long_answer = encode_row("close", "window " * 50, tokenizer, 10)
    assert len(long_answer["input_ids"]) == 10
    assert long_answer["labels"][0] == -100


def test_a_beginning_token_survives_the_cut(tokenizer) -> None:
    prompt = tokenizer.bos_token + "close the window " * 20
    ids = encode_prompt(prompt, tokenizer, 9)
    assert len(ids) == 9
    assert ids[0] == tokenizer.bos_token_id


def test_rows_without_an_answer_token_are_refused(tokenizer) -> None:
    rows = Dataset.from_list([{"prompt": "read the buffer", "completion": "x"}])
    with pytest.raises(UserError, match="--max_length 1 "):
        encode_rows(rows, tokenizer, 1, "tokenize")


def test_messages_with_and_without_a_chat_template(tokenizer) -> None:
    import copy

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = Dataset.from_list([{"messages": messages}])
    plain = apply_chat_templates(rows, tokenizer)[0]
    assert (plain["prompt"], plain["completion"]) == ("user: hi\nassistant: ", "yes")
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    row = apply_chat_templates(rows, templated)[0]
    assert (row["prompt"], row["completion"]) == ("<user>hi<assistant>", "yes")


def test_choices_become_rows() -> None:
    rows = Dataset.from_list(
        [
            {
                "prompt": "is it?\n\nAnswer format: true/false\n",
                "completion": "the answer is false",
                "answer": "false",
                "choices": None,
            },
            {"prompt": "which?", "completion": "b", "answer": "b", "choices": ["a", "b", "c"]},
        ]
    )
    expanded, question_of_row, right = expand_choices(rows)
    assert expanded["completion"][:] == ["the answer is true", "the answer is false", "a", "b", "c"]
    assert (question_of_row, right) == ([0, 0, 1, 1, 1], [1, 1])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "is it?", "completion": "false", "answer": "false"},
        {"prompt": "Answer format: a/b", "completion": "c", "answer": "c"},
        {"prompt": "Answer format: a/b", "completion": "a.", "answer": "a"},
        {"prompt": "Answer format: a/b", "completion": "a"},
    ],
)
def test_rows_without_choices_are_refused(row: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--answer_choices_metric"):
        expand_choices(Dataset.from_list([row]))
