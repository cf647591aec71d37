"""``hf-moe to-dcca``: the same conversion from the command line."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.convert import to_dcca
from hf_moe_ext.convert.distillation import DistillationSettings


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{30 + (i * i) % 61}" for i in range(8000)))
    return path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["to-dcca", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_equals_the_function(source: Path, text: Path, tmp_path: Path) -> None:
    options = ("--latent-size", "16", "--layers", "0,2", "--tokens", "2048", "--sequence-length", "32", "--seed", "3")
    more = ("--held-out-tokens", "512", "--distill-steps", "2", "--distill-router", "--distill-batch-rows", "2")
    rates = ("--distill-learning-rate", "0.001", "--distill-output-loss-coef", "0.5", "--device", "cpu")
    code, out, error = run(
        str(source), "--output", str(tmp_path / "cli"), "--calibration", str(text), *options, *more, *rates, "--json"
    )
    assert code == 0, error
    report = json.loads(out[out.index("\n{\n") :] if not out.startswith("{\n") else out)
    wanted = to_dcca(
        *(source, tmp_path / "api", text),
        **{"latent_size": 16, "layers": [0, 2], "num_tokens": 2048, "sequence_length": 32, "seed": 3},
        **{"num_held_out_tokens": 512, "distillation": DistillationSettings(2, 0.001, 2, 0.5, True), "device": "cpu"},
    ).as_dict()
    for name in ("output", "seconds", "peak_memory_bytes"):
        report.pop(name), wanted.pop(name)
    assert report == json.loads(json.dumps(wanted))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cli").config.moe_block == ["dcca", "standard", "dcca"]


def test_table(source: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--output", str(tmp_path / "out"), "--calibration", str(text), "--sequence-length", "32")
    code, out, error = run(str(source), *arguments, "--ratio", "0.5", "--method", "svd", "--tokens", "1024")
    assert code == 0, error
    for words in ("latent size 16", "hidden error", "fewest tokens", "converted", "parameters", str(tmp_path / "out")):
        assert words in out
    code, _, error = run(str(source), *arguments, "--ratio", "0.5")
    assert code == 2
    assert "exists; name a new folder" in error
    code, _, error = run(str(source), *arguments, "--ratio", "0.5", "--overwrite", "--tokens", "1024")
    assert code == 0, error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--latent-size", "40"), "hf-moe to-dcca: latent_size must be from 1 to hidden_size=32; got 40"),
        (("--layers", "5-3"), "hf-moe to-dcca: layers must be numbers and ranges such as 3,5-8; got '5-3'"),
        (("--method", "pca"), "Invalid value for '--method'"),
        (("--distill-steps", "-1"), "num_steps must be an integer of at least 0; got -1"),
        (("--calibration", "no/such"), "neither a text file nor a folder"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(
    source: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    code, out, error = run(str(source), "--output", str(tmp_path / "out"), *options)
    assert code == 2
    assert out == ""
    assert words in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_missing_source(tmp_path: Path) -> None:
    code, _, error = run("no/such", "--output", str(tmp_path / "out"))
    assert code == 2
    assert "no/such is neither a folder here nor a model" in error
