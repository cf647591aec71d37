"""The script as a whole: mistakes, one small run, several processes, and a killed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from hf_moe_ext.cards import check_card

HEAT_MAP, CURVE = "router_load.png", "loss_curve.png"


def _losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def _assert_same_adapter(a: Path, b: Path, tolerance: float) -> None:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_name_or_path", "LLAMA"], ["--peft perft", "No MoE block", "llama"]),
        (["--model_name_or_path", "OLMOE", "--lora_target_modules", "nothing"], ["--peft perft", "nothing"]),
        (["--model_name_or_path", "OLMOE", "--peft", "lora", "--lora_target_modules", "no"], ["--peft lora", "no"]),
        (["--model_name_or_path", "nowhere/at_all"], ["--model_name_or_path nowhere/at_all", "cannot be loaded"]),
        (["--variant", "X"], ["--variant", "'X'", "R"]),
        (["--ep_size", "2", "--save_strategy", "no"], ["--ep_size 2", "number of processes, which is 1"]),
        (["--variant", "S", "--num_experts", "2"], ["--peft perft", "num_experts"]),
        (["--config", "UNKNOWN"], ["unknown key 'rank'"]),
        (["--dataset_name", "COLUMNS"], ["question", "prompt, completion"]),
        (["--dataset_name", "EMPTY"], ["empty file"]),
        (["--base_source_dir", "NOWHERE"], ["--base_source_dir"]),
        (["--resume_from_checkpoint", "NOWHERE"], ["--resume_from_checkpoint", "trainer_state.json"]),
    ],
    ids=lambda value: "-".join(value)[:40],
)
def test_mistakes_exit_with_two_and_write_nothing(
    flags: list[str], words: list[str], tmp_path: Path, olmoe_dir: Path, llama_dir: Path, capfd, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("rank: 4\n")
    (tmp_path / "columns.jsonl").write_text('{"question": "a"}\n' * 4)
    (tmp_path / "empty.jsonl").write_text("")
    places = {
        "LLAMA": llama_dir, "OLMOE": olmoe_dir, "UNKNOWN": "unknown.yaml", "COLUMNS": "columns.jsonl",
        "EMPTY": "empty.jsonl", "NOWHERE": "nowhere",
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    code = finetune.main([str(places.get(word, word)) for word in flags] + ["--output_dir", "out/run"])
    message = [line for line in capfd.readouterr().err.splitlines() if line.startswith("finetune.py: error: ")]
    assert code == 2
    assert len(message) == 1
    assert all(word in message[0] for word in words), message[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_exit_code_of_the_script_is_two(run_script, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter_config.json").write_text("{}")
    result = run_script("--output_dir", tmp_path / "taken")
    assert result.returncode == 2
    assert result.stderr.count("finetune.py: error: ") == 1
    assert "already holds another run" in result.stderr
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["adapter_config.json"]


def test_a_weak_base_is_refused(quickstart_flags: list[str], tmp_path: Path, capfd) -> None:
    flags = [flag for flag in quickstart_flags if not flag.startswith("--allow_weak_base")]
    assert finetune.main([*flags, "--output_dir", str(tmp_path / "run")]) == 2
    message = capfd.readouterr().err
    assert "--base_max_steps 5" in message
    assert "must beat the n-gram" in message
    assert not (tmp_path / "run").exists()


def test_the_whole_quickstart_in_small(quickstart_flags: list[str], base_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finetune.main([*quickstart_flags, "--output_dir", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"base", "loss", "text_metric", "samples", "router_load", "parameters", "log", "seconds"} <= metrics.keys()
    assert metrics["base"]["ngram_bits_per_byte"] > 0
    assert metrics["loss"]["low"] <= metrics["loss"]["difference"] <= metrics["loss"]["high"]
    assert {"before", "after", "name_words", "shuffled"} <= metrics["text_metric"].keys()
    for shares in metrics["router_load"].values():
        assert sum(shares) == pytest.approx(1)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", CURVE, HEAT_MAP, "run.json"):
        assert (folder / name).stat().st_size > 0, name
    assert any("router_aux_loss" in entry for entry in metrics["log"])
    card = (folder / "README.md").read_text()
    assert card.index("import hf_moe_ext") < card.index("from_pretrained") < card.index("## Results")
    assert check_card(folder, folder / "metrics.json")
    assert metrics["data"]["duplicate_rate"] == 0  # as `build_docstring_rows` promises
    assert 0 <= metrics["data"]["verbatim_rate_train"] <= 1
    assert "not measured" not in card.partition("## Data")[2].partition("## Limits")[0]
    assert str(tmp_path) not in card
    assert len(list(base_cache.glob("quickstart-base-*"))) == 1
    assert not list(base_cache.glob(".building-*"))

    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained(folder).active_adapter == "default"


@pytest.mark.parametrize(
    "flags",
    [
        ["--variant", "E", "--expert_fraction", "0.5"],
        ["--variant", "E", "--base_router", "lora", "--router_learning_rate", "1e-2", "--shared_A", "true"],
        ["--variant", "R", "--router_learning_rate", "1e-2", "--eval_strategy", "steps", "--eval_steps", "2"],
        ["--peft", "lora"],
        ["--peft", "full"],
        ["--peft", "none"],
    ],
    ids=lambda flags: "-".join(flags)[2:],
)
def test_another_model_and_a_file(flags: list[str], olmoe_dir: Path, json_file: Path, tmp_path: Path) -> None:
    common = {
        "model_name_or_path": olmoe_dir, "dataset_name": json_file, "output_dir": tmp_path / "run", "max_steps": 3,
        "logging_steps": 1, "per_device_train_batch_size": 2, "max_new_tokens": 3, "use_cpu": True,
    }  # fmt: skip
    assert finetune.main([f"--{name}={value}" for name, value in common.items()] + flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (tmp_path / "run" / "README.md").exists()
    if flags[1] == "none":
        assert "after" not in metrics["loss"]
        return
    assert metrics["steps"] == 3
    if "--expert_fraction" in flags:
        config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        assert [len(ids) for ids in config["expert_ids"].values()] == [2, 2]
    assert metrics["loss"]["rows"] == 1
    assert (tmp_path / "run" / HEAT_MAP).exists() == (flags[1] == "R")
    assert metrics["parameters"]["active"] <= metrics["parameters"]["trainable"]


def test_accuracy_beside_the_majority_class(olmoe_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"is {i} even? Answer format: true/false", "output": f"it is {a}", "answer": a, "group": "even"}
        for i in range(40)
        for a in [str(i % 4 != 1).lower()]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model_name_or_path": olmoe_dir, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run",
        "max_steps": 2, "answer_choices_metric": True, "max_new_tokens": 2, "use_cpu": True,
    }  # fmt: skip
    assert finetune.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    accuracy = json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"]
    assert accuracy["even"].keys() == {"before", "after", "majority_class", "rows"}
    assert 0 <= accuracy["even"]["after"] <= 1


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation(quickstart_flags: list[str], run_script, tmp_path: Path) -> None:
    # two rows at a time: twenty steps stay inside one epoch, whose last batch is filled up when there are two processes
    flags = [*quickstart_flags, "--max_steps=20", "--save_strategy=no", "--per_device_train_batch_size=2"]
    one = run_script(*flags, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps=2")
    assert one.returncode == 0, one.stderr
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    two = run_script(*flags, "--output_dir", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [entry["processes"] for entry in metrics] == [1, 2]
    assert len(_losses(tmp_path / "one")) == 20
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    _assert_same_adapter(tmp_path / "one", tmp_path / "two", tolerance=1e-5)
    assert metrics[0]["loss"]["after"] == pytest.approx(metrics[1]["loss"]["after"], abs=1e-5)
    for name, shares in metrics[0]["router_load"].items():
        # held-out rows that do not divide by the processes are filled up with a repeated one
        assert metrics[1]["router_load"][name] == pytest.approx(shares, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "variant"), [("--ep_size=2", "E"), ("--fsdp_size=2", "R")])
def test_a_model_spread_over_two_processes_equals_one(
    layout: str, variant: str, quickstart_flags: list[str], run_script, recipes: Path, tmp_path: Path
) -> None:
    flags = [*quickstart_flags, "--max_steps=8", "--save_strategy=no", "--per_device_train_batch_size=2"]
    flags.append(f"--config={recipes}/configs/quickstart_{variant.lower()}.yaml")
    one = run_script(*flags, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps=2")
    assert one.returncode == 0, one.stderr
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    two = run_script(*flags, layout, "--output_dir", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [entry["processes"] for entry in metrics] == [1, 2]
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    _assert_same_adapter(tmp_path / "one", tmp_path / "two", tolerance=1e-5)
    assert metrics[0]["parameters"] == metrics[1]["parameters"]
    for name in ("before", "after"):
        assert metrics[1]["loss"][name] == pytest.approx(metrics[0]["loss"][name], abs=1e-5)
        assert [s[name] for s in metrics[1]["samples"]] == [s[name] for s in metrics[0]["samples"]]


@pytest.mark.slow
def test_the_exit_code_of_a_layout_that_does_not_fit_is_two(run_script, tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    run = run_script("--use_cpu", "--ep_size=3", "--output_dir", tmp_path / "run", launcher=launcher)
    assert "finetune.py: error: --ep_size 3 must divide the number of processes, which is 2" in run.stderr
    assert run.stderr.count("error: --ep_size") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    quickstart_flags: list[str], run_script, recipes: Path, tmp_path: Path
) -> None:
    flags = [*quickstart_flags, "--max_steps=40", "--save_steps=4", "--lora_dropout=0.1"]
    whole = run_script(*flags, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    command = [sys.executable, str(recipes / "finetune.py"), *flags, "--output_dir", str(killed)]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(killed.glob("checkpoint-8/trainer_state.json")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    again = run_script(*flags, "--output_dir", killed, "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stderr
    assert len(_losses(killed)) == 40
    assert _losses(killed) == _losses(tmp_path / "whole")
    _assert_same_adapter(killed, tmp_path / "whole", tolerance=0)


def test_resumed_into_another_folder(quickstart_flags: list[str], tmp_path: Path, capfd) -> None:
    """The first measurement lies beside the checkpoint; without it nothing is written."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune.main([*quickstart_flags, "--output_dir", str(first)]) == 0
    resume = ["--output_dir", str(second), "--resume_from_checkpoint", str(first / "checkpoint-2")]
    (first / "before.json").rename(first / "elsewhere.json")
    assert finetune.main([*quickstart_flags, *resume]) == 2
    assert "before.json of that run cannot be read" in capfd.readouterr().err
    assert not second.exists()
    (first / "elsewhere.json").rename(first / "before.json")
    assert finetune.main([*quickstart_flags, *resume]) == 0
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert metrics[0]["loss"] == metrics[1]["loss"]
    _assert_same_adapter(first, second, tolerance=0)
