"""The multipliers: against GraniteMoe, which has all but the router's in its own code; and what users do with a model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from support.latent_models import BLOCKS, FAMILIES, make_model

IDS = torch.arange(3, 25).reshape(2, 11)
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.35,
    "logits_scaling": 3.0,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_the_same_numbers_as_granitemoe():
    ours = make_model("mixtral_ext", "standard", **MULTIPLIERS)
    sizes = {
        key: getattr(ours.config, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")
    }
    layout = {
        key: getattr(ours.config, key) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    }
    experts = {"num_local_experts": 8, "num_experts_per_tok": 3, "rope_parameters": ours.config.rope_parameters}
    theirs = GraniteMoeForCausalLM(GraniteMoeConfig(**sizes, **layout, **experts, **MULTIPLIERS, pad_token_id=0)).eval()
    names = {"mlp.gate": "block_sparse_moe.router", "mlp.experts": "block_sparse_moe.experts"}
    weights = {}
    for name, tensor in ours.state_dict().items():
        for mine, granite in names.items():
            name = name.replace(mine, granite)
        weights[name] = tensor
    theirs.load_state_dict(weights)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-6)
    assert (ours(IDS).logits - make_model("mixtral_ext", "standard")(IDS).logits).abs().max() > 0.1


@every_family
@pytest.mark.parametrize("block", BLOCKS)
def test_the_router_sees_its_input_divided_and_all_its_losses_do(family, block):
    model = make_model(family, block, router_logits_scaling=4.0)
    folded = make_model(family, block)
    for layer in folded.model.layers:
        layer.mlp.gate.weight.data /= 4
    ours, theirs = (m(IDS, labels=IDS, output_router_logits=True) for m in (model, folded))
    for mine, other in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.aux_loss, theirs.aux_loss)


@every_family
def test_multipliers_of_one_leave_nothing_behind(family):
    model = make_model(family, "full")
    for module in (model.lm_head, model.model.embed_tokens, *model.model.layers):
        for part in (module, getattr(module, "mlp", module), getattr(module, "self_attn", module)):
            assert not part._forward_hooks
            assert not part._forward_pre_hooks
    assert not hasattr(model.model.embed_tokens, "embed_scale")


@every_family
def test_what_users_do(family, tmp_path):
    model = make_model(family, "mixed", **MULTIPLIERS, router_logits_scaling=2.0)
    logits = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, logits)
    torch.testing.assert_close(torch.compile(again, backend="aot_eager")(IDS).logits, logits, rtol=0, atol=1e-6)
    greedy = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, use_cache=True, **greedy), model.generate(IDS, use_cache=False, **greedy))
    model.train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-6)
    model.resize_token_embeddings(100, mean_resizing=False)
    torch.testing.assert_close(model.eval()(IDS).logits[..., : logits.shape[-1]], logits, rtol=0, atol=1e-6)


@every_family
def test_embeddings_handed_in_are_taken_as_they_are(family):
    model = make_model(family, "standard", **MULTIPLIERS)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, model(IDS).logits)


def test_lora_on_the_embedding_is_multiplied_too():
    model = make_model("mixtral_ext", "standard", embedding_multiplier=4.0)
    tuned = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False)
    )
    before = tuned(IDS).logits
    torch.testing.assert_close(tuned.merge_and_unload()(IDS).logits, before, rtol=0, atol=1e-5)
    assert (before - model(IDS).logits).abs().max() > 1e-3


@every_family
@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_an_adapted_head_is_divided_once_and_merges(family, settings):
    model = make_model(family, "standard", logits_scaling=4.0)
    stock = model(IDS).logits
    tuned = get_peft_model(model, LoraConfig(r=2, **settings))
    assert torch.equal(tuned(IDS).logits, stock)  # a no-op at birth
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    before = tuned(IDS).logits
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=0, atol=1e-5)
    assert (before - stock).abs().max() > 1e-2
    merged.lm_head.weight.data *= 4  # and once only
    divided, merged.config.logits_scaling = merged(IDS).logits, None
    for module in merged.lm_head.modules():
        module._forward_pre_hooks.clear()
    torch.testing.assert_close(merged(IDS).logits, divided * 4, rtol=1e-5, atol=1e-5)


def test_a_router_tuned_in_either_form_learns_the_same():
    """Its difference is divided as the router is, so in the multiplier form it has the router's rate."""
    from hf_moe_ext import PerftConfig
    from hf_moe_ext.mup import param_groups

    found = {}
    for form in ("multiplier", "folded"):
        model = make_model("mixtral_ext", "standard", mup="mup", mup_form=form, mup_base_hidden_size=8)
        before = model(IDS, output_router_logits=True).router_logits[0].detach()
        tuned = get_peft_model(model, PerftConfig(variant="S", base_router="train", base_router_drift_coef=0.5))
        for name, parameter in tuned.named_parameters():
            parameter.requires_grad_("perft_base_router" in name)
        optimizer = torch.optim.AdamW(param_groups(tuned, 0.01, eps=1e-12), lr=0.01)
        tuned.train()
        for _ in range(3):
            tuned(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[form] = tuned.eval()(IDS, output_router_logits=True).router_logits[0].detach() - before
    torch.testing.assert_close(found["multiplier"], found["folded"], rtol=0, atol=1e-5)
    assert found["folded"].abs().max() > 0.05
