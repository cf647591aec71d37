"""Every form of data set, and refusals in the recipe's words."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from finetune_arguments import UserError, parse_arguments
from finetune_data import encode_rows, expand_choices, load_rows

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


def test_rows_without_an_answer_token_are_refused(tokenizer) -> None:
    rows = Dataset.from_list([{"prompt": "read the buffer", "completion": "x"}])
    with pytest.raises(UserError, match="--max_length 1 "):
        encode_rows(rows, tokenizer, 1, "tokenize")


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
