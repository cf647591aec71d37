"""Models whose experts share a base, on disk: names, round trips, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.latent_models import assert_same, make_model
from support.shared_base import IDS, every_block, every_model, fill_deltas


@every_model
@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_open_again(family, block, dtype, tmp_path):
    fill_deltas(make_model(family, block, output_router_logits=True)).save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model)
    assert_same(again.state_dict(), model.state_dict())
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


NAMES = {
    "low_rank": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in "AB"},
    "sparse": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in ("values", "stream")},
    "quantized": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in ("codes", "scales")},
    "sparse_values": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in ("codes", "scales", "positions")},
    "universal": {f"delta_{m}_{part}" for m in ("gate", "up", "down") for part in "AB"}
    | {"gate_up_proj_bias", "down_proj_bias"},
}


@every_model
@pytest.mark.parametrize("block", NAMES)
def test_names_on_disk(family, block):
    """A golden list: a renamed tensor is a breaking change."""
    names = {n.removeprefix("model.layers.1.mlp.") for n in make_model(family, block).state_dict() if ".1.mlp" in n}
    assert names == {"gate.weight"} | {f"experts.{n}" for n in NAMES[block] | {"gate_up_proj", "down_proj"}}


@every_model
def test_names_of_dense_layers_and_of_a_universal_ffn(family):
    names = set(make_model(family, "some_layers", ders_bias=True).state_dict())
    parts = [f"{m}_proj.{kind}" for m in ("gate", "up", "down") for kind in ("weight", "bias")]
    assert {n.removeprefix("model.layers.0.mlp.") for n in names if ".0.mlp." in n} == set(parts)
    names = set(make_model(family, "beside").state_dict())
    assert {n.partition("shared_expert.")[2] for n in names if ".0.mlp.shared" in n} == set(parts)


@every_model
@every_block
def test_a_missing_tensor_is_refused_by_name(family, block, tmp_path):
    make_model(family, block).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    layer = 1
    for name in [n for n in whole if f"layers.{layer}.mlp." in n]:
        save_file({n: t for n, t in whole.items() if n != name}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"layers {layer} are not those.*ders_delta=.*it has no {name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@every_model
@pytest.mark.parametrize(
    ("saved", "wanted", "rule"),
    [
        ("standard", {"moe_block": "ders"}, "moe_block='ders', ders_delta='low_rank', ders_rank=4.*hf-moe upcycle"),
        ("low_rank", {"moe_block": "standard"}, r"down_proj is \(32, 48\), the model's \(8, 32, 48\)"),
        ("low_rank", {"ders_rank": 2}, "ders_rank=2"),
        ("sparse", {"ders_drop_rate": 0.5}, "ders_drop_rate=0.5"),
        ("quantized", {"ders_bits": 8}, "ders_bits=8"),
        ("universal", {"ders_bias": False}, "ders_bias=False"),
        ("universal", {"ders_share_universal": False}, "ders_share_universal=False"),
    ],
)
def test_a_checkpoint_of_other_blocks_is_refused(family, saved, wanted, rule, tmp_path):
    make_model(family, saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rule):
        AutoModelForCausalLM.from_pretrained(tmp_path, **wanted)


def test_no_matrix_per_expert_on_disk(tmp_path):
    with pytest.raises(ValueError, match="one matrix per expert, which experts with a shared base"):
        make_model("mixtral_ext", "low_rank").save_pretrained(tmp_path / "out", save_original_format=True)
    assert not (tmp_path / "out").exists()
