"""Files of an upcycled checkpoint: shards, names, what is copied, what is drawn from the seed, nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_ext.convert import upcycle
from support.dense_models import check_equal, load_logits, read_logits, read_weights, save_dense
from support.killed import kill_while_writing

DELTAS = ("low_rank", "sparse", "quantized")
STOCK = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


@pytest.mark.parametrize("form", ["ders", "vanilla"])
def test_sources_and_results_in_shards(tmp_path: Path, form: Any) -> None:
    save_dense(tmp_path / "one", "qwen3")
    save_dense(tmp_path / "many", "qwen3", shard="9KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    upcycle(tmp_path / "one", tmp_path / "moe-one", form=form)
    upcycle(tmp_path / "many", tmp_path / "moe-many", form=form, max_shard_bytes=20_000)
    assert len(list((tmp_path / "moe-many").glob("*.safetensors"))) > 5
    one, many = read_weights(tmp_path / "moe-one"), read_weights(tmp_path / "moe-many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    torch.testing.assert_close(load_logits(tmp_path / "moe-many"), load_logits(tmp_path / "moe-one"), rtol=0, atol=0)


@pytest.mark.parametrize("parent", ["llama", "qwen3"])
@pytest.mark.parametrize("form", ["ders", "vanilla"])
def test_names_on_disk_are_those_the_class_writes(tmp_path: Path, parent: str, form: Any) -> None:
    save_dense(tmp_path / "dense", parent)
    upcycle(tmp_path / "dense", tmp_path / "moe", form=form, universal="none" if form == "vanilla" else "keep")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    ours, theirs = read_weights(tmp_path / "moe"), read_weights(tmp_path / "again")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_seed_one_router(tmp_path: Path) -> None:
    """The same router in both forms and beside any deltas, another with another seed; deltas zero, A and masks not."""
    save_dense(tmp_path / "dense")
    for name, settings in {
        "ders": {},
        "vanilla": {"form": "vanilla"},
        "sparse": {"delta": "sparse", "universal": "extend"},
        "other": {"seed": 1},
        "wide": {"router_std": 0.2},
    }.items():
        upcycle(tmp_path / "dense", tmp_path / name, verify=False, **settings)  # type: ignore[arg-type]
    weights = {path.name: read_weights(path) for path in tmp_path.iterdir()}
    routers = {
        name: torch.stack([each[key] for key in sorted(each) if key.endswith((".mlp.gate.weight", "moe.gate.weight"))])
        for name, each in weights.items()
        if name != "dense"
    }
    assert routers["ders"].shape == (3, 8, 32)
    assert torch.equal(routers["ders"], routers["vanilla"])
    assert torch.equal(routers["ders"], routers["sparse"])
    assert torch.equal(routers["ders"] * 10, routers["wide"]) or torch.allclose(routers["ders"] * 10, routers["wide"])
    assert not torch.isclose(routers["ders"], routers["other"]).any()
    assert not torch.isclose(routers["ders"][0], routers["ders"][1]).any()
    assert routers["ders"].std() == pytest.approx(0.02, rel=0.1)
    A, B = (weights["ders"][f"model.layers.1.mlp.experts.delta_up_{part}"] for part in "AB")
    assert A.shape == (8, 4, 32)
    assert A.abs().max() == pytest.approx(32**-0.5, rel=0.02)
    assert not torch.isclose(A[0], A[1]).any()
    assert not B.any()
    stream = weights["sparse"]["model.layers.2.mlp.experts.delta_down_stream"]
    assert stream.tolist() == [[0, 2, 2, member] for member in range(9)]


def test_side_files_and_keys(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    (tmp_path / "dense" / "LICENSE").write_text("free")
    upcycle(tmp_path / "dense", tmp_path / "moe", verify=False)
    sides = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "moe").iterdir()} == sides | {"upcycle.json"}
    for name in sides - {"config.json", "model.safetensors"}:
        assert (tmp_path / "moe" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("w30 w31").input_ids == [30, 31]
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.generation_config.temperature == 0.7


@pytest.mark.parametrize("parent", ["llama-biased", "qwen3"])
def test_tied_heads(tmp_path: Path, parent: str) -> None:
    """One tensor in the file; a stored copy of it is left out, another tensor is refused."""
    dense = save_dense(tmp_path / "dense", parent)
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    upcycle(tmp_path / "dense", tmp_path / "moe")
    assert "lm_head.weight" not in read_weights(tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    check_equal(read_logits(moe), read_logits(dense))
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True, but lm_head\.weight is not the embedding"):
        upcycle(tmp_path / "dense", tmp_path / "other")


def test_old_checkpoints_with_frequencies(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, path, {"format": "pt"})
    upcycle(tmp_path / "dense", tmp_path / "moe", verify=False)
    check_equal(load_logits(tmp_path / "moe"), read_logits(dense))


def test_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    assert (tmp_path / "moe" / "config.json").read_text() == "{}"
    with pytest.raises(FileExistsError, match="is or holds the model that is read"):
        upcycle(tmp_path / "dense", tmp_path / "dense", overwrite=True)
    assert upcycle(tmp_path / "dense", tmp_path / "moe", overwrite=True).written
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == "mixtral_ext"


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", num_hidden_layers=24)
    code = (
        "import sys\nfrom hf_moe_ext.convert import upcycle\n"
        "upcycle(sys.argv[1], sys.argv[2], max_shard_bytes=1, delta='sparse')\n"
    )
    output = tmp_path / "moe"
    kill_while_writing(tmp_path, code, tmp_path / "dense", output)
    assert not output.exists()
    assert upcycle(tmp_path / "dense", output).written
