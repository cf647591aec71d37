"""An inspection against loops: losses, selectivity and counts, whatever form the text has; and back from JSON."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_moe_ext.audit.inspection import Inspection, inspect_model, read_inspection
from hf_moe_ext.audit.selectivity import selectivity
from hf_moe_ext.audit.text_batches import make_batches, read_examples
from support import zoo
from support.inspected import MODEL, random_rows, write_rows
from support.perft import perft_r
from support.words import build_tokenizer

WORDS = "w40 w41 w42 w43"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return perft_r("olmoe", torch.float32).eval()


@pytest.fixture
def data(tokenizer, tmp_path: Path):
    rows = random_rows(12)
    for number, row in enumerate(rows):  # of different length, so that a batch has padding
        row["text"] = " ".join(row["text"].split()[: 8 + number])
    return read_examples(str(write_rows(tmp_path / "text.jsonl", rows)), tokenizer)


def test_losses_are_the_models_own_row_by_row(model, data) -> None:
    told = inspect_model(model, data, MODEL, batch_size=5)
    nats: dict[str, list[float]] = {"even": [], "odd": []}
    for example in data.examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            probabilities = model(input_ids=ids).logits[0].double().softmax(dim=-1)
        nats[example.slice] += [-math.log(probabilities[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
    assert told.loss.tokens == sum(len(each) for each in nats.values())
    assert told.loss.loss == pytest.approx(np.mean(nats["even"] + nats["odd"]), abs=1e-5)
    for name, values in nats.items():
        assert told.slice_losses[name].tokens == len(values)
        assert told.slice_losses[name].loss == pytest.approx(np.mean(values), abs=1e-5)
    with torch.no_grad():
        outputs = [model(input_ids=b["input_ids"], labels=b["labels"]) for _, b in make_batches(data.examples, 12, 2)]
    assert told.loss.loss == pytest.approx(float(outputs[0].loss), abs=1e-5)


def test_counts_and_selectivity_are_those_of_a_loop(model, data) -> None:
    seen: dict[str, list] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(
                lambda module, args, output, name=name: seen.setdefault(name, []).append(output[0].double().softmax(-1))
            )
    told = inspect_model(model, data, MODEL, batch_size=1)
    again = inspect_model(model, data, MODEL, batch_size=7)  # with padding
    assert len(seen) == 2
    for number, name in enumerate(seen):
        reading = told.reading.of("base")[number]
        rows = torch.cat(seen[name][: len(data.examples)])
        counts = [0] * 8
        for row in rows:
            for expert in row.topk(3).indices.tolist():
                counts[expert] += 1
        assert reading.counts.tolist() == counts
        assert again.reading.of("base")[number].counts.tolist() == counts
        mixed = rows.mean(dim=0)
        information = np.mean([sum(p * math.log(p / q) for p, q in zip(r, mixed, strict=True)) for r in rows.tolist()])
        expected = pytest.approx(information / math.log(8), abs=1e-6)
        assert told.selectivity[reading.layer]["base"] == expected
        assert again.selectivity[reading.layer]["base"] == expected
    assert set(told.selectivity[reading.layer]) == {"base", "default"}
    even = sum(len(example.input_ids) for example in data.examples if example.slice == "even")
    assert told.reading.routers[0].slices["even"].sum() == 3 * even
    assert told.data.num_tokens == sum(9 + number for number in range(12))


def test_selectivity_of_known_routers() -> None:
    certain = torch.eye(4, dtype=torch.float64)
    assert selectivity(certain.mean(dim=0), 0.0) == pytest.approx(1.0)
    flat = torch.full((4,), 0.25, dtype=torch.float64)
    assert selectivity(flat, math.log(4)) == 0.0
    peaked = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    assert selectivity(peaked, -float((peaked * peaked.log()).sum())) == pytest.approx(0.0, abs=1e-12)
    assert selectivity(torch.ones(1), 0.0) == 0.0


def test_the_models_mode_is_put_back(data) -> None:
    model = zoo.build("olmoe").train()
    first, second = (inspect_model(model, data, MODEL).as_dict() for _ in range(2))
    assert first == second
    assert model.training


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_other_families(family: str, data) -> None:
    """A leading beside the softmax: sigmoid scores, a bias, top-k before softmax, experts behind a latent projection."""
    model = zoo.build(family)
    told = inspect_model(model, data, MODEL)
    assert told.reading.routers
    for one in told.reading.routers:
        assert one.counts.sum() == one.top_k * told.data.num_tokens
        assert 0 < told.selectivity[one.layer]["base"] < 1


def test_json_and_back(model, data, tmp_path: Path) -> None:
    told = inspect_model(model, data, MODEL)
    path = tmp_path / "told.json"
    path.write_text(json.dumps(told.as_dict(), allow_nan=False))
    assert read_inspection(path).as_dict() == told.as_dict()
    words = [f"w{token}" for token in data.examples[0].input_ids[:-1]]
    assert not [word for word in words if word in path.read_text()]  # of the text only a hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "is no inspection"),
        (b"[1]", "must be an object with format"),
        (b'{"format": "other"}', "must be an object with format"),
        (b'{"format": "hf_moe_ext inspection", "version": 7}', "version 7 cannot be read, only 1"),
        (b'{"format": "hf_moe_ext inspection", "version": 1}', "lacks something"),
    ],
)
def test_what_is_no_inspection(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_inspection(path)
    assert str(path) in str(caught.value)
    assert "Write one with hf-moe inspect --output" in str(caught.value)


def test_a_loss_that_is_not_a_number_survives_json(model, data) -> None:
    values = inspect_model(model, data, MODEL).as_dict()
    values["loss"]["loss"] = None
    assert math.isnan(Inspection.from_dict(values).loss.loss)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jsonl", json.dumps({"text": WORDS})),
        ("text.json", json.dumps([{"text": WORDS}])),
        ("text.jsonl.gz", json.dumps({"text": WORDS})),
        ("text.csv", f"text,group\n{WORDS},1\n"),
        ("text.tsv", f"text\tgroup\n{WORDS}\t1\n"),
        ("text.txt", WORDS + "\n"),
        ("text.parquet", WORDS),
        ("prompt.jsonl", json.dumps({"prompt": "w40 w41 ", "completion": "w42 w43"})),
        ("instruction.jsonl", json.dumps({"instruction": "w40 w41", "output": "w42 w43"})),
        ("messages.jsonl", json.dumps({"messages": [{"role": "user", "content": "w40 w41"},
                                                      {"role": "assistant", "content": "w42 w43"}]})),
    ],
)  # fmt: skip
def test_every_form_of_text(name: str, content: str, tokenizer, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode()))
    elif name.endswith(".parquet"):
        Dataset.from_dict({"text": [content]}).to_parquet(path)
    else:
        path.write_text(content)
    data = read_examples(str(path), tokenizer)
    assert [example.input_ids for example in data.examples] == [[40, 41, 42, 43, 2]]
    scored = [i for i in data.examples[0].labels if i != -100]
    assert scored == ([40, 41, 42, 43, 2] if name.startswith("text") else [42, 43, 2])


def test_rows_are_drawn_at_random_and_keep_their_numbers(tokenizer, tmp_path: Path) -> None:
    rows = [{"text": ""} if i % 5 == 0 else {"text": f"w{30 + i}"} for i in range(60)]
    path = str(write_rows(tmp_path / "text.jsonl", rows))
    data = read_examples(path, tokenizer, max_tokens=20)
    assert data.num_rows == 48
    assert data.num_tokens == 20
    assert [example.input_ids[0] for example in data.examples] == [30 + example.number for example in data.examples]
    assert sorted(example.number for example in data.examples) == [example.number for example in data.examples]
    assert [example.number for example in data.examples] != [i for i in range(60) if i % 5][:10]
    assert read_examples(path, tokenizer, max_tokens=20) == data
    other = read_examples(path, tokenizer, max_tokens=20, seed=1)
    assert other.examples != data.examples
    assert other.data_hash == data.data_hash
    rows[1]["text"] = "w32"
    assert read_examples(str(write_rows(tmp_path / "b.jsonl", rows)), tokenizer).data_hash != data.data_hash


def test_long_rows_are_cut(tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "text.jsonl", random_rows(3, length=50)))
    assert [len(each.input_ids) for each in read_examples(path, tokenizer, max_length=11).examples] == [11] * 3


def test_a_column_of_the_text_itself_may_name_slices(tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "text.jsonl", [{"text": f"w{40 + i % 2} w50"} for i in range(6)]))
    data = read_examples(path, tokenizer, slice_column="text")
    assert {example.slice for example in data.examples} == {"w40 w50", "w41 w50"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "is an empty file"),
        ([{"text": ""}, {"text": None}], {}, "has no row with text"),
        ([{"words": "w40"}], {}, "has the columns words; one of these forms"),
        ([{"text": "w40 w41"}], {"slice_column": "topic"}, "--slice-column topic: .* has the columns text"),
        ([{"text": "w40", "n": i} for i in range(65)], {"slice_column": "n"}, "has 65 different values"),
        ([{"text": "w40 w41"}], {"max_tokens": 1}, "--max-tokens must be at least 2, got 1"),
        ([{"text": "w40 w41"}], {"max_length": 0}, "--max-length must be at least 2, got 0"),
    ],
)
def test_data_that_cannot_be_used(rows, options, message: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(str(write_rows(tmp_path / "text.jsonl", rows)), tokenizer, **options)
