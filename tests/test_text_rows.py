"""Rows for a caller that is no recipe, and tokens with the loss on the answer only."""

import copy
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_moe_ext.text_rows import (
    RowSource,
    apply_chat_templates,
    encode_prompt,
    encode_row,
    expand_choices,
    read_rows,
    read_sides,
)
from support import words


@pytest.fixture
def tokenizer():
    return words.build_tokenizer()


def test_loss_is_on_the_answer_and_its_end_only(tokenizer) -> None:
    row = encode_row("w3 w4 w5\n", "w6 w7", tokenizer, 64)
    answer = tokenizer("w6 w7")["input_ids"] + [tokenizer.eos_token_id]
    assert [label for label in row["labels"] if label != -100] == answer
    assert row["input_ids"] == [3, 4, 5, 6, 7, 2]
    plain = encode_row("", "w6 w7", tokenizer, 64)
    assert plain["labels"] == plain["input_ids"] == answer


def test_too_long_a_prompt_loses_its_left_end(tokenizer) -> None:
    whole = encode_row("w8 w9 w10 " * 20, "w11", tokenizer, 999)
    cut = encode_row("w8 w9 w10 " * 20, "w11", tokenizer, 12)
    assert len(cut["input_ids"]) == 12
    assert cut["input_ids"] == whole["input_ids"][-12:]
    assert cut["labels"] == whole["labels"][-12:]
    long_answer = encode_row("w8", "w10 " * 50, tokenizer, 10)
    assert len(long_answer["input_ids"]) == 10
    assert long_answer["labels"][0] == -100


def test_a_beginning_token_survives_the_cut(tokenizer) -> None:
    prompt = tokenizer.bos_token + " w8 w9 w10 " * 20
    ids = encode_prompt(prompt, tokenizer, 9)
    assert len(ids) == 9
    assert ids[0] == tokenizer.bos_token_id


def test_messages_with_and_without_a_chat_template(tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = Dataset.from_list([{"messages": messages}])
    tokenizer.chat_template = None
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


def test_all_rows_of_a_file_or_one_split_and_columns_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i}", "topic": i % 2, "other": i}) + "\n" for i in range(6)))
    rows = read_rows(RowSource(str(path), kept_columns=("topic",)))
    assert rows["completion"][:] == [f"line {i}" for i in range(6)]
    assert sorted(rows.column_names) == ["completion", "prompt", "topic"]
    sides = {"train": read_rows(RowSource(str(path))), "dev": rows.select(range(2))}
    DatasetDict({name: part.select_columns(["prompt", "completion"]) for name, part in sides.items()}).save_to_disk(
        tmp_path / "saved"
    )
    assert [len(read_rows(RowSource(str(tmp_path / "saved")), split)) for split in ("train", "dev", None)] == [6, 2, 8]
    with pytest.raises(ValueError, match="has the splits train, dev, got 'test'"):
        read_rows(RowSource(str(tmp_path / "saved")), "test")


def test_a_refusal_names_the_option_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--texts .*no such file or folder"):
        read_rows(RowSource("nowhere/rows.jsonl", option="--texts"))
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n' * 4)
    with pytest.raises(ValueError, match=r"--data .*no row with text"):
        read_sides(RowSource(str(tmp_path / "rows.jsonl")))
