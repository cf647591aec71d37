"""Experts that share a base, written as ordinary ones: the same logits, a stock checkpoint, all or nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.convert import export, export_plan, fold, upcycle
from support.dense_models import PARENTS, save_dense
from support.killed import kill_while_writing
from support.latent_models import DERS_BLOCKS, make_model
from support.words import build_tokenizer
from support.zoo import VOCAB_SIZE

STOCK = {"mixtral_ext": MixtralForCausalLM, "olmoe_ext": OlmoeForCausalLM, "qwen3_moe_ext": Qwen3MoeForCausalLM}
FORMS = ("low_rank", "sparse", "quantized", "sparse_values")
W = {"gate": "w1", "up": "w3", "down": "w2"}


def save(folder: Path, family: str, block: str = "low_rank", dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """A model whose every delta differs from zero, on disk with a tokenizer; returns it."""
    # Fused, the same sums would be rounded elsewhere.
    forward = {"ders_forward": "materialised"} if block in DERS_BLOCKS else {}
    model = make_model(family, block, dtype=dtype, **forward, **keys)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            part = name.rpartition(".delta_")[2]
            if part.endswith(("_A", "_B", "_values")):
                tensor.copy_((torch.randn(tensor.shape, generator=generator) * 0.05).to(dtype))
            elif part.endswith("_codes"):
                tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator).to(tensor.dtype))
            elif part.endswith("_scales"):
                tensor.copy_((torch.rand(tensor.shape, generator=generator) * 0.01).to(tensor.dtype))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(2))
    return model.eval()(input_ids=ids).logits


def matrices(model: Any, layer: int) -> dict[str, Tensor]:
    """Base plus delta of every expert in float64, written out: matrix -> [experts, rows, cols]."""
    experts = model.model.layers[layer].mlp.experts
    gate, up = experts.gate_up_proj.detach().double().chunk(2)
    found = {}
    for matrix, base in (("gate", gate), ("up", up), ("down", experts.down_proj.detach().double())):
        deltas = [experts.deltas(matrix).delta(expert).decode().detach().double() for expert in range(8)]
        found[matrix] = torch.stack([base + delta for delta in deltas])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", STOCK)
def test_a_stock_checkpoint_of_base_plus_delta(tmp_path: Path, family: str, form: str, dtype: torch.dtype) -> None:
    model = save(tmp_path / "ders", family, form, dtype)
    report = export(tmp_path / "ders", tmp_path / "stock")
    assert report.written
    assert report.layers == [0, 1]
    assert report.kept == []
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(found) is STOCK[family]
    assert found.dtype == dtype
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    for layer in range(2):
        for matrix, wanted in matrices(model, layer).items():
            block, name = ("block_sparse_moe", W[matrix]) if family == "mixtral_ext" else ("mlp", f"{matrix}_proj")
            for expert in range(8):
                stored = tensors.pop(f"model.layers.{layer}.{block}.experts.{expert}.{name}.weight")
                # One rounding, after a sum and the decoding in float32.
                torch.testing.assert_close(stored.double(), wanted[expert], rtol=torch.finfo(dtype).eps, atol=1e-7)
    others = {n: t for n, t in model.state_dict().items() if ".experts." not in n}
    assert {n.replace("block_sparse_moe", "mlp"): t.tolist() for n, t in tensors.items()} == {
        n: t.tolist() for n, t in others.items()
    }
    if dtype == torch.float32:
        torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-6)
    assert report.num_parameters == found.num_parameters()
    assert report.num_bytes == report.num_parameters * dtype.itemsize


@pytest.mark.parametrize("parent", PARENTS)
def test_an_untrained_upcycled_model_becomes_its_full_copies(tmp_path: Path, parent: str) -> None:
    save_dense(tmp_path / "dense", parent)
    keys: dict[str, Any] = {"num_experts": 4, "top_k": 2, "verify": False}
    upcycle(tmp_path / "dense", tmp_path / "ders", **keys)
    if parent in ("llama-biased", "granite"):
        with pytest.raises(ValueError, match="ders_bias=True: biases"):
            export(tmp_path / "ders", tmp_path / "out")
        return
    report = export(tmp_path / "ders", tmp_path / "out")
    upcycle(tmp_path / "dense", tmp_path / "copies", form="vanilla", **keys)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "copies")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items() if "gate.weight" not in name)
    assert report.model_type == AutoModelForCausalLM.from_pretrained(tmp_path / "copies").config.model_type


def test_stock_result_opens_without_this_package(tmp_path: Path) -> None:
    save(tmp_path / "ders", "mixtral_ext")
    export(tmp_path / "ders", tmp_path / "stock")
    config = (tmp_path / "stock" / "config.json").read_text(encoding="utf-8")
    assert "ders" not in config
    assert "_ext" not in config
    code = (
        "import sys; sys.modules['hf_moe_ext'] = None\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stock")], capture_output=True, text=True)
    assert done.stdout.strip() == "MixtralForCausalLM", done.stderr


def test_what_a_stock_model_has_not_stays_and_folds(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "mixtral_ext", embedding_multiplier=4.0, residual_multiplier=0.5)
    report = export(tmp_path / "ders", tmp_path / "ext")
    assert report.kept == ["embedding_multiplier=4.0", "residual_multiplier=0.5"]
    assert "hf-moe fold" in report.as_text()
    ext = AutoModelForCausalLM.from_pretrained(tmp_path / "ext")
    assert ext.config.model_type == "mixtral_ext"
    assert ext.config.moe_block == "standard"
    assert ext.config.ders_rank is None
    torch.testing.assert_close(logits(ext), logits(model), rtol=1e-4, atol=1e-6)
    fold(tmp_path / "ext", tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is MixtralForCausalLM
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-6)


def test_raw_gates_are_no_stock_mixtral(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "mixtral_ext", norm_topk_prob=False)
    report = export(tmp_path / "ders", tmp_path / "ext")
    assert report.kept == ["norm_topk_prob=False"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "ext")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-6)


def test_other_blocks_stay_what_they_are(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "mixtral_ext", "some_layers", ders_rank=[None, 2, None, 4, None])
    report = export(tmp_path / "ders", tmp_path / "out")
    assert report.layers == [1, 3]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.moe_blocks == ["dense", "standard", "standard", "standard", "dcca"]
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-6)


def test_shards_and_a_tied_head(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "olmoe_ext", tie_word_embeddings=True)
    export(tmp_path / "ders", tmp_path / "stock", max_shard_bytes=20_000)
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 3
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert found.config.tie_word_embeddings
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-6)


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
    path = tmp_path / "ders" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no {gone}"):
        export(tmp_path / "ders", tmp_path / "out")
    save_file(tensors | {gone: tensors[gone][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{gone} is .* its config.json says"):
        export(tmp_path / "ders", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_logits_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "ders", "olmoe_ext")
    monkeypatch.setattr(sys.modules[export.__module__], "merge_out", lambda base, delta, dtype: base.clone())
    with pytest.raises(RuntimeError, match="nothing was written"):
        export(tmp_path / "ders", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_while_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    save(tmp_path / "ders", "olmoe_ext", num_hidden_layers=24)
    code = "import sys\nfrom hf_moe_ext.convert import export\nexport(sys.argv[1], sys.argv[2], max_shard_bytes=1)\n"
    kill_while_writing(tmp_path, code, tmp_path / "ders", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "ders", tmp_path / "out", verify=False).written


def test_command(tmp_path: Path) -> None:
    save(tmp_path / "ders", "qwen3_moe_ext")
    words = ["export", str(tmp_path / "ders"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "nothing written" in done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["model_type"] == "qwen3_moe"
    assert told["max_logit_difference"] < 1e-5 < told["max_logit"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not any("delta" in name for name in file.keys())  # noqa: SIM118 (a handle, not a dictionary)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr


def test_a_plan_reads_no_weight(tmp_path: Path) -> None:
    save(tmp_path / "ders", "olmoe_ext")
    (tmp_path / "ders" / "model.safetensors").unlink()
    assert export_plan.plan_export(tmp_path / "ders").is_stock
