"""``hf-moe pilot`` as a person and as a script meet it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from support import planted

REASONING = "HF_MOE_EXT_REASONING_DIR"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.two_tasks(tmp_path_factory.mktemp("data") / "rows.jsonl")


def _run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["pilot", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.stderr.split())


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["pilot", "--help"])
    assert result.exit_code == 0
    assert "Example: hf-moe pilot --model" in result.stdout


def test_finished_pilot_prints_json_and_writes_pages(model: Path, data: Path, tmp_path: Path) -> None:
    words = [
        "pilot",
        "--model",
        model,
        "--data",
        data,
        "-o",
        tmp_path / "pilot",
        "--threads",
        1,
        "--steps",
        16,
        "--min-steps",
        4,
    ]
    words += ["--seeds", 1, "--candidates", "perft-s", "--learning-rates", 0.01, "--max-length", 16, "--json"]
    command = [sys.executable, "-m", "hf_moe_ext.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "pilot" / "pilot.json").read_text())
    assert {"arms", "finalists", "recommendation"} <= set(told)
    assert told["finalists"] == ["perft-s"]
    assert (tmp_path / "pilot" / "report.html").is_file()
    assert (tmp_path / "pilot" / "report.md").is_file()
    assert "finalists, seed 1 of 1 1/1: perft-s" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget-minutes", "0"], "--budget-minutes must be above 0"),
        (["--steps", "10"], "--steps 10 must be at least four times --min-steps 16"),
        (["--steps", "64", "--equal", "time"], "--steps fixes the steps"),
        (["--learning-rates", "0"], "--learning-rates must be above 0"),
        (["--price", "3"], "--price needs --hardware"),
        (["--candidates", "perft-x"], "there is no candidate 'perft-x'"),
        (["--candidates", "ders"], "is for a dense model"),
        (["--metric", "no_such_metric_anywhere"], "--metric no_such_metric_anywhere cannot be loaded"),
        (["--hardware", "abacus"], "abacus"),
        (["--held-out", "nowhere.jsonl"], "--held-out nowhere.jsonl: there is no such file"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: there is no such file"),
        (["--model", "nowhere/model"], "--model nowhere/model: its model cannot be loaded"),
        (["--metric", "choices"], "'answer' among 'choices'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_exit_code_2(
    model: Path, data: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    code, errors = _run("--model", model, "--data", data, "-o", tmp_path / "pilot", *options)
    assert code == 2
    assert errors.startswith("hf-moe pilot: ") or "hf-moe pilot: " in errors
    assert words in errors
    assert not (tmp_path / "pilot" / "arms").exists()


def test_data_without_text_is_refused(model: Path, tmp_path: Path) -> None:
    empty, few = tmp_path / "empty.jsonl", tmp_path / "few.jsonl"
    empty.write_text('{"text": ""}\n' * 60)
    few.write_text('{"text": "t05 t06"}\n' * 8)
    assert "no row with text" in _run("--model", model, "--data", empty, "-o", tmp_path / "a")[1]
    assert "at least" in _run("--model", model, "--data", few, "-o", tmp_path / "b")[1]


def test_dense_models_without_a_home_are_refused_with_what_can_be_done(data: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    Qwen2ForCausalLM(Qwen2Config(vocab_size=96, **sizes)).save_pretrained(tmp_path / "qwen2")
    planted.build_tokenizer().save_pretrained(tmp_path / "qwen2")
    code, errors = _run("--model", tmp_path / "qwen2", "--data", data, "-o", tmp_path / "pilot")
    assert code == 2
    for words in ("is dense and cannot be upcycled", "biases", "--candidates lora-qv --candidates full"):
        assert words in errors
    code, errors = _run(
        "--model", tmp_path / "qwen2", "--data", data, "-o", tmp_path / "pilot", "--candidates", "perft-r"
    )
    assert code == 2
    assert "No MoE block found in Qwen2ForCausalLM" in errors


@pytest.mark.slow
def test_arc_easy_within_its_budget(tmp_path: Path) -> None:
    """The real questions, a model that knows nothing: the pilot ends in time, and every number of its table is there."""
    folder = Path(os.environ.get(REASONING, "../shared/data/reasoning"))
    train, test = folder / "ARC-Easy_train.jsonl.gz", folder / "ARC-Easy_test.jsonl.gz"
    if not train.is_file() or not test.is_file():
        pytest.skip(f"no ARC-Easy in {folder} ({REASONING} names another folder)")
    import gzip

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from support import zoo

    with gzip.open(train, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["instruction"] for line in file]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    )
    zoo.build("olmoe", vocab_size=1024, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "model")
    words = ["pilot", "--model", tmp_path / "model", "--data", train, "--held-out", test, "-o", tmp_path / "pilot"]
    words += [
        "--budget-minutes",
        8,
        "--threads",
        1,
        "--max-held-out-rows",
        128,
        "--metric",
        "choices",
        "--metric-rows",
        32,
    ]
    words += ["--max-length", 128, "--batch-size", 4, "--json"]
    command = [sys.executable, "-m", "hf_moe_ext.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    finalists = [arm for arm in told["arms"] if arm["finalist"] and arm["candidate"] != "base"]
    assert len(finalists) >= 2
    for arm in finalists:
        assert arm["status"] == "done"
        assert arm["loss"] > 0
        assert 0 <= arm["metric"] <= 1
    assert told["data"]["held_out_rows"] == 128
    # What the answer's form is like can be learnt by any of them, however little the model knows.
    assert told["recommendation"]["answer"] == "recommended"
