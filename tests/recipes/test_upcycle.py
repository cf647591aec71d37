"""Upcycling as a recipe: mistakes, a small run of every arm, an interrupted run, and the benchmark's parts in small."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import upcycle
from finetune_arguments import UserError
from upcycle_arguments import ARMS, parse_upcycle_arguments


@pytest.fixture(scope="session")
def parent_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' dense parent is kept: built once."""
    return tmp_path_factory.mktemp("parents")


@pytest.fixture(scope="session")
def flags(source_dir: Path, parent_cache: Path) -> list[str]:
    """The default run with everything small."""
    settings = {
        "source_dir": source_dir, "cache_dir": parent_cache, "parent_hidden_size": 32, "parent_intermediate_size": 48,
        "parent_num_layers": 2, "parent_vocab_size": 300, "parent_max_steps": 20, "max_length": 32, "max_steps": 6,
        "warmup_steps": 1, "learning_rate": 4e-3, "logging_steps": 1, "per_device_train_batch_size": 2,
        "max_eval_samples": 8, "use_cpu": True,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "low_rank", "full"], "--arms must be some of"),
        (["--arms", "dense", "dense"], "each once"),
        (["--tokenizer_name_or_path", "gpt2"], "the parent's own tokenizer"),
        (["--parent", "some/llama", "--parent_seed", "3"], "--parent_seed is for the quickstart's parent"),
        (["--dataset_name", "docstrings"], "has read Python only"),
        (["--push_to_hub", "true"], "give --arms one name"),
        (["--parent_hidden_size", "40"], "multiple of 32"),
        (["--max_length", "1"], "--max_length must be at least 2"),
    ],
)
def test_a_mistake_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_upcycle_arguments(words)


def test_a_conversion_that_is_refused_ends_the_run_before_anything_is_trained(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = upcycle.main([*flags, "--rank", "33", "--output_dir", str(tmp_path / "run")])
    assert code == 2
    assert "--arms low_rank: rank" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_arm_starts_at_the_parent_and_learns(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*flags, "--output_dir", str(folder)]
    assert upcycle.main(words) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["arms"]) == list(ARMS)
    starts = [arm["loss"]["before"] for arm in metrics["arms"].values()]
    assert max(starts) - min(starts) < 1e-5
    sizes = {}
    for name, arm in metrics["arms"].items():
        assert arm["loss"]["after"] < arm["loss"]["before"]
        assert ("loss_levelled" in arm) == (name != "dense")
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        sizes[name] = model.num_parameters()
        assert sizes[name] == arm["parameters"]
    for form in ("low_rank", "sparse"):
        assert sizes["dense"] < sizes[form] < sizes["vanilla"]
    assert "| held-out loss, nats per token, shared base, low-rank deltas |" in (folder / "README.md").read_text()
    assert (folder / "losses.png").stat().st_size > 5_000

    # Finished arms are kept; one that is missing is trained again, on the same rows, to the same loss.
    (folder / "sparse" / "metrics.json").unlink()
    kept = (folder / "dense" / "model.safetensors").stat().st_mtime_ns
    assert upcycle.main([*words, "--resume_from_checkpoint", "true"]) == 0
    again = json.loads((folder / "metrics.json").read_text())
    assert (folder / "dense" / "model.safetensors").stat().st_mtime_ns == kept
    assert again["arms"]["sparse"]["loss"]["after"] == pytest.approx(
        metrics["arms"]["sparse"]["loss"]["after"], abs=1e-6
    )


def test_levelling_makes_experts_alike_and_leaves_a_dense_model_alone(flags: list[str], tmp_path: Path) -> None:
    arguments = parse_upcycle_arguments([*flags, "--output_dir", str(tmp_path / "run")])
    parent = upcycle.prepare_parent(arguments)
    dense = AutoModelForCausalLM.from_pretrained(parent)
    assert not upcycle.level_experts(dense)
    ids = torch.arange(24).view(1, -1)
    for arm in ("low_rank", "sparse", "vanilla"):
        upcycle.convert(arm, parent, arguments, tmp_path / arm)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / arm)
        with torch.no_grad():
            for parameter in model.model.layers[0].mlp.experts.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        moved = model(ids).logits
        assert upcycle.level_experts(model)
        assert (model(ids).logits - moved).abs().max() > 1e-4
        with torch.no_grad():  # whoever is chosen, the output is the same
            model.model.layers[0].mlp.gate.weight.normal_()
            before = model(ids).logits
            model.model.layers[0].mlp.gate.weight.normal_()
            torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_benchmark_runs_in_small(source_dir: Path, tmp_path: Path, run_script) -> None:
    words = ("--preset", "smoke", "--source_dir", source_dir, "--work_dir", tmp_path / "work", "--card_dir", tmp_path)
    done = run_script(*words, "--jobs", 2, script="benchmarks/ders.py")
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((tmp_path / "ders-upcycle.json").read_text())["runs"]["smoke"]
    assert set(run) == {"time", "memory", "quality", "compression"}
    card = (tmp_path / "ders-upcycle.md").read_text()
    for heading in ("### Time", "### Memory", "### Loss after equal tokens", "### Compression"):
        assert heading in card
    by_name = {row["encoding"]: row for row in run["compression"]["encodings"]}
    assert by_name["4 bit, least squares"]["share"] < by_name["random drop 0.5"]["share"] < 1
    assert run["quality"]["arms"]["low_rank"]["worth_of_deltas"]["seeds"] == 2
