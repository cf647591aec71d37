"""`hf_moe_ext.host.families`: the rule table against the routers that Transformers really runs."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cohere2MoeConfig,
    DbrxConfig,
)

from hf_moe_ext import PerftConfig
from hf_moe_ext.host.blocks import iterate_experts
from hf_moe_ext.host.families import BY_KEY, FAMILIES, active_experts, loss_shifts_labels, normalizes_top_k
from support import zoo

KEYED = [name for name, config in zoo.FAMILIES.items() if hasattr(config(), BY_KEY)]
SETTINGS = [(name, {}) for name in zoo.FAMILIES] + [
    (name, {BY_KEY: value}) for name in KEYED for value in (True, False)
]


def _id(value):
    return ",".join(f"{key}={item}" for key, item in value.items()) or "default" if isinstance(value, dict) else value


def arriving_weights(model: nn.Module) -> list[tuple[nn.Module, torch.Tensor]]:
    """(experts, weights [tokens, top_k]) as each block of the model hands them over in one forward pass."""
    seen = []

    def record(module, args, kwargs):
        seen.append((module, [*args, *kwargs.values()][2]))

    handles = [s.experts.register_forward_pre_hook(record, with_kwargs=True) for s in iterate_experts(model)]
    model(**zoo.random_batch(vocab=model.config.vocab_size))
    for handle in handles:
        handle.remove()
    assert seen
    return seen


def sums_are_one(weights: torch.Tensor, scaling: float) -> bool:
    """Whether all tokens' weights sum to `scaling`; a router between the two answers fails here."""
    distance = (weights.double().sum(dim=-1) / scaling - 1).abs().max().item()
    # Float32 sums of up to 8 numbers below 1 are good to 1e-6; a router that does not divide misses by percents.
    assert distance < 1e-5 or distance > 1e-2
    return distance < 1e-5


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=_id)
def test_rule_says_what_the_base_router_does(family, settings):
    model = zoo.build(family, **settings)
    scaling = getattr(model.config, "routed_scaling_factor", 1.0)
    for experts, weights in arriving_weights(model):
        assert normalizes_top_k(experts, model.config) == sums_are_one(weights, scaling)


def test_both_answers_and_the_key_occur():
    """Otherwise the test above could pass on a table that always says the same."""
    assert set(KEYED) >= {"olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe", "nemotron_h"}
    answers = {name: normalizes_top_k(next(iterate_experts(zoo.build(name))).experts) for name in zoo.FAMILIES}
    assert {name for name, answer in answers.items() if not answer} == {
        *("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "phimoe")
    }


@pytest.mark.parametrize("p", [1.0, 2.0, None])
def test_dbrx_divides_by_a_p_norm(p):
    """DBRX keeps no configuration in its experts and divides by the p-norm its configuration names."""
    config = DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=1,
        vocab_size=96,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": p,
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for experts, weights in arriving_weights(model):
        assert normalizes_top_k(experts, model.config) == sums_are_one(weights, 1.0) == (p == 1.0)


@pytest.mark.parametrize(("selection", "key"), [("softmax", False), ("sigmoid", True), ("sigmoid", False)])
def test_cohere2_moe_has_two_routers(selection, key):
    config = Cohere2MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        expert_selection_fn=selection,
        norm_topk_prob=key,
        initializer_range=0.15,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for experts, weights in arriving_weights(model):
        assert normalizes_top_k(experts, model.config) == sums_are_one(weights, 1.0) == (selection == "softmax" or key)


def test_every_model_type_of_the_table_exists():
    """A row that Transformers does not know is a typing error: it would never be read."""
    assert sorted(set(FAMILIES) - set(CONFIG_MAPPING)) == []


@pytest.mark.parametrize("model_type", sorted(name for name, rule in FAMILIES.items() if rule == BY_KEY))
def test_rows_that_follow_the_key_have_it(model_type):
    """Without the key in its configuration class such a family would be refused on attaching R."""
    assert isinstance(CONFIG_MAPPING[model_type]().norm_topk_prob, bool)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_active_experts_is_the_width_of_the_index(family):
    for experts, weights in arriving_weights(zoo.build(family)):
        assert active_experts(experts) == weights.shape[1]


def rename(model: nn.Module) -> nn.Module:
    """Make a model one of a family that the table does not know."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.model_type = "brand_new_moe"
    return model


@pytest.mark.parametrize("value", [True, False])
def test_unknown_family_follows_its_own_key(value):
    model = rename(zoo.build("olmoe", norm_topk_prob=value))
    assert normalizes_top_k(next(iterate_experts(model)).experts) is value


def test_unknown_family_without_the_key_says_what_to_write():
    model = rename(zoo.build("mixtral"))
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="write normalize_top_k=True or False") as error:
        get_peft_model(model, PerftConfig(variant="R"))
    assert "MixtralExperts (model_type 'brand_new_moe')" in str(error.value)
    assert dict(model.named_modules()) == modules, "refused, but the model was changed"


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "R", "normalize_top_k": True},
        {"variant": "R", "normalize_top_k": False},
        {"variant": "R", "top_k": 1},
        {"variant": "E"},
        {"variant": "D"},
        {"variant": "S"},
    ],
    ids=str,
)
def test_unknown_family_is_served_where_no_rule_is_needed(settings):
    model = rename(zoo.build("mixtral"))
    get_peft_model(model, PerftConfig(**settings))
    layer = model.get_submodule("model.layers.0.mlp.experts")
    assert layer.settings["default"].normalize is settings.get("normalize_top_k", False)


def test_labels_are_shifted_by_causal_models_only():
    assert loss_shifts_labels(zoo.build("mixtral"))
    classifier = AutoModelForSequenceClassification.from_config(zoo.FAMILIES["mixtral"]())
    assert not loss_shifts_labels(classifier)
    assert not loss_shifts_labels(nn.Linear(2, 2))
