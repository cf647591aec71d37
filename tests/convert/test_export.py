"""Experts that share a base, written as ordinary ones: the same logits, a stock checkpoint, all or nothing."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.convert import export, fold, upcycle
from support.dense_models import PARENTS, save_dense
from support.ders_checkpoints import edit, save
from support.zoo import VOCAB_SIZE

STOCK = {"mixtral_ext": MixtralForCausalLM, "olmoe_ext": OlmoeForCausalLM, "qwen3_moe_ext": Qwen3MoeForCausalLM}
FORMS = ("low_rank", "sparse", "quantized", "sparse_values")
W = {"gate": "w1", "up": "w3", "down": "w2"}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(2))
    return model.eval()(input_ids=ids).logits


def matrices(model: Any, layer: int) -> dict[str, Tensor]:
    """Base plus delta of every expert, all in float64, written out: matrix -> [experts, rows, cols]."""
    experts = copy.deepcopy(model.model.layers[layer].mlp.experts).double()
    gate, up = experts.gate_up_proj.detach().chunk(2)
    found = {}
    for matrix, base in (("gate", gate), ("up", up), ("down", experts.down_proj.detach())):
        deltas = [experts.deltas(matrix).delta(expert).decode().detach() for expert in range(8)]
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
                # One rounding, after decoding and sum in float32.
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


@pytest.mark.parametrize(
    ("family", "keys", "told"),
    [
        ("olmoe_ext", {"mup": "mup", "mup_base_hidden_size": 8}, True),
        ("qwen3_moe_ext", {"embedding_multiplier": 4.0}, False),
        ("mixtral_ext", {"embedding_multiplier": 4.0, "norm_topk_prob": False}, False),
    ],
)
def test_folding_is_named_where_it_works(tmp_path: Path, family: str, keys: dict[str, Any], told: bool) -> None:
    save(tmp_path / "ders", family, **keys)
    report = export(tmp_path / "ders", tmp_path / "ext")
    assert report.kept
    assert ("hf-moe fold" in report.as_text()) == told
    if told:
        assert fold(tmp_path / "ext", tmp_path / "stock").written
    else:
        with pytest.raises(ValueError, match=r"fold takes|stays as it is"):
            fold(tmp_path / "ext", tmp_path / "stock")


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


def test_ordinary_experts_one_by_one(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "mixtral_ext", moe_block=["standard", "ders"], ders_rank=[None, 2])
    name = "model.layers.0.mlp.experts.down_proj"
    single = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight": matrix.clone()
        for expert, matrix in enumerate(model.state_dict()[name])
    }
    edit(tmp_path / "ders", {name: None, **single})
    export(tmp_path / "ders", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_16_bits_are_judged_by_what_is_stored(tmp_path: Path, form: str) -> None:
    save(tmp_path / "ders", "olmoe_ext", form, torch.bfloat16)
    report = export(tmp_path / "ders", tmp_path / "out")
    assert report.max_logit_difference is not None
    assert report.rounding is not None
    assert report.max_logit_difference < 1e-5 < report.rounding
    assert "16 bits changes logits by up to" in report.as_text()
    save(tmp_path / "wide", "olmoe_ext", form)
    assert export(tmp_path / "wide", tmp_path / "wide_out").rounding == 0


def test_each_matrix_keeps_its_type(tmp_path: Path) -> None:
    model = save(tmp_path / "ders", "mixtral_ext")
    narrow = {f"model.layers.0.mlp.experts.{name}": torch.Tensor.bfloat16 for name in ("gate_up_proj", "delta_up_B")}
    edit(tmp_path / "ders", narrow)
    report = export(tmp_path / "ders", tmp_path / "out")
    assert report.rounding
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    types = {name.split(".")[-2]: t.dtype for name, t in tensors.items() if ".0.block_sparse_moe.experts." in name}
    assert types == {"w1": torch.bfloat16, "w3": torch.bfloat16, "w2": torch.float32}
    wanted = matrices(model, 0)["down"][3]
    torch.testing.assert_close(
        tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"].double(), wanted, rtol=1e-6, atol=1e-7
    )


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
