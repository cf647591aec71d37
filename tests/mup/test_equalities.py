"""What has to be equal: every mode at the base width, form A and form B, and the scale of the weights over widths."""

import pytest
import torch

from hf_moe_ext.mup import param_groups, rules
from hf_moe_ext.mup.roles import assign_roles
from hf_moe_ext.mup.widening import widen
from support.latent_models import BLOCKS, FAMILIES, make_config, make_model

IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_block = pytest.mark.parametrize("block", BLOCKS)


def normalized(family, ratio=1, **settings):
    """µP's keys at a width ratio; OLMoE with weights that sum to 1, so that more than one of them matters."""
    keys = {"mup": "mup", "mup_base_hidden_size": 32 // ratio, **settings}
    return keys | ({"norm_topk_prob": True} if family == "olmoe_ext" else {})


def loss_curve(model, groups, steps=10, clip=None):
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS, output_router_logits=True).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(family, block, ratio=1, clip=None, change=None, **settings):
    model = make_model(family, block, seed=3, **normalized(family, ratio, **settings))
    groups = param_groups(model, 0.01, 0.1, 1e-6)
    for group in groups if change else ():
        group |= change
    return loss_curve(model, groups, clip=clip), model


@every_family
@every_block
def test_at_the_base_width_every_mode_is_the_stock_model(family, block):
    stock = make_model(family, block, seed=3, **({"norm_topk_prob": True} if family == "olmoe_ext" else {}))
    named = dict(stock.named_parameters())
    decayed = [p for name, p in named.items() if p.ndim > 1]
    rest = [p for name, p in named.items() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    expected = loss_curve(stock, [{**group, "lr": 0.01, "eps": 1e-6} for group in groups])
    for mode in ("mup", "simplep"):
        for form in ("multiplier", "folded"):
            curve, _ = train(family, block, mup=mode, mup_form=form)
            assert curve == expected, (mode, form)


@every_family
@every_block
@pytest.mark.parametrize("ratio", [2, 4])
def test_form_a_is_form_b(family, block, ratio):
    curve, model = train(family, block, ratio)
    folded_curve, folded = train(family, block, ratio, mup_form="folded")
    assert curve == folded_curve
    assert curve[-1] < curve[0] - 0.1
    scaled = ("gate.weight", "lm_head.weight")
    for name, parameter in model.named_parameters():
        factor = ratio if name.endswith(scaled) else 1
        assert torch.equal(parameter, folded.get_parameter(name) * factor), name


@every_family
def test_form_a_is_form_b_within_rounding_for_other_ratios(family):
    settings = {"mup_base_hidden_size": 32 / 3}
    curve, folded = (train(family, "full", mup_form=form, **settings)[0] for form in ("multiplier", "folded"))
    assert curve == pytest.approx(folded, abs=5e-6)


@pytest.mark.parametrize("column", ["eps", "weight_decay"])
def test_without_epsilons_or_decays_of_their_own_the_forms_differ(column):
    change = {column: {"eps": 1e-6, "weight_decay": 0.1}[column]}
    curve, folded = (
        train("mixtral_ext", "standard", 4, change=change, mup_form=form)[0] for form in ("multiplier", "folded")
    )
    assert max(abs(a - b) for a, b in zip(curve, folded, strict=True)) > 1e-6


def test_a_common_clipping_norm_makes_the_forms_differ():
    curve, folded = (
        train("mixtral_ext", "standard", 4, clip=0.1, mup_form=form)[0] for form in ("multiplier", "folded")
    )
    assert max(abs(a - b) for a, b in zip(curve, folded, strict=True)) > 1e-3


# --- scale at birth --------------------------------------------------------------------------------------------------


def stds(config):
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    return {name: p.detach().std().item() for name, p in model.named_parameters() if p.ndim > 1}, assign_roles(model)


@every_family
@pytest.mark.parametrize("block", ["standard", "full"])
@pytest.mark.parametrize("form", ["multiplier", "folded"])
@pytest.mark.parametrize("hold_latent", [False, True])
def test_initial_scales_over_widths(family, block, form, hold_latent):
    base = make_config(family, block, mup="mup", mup_base_hidden_size=32, mup_form=form, vocab_size=512)
    at_base, _ = stds(base)
    found, roles = stds(widen(base, 256, hold_latent=hold_latent))
    for name, std in found.items():
        role = roles[name]
        power = {rules.HIDDEN: -0.5, rules.OUTPUT: -1.0}.get(role.role, 0.0)
        count = found[name] and 8 * 32  # the smallest matrix, a router at the base
        assert std / at_base[name] == pytest.approx(role.fan_in**power, rel=4 / (2 * count) ** 0.5), (name, role)
    assert found["model.layers.0.mlp.gate.weight"] > 0


def test_experts_wider_on_their_own_are_keyed_on_their_own_width():
    base = make_config("mixtral_ext", "standard", mup="mup", mup_base_hidden_size=32)
    wide = make_config(
        "mixtral_ext",
        "standard",
        mup="mup",
        mup_base_hidden_size=32,
        mup_base_intermediate_size=48,
        intermediate_size=192,
    )
    (at_base, _), (found, roles) = stds(base), stds(wide)
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        expected = 1.0 if name.endswith("gate_up_proj") else 0.5
        assert found[name] / at_base[name] == pytest.approx(expected, rel=0.05)
        assert roles[name].update_factors("adam")[0] == (1.0 if expected == 1.0 else 0.25)


@every_family
@every_block
def test_loading_never_rescales(family, block, tmp_path):
    model = make_model(family, block, mup="mup", mup_base_hidden_size=8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert torch.equal(model(IDS).logits, again(IDS).logits)


@every_family
def test_what_a_checkpoint_lacks_is_drawn_at_the_models_scale(family, tmp_path):
    """A state dict without the head: what is missing is drawn by the same rule, what is there stays."""
    from safetensors.torch import load_file, save_file

    model = make_model(family, "standard", mup="mup", mup_form="folded", mup_base_hidden_size=8)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight.std().item() == pytest.approx(0.15 / 4, rel=0.05)
    assert torch.equal(again.model.layers[0].mlp.gate.weight, model.model.layers[0].mlp.gate.weight)


def test_padding_row_and_biases_start_at_zero():
    model = make_model("olmoe_ext", "standard", mup="mup", mup_base_hidden_size=8, attention_bias=True)
    assert not model.model.embed_tokens.weight[0].any()
    assert model.model.embed_tokens.weight[1].any()
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
