"""The parametrisation keys: what they become in config.json, what is refused, what has no effect."""

import json

import pytest
from transformers import AutoConfig

from hf_moe_ext.mup.settings import BASE_SIZES, MULTIPLIERS
from support.latent_models import FAMILIES, make_config

MUP = {"mup": "mup", "mup_base_hidden_size": 8}
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_open_values_become_numbers_in_config_json(family, tmp_path):
    make_config(family, "full", **MUP).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    head_dim = 12 if family == "qwen3_moe_ext" else 8
    expected = {
        "mup_base_hidden_size": 8,
        "mup_base_intermediate_size": 12,  # 48 * 8 / 32
        "mup_base_head_dim": head_dim,
        "mup_base_latent_size": 4,
        "embedding_multiplier": 1.0,
        "attention_multiplier": head_dim**-0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 4.0,
        "router_logits_scaling": 4.0,
    }
    assert {name: written[name] for name in (*BASE_SIZES, *MULTIPLIERS)} == expected
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == make_config(family, "full", **MUP).to_diff_dict()


@pytest.mark.parametrize(
    ("settings", "logits", "router"),
    [
        ({"mup": "mup"}, 4.0, 4.0),
        ({"mup": "simplep"}, 4.0, 1.0),
        ({"mup": "mup", "mup_form": "folded"}, 1.0, 1.0),
        ({"mup": "simplep", "mup_form": "folded"}, 1.0, 1.0),
        ({"mup": "mup", "logits_scaling": 40.0}, 40.0, 4.0),  # written numbers are taken as they are
        ({"mup": "mup", "router_logits_scaling": 2.0}, 4.0, 2.0),
    ],
)
def test_scalings_of_the_logits(settings, logits, router):
    config = make_config("mixtral_ext", "standard", mup_base_hidden_size=8, **settings)
    assert (config.logits_scaling, config.router_logits_scaling) == (logits, router)


def test_attention_shrinks_with_the_head_dimension():
    settings = {"head_dim": 16, "mup_base_head_dim": 4}
    config = make_config("mixtral_ext", "standard", **MUP, **settings)
    assert config.attention_multiplier == 4**0.5 / 16
    wrong = {"attention_multiplier": 16**-0.5}
    with pytest.raises(ValueError, match=r"must shrink as 1/head_dim when it changes .here from 4 to 16.*write 0.125"):
        make_config("mixtral_ext", "standard", **MUP, **settings, **wrong)


def test_nothing_is_filled_in_without_mup():
    config = make_config("olmoe_ext", "full")
    assert [getattr(config, name) for name in BASE_SIZES] == [None] * 4
    assert [getattr(config, name) for name in MULTIPLIERS] == [1.0, None, 1.0, None, None]


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        ({"mup": "mu"}, ValueError, "mup must be one of 'none', 'simplep', 'mup', got 'mu'"),
        ({**MUP, "mup_form": "A"}, ValueError, "mup_form must be one of 'multiplier', 'folded', got 'A'"),
        ({"mup": "mup"}, ValueError, "mup='mup' needs mup_base_hidden_size.*write mup_base_hidden_size=32"),
        (
            {"mup": "mup", "mup_base_hidden_size": 0},
            ValueError,
            "mup_base_hidden_size must be a positive number, got 0",
        ),
        ({"mup": "mup", "mup_base_hidden_size": "8"}, TypeError, "mup_base_hidden_size must be a number, got '8'"),
        ({**MUP, "logits_scaling": -1.0}, ValueError, "logits_scaling must be a positive number, got -1.0"),
        ({**MUP, "embedding_multiplier": None}, TypeError, "embedding_multiplier must be a number, got None"),
        ({"residual_multiplier": True}, TypeError, "residual_multiplier must be a number, got True"),
        ({**MUP, "initializer_range": 0.0}, ValueError, "initializer_range must be above 0.*router of zeros"),
        (
            {**MUP, "mup_form": "folded", "tie_word_embeddings": True},
            ValueError,
            "mup_form='folded'.*tie_word_embeddings=True.*write mup_form='multiplier'",
        ),
    ],
)
@every_family
def test_bad_values_are_refused(family, settings, error, rule):
    with pytest.raises(error, match=rule):
        make_config(family, "standard", **settings)


def test_a_router_whose_weights_are_always_one_is_refused():
    dead = {"num_experts_per_tok": 1}
    with pytest.raises(ValueError, match="it gets no gradient from the loss; write norm_topk_prob=False"):
        make_config("mixtral_ext", "standard", **MUP, **dead)
    with pytest.raises(ValueError, match="it gets no gradient from the loss; write norm_topk_prob=False"):
        make_config("olmoe_ext", "standard", **MUP, **dead, norm_topk_prob=True)
    make_config("olmoe_ext", "standard", **MUP, **dead)  # Switch-like: probabilities as they are
    make_config("mixtral_ext", "standard", **dead)  # stock behaviour is the user's own


def test_base_sizes_without_mup_are_named(caplog):
    from transformers.utils import logging

    logging.get_logger("hf_moe_ext").propagate = True  # Transformers' own handler does not reach pytest
    make_config("olmoe_ext", "standard", mup_base_hidden_size=8, mup_form="folded")
    assert "mup_base_hidden_size, mup_form: no effect, because mup='none'" in caplog.text


def test_numbers_of_another_width_are_named(caplog, tmp_path):
    from transformers.utils import logging

    logging.get_logger("hf_moe_ext").propagate = True
    make_config("mixtral_ext", "standard", mup="mup", mup_base_hidden_size=32, vocab_size=97).save_pretrained(tmp_path)
    assert "taken as written" not in caplog.text
    copied = json.loads((tmp_path / "config.json").read_text()) | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(copied))
    AutoConfig.from_pretrained(tmp_path)
    assert "logits_scaling=1 (here 2), router_logits_scaling=1 (here 2): taken as written" in caplog.text
    assert "attention_multiplier=0.353553 (here 0.176777)" in caplog.text
