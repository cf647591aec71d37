"""The keys of experts that share a base: what they become, what is refused, what is warned of."""

import json

import pytest
from transformers import AutoConfig

from hf_moe_ext.models import MixtralExtConfig
from hf_moe_ext.models.ders_keys import layer_numbers
from support.latent_models import DERS_BLOCKS, FAMILIES, make_config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", DERS_BLOCKS)
def test_config_json_says_what_the_model_is(family, block, tmp_path):
    config = make_config(family, block)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    needed = {"low_rank": "ders_rank", "sparse": "ders_drop_rate", "quantized": "ders_bits"}[config.ders_delta]
    assert written[needed] is not None
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is FAMILIES[family]
    assert again.to_diff_dict() == config.to_diff_dict()


def test_open_values_are_filled_in():
    assert make_config("mixtral_ext", "low_rank").ders_rank == 4
    sparse = make_config("mixtral_ext", "sparse")
    assert (sparse.ders_drop_rate, sparse.ders_bits, sparse.ders_rank) == (0.9, None, None)
    assert make_config("mixtral_ext", "quantized").ders_bits == 4
    config = make_config("mixtral_ext", "low_rank", ders_rank=[{"gate": 1, "up": 2, "down": 3}, None])
    assert layer_numbers(config, 0) == {"rank": {"gate": 1, "up": 2, "down": 3}, "drop_rate": None, "bits": None}
    assert layer_numbers(config, 1)["rank"] == 4
    values = make_config("mixtral_ext", "sparse", ders_bits=[None, 8])
    assert [layer_numbers(values, i)["bits"] for i in range(2)] == [None, 8]


def test_the_mask_names_its_algorithm_and_no_other_is_read(tmp_path):
    config = make_config("mixtral_ext", "sparse")
    # The checksum of a small mask: another one means other positions, and so other weights in every saved model.
    assert config.ders_mask == {"algorithm": "hf_moe_ext.mix32", "version": 1, "checksum": MASK_CHECKSUM}
    assert make_config("mixtral_ext", "low_rank").ders_mask is None
    config.save_pretrained(tmp_path)
    for change in ({"version": 2}, {"algorithm": "other"}, {"checksum": "0" * 16}):
        with pytest.raises(
            ValueError, match=r"were made by another algorithm than this release's.*read the model with"
        ):
            AutoConfig.from_pretrained(tmp_path, ders_mask=config.ders_mask | change)


MASK_CHECKSUM = "e3336db238f00a5a"


