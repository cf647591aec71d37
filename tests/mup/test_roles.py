"""Every parameter has a role, by declared axes; checked against the shapes of a second width and the table of the spec."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from hf_moe_ext.host import axes as host_axes
from hf_moe_ext.host.axes import read_axes
from hf_moe_ext.mup import rules
from hf_moe_ext.mup.roles import assign_roles, read_role
from hf_moe_ext.mup.widening import widen
from support import zoo
from support.latent_models import BLOCKS, FAMILIES, make_config, make_model

every_family = pytest.mark.parametrize("family", FAMILIES)
every_block = pytest.mark.parametrize("block", BLOCKS)
GROWING = {
    host_axes.HIDDEN,
    host_axes.ATTENTION,
    host_axes.INTERMEDIATE,
    host_axes.LATENT,
    host_axes.LATENT_INTERMEDIATE,
    host_axes.SHARED_INTERMEDIATE,
}


def outline(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@every_family
@every_block
def test_declared_axes_are_those_that_grow_in_a_wider_model(family, block):
    config = make_config(family, block, mup="mup", mup_base_hidden_size=32)
    wide = dict(outline(widen(config, 64)).named_parameters())
    for name, parameter in outline(config).named_parameters():
        axes = read_axes(name, config)
        # [..., fan_out, fan_in]; an embedding is stored the other way round, a row per token.
        declared = [axes.fan_out] if axes.fan_in is None else [axes.fan_out, axes.fan_in]
        if axes.fan_in == host_axes.VOCAB:
            declared.reverse()
        grown = [b > a for a, b in zip(parameter.shape, wide[name].shape, strict=True)]
        assert grown[-len(declared) :] == [axis in GROWING for axis in declared], (name, axes)
        assert not any(grown[: -len(declared)]), (name, axes)  # the experts' own dimension is no width


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "granitemoe", "qwen3_moe"])
def test_stock_models_are_declared_whole(family):
    model = zoo.build(family)
    assert set(assign_roles(model)) == {name for name, _ in model.named_parameters()}
    routers = [name for name, role in assign_roles(model).items() if role.axes.fan_out == host_axes.EXPERTS]
    assert len(routers) == sum(name.endswith(("gate.weight", "router.weight")) for name, _ in model.named_parameters())


def roles_of(block, **settings):
    model = outline(make_config("olmoe_ext", block, **{"mup": "mup", "mup_base_hidden_size": 8} | settings))
    return {name.replace("model.layers.1.", ""): role for name, role in assign_roles(model).items()}


def test_roles_of_a_standard_block():
    roles = roles_of("standard", attention_bias=True)
    assert {name: role.role for name, role in roles.items() if "layers.0" not in name} == {
        "model.embed_tokens.weight": rules.INPUT,
        **{f"self_attn.{p}_proj.weight": rules.HIDDEN for p in "qkvo"},
        **{f"self_attn.{p}_proj.bias": rules.VECTOR for p in "qkvo"},
        **{f"self_attn.{p}_norm.weight": rules.VECTOR for p in "qk"},
        "mlp.gate.weight": rules.OUTPUT_MULTIPLIER,
        "mlp.experts.gate_up_proj": rules.HIDDEN,
        "mlp.experts.down_proj": rules.HIDDEN,
        "input_layernorm.weight": rules.VECTOR,
        "post_attention_layernorm.weight": rules.VECTOR,
        "model.norm.weight": rules.VECTOR,
        "lm_head.weight": rules.OUTPUT_MULTIPLIER,
    }


@pytest.mark.parametrize(
    ("settings", "router", "head"),
    [
        ({"mup_form": "folded"}, rules.OUTPUT, rules.OUTPUT),
        ({"mup": "simplep"}, rules.STANDARD_ROUTER, rules.OUTPUT_MULTIPLIER),
        ({"mup": "simplep", "mup_form": "folded"}, rules.STANDARD_ROUTER, rules.OUTPUT),
        ({"mup": "none", "mup_base_hidden_size": None}, rules.FINITE, rules.FINITE),
    ],
)
def test_forms_and_simplep_differ_in_router_and_head_only(settings, router, head):
    reference, roles = roles_of("full"), roles_of("full", **settings)
    assert roles["mlp.gate.weight"].role == router
    assert roles["lm_head.weight"].role == head
    if settings.get("mup") != "none":
        rest = {name for name in roles if not name.endswith(("mlp.gate.weight", "lm_head.weight"))}
        assert all(roles[name] == reference[name] for name in rest)


def test_roles_of_a_dcca_block_with_a_latent_that_grows_and_one_that_does_not():
    grows, held = roles_of("full"), roles_of("full", mup_base_latent_size=16)
    named = {
        "mlp.descend.weight": (rules.HIDDEN, rules.OUTPUT),
        "mlp.ascend.weight": (rules.HIDDEN, rules.INPUT),
        "mlp.experts.up_proj": (rules.HIDDEN, rules.INPUT),
        "mlp.experts.down_proj": (rules.HIDDEN, rules.OUTPUT),
        "mlp.latent_norm.weight": (rules.VECTOR, rules.FINITE),
        "mlp.shared_expert.up_proj.weight": (rules.HIDDEN, rules.HIDDEN),
        "mlp.shared_expert.down_proj.weight": (rules.HIDDEN, rules.HIDDEN),
        "mlp.gate.weight": (rules.OUTPUT_MULTIPLIER, rules.OUTPUT_MULTIPLIER),
    }
    assert {name: (grows[name].role, held[name].role) for name in named} == named
    # F = 3HI / 2R: four times as wide with a latent that grows, sixteen times with one that does not.
    assert grows["mlp.experts.down_proj"].fan_in == 4
    assert held["mlp.experts.down_proj"].fan_in == 16


def test_factors_are_those_of_the_table():
    """Specs of arXiv 2508.09752 after arXiv 2203.03466, tables 3 and 8, at m = 4 and m_H = 8."""
    model = outline(
        make_config("mixtral_ext", "standard", mup="mup", mup_base_hidden_size=8, mup_base_intermediate_size=6)
    )
    folded = outline(
        make_config(
            "mixtral_ext",
            "standard",
            mup="mup",
            mup_base_hidden_size=8,
            mup_base_intermediate_size=6,
            mup_form="folded",
        )
    )
    m, m_h = 4.0, 8.0
    # init std, Adam: lr, eps; SGD: lr
    common = {
        "model.embed_tokens.weight": (1, 1, 1 / m, m),
        "model.norm.weight": (1, 1, 1 / m, m),
        "model.layers.0.input_layernorm.weight": (1, 1, 1 / m, m),
        **{f"model.layers.0.self_attn.{p}_proj.weight": (m**-0.5, 1 / m, 1 / m, 1) for p in "qkvo"},
        "model.layers.0.mlp.experts.gate_up_proj": (m**-0.5, 1 / m, 1 / m_h, m_h / m),
        "model.layers.0.mlp.experts.down_proj": (m_h**-0.5, 1 / m_h, 1 / m, m / m_h),
    }
    forms = {
        "multiplier": {"model.layers.0.mlp.gate.weight": (1, 1, 1 / m, m), "lm_head.weight": (1, 1, 1 / m, m)},
        "folded": {
            "model.layers.0.mlp.gate.weight": (1 / m, 1 / m, 1, 1 / m),
            "lm_head.weight": (1 / m, 1 / m, 1, 1 / m),
        },
    }
    for found, form in ((model, "multiplier"), (folded, "folded")):
        roles = assign_roles(found)
        for name, (init, lr, eps, sgd) in (common | forms[form]).items():
            role = roles[name]
            assert role.init_factor == init, name
            assert role.update_factors("adam") == (lr, 1 / lr, eps), name
            assert role.update_factors("sgd")[:2] == (sgd, 1 / sgd), name


@pytest.mark.parametrize("role", rules.RULES)
@pytest.mark.parametrize("optimiser", rules.OPTIMISERS)
def test_independent_weight_decay_takes_the_same_share_at_every_width(role, optimiser):
    update = rules.RULES[role].updates[optimiser]
    for widths in ((2.0, 3.0), (4.0, 1.0), (1.0, 8.0)):
        assert update.lr.at(*widths) * update.weight_decay.at(*widths) == pytest.approx(1.0, rel=1e-12)
    assert rules.RULES[role].source


def test_an_undeclared_parameter_is_named():
    model = make_model("mixtral_ext", "standard", mup="mup", mup_base_hidden_size=8)
    model.model.layers[1].mlp.extra = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.extra' of a 'mixtral_ext' model has no declared axes"):
        assign_roles(model)
    model.model.layers[1].mlp.extra.requires_grad_(False)
    assert len(assign_roles(model)) == len(list(model.parameters())) - 1


def test_adapters_follow_their_axes():
    base = make_model("olmoe_ext", "mixed", mup="mup", mup_base_hidden_size=8)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "descend", "lm_head", "embed_tokens"]))
    found = {name: role.role for name, role in assign_roles(lora).items()}
    for name, role in found.items():
        if "embed_tokens" in name:  # from the vocabulary to the rank, and from the rank to the width
            assert role == (rules.INPUT if "embedding_B" in name else rules.FINITE)
        elif "lora_A" in name:
            assert role == (rules.OUTPUT_MULTIPLIER if "lm_head" in name else rules.OUTPUT), name
        else:
            assert role == (rules.FINITE if "lm_head" in name else rules.INPUT), name
    assert len(found) == 2 * (2 + 1 + 1 + 1)
    base = make_model("olmoe_ext", "mixed", mup="mup", mup_base_hidden_size=8)
    perft = get_peft_model(base, PerftConfig(variant="R", r=4, num_experts=4, base_router="train"))
    by_part = {}
    for name, role in assign_roles(perft).items():
        by_part.setdefault(name.split(".")[-2], set()).add((role.role, role.fan_in, role.fan_out))
    assert by_part == {
        "perft_A": {(rules.OUTPUT, 4, 1)},
        "perft_B": {(rules.INPUT, 1, 4)},
        "perft_router": {(rules.OUTPUT, 4, 1)},
        "perft_base_router": {(rules.OUTPUT_MULTIPLIER, 4, 1)},  # it is divided as the router is
    }


def test_lora_on_experts_is_refused_by_name():
    base = make_model("mixtral_ext", "standard", mup="mup", mup_base_hidden_size=8)
    tuned = get_peft_model(base, LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    with pytest.raises(ValueError, match=r"LoRA on stacked experts .target_parameters. does not say.*PERFT"):
        assign_roles(tuned)


def test_names_of_wrapped_models():
    config = make_config("olmoe_ext", "standard", mup="mup", mup_base_hidden_size=8)
    bare = "model.layers.0.mlp.experts.down_proj"
    for wrapped in (
        f"module.{bare}",
        f"_orig_mod.{bare}",
        f"module._orig_mod.base_model.model.{bare}",
        "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.experts.base_layer.down_proj",
        "base_model.model.model.layers.0.mlp.experts.modules_to_save.default.down_proj",
    ):
        assert read_role(wrapped, config) == read_role(bare, config)
