"""Perplexity before and after, the worst slice, and a bound that keeps a folder from getting its name."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.convert import compress
from hf_moe_ext.convert.compress_calibration import read_slices
from support.upcycled import save_pair
from support.words import build_tokenizer


# Below w30 the special words w0 to w2 would be found in others.
def words(seed: int, low: int, high: int) -> str:
    ids = torch.randint(low, high, (40,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(i)}" for i in ids)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [{"text": words(i, 30, 50), "slice": "low"} for i in range(3)]
    lines += [{"text": words(9 + i, 60, 96), "slice": "high"} for i in range(2)] + [{"text": words(5, 30, 96)}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


@torch.no_grad()
def loss(folder: Path, texts: list[str]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [torch.tensor([int(word[1:]) for word in each.split()]) for each in texts]
    nats = [F.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]
    return float(torch.cat(nats).mean())


def test_perplexities_and_worst_slice(tmp_path: Path, text: Path) -> None:
    save_pair(tmp_path, scale=0.1)
    whole = compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", drop_rate=0.9, calibration=text)
    report = whole.calibration
    assert report is not None
    slices = read_slices(text)
    assert {name: len(texts) for name, texts in slices.items()} == {"low": 3, "high": 2, "-": 1}
    rises = {}
    for name, texts in slices.items():
        before, after = loss(tmp_path / "moe", texts), loss(tmp_path / "out", texts)
        assert report.slices[name]["loss_before"] == pytest.approx(before, abs=1e-5)
        assert report.slices[name]["loss_after"] == pytest.approx(after, abs=1e-5)
        rises[name] = after - before
    assert report.worst_slice == max(rises, key=rises.__getitem__)
    assert report.worst_rise == pytest.approx(max(rises.values()), abs=1e-5)
    num_tokens = {"low": 117, "high": 78, "-": 39}[report.worst_slice]
    said = f"worst slice {report.worst_slice!r} ({report.worst_rise:+.4f} on {num_tokens} tokens)"
    assert said in whole.as_text()
    everything = [each for texts in slices.values() for each in texts]
    assert report.num_tokens == 6 * 39
    assert report.perplexity_before == pytest.approx(math.exp(loss(tmp_path / "moe", everything)), rel=1e-5)
    assert report.perplexity_after == pytest.approx(math.exp(loss(tmp_path / "out", everything)), rel=1e-5)


def test_a_rise_above_the_bound_is_not_done(tmp_path: Path, text: Path) -> None:
    _, moe = save_pair(tmp_path, scale=0.3)
    # Text that the source itself finds likeliest: any change makes it less likely.
    starts = torch.arange(40, 46)[:, None]
    ids = moe.generate(starts, max_new_tokens=40, do_sample=False, suppress_tokens=list(range(30)))
    lines = [{"text": " ".join(f"w{int(i)}" for i in row), "slice": "low"} for row in ids]
    text.write_text("\n".join(map(json.dumps, lines)))
    keys = {"parent": tmp_path / "dense", "drop_rate": 0.95, "calibration": text}
    rise = compress(tmp_path / "moe", tmp_path / "free", **keys).calibration.loss_rise
    assert rise > 0
    words = r"rises by .* nats a token .*, above max_loss=.*; the worst slice is '(low|high|-)' with"
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", max_loss=rise * 0.9, **keys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "free", "moe", "text.jsonl"]
    compress(tmp_path / "moe", tmp_path / "out", max_loss=rise * 1.1, **keys)


def test_a_text_that_cannot_be_measured_is_refused_before_any_work(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("it measured first")

    monkeypatch.setattr(importlib.import_module("hf_moe_ext.convert.compress"), "measure_all", fail)
    keys = {"parent": tmp_path / "dense", "calibration": text}
    build_tokenizer(320).save_pretrained(tmp_path / "moe")
    text.write_text(json.dumps({"text": "w300 w301"}))
    with pytest.raises(ValueError, match="gives token 301, the model has vocab_size=96"):
        compress(tmp_path / "moe", tmp_path / "out", **keys)
    text.write_text(json.dumps({"text": "w50"}))
    with pytest.raises(ValueError, match="no two tokens of any text"):
        compress(tmp_path / "moe", tmp_path / "out", **keys)
    for path in (tmp_path / "moe").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        compress(tmp_path / "moe", tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_slices_of_texts_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"line {i}" for i in range(20)))
    slices = read_slices(path)
    assert next(iter(slices)) == "lines 1-3"
    assert len(slices) == 7
    assert "\n".join(text for texts in slices.values() for text in texts) == path.read_text()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("one")
    (tmp_path / "folder/b.md").write_text("two")
    assert read_slices(tmp_path / "folder") == {"a.txt": ["one"], "b.md": ["two"]}
    for content, words in (('{"text": 3}', 'must be an object with a string "text"'), ("{", "line 1 of .* is no JSON")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_slices(tmp_path / "bad.jsonl")


def test_command(tmp_path: Path, text: Path) -> None:
    save_pair(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["compress", str(tmp_path / "moe"), *map(str, arguments)])
        return result.exit_code, result.stdout, result.stderr

    options = ("--parent", tmp_path / "dense", "--calibration", text)
    code, out, error = run("-o", tmp_path / "cli", *options, "--encode", "quantize", "--bits", "4", "--json")
    assert code == 0, error
    report = json.loads(out[out.index("{\n") :])
    wanted = compress(
        tmp_path / "moe", tmp_path / "api", parent=tmp_path / "dense", calibration=text, encode="quantize", bits=4
    ).as_dict()
    for name in ("output", "seconds", "peak_memory_bytes"):
        report.pop(name), wanted.pop(name)
    assert report == wanted
    code, out, error = run("-o", tmp_path / "x", *options, "--dry-run")
    assert code == 0, error
    assert "nothing written" in out
    assert "random_drop drop_rate=0.6" in out
    code, out, error = run("-o", tmp_path / "x", "--base", "parent")
    assert (code, out) == (2, "")
    assert error.strip().endswith("or base='least_squares' (--base)") or "needs parent" in error
    assert not (tmp_path / "x").exists()