@pytest.mark.parametrize(
    ("block", "settings", "error", "rule"),
    [
        (
            "low_rank",
            {"ders_delta": "dense"},
            ValueError,
            "ders_delta must be one of 'low_rank', 'sparse', 'quantized'",
        ),
        ("low_rank", {"ders_rank": 33}, ValueError, "ders_rank must be from 1 to 32, the smaller of hidden_size=32"),
        ("low_rank", {"ders_rank": 0}, ValueError, "ders_rank must be from 1 to 32.*got 0"),
        ("low_rank", {"ders_rank": 4.0}, TypeError, "ders_rank must be an integer, got 4.0"),
        ("low_rank", {"ders_rank": True}, TypeError, "ders_rank must be an integer, got True"),
        ("low_rank", {"ders_rank": {"gate": 4, "up": 4}}, ValueError, "have the keys 'gate', 'up' and 'down'"),
        (
            "low_rank",
            {"ders_rank": {"gate": 4, "up": 4, "down": 40}},
            ValueError,
            r"ders_rank\['down'\] must be from 1",
        ),
        ("low_rank", {"ders_rank": [4]}, ValueError, "ders_rank lists 1 entries for num_hidden_layers=2"),
        ("low_rank", {"ders_rank": [4, 99]}, ValueError, "ders_rank must be from 1 to 32.*got 99"),
        ("low_rank", {"ders_drop_rate": 0.5}, ValueError, "ders_drop_rate=0.5 belongs to another form.*'sparse'"),
        ("low_rank", {"ders_bits": 4}, ValueError, "ders_bits=4 belongs to another form than ders_delta='low_rank'"),
        ("sparse", {"ders_rank": 4}, ValueError, "ders_rank=4 belongs to another form.*ders_delta='low_rank'"),
        ("sparse", {"ders_drop_rate": 1}, ValueError, "ders_drop_rate must lie strictly between 0 and 1.*got 1"),
        ("sparse", {"ders_drop_rate": 0.0}, ValueError, "ders_drop_rate must lie strictly between 0 and 1.*got 0.0"),
        ("sparse", {"ders_drop_rate": 0.9999}, ValueError, "keeps none of a matrix's 1536 entries"),
        ("sparse", {"ders_drop_rate": "0.5"}, TypeError, "ders_drop_rate must be a number, got '0.5'"),
        ("sparse", {"ders_stored_positions": True, "ders_hold_positions": True}, ValueError, "are stored anyway"),
        ("quantized", {"ders_bits": 3}, ValueError, "ders_bits must be one of 16, 8, 4, 2, 1, got 3"),
        ("quantized", {"ders_group_size": 0}, ValueError, "ders_group_size must be at least 1"),
        ("low_rank", {"ders_seed": -1}, ValueError, "ders_seed must be at least 0"),
        ("low_rank", {"ders_seed": 1.5}, TypeError, "ders_seed must be an integer, got 1.5"),
        ("low_rank", {"ders_bias": 1}, TypeError, "ders_bias must be True or False, got 1"),
        ("low_rank", {"ders_forward": "slow"}, ValueError, "ders_forward must be one of 'fused', 'materialised'"),
        (
            "low_rank",
            {"ders_universal_gate": "x"},
            ValueError,
            "ders_universal_gate must be one of 'complement', 'add'",
        ),
        ("low_rank", {"ders_share_universal": True}, ValueError, "write moe_shared_expert_intermediate_size=48"),
        ("universal", {"moe_shared_expert_intermediate_size": 40}, ValueError, "=40 must be their width; write .*=48"),
        ("universal", {"norm_topk_prob": False}, ValueError, "write norm_topk_prob=True, or ders_universal_gate='add'"),
        ("universal", {"moe_shared_expert_intermediate_size": -1}, ValueError, "must be 0 .none. or a width, got -1"),
        (
            "some_layers",
            {"ders_rank": [4, 4, None, 4, None]},
            ValueError,
            r"ders_rank\[0\]=4, but layer 0 has .*'dense'",
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_values_are_refused(family, block, settings, error, rule):
    with pytest.raises(error, match=rule):
        make_config(family, block, **settings)


@pytest.fixture
def warned(caplog):
    from transformers.utils import logging

    logging.get_logger("hf_moe_ext").propagate = True  # Transformers' own handler does not reach pytest
    return caplog


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ders_rank": 2, "ders_seed": 3}, "ders_rank, ders_seed: no effect, because no layer has moe_block='ders'"),
        ({"moe_block": "ders", "ders_seed": 3}, "ders_seed: no effect with ders_delta='low_rank'"),
        ({"moe_block": "ders", "ders_group_size": 64}, "ders_group_size: no effect"),
        ({"moe_block": "ders", "ders_universal_gate": "add"}, "ders_universal_gate: no effect"),
        (
            {"moe_block": "ders", "moe_latent_size": 8},
            "moe_latent_size: no effect, because no layer has moe_block='dcca'",
        ),
        (
            {"moe_block": "ders", "num_experts_per_tok": 1, "norm_topk_prob": True},
            "every gate is 1 whatever the router says",
        ),
    ],
)
def test_what_has_no_effect_is_named(settings, sentence, warned):
    make_config("mixtral_ext", "standard", **settings)
    assert sentence in warned.text


def test_what_has_an_effect_is_not(warned):
    for block in DERS_BLOCKS:
        make_config("mixtral_ext", block)
    make_config("mixtral_ext", "low_rank", num_experts_per_tok=1, norm_topk_prob=False)
    make_config("mixtral_ext", "universal", num_experts_per_tok=1)  # s_1 carries the router's gradient
    make_config("mixtral_ext", "standard", moe_block="dense", ders_bias=True)
    assert warned.text == ""


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        # Break-even rank (N - 1) / N d d_h / (d + d_h) = 7/8 * 32 * 48 / 80 = 16.8; 18 r take 18 * 80 / 1536 + 1/8.
        ({"ders_rank": 18}, "ders_rank=18 saves nothing: a base and 8 deltas take 1.06 times .* ders_rank below 16.8"),
        # specs 3.6: 1/8 with a seed, 0.7083 with int32 positions.
        ({"ders_delta": "sparse", "ders_drop_rate": 0.1}, "ders_drop_rate=0.1 saves .* 1.02 times .* above 0.125"),
        (
            {"ders_delta": "sparse", "ders_drop_rate": 0.7, "ders_stored_positions": True},
            "ders_drop_rate=0.7 saves nothing.* 1.03 times .* above 0.7083",
        ),
        ({"ders_delta": "quantized", "ders_bits": 16}, "ders_bits=16 saves .* 1.12 times .* below 14"),
        ({"num_local_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}, "a base and 1 deltas take 1.21"),
    ],
)
def test_a_rate_that_saves_nothing_is_named_with_the_break_even(settings, sentence, warned):
    import re

    make_config("mixtral_ext", "low_rank", **settings)
    assert re.search(sentence, warned.text), warned.text


@pytest.mark.parametrize(
    "settings",
    [
        {"ders_rank": 16},
        {"ders_delta": "sparse", "ders_drop_rate": 0.13},
        {"ders_delta": "sparse", "ders_drop_rate": 0.71, "ders_stored_positions": True},
        {"ders_delta": "quantized", "ders_bits": 8},
        {"ders_share_universal": True, "moe_shared_expert_intermediate_size": 48, "ders_rank": 17},  # 9 members: 17.07
    ],
)
def test_a_rate_below_the_break_even_is_not(settings, warned):
    make_config("mixtral_ext", "low_rank", **settings)
    assert "saves nothing" not in warned.text


def test_overrides_while_loading(tmp_path):
    make_config("mixtral_ext", "standard").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, moe_block="ders", ders_delta="sparse")
    assert isinstance(config, MixtralExtConfig)
    assert config.ders_drop_rate == 0.9


def test_plans_leave_shared_base_experts_whole():
    config = make_config("mixtral_ext", "low_rank")
    assert config.base_model_ep_plan == {}
    assert not any(".experts" in name for name in config.base_model_tp_plan)
    assert config.base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"
    mixed = make_config("olmoe_ext", "some_layers").base_model_tp_plan
    assert not any(".experts" in name for name in mixed)
    assert mixed["layers.*.mlp.down_proj"] == "rowwise"
