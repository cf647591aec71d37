"""Exports that are refused, and what a refusal or a kill leaves behind: nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_moe_ext.convert import export, export_plan
from support.dense_models import save_dense
from support.ders_checkpoints import edit, save
from support.killed import kill_while_writing

ROW = torch.tensor([1])


@pytest.mark.parametrize(
    ("family", "block", "keys", "words"),
    [
        ("olmoe_ext", "standard", {}, "its experts are ordinary ones already"),
        ("mixtral_ext", "ungated", {}, "its experts are ordinary ones already"),
        ("mixtral_ext", "low_rank", {"ders_bias": True}, r"ders_bias=True: biases, which .* no place for"),
        ("olmoe_ext", "beside", {"ders_bias": False}, "moe_shared_expert_intermediate_size=48: an expert that serves"),
        (
            "olmoe_ext",
            "universal",
            {"ders_bias": False},
            "moe_shared_expert_intermediate_size=48: an expert that serves",
        ),
    ],
)
def test_refusals(tmp_path: Path, family: str, block: str, keys: dict[str, Any], words: str) -> None:
    save(tmp_path / "model", family, block, **keys)
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_an_adapter_another_family_and_a_taken_output(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "olmoe_ext")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(tmp_path / "ders", tmp_path / "ders")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter"):
        export(tmp_path / "adapter", tmp_path / "out")
    save_dense(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match=r"export takes mixtral_ext, olmoe_ext, qwen3_moe_ext; .* model_type 'llama'"):
        export(tmp_path / "dense", tmp_path / "out")


@pytest.mark.parametrize("gone", ["model.layers.1.mlp.experts.delta_up_A", "model.norm.weight"])
def test_refuses_an_incomplete_checkpoint(tmp_path: Path, gone: str) -> None:
    save(tmp_path / "ders", "olmoe_ext")
    tensor = load_file(tmp_path / "ders" / "model.safetensors")[gone]
    edit(tmp_path / "ders", {gone: None})
    with pytest.raises(ValueError, match=f"has no {gone}"):
        export(tmp_path / "ders", tmp_path / "out")
    edit(tmp_path / "ders", {gone: tensor[:-1].clone()})
    with pytest.raises(ValueError, match=f"{gone} is .* its config.json says"):
        export(tmp_path / "ders", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", [2, 4])
def test_refuses_ordinary_experts_in_part(tmp_path: Path, layer: int) -> None:
    save(tmp_path / "ders", "mixtral_ext", "some_layers", ders_rank=[None, 2, None, 4, None])
    edit(tmp_path / "ders", {f"model.layers.{layer}.mlp.experts.down_proj": None})
    with pytest.raises(ValueError, match=rf"has no model\.layers\.{layer}\..*experts\."):
        export(tmp_path / "ders", tmp_path / "out", dry_run=True)


def test_refuses_tensors_that_the_model_has_not(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "olmoe_ext")
    more = "model.layers.0.mlp.experts.delta_up_values"
    edit(tmp_path / "ders", {more: torch.zeros(3)})
    with pytest.raises(ValueError, match=f"holds {more}, which"):
        export(tmp_path / "ders", tmp_path / "out", dry_run=True)
    edit(tmp_path / "ders", {more: None})
    model.config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path / "ders")
    with pytest.raises(ValueError, match=r"holds model\.layers\.1\."):
        export(tmp_path / "ders", tmp_path / "out", dry_run=True)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    save(tmp_path / "ders", "olmoe_ext")
    code = (
        "import resource, sys\nfrom hf_moe_ext.cli import app\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\napp(sys.argv[1:])"
    )
    words = ["export", str(tmp_path / "ders"), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "hf-moe export: could not write" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ders"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_logits_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    save(tmp_path / "ders", "olmoe_ext", dtype=dtype)
    monkeypatch.setattr(
        sys.modules[export.__module__], "merge_out", lambda base, delta, dtype: base.to(dtype, copy=True)
    )
    with pytest.raises(RuntimeError, match="nothing was written"):
        export(tmp_path / "ders", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("large", [60000.0, float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path, large: float) -> None:
    words = "layer 1, gate of expert 0: " + (
        "base plus delta is too large" if large == 60000 else "the source holds NaN"
    )
    save(tmp_path / "ders", "mixtral_ext", dtype=torch.float16)
    edit(tmp_path / "ders", {"model.layers.1.mlp.experts.gate_up_proj": lambda base: base.index_fill(0, ROW, large)})
    edit(tmp_path / "ders", {"model.layers.1.mlp.experts.delta_gate_B": lambda B: B.index_fill(1, ROW, 30000.0)})
    edit(tmp_path / "ders", {"model.layers.1.mlp.experts.delta_gate_A": lambda A: torch.full_like(A, 1.0)})
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "ders", tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_source_without_finite_logits(tmp_path: Path) -> None:
    save(tmp_path / "ders", "olmoe_ext")
    edit(tmp_path / "ders", {"model.norm.weight": lambda gain: gain.index_fill(0, ROW, float("nan"))})
    with pytest.raises(ValueError, match="its own logits are not finite"):
        export(tmp_path / "ders", tmp_path / "out")


@pytest.mark.slow
def test_killed_while_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    save(tmp_path / "ders", "olmoe_ext", num_hidden_layers=24)
    code = "import sys\nfrom hf_moe_ext.convert import export\nexport(sys.argv[1], sys.argv[2], max_shard_bytes=1)\n"
    kill_while_writing(tmp_path, code, tmp_path / "ders", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "ders", tmp_path / "out", verify=False).written


def test_a_plan_reads_no_weight(tmp_path: Path) -> None:
    save(tmp_path / "ders", "olmoe_ext")
    (tmp_path / "ders" / "model.safetensors").unlink()
    assert export_plan.plan_export(tmp_path / "ders").is_stock
