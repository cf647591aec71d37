"""``hf-moe inspect`` as a user runs it: files, exit codes, one message for bad input and nothing half-written."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe_ext import OlmoeExtConfig, PerftConfig
from hf_moe_ext.audit.inspection import read_inspection
from hf_moe_ext.audit.log import AuditLog
from hf_moe_ext.cli import app
from support import zoo
from support.inspected import random_rows, save, write_rows


def _run(*arguments: str | Path, code: int = 0):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def _perft() -> PerftConfig:
    return PerftConfig(task_type="CAUSAL_LM", variant="R", r=4, num_experts=4, top_k=2, init_weights=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, adapters and texts that the tests share; none of them writes here."""
    folder = tmp_path_factory.mktemp("inspected")
    save(zoo.build("olmoe"), folder / "base")
    get_peft_model(zoo.build("olmoe"), _perft()).save_pretrained(folder / "adapter")
    get_peft_model(zoo.build("olmoe", num_hidden_layers=3), _perft()).save_pretrained(folder / "deeper")
    get_peft_model(zoo.build("olmoe", num_hidden_layers=1), _perft()).save_pretrained(folder / "shallower")
    get_peft_model(zoo.build("olmoe", hidden_size=64), _perft()).save_pretrained(folder / "wider")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(zoo.build("olmoe", num_hidden_layers=3), lora).save_pretrained(folder / "deeper_lora")
    save(zoo.build("llama"), folder / "dense")
    changed = zoo.build("olmoe")
    with torch.no_grad():
        next(zoo.routers(changed)).neg_()
    save(changed, folder / "changed")
    save(zoo.build("olmoe", num_experts=6), folder / "fewer")
    write_rows(folder / "old.jsonl", random_rows(60))
    write_rows(folder / "new.jsonl", random_rows(60, seed=1))
    write_rows(folder / "other.jsonl", random_rows(60, low=90))
    return folder


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    _run(folder / "base", "--data", folder / "old.jsonl", "--output", folder / "old.json")
    return folder / "old.json"


def test_every_file_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """And nothing else."""
    result = _run(
        folder / "base", "--adapter", folder / "adapter", "--data", folder / "old.jsonl", "--json",
        "--html", tmp_path / "page" / "a.html", "--output", tmp_path / "a.json", "--log", tmp_path / "log",
        "--sample-rate", "0.5",
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"page", "a.json", "log"}
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["a.html"]
    told = json.loads(result.stdout)
    assert told.pop("findings")
    assert told == json.loads((tmp_path / "a.json").read_text())
    found = read_inspection(tmp_path / "a.json")
    assert found.reading.kinds == ("base", "default")
    assert found.data.num_tokens == 60 * 25
    assert set(found.slice_losses) == {"even", "odd"}
    log = AuditLog.open(tmp_path / "log")
    assert log.redacted
    assert log.sample_rate == 0.5
    assert 0.4 * 4 * 1500 < len(log.dataset()) < 0.6 * 4 * 1500
    assert (tmp_path / "page" / "a.html").read_text().startswith("<!DOCTYPE html>")


def test_log_with_text_when_asked_for(folder: Path, tmp_path: Path) -> None:
    _run(folder / "base", "--data", folder / "old.jsonl", "--log", tmp_path / "log", "--show-text", "--max-tokens", 100)
    log = AuditLog.open(tmp_path / "log")
    assert not log.redacted
    row = log.dataset()[0]
    first = json.loads((folder / "old.jsonl").read_text().splitlines()[int(row["example"])])["text"].split()
    assert row["token_text"] == first[row["position"]]


def test_the_same_twice_and_against_itself(folder: Path, old: Path) -> None:
    first = _run(folder / "base", "--data", folder / "old.jsonl", "--against", old, "--json")
    told = json.loads(first.stdout)
    assert told["comparison"]["exceeded"] == []
    assert max(one["load"] for one in told["comparison"]["routers"]) == 0.0
    assert told["comparison"]["losses"][0]["rise"] == 0.0
    assert told["comparison"]["cautions"] == []


def test_another_sample_of_the_same_text_is_no_drift(folder: Path, old: Path) -> None:
    """The loss of one slice rises above the limit, by no more than is chance among so few tokens."""
    text = _run(folder / "base", "--data", folder / "new.jsonl", "--against", old).stdout
    assert "nothing is past a limit" in text
    assert (
        "caution: the rise of the loss (nats per token) of slice odd is 0.0523, 0.0023 above the limit 0.05, but"
        in text
    )


def test_drift_of_the_data_is_exit_code_1(folder: Path, old: Path, tmp_path: Path) -> None:
    """The files are written all the same."""
    result = _run(
        folder / "base", "--data", folder / "other.jsonl", "--against", old, "--html", tmp_path / "a.html", code=1
    )
    assert "past the limit: the change of load (total variation) of the base router of model.layers.0" in result.stdout
    assert "above the limit 0.1" in result.stdout
    assert "Against the old inspection" in (tmp_path / "a.html").read_text()
    arguments = (folder / "base", "--data", folder / "other.jsonl", "--against", old)
    _run(*arguments, "--max-load", 1, "--max-kl", 100, "--max-loss", 100)


