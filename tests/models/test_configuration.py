"""The keys that choose a block: what they become, what is refused, what config.json says."""

import json

import pytest
from transformers import AutoConfig

from hf_moe_ext.models import MixtralExtConfig, OlmoeExtConfig
from hf_moe_ext.models.dcca_keys import equal_expert_width
from support.latent_models import BLOCKS, FAMILIES, make_config, make_model

DCCA = {"moe_block": "dcca"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_config_json_says_what_the_model_is(family, block, tmp_path):
    config = make_config(family, block)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == family
    if block != "standard":
        assert isinstance(written["moe_latent_size"], int)
        assert isinstance(written["moe_expert_intermediate_size"], int)
        assert isinstance(written["moe_expert_act"], str)
    assert "base_model_ep_plan" not in written
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is FAMILIES[family]
    assert again.to_diff_dict() == config.to_diff_dict()


def test_open_values_are_filled_in():
    config = OlmoeExtConfig(hidden_size=1024, intermediate_size=512, **DCCA)
    assert config.moe_latent_size == 256
    assert config.moe_expert_intermediate_size == 3 * 1024 * 512 // (2 * 256)
    assert config.moe_expert_act == config.hidden_act
    gated = OlmoeExtConfig(hidden_size=1024, intermediate_size=512, moe_expert_gated=True, **DCCA)
    assert gated.moe_expert_intermediate_size == 1024 * 512 // 256


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("hidden", "inner", "latent"), [(2048, 1024, 512), (1000, 333, 248), (32, 48, 8), (64, 8, 64)])
def test_equal_parameters_up_to_alignment(hidden, inner, latent, gated):
    width = equal_expert_width(hidden, inner, latent, gated)
    matrices = 3 if gated else 2
    assert width % 8 == 0
    assert abs(matrices * latent * width - 3 * hidden * inner) <= matrices * latent * 4  # half of one alignment step


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"moe_latent_size": 0}, "moe_latent_size must be from 1 to hidden_size=32, got 0"),
        ({"moe_latent_size": 40}, "moe_latent_size must be from 1 to hidden_size=32, got 40"),
        ({"moe_latent_size": 12}, "moe_latent_size=12 is not a multiple of 8.*write moe_latent_size=16"),
        ({"hidden_size": 48}, "moe_latent_size is hidden_size // 4 = 12 by default.*write moe_latent_size=16"),
        ({"moe_expert_intermediate_size": 20}, "moe_expert_intermediate_size=20 is not a multiple of 8"),
        ({"moe_expert_intermediate_size": 0}, "must be at least 1, got 0"),
        ({"moe_shared_expert_intermediate_size": -1}, "must be 0 .none. or a width, got -1"),
        ({"moe_expert_act": "loud"}, "moe_expert_act must be an activation of Transformers, got 'loud'"),
        ({"moe_block": "bigmac"}, "moe_block must be one of 'standard', 'dcca', 'ders', 'dense', got 'bigmac'"),
        ({"moe_block": ["dcca"]}, "moe_block lists 1 blocks for num_hidden_layers=2"),
    ],
)
def test_bad_values_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        make_config("olmoe_ext", **settings)


@pytest.mark.parametrize(
    "settings", [{"moe_latent_size": 8.0}, {"moe_latent_size": True}, {"moe_expert_gated": 1}, {"moe_block": 3}]
)
def test_bad_kinds_are_refused(settings):
    with pytest.raises(TypeError, match=next(iter(settings))):
        make_config("mixtral_ext", **settings)


def test_keys_without_effect_are_named(caplog):
    from transformers.utils import logging

    logging.get_logger("hf_moe_ext").propagate = True  # Transformers' own handler does not reach pytest
    OlmoeExtConfig(moe_latent_size=128, moe_latent_norm=True)
    assert "moe_latent_size, moe_latent_norm: no effect" in caplog.text
    caplog.clear()
    make_config("olmoe_ext", "standard")
    make_config("olmoe_ext", "mixed", moe_latent_size=16)
    assert "no effect" not in caplog.text


def test_overrides_while_loading_are_resolved_and_checked(tmp_path):
    OlmoeExtConfig(hidden_size=64, intermediate_size=32, num_attention_heads=4).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, moe_block="dcca")
    assert config.moe_latent_size == 16
    with pytest.raises(ValueError, match="moe_latent_size must be from 1 to hidden_size=64"):
        AutoConfig.from_pretrained(tmp_path, moe_block="dcca", moe_latent_size=128)


def test_ungated_experts_cannot_run_sonicmoe():
    with pytest.raises(ValueError, match=r"sonicmoe.*gated experts only"):
        make_model("olmoe_ext", "ungated", experts_implementation="sonicmoe")


@pytest.mark.parametrize(
    ("block", "weights"),
    [
        ("standard", {"gate_up_proj", "down_proj"}),
        ("ungated", {"up_proj", "down_proj"}),
        ("gated", {"gate_up_proj", "down_proj"}),
        ("mixed", {"gate_up_proj", "up_proj", "down_proj"}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_name_the_weights_that_exist_and_no_others(family, block, weights):
    model = make_model(family, block)
    here = {name.split(".experts.")[1] for name, _ in model.named_parameters() if ".experts." in name}
    assert here == weights
    for plan in (model.ep_plan, model.tp_plan):
        assert {name.split(".experts.")[1] for name in plan if ".experts." in name} == weights
    assert model.ep_plan["model.layers.*.mlp.experts"] == "ep_dispatch_experts"


def test_the_stock_plan_where_every_block_is_standard():
    for config, stock in ((OlmoeExtConfig(), "OlmoeConfig"), (MixtralExtConfig(), "MixtralConfig")):
        import transformers

        theirs = getattr(transformers, stock)()
        assert config.base_model_ep_plan == theirs.base_model_ep_plan
        assert config.base_model_tp_plan == theirs.base_model_tp_plan
