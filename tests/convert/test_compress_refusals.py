"""What compression refuses, and that nothing is half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM

from hf_moe_ext.convert import compress
from support.killed import kill_while_writing
from support.upcycled import COMMON, MOES, load, logits, save_dense, save_pair, upcycle_by_hand

STOCK = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
LOSSLESS = {"encode": "quantize", "bits": 16}


def test_refuses_experts_that_share_no_base(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    moe = upcycle_by_hand(dense)
    torch.manual_seed(9)
    with torch.no_grad():  # one expert of one layer is drawn anew, as Drop-Upcycling does in part
        moe.model.layers[1].mlp.experts.down_proj[2].normal_(std=0.15)
    moe.save_pretrained(tmp_path / "moe")
    keys = {"parent": tmp_path / "dense", **LOSSLESS}
    words = (
        r"layer 1, down of expert 2 has cosine -?0\.0\d+ to the parent's matrix .*below min_cosine=0.9, as have 1 of 6"
    )
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", **keys)
    with pytest.raises(ValueError, match=r"the experts' mean .* A MoE trained from scratch does not fit"):
        compress(tmp_path / "moe", tmp_path / "out", base="mean", **LOSSLESS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    report = compress(tmp_path / "moe", tmp_path / "out", force=True, **keys)
    assert "layer 1, down of expert 2" in report.warnings[0]
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(moe), rtol=0, atol=5e-6)


def test_one_far_expert_among_near_ones_is_refused(tmp_path: Path) -> None:
    """Their mean cosine is above the threshold: the least decides."""
    _, moe = save_pair(tmp_path)
    with torch.no_grad():
        matrix = moe.model.layers[0].mlp.experts.down_proj[3]
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(4))
        matrix += 0.7 * noise * matrix.norm() / noise.norm()
    moe.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"layer 0, down of expert 3 has cosine 0\.8"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")


def test_unrelated_experts_are_refused_with_any_base(tmp_path: Path) -> None:
    """Two unrelated experts have a cosine of 0.71 to their mean, the most that unrelated ones can have."""
    model_class, config_class, own = MOES["mixtral"]
    torch.manual_seed(0)
    model_class(config_class(**{**COMMON, **own, "num_local_experts": 2})).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"cosine 0\.[67]\d+ to the experts' mean"):
        compress(tmp_path / "moe", tmp_path / "out", base="mean")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": 64}, "has hidden_size=64, the MoE needs 32"),
        ({"vocab_size": 97}, "has vocab_size=97, the MoE needs 96"),
        ({"intermediate_size": 64}, "has intermediate_size=64, the MoE needs 48"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers=3, the MoE needs 2"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu', the MoE needs 'silu'"),
        ({"mlp_bias": True}, "has mlp_bias=True"),
    ],
    ids=str,
)
def test_another_parent_is_refused_by_what_differs(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    save_pair(tmp_path)
    save_dense(tmp_path / "other", **keys)
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_parent_of_another_architecture_or_training(tmp_path: Path) -> None:
    save_pair(tmp_path)
    save_dense(tmp_path / "qwen", "qwen3_moe")
    with pytest.raises(ValueError, match="model_type 'qwen3'; experts of mixtral come from llama or mistral"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "qwen")
    other = save_dense(tmp_path / "other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.15)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"below min_cosine=0.9, as have 6 of 6 matrices"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "other")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"base": "median"}, "base must be one of parent, mean, least_squares, got 'median'"),
        ({"base": "parent", "parent": None}, "base='parent' needs parent"),
        ({"base": "mean"}, "base='mean' does not use a parent"),
        ({"base": "least_squares", "parent": None}, "its expected error is least at the mean"),
        ({"drop_rate": 1.5}, "drop_rate must lie strictly between 0 and 1"),
        ({"encode": "svd", "rank": 33}, "rank must be at least 1 and at most 32"),
        ({"target_bytes": 10**6, "max_error": 0.1}, "give one of them"),
        ({"target_bytes": 10**6, "drop_rate": 0.5}, "leave drop_rate=0.5 out"),
        ({"max_error": -1}, "max_error must be a positive number, got -1"),
        ({"min_cosine": 2}, "min_cosine must be from -1 to 1, got 2"),
        ({"export": "gguf"}, "export must be 'stock' or None, got 'gguf'"),
        ({"export": "stock", "target_bytes": 10**6}, "leave target_bytes out"),
        ({"max_loss": 0.1}, "max_loss=0.1 needs calibration"),
        ({"target_bytes": float("nan")}, "target_bytes must be a positive number, got nan"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"calibration": "no/such.txt"}, "is no JSONL, text file or folder of texts"),
    ],
    ids=str,
)
def test_bad_requests(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    save_pair(tmp_path)
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", **{"parent": tmp_path / "dense", **keys})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_truncated_and_missing_shards(tmp_path: Path) -> None:
    save_pair(tmp_path, shard="40KB")
    shard = sorted((tmp_path / "moe").glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) - 100])
    with pytest.raises(ValueError, match=shard.name):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is missing"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_killed_while_writing_then_again(tmp_path: Path) -> None:
    save_pair(tmp_path)
    code = (
        "import sys, time\n"
        "from hf_moe_ext.convert import checkpoint, compress\n"
        "flush = checkpoint.CheckpointWriter._flush\n"
        "def slow(self):\n    flush(self)\n    time.sleep(1)\n"
        "checkpoint.CheckpointWriter._flush = slow\n"
        "compress(sys.argv[1] + '/moe', sys.argv[1] + '/out', parent=sys.argv[1] + '/dense', max_shard_bytes=4000)\n"
    )
    kill_while_writing(tmp_path, code, tmp_path)
    assert not (tmp_path / "out").exists()
    compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
    load(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")


def test_other_families_and_blocks_are_refused(tmp_path: Path) -> None:
    save_pair(tmp_path)
    with pytest.raises(ValueError, match=r"compress takes mixtral, mixtral_ext, .* has model_type 'llama'"):
        compress(tmp_path / "dense", tmp_path / "out", base="mean")
    compress(tmp_path / "moe", tmp_path / "once", parent=tmp_path / "dense")
    with pytest.raises(ValueError, match="moe_block='ders' already"):
        compress(tmp_path / "once", tmp_path / "out", parent=tmp_path / "dense")
    config = json.loads((tmp_path / "moe/config.json").read_text())
    shutil.copytree(tmp_path / "moe", tmp_path / "more")
    (tmp_path / "more/config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    with pytest.raises(ValueError, match="has no gate of expert 4; the checkpoint is incomplete"):
        compress(tmp_path / "more", tmp_path / "out", parent=tmp_path / "dense")


def save_ext(folder: Path, **keys: Any) -> Any:
    """A MoE of our family, standard blocks, in ``folder / "ext"``, its parent beside it."""
    from hf_moe_ext.models import MixtralExtConfig, MixtralExtForCausalLM

    _, moe = save_pair(folder)
    settings = {k: v for k, v in moe.config.to_dict().items() if k != "model_type"} | keys
    ext = MixtralExtForCausalLM(MixtralExtConfig(**settings)).eval()
    ext.load_state_dict(moe.state_dict())
    ext.save_pretrained(folder / "ext")
    return ext


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"norm_topk_prob": False}, "has norm_topk_prob=False, which a stock mixtral model has not; leave export out$"),
        ({"attention_multiplier": 1.0}, r"attention_multiplier=1.0, .* fold the multipliers first"),
        ({"router_logits_scaling": 2.0}, r"router_logits_scaling=2.0, .* fold the multipliers first"),
    ],
    ids=str,
)
def test_export_of_what_no_stock_model_computes(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    ext = save_ext(tmp_path, **keys)
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "ext", tmp_path / "out", parent=tmp_path / "dense", export="stock", **LOSSLESS)
    compress(tmp_path / "ext", tmp_path / "out", parent=tmp_path / "dense", **LOSSLESS)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(ext), rtol=0, atol=5e-6)


def test_neutral_multipliers_and_idle_keys_are_no_reason(tmp_path: Path) -> None:
    """Multipliers written out as what a stock model does, and keys of other blocks, which would have an effect in the result."""
    own = {"attention_multiplier": 8**-0.5, "logits_scaling": 1.0, "ders_hold_positions": True, "ders_bias": True}
    ext = save_ext(tmp_path, **own, moe_shared_expert_intermediate_size=16)
    for name, export in (("out", None), ("stock", "stock")):
        compress(tmp_path / "ext", tmp_path / name, parent=tmp_path / "dense", export=export, **LOSSLESS)
        torch.testing.assert_close(logits(load(tmp_path / name)), logits(ext), rtol=0, atol=5e-6)


def test_keys_that_other_layers_need_are_refused(tmp_path: Path) -> None:
    save_ext(tmp_path)
    path = tmp_path / "ext/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "moe_block": ["standard", "dense"], "ders_bias": True}))
    with pytest.raises(ValueError, match="has ders_bias=True for its layers with moe_block='dense'"):
        compress(tmp_path / "ext", tmp_path / "out", parent=tmp_path / "dense")


def test_a_checkpoint_that_lacks_tensors(tmp_path: Path) -> None:
    """Without an index nothing else says that they are missing."""
    save_pair(tmp_path)
    path = tmp_path / "moe/model.safetensors"
    whole = load_file(path)
    for part, words in (
        ("layers.1.block_sparse_moe.experts.", "layer 1 of .* has no experts' matrices"),
        ("layers.1.block_sparse_moe.experts.3.w2", "has no down of expert 3"),
        ("layers.0.self_attn.k_proj", r"has no model.layers.0.self_attn.k_proj.weight \(1 tensors are missing\)"),
        ("layers.0.block_sparse_moe.gate", "has no model.layers.0.mlp.gate.weight"),
    ):
        save_file({name: tensor for name, tensor in whole.items() if part not in name}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    save_pair(tmp_path)
    (tmp_path / "old").mkdir()
    shutil.copyfile(tmp_path / "moe/config.json", tmp_path / "old/config.json")
    (tmp_path / "old/text.txt").write_text("w30 w31")
    keys = {"parent": tmp_path / "dense", "calibration": tmp_path / "old/text.txt", "overwrite": True}
    for name in ("moe", "dense", "old"):
        with pytest.raises(FileExistsError, match="is or holds"):
            compress(tmp_path / "moe", tmp_path / name, **keys)
    assert not (tmp_path / "dense/compress.json").exists()


def test_not_a_number_in_an_expert(tmp_path: Path) -> None:
    _, moe = save_pair(tmp_path)
    with torch.no_grad():
        moe.model.layers[0].mlp.experts.down_proj[1, 0, 0] = float("nan")
    moe.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match="expert has NaN or infinite entries"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