def test_another_version_of_the_model_is_exit_code_1(folder: Path, old: Path) -> None:
    told = _run(folder / "changed", "--data", folder / "old.jsonl", "--against", old, "--json", code=1)
    comparison = json.loads(told.stdout)["comparison"]
    assert {one["where"] for one in comparison["exceeded"]} >= {"the base router of model.layers.0.mlp.experts"}
    assert comparison["cautions"] == []


def test_our_own_model_types(folder: Path, tmp_path: Path) -> None:
    """A type that only this package knows, with its blocks in the latent width."""
    sizes = {key: value for key, value in zoo.COMMON.items() if key != "initializer_range"}
    config = OlmoeExtConfig(
        **sizes, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_block="dcca", moe_latent_size=16
    )
    save(AutoModelForCausalLM.from_config(config), tmp_path / "dcca")
    told = json.loads(_run(tmp_path / "dcca", "--data", folder / "old.jsonl", "--json").stdout)
    assert told["model"]["model_type"] == "olmoe_ext"
    assert [one["num_experts"] for one in told["reading"]["routers"]] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{f}/dense", "--data", "{f}/old.jsonl"], "No MoE block found in LlamaForCausalLM"),
        (["{f}/adapter", "--data", "{f}/old.jsonl"], "is an adapter; name its base model first"),
        (["{f}", "--data", "{f}/old.jsonl"], "is no model: it has no config.json"),
        (["no/such/folder", "--data", "{f}/old.jsonl"], "'no/such/folder' cannot be loaded"),
        (["{f}/base", "--data", "{t}/none.jsonl"], "there is no such file or folder"),
        (["{f}/base", "--data", "{t}/empty.jsonl"], "is an empty file"),
        (["{f}/base", "--data", "{t}/words.jsonl"], "has the columns words; one of these forms is needed: text"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--slice-column", "topic"], "--slice-column topic"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--adapter", "{f}/deeper"], "does not belong to"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--adapter", "{f}/shallower"], "does not belong to"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--adapter", "{f}/wider"], "does not belong to"),
        (
            ["{f}/base", "--data", "{f}/old.jsonl", "--adapter", "{f}/deeper_lora"],
            "tensors that this model has no place for",
        ),
        (["{f}/base", "--data", "{f}/old.jsonl", "--adapter", "{f}/base"], "has no adapter_config.json"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--adapter", "{t}/pickled"], "has no adapter_model.safetensors"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--against", "{t}/none.json"], "is no inspection"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--against", "{t}/list.json"], "is no inspection"),
        (["{f}/fewer", "--data", "{f}/old.jsonl", "--against", "{f}/old.json"], "chose 3 of 8 experts, now 3 of 6"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--max-load", "-1"], "--max-load must be at least 0"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--max-tokens", "0"], "--max-tokens must be at least 2"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--show-text", "--no-log"], "--show-text and --sample-rate are about"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--sample-rate", "0"], "--sample-rate must be above 0"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--log", "{t}"], "needs a folder of its own"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--html", "{t}"], "--html must be a file to write"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--output", "{t}/x.html"], "are both"),
        (["{f}/base", "--data", "{f}/old.jsonl", "--device", "abacus"], "--device abacus cannot be used"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, old: Path, tmp_path: Path
) -> None:
    """No traceback, nothing written."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "words.jsonl").write_text('{"words": "w40"}\n')
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    before = sorted(tmp_path.rglob("*"))
    given = [one.format(f=folder, t=tmp_path) for one in arguments]
    if "--no-log" in given:
        given.remove("--no-log")
    elif "--log" not in given:
        given += ["--log", str(tmp_path / "log")]
    if "--html" not in given:
        given += ["--html", str(tmp_path / "x.html")]
    result = _run(*given, code=2)
    assert message in result.stderr
    assert result.stderr.count("hf-moe inspect: ") == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_names_another_base_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tensors fit, so it may be a renamed folder."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, _perft()).save_pretrained(tmp_path / "adapter")
    save(zoo.build("olmoe", seed=1), tmp_path / "twin")
    for name, told in (("base", 0), ("twin", 1)):
        caplog.clear()
        model = folder / "base" if name == "base" else tmp_path / "twin"
        _run(model, "--data", folder / "old.jsonl", "--adapter", tmp_path / "adapter", "--max-tokens", 50)
        assert len([one for one in caplog.messages if "says that its base model is" in one]) == told


def test_missing_weights_are_not_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    save(zoo.build("olmoe"), tmp_path / "torn")
    weights = load_file(tmp_path / "torn" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    result = _run(tmp_path / "torn", "--data", folder / "old.jsonl", code=2)
    assert "lack 1 tensors, which would be random: lm_head.weight" in result.stderr


def test_a_missing_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = _run(folder / "base", "--data", folder / "old.jsonl", "--html", tmp_path / "a.html", code=2)
    assert "--html needs jinja2: pip install 'hf_moe_ext[audit]'" in result.stderr
    assert list(tmp_path.iterdir()) == []
    _run(folder / "base", "--data", folder / "old.jsonl")


def test_help_shows_an_example() -> None:
    text = " ".join(_run("--help").stdout.split())
    assert "Example: hf-moe inspect" in text
    assert "Exit code: 0 told, 1 past" in text
