"""Every meaningless configuration is refused when it is built, with what to write instead."""

import json
import pickle
import warnings

import pytest
from peft import LoraConfig, PeftConfig, get_peft_config

from hf_moe_ext import PerftConfig


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "X"}, "variant must be one of R, E, D, S; got 'X'"),
        ({"adapter": "houlsby"}, "adapter must be one of lora, parallel; got 'houlsby'"),
        ({"num_experts": 2, "top_k": 3}, "top_k must be between 1 and num_experts=2; got 3. Lower top_k or raise"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1; got 0"),
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1; got 0"),
        ({"normalize_top_k": True, "top_k": 1}, "leave it out .None. or write False"),
        ({"r": 0}, "r must be a whole number of at least 1; got 0"),
        ({"r": 2.5}, "r must be a whole number of at least 1; got 2.5"),
        ({"rank_pattern": {"x": 0}}, r"rank_pattern\['x'\] must be a whole number of at least 1; got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a probability in \[0, 1\); got 1.0"),
        ({"top_k": 1.5}, "top_k must be a whole number of at least 1; got 1.5"),
        ({"num_experts": True}, "num_experts must be a whole number of at least 1; got True"),
        ({"num_experts": "4"}, "num_experts must be a whole number of at least 1; got '4'"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a number of at least 0; got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be positive; got inf"),
        ({"alpha_pattern": {"x": -1}}, r"alpha_pattern\['x'\] must be positive; got -1"),
        ({"normalize_top_k": "false"}, "normalize_top_k must be None, True or False; got 'false'"),
        ({"lora_alpha": 0}, "lora_alpha must be positive; got 0"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef must be a number of at least 0; got -1"),
        ({"init_weights": "gaussian"}, "init_weights must be True, False or 'paper'; got 'gaussian'"),
        ({"bias": "perft_only"}, "bias must be one of none, all; got 'perft_only'"),
        ({"layers_pattern": "layers"}, "layers_pattern names the list for layers_to_transform; set that too"),
        ({"layers_to_transform": [0], "target_modules": ".*experts"}, "a regular expression .* can name the layers"),
        ({"variant": "E", "num_experts": 4}, "variant='E' has one adapter per base expert"),
        ({"variant": "S", "num_experts": 4}, "variant='S' has a single adapter; for several use 'D'"),
        ({"variant": "D", "num_experts": 0}, "num_experts must be a whole number of at least 1; got 0"),
        ({"variant": "D", "top_k": 2}, "top_k belongs to the router of variant='R'; variant='D' has none"),
        ({"variant": "E", "normalize_top_k": False}, "normalize_top_k belongs to the router"),
        ({"variant": "S", "router_aux_loss_coef": 0.1}, "router_aux_loss_coef belongs to the router"),
        ({"variant": "D", "router_z_loss_coef": 0.1}, "router_z_loss_coef belongs to the router"),
    ],
)
def test_meaningless_values_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        PerftConfig(**arguments)


def test_defaults_are_those_of_the_variant():
    config = PerftConfig()
    assert (config.variant, config.adapter, config.r, config.lora_alpha) == ("R", "lora", 16, 32)
    assert (config.num_experts, config.top_k, config.normalize_top_k) == (4, 2, None)
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (0.01, 0.0)
    assert PerftConfig(variant="D").num_experts == 4
    for variant in ("E", "S"):
        assert PerftConfig(variant=variant).num_experts is None


def test_settings_without_effect_warn():
    with pytest.warns(UserWarning, match="equals variant='S'"):
        config = PerftConfig(num_experts=1)
    assert config.top_k == 1
    with pytest.warns(UserWarning, match="lora_alpha has no effect on adapter='parallel'"):
        PerftConfig(adapter="parallel", lora_alpha=8)


@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
def test_a_configuration_survives_the_disk(variant, tmp_path):
    config = PerftConfig(variant=variant, r=3, target_modules=["experts"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PERFT"
    for reader in (PeftConfig, PerftConfig):
        assert reader.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert get_peft_config(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_newer_writer_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"written by hf_moe_ext 999.0.0, newer than the installed"):
        PerftConfig(hf_moe_ext_version="999.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PerftConfig(hf_moe_ext_version="0.0.1")


def test_an_unknown_setting_on_disk_names_the_package_to_upgrade(tmp_path):
    PerftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_setting": 1}))
    with pytest.warns(UserWarning, match=r"\['new_setting'\] .* are ignored.* pip install -U hf_moe_ext"):
        assert PerftConfig.from_pretrained(tmp_path).r == 16


def test_a_file_of_another_method_keeps_its_settings(tmp_path, recwarn):
    LoraConfig(r=3, use_rslora=True).save_pretrained(tmp_path)
    config = PerftConfig.from_pretrained(tmp_path)  # PEFT builds what the file says, whichever class is asked
    assert type(config) is LoraConfig
    assert config.use_rslora
    assert not recwarn.list


def test_a_file_that_is_no_adapter_configuration_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match="missing required keys"):
        PerftConfig.from_pretrained(tmp_path)
