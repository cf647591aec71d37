"""µP of experts that share a base: roles of base and deltas, both forms, the base width, and their scale at birth."""

import pytest
import torch

from hf_moe_ext.mup import muon_groups, param_groups, rules
from hf_moe_ext.mup.roles import assign_roles
from hf_moe_ext.mup.widening import cut_experts, widen
from support.latent_models import DERS_BLOCKS, FAMILIES, make_config, make_model
from support.shared_base import fill_deltas

IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
MUP = {"mup": "mup", "mup_base_hidden_size": 8}


def loss_curve(model, groups, steps=6):
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def roles_of(block, **settings):
    model = make_model("mixtral_ext", block, **MUP, **settings)
    return {n.partition("layers.1.mlp.")[2]: role for n, role in assign_roles(model).items() if "layers.1.mlp." in n}


def test_roles_of_low_rank_deltas():
    roles = roles_of("universal")
    assert {name: role.role for name, role in roles.items()} == {
        "gate.weight": rules.OUTPUT_MULTIPLIER,
        "experts.gate_up_proj": rules.HIDDEN,
        "experts.gate_up_proj_bias": rules.VECTOR,
        "experts.down_proj": rules.HIDDEN,
        "experts.down_proj_bias": rules.VECTOR,
        **{f"experts.delta_{m}_A": rules.OUTPUT for m in ("gate", "up", "down")},
        **{f"experts.delta_{m}_B": rules.INPUT for m in ("gate", "up", "down")},
    }
    # A reads the width and gets 1 / ratio of the rate, B reads the rank and gets the base's.
    assert [roles[f"experts.delta_down_{part}"].update_factors("adam")[0] for part in "AB"] == [0.25, 1.0]


def test_values_of_a_sparse_delta_get_what_the_matrix_gets():
    roles = roles_of("sparse")
    for matrix, base in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
        values, host = roles[f"experts.delta_{matrix}_values"], roles[f"experts.{base}"]
        for rule in ("adam", "sgd"):
            assert values.update_factors(rule) == host.update_factors(rule)
    assert not any("stream" in name for name in roles)


def test_roles_of_dense_layers_and_of_a_universal_ffn():
    roles = roles_of("beside")
    model = make_model("qwen3_moe_ext", "some_layers", ders_bias=True, **MUP)
    dense = {n.partition("layers.0.mlp.")[2]: r for n, r in assign_roles(model).items() if "layers.0.mlp." in n}
    for found, prefix in ((roles, "shared_expert."), (dense, "")):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            assert found[f"{prefix}{matrix}.weight"].role == rules.HIDDEN
            assert found[f"{prefix}{matrix}.weight"].update_factors("adam")[0] == 0.25
            assert found[f"{prefix}{matrix}.bias"].role == rules.VECTOR
    norm = assign_roles(model)["model.layers.0.self_attn.q_norm.weight"]
    assert norm.role == rules.FINITE  # one gain for each place in a head, however many heads


# One form for each family: these train for some steps.
FORM_OF_FAMILY = [
    ("mixtral_ext", "low_rank"),
    ("mixtral_ext", "sparse"),
    ("olmoe_ext", "quantized"),
    ("qwen3_moe_ext", "universal"),
]


@pytest.mark.parametrize(("family", "block"), FORM_OF_FAMILY)
def test_at_the_base_width_every_mode_is_the_model_without(family, block):
    keys = {"norm_topk_prob": True}
    plain = make_model(family, block, seed=3, **keys)
    roles = assign_roles(plain)
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    decayed = [p for name, p in named.items() if roles[name].axes.fan_in is not None]
    rest = [p for name, p in named.items() if roles[name].axes.fan_in is None]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    expected = loss_curve(plain, [{**group, "lr": 0.01, "eps": 1e-6} for group in groups])
    for mode, form in (("mup", "multiplier"), ("simplep", "folded")):
        model = make_model(family, block, seed=3, mup=mode, mup_form=form, mup_base_hidden_size=32, **keys)
        assert loss_curve(model, param_groups(model, 0.01, 0.1, 1e-6)) == expected, (mode, form)


@pytest.mark.parametrize(("family", "block"), FORM_OF_FAMILY)
def test_the_multiplier_form_is_the_folded_form(family, block):
    curves, models = [], []
    for form in ("multiplier", "folded"):
        model = make_model(family, block, seed=3, norm_topk_prob=True, mup_form=form, **MUP)
        curves.append(loss_curve(model, param_groups(model, 0.01, 0.1, 1e-6)))
        models.append(model)
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] - 0.1
    for name, parameter in models[0].named_parameters():
        factor = 4 if name.endswith(("gate.weight", "lm_head.weight")) else 1
        assert torch.equal(parameter, models[1].get_parameter(name) * factor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_at_birth_over_widths(family):
    base = make_config(family, "universal", mup="mup", mup_base_hidden_size=32)
    stds = {}
    for width in (32, 128):
        torch.manual_seed(0)
        from transformers import AutoModelForCausalLM

        experts = AutoModelForCausalLM.from_config(widen(base, width)).model.layers[0].mlp.experts
        stds[width] = {name: float(p.detach().std()) for name, p in experts.named_parameters()}
    for name in ("gate_up_proj", "down_proj"):  # hidden matrices: the square root of the width
        assert stds[128][name] / stds[32][name] == pytest.approx(0.5, rel=0.08)
    # LoRA's law is that root already, at every width.
    for matrix, inputs in (("gate", 32), ("up", 32), ("down", 48)):
        for width, times in ((32, 1), (128, 4)):
            assert stds[width][f"delta_{matrix}_A"] == pytest.approx((3 * inputs * times) ** -0.5, rel=0.08)
            assert stds[width][f"delta_{matrix}_B"] == 0


def test_widths_of_a_qwen_copy():
    config = make_config("qwen3_moe_ext", "universal", mup="mup", mup_base_hidden_size=32)
    wide = widen(config, 64)
    assert (wide.moe_intermediate_size, wide.intermediate_size) == (96, 112)
    assert wide.moe_shared_expert_intermediate_size == 96
    cut = cut_experts(make_config("qwen3_moe_ext", "standard", mup="mup", mup_base_hidden_size=32), 2)
    assert (cut.num_experts, cut.moe_intermediate_size, cut.intermediate_size) == (16, 24, 56)
    assert cut.mup_base_intermediate_size == 48


def test_muon_takes_no_values_for_a_matrix():
    model = make_model("mixtral_ext", "sparse", **MUP)
    groups = muon_groups(model, 0.02, adjust_lr_fn="match_rms_adamw")
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in groups if group["rule"] == "muon" for p in group["params"]}
    assert "model.layers.0.mlp.experts.down_proj" in muon
    assert not any("delta_" in name for name in muon)


@pytest.mark.parametrize("block", DERS_BLOCKS)
def test_loading_never_rescales(block, tmp_path):
    model = fill_deltas(make_model("mixtral_ext", block, **MUP))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(model(IDS).logits, again(IDS).logits)
