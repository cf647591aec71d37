"""The ``*_ext`` models: the stock model by default, and everything users do with one with every block."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    pipeline,
)

from hf_moe_ext import OlmoeExtForCausalLM, PerftConfig
from hf_moe_ext.dcca.block import DccaMoeBlock
from support import trainers
from support.latent_models import BLOCKS, FAMILIES, LatentBlock, assert_same, make_config, make_model, stock_settings

STOCK = {
    "olmoe_ext": (OlmoeConfig, OlmoeForCausalLM),
    "mixtral_ext": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe_ext": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
every_model = pytest.mark.parametrize("family", FAMILIES)
every_block = pytest.mark.parametrize("block", BLOCKS)
IDS = torch.arange(3, 25).reshape(2, 11)


def stock_model(family, seed=0):
    config, model = STOCK[family]
    torch.manual_seed(seed)
    return model(config(**stock_settings(family.removesuffix("_ext")))).eval()


# --- the stock model by default --------------------------------------------------------------------------------------


@every_model
def test_same_names_weights_and_logits_as_the_stock_model(family):
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(make_config(family, "standard")).eval()
    ours_after = torch.rand(1)
    theirs = stock_model(family)
    assert torch.equal(torch.rand(1), ours_after)  # as many random numbers drawn
    assert isinstance(ours, type(theirs))
    assert_same(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    ours_out, theirs_out = (m(IDS, labels=IDS, output_router_logits=True) for m in (ours, theirs))
    assert torch.equal(ours_out.loss, theirs_out.loss)
    assert torch.equal(ours_out.aux_loss, theirs_out.aux_loss)


@every_model
def test_a_stock_checkpoint_loads_and_goes_back(family, tmp_path):
    theirs = stock_model(family)
    theirs.save_pretrained(tmp_path / "stock")
    ours = type(make_model(family, "standard")).from_pretrained(tmp_path / "stock")
    assert ours.config.model_type == family
    assert_same(ours.state_dict(), theirs.state_dict())
    for original_format in (False, True):
        ours.save_pretrained(tmp_path / "ours", save_original_format=original_format)
        back = type(theirs).from_pretrained(tmp_path / "ours")
        assert_same(back.state_dict(), theirs.state_dict())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert type(again) is type(ours)
        assert_same(again.state_dict(), theirs.state_dict())


# --- every block -----------------------------------------------------------------------------------------------------


@every_model
@every_block
def test_save_and_open_again(family, block, tmp_path):
    model = make_model(family, block, output_router_logits=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@every_model
@every_block
def test_gradients_reach_every_parameter(family, block):
    model = make_model(family, block).train()
    out = model(IDS, labels=IDS, output_router_logits=True)
    assert len(out.router_logits) == 2
    assert out.router_logits[0].shape == (22, 8)
    assert out.loss.item() > model.eval()(IDS, labels=IDS).loss.item()  # the model's own auxiliary loss is in it
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@every_model
@every_block
def test_generation_with_a_cache(family, block):
    model = make_model(family, block)
    cached, plain = (
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    static = model.generate(IDS, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, cached)


@every_model
@every_block
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, block, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = make_model(family, block, dtype=torch.float64).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-12, rtol=0)


@every_model
@pytest.mark.parametrize("block", ["ungated", "full"])
def test_compiles_to_one_graph(family, block):
    model = make_model(family, block).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(IDS, labels=IDS).loss
    expected = model(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("block", ["standard", "ungated", "full", "mixed"])
def test_the_trainer_resumes_where_it_was(family, block, tmp_path):
    def train(folder, resume=None):
        model = make_model(family, block, seed=1).train()
        settings = trainers.arguments(
            folder, max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2, gradient_accumulation_steps=1
        )
        trainer = trainers.build_trainer("Trainer", model, settings, trainers.rows(24), [])
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(resumed, whole)
    assert any(not torch.equal(whole[n], v) for n, v in make_model(family, block, seed=1).state_dict().items())


@every_model
@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
def test_perft_attaches_in_the_latent_width(family, variant, tmp_path):
    from peft import AutoPeftModelForCausalLM, get_peft_model

    base = make_model(family, "full")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = base(IDS).logits
    model = get_peft_model(base, PerftConfig(variant=variant, r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, expected)  # a no-op at birth
    widths = {p.shape[-1] for n, p in model.named_parameters() if "perft_A" in n}
    assert widths == {16}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "perft_B" in name:
                parameter.normal_()
    changed = model(IDS, labels=IDS)
    assert not torch.allclose(changed.logits, expected)
    changed.loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, changed.logits)


def test_blocks_per_layer():
    model = make_model("olmoe_ext", "mixed", num_hidden_layers=4, moe_block=["dcca", "standard", "standard", "dcca"])
    assert [isinstance(layer.mlp, DccaMoeBlock) for layer in model.model.layers] == [True, False, False, True]


def test_names_on_disk():
    """A golden list: a renamed parameter is a breaking change."""
    names = {
        n.removeprefix("model.layers.0.mlp.") for n in make_model("olmoe_ext", "full").state_dict() if ".0.mlp" in n
    }
    assert names == {
        "gate.weight",
        "descend.weight",
        "experts.up_proj",
        "experts.down_proj",
        "latent_norm.weight",
        "ascend.weight",
        "shared_expert.up_proj.weight",
        "shared_expert.down_proj.weight",
    }
    gated = make_model("olmoe_ext", "gated", moe_shared_expert_intermediate_size=8)
    shapes = {
        n.removeprefix("model.layers.0.mlp."): tuple(p.shape) for n, p in gated.named_parameters() if ".0.mlp" in n
    }
    assert shapes == {
        "gate.weight": (8, 32),
        "descend.weight": (8, 32),
        "experts.gate_up_proj": (8, 2 * 192, 8),
        "experts.down_proj": (8, 8, 192),
        "ascend.weight": (32, 8),
        "shared_expert.gate_proj.weight": (8, 32),
        "shared_expert.up_proj.weight": (8, 32),
        "shared_expert.down_proj.weight": (32, 8),
    }
    assert LatentBlock.read(gated.model.layers[0].mlp, gated.config).gate.shape == (8, 192, 8)


def test_copies_pickles_and_pipelines(tmp_path):
    model = make_model("olmoe_ext", "full")
    model.train()(IDS)  # leaves what it remembers of its last forward
    model.eval()
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    generated = pipeline("text-generation", model, tokenizer=trainers.tokenizer())("t5 t6", max_new_tokens=3)
    assert generated[0]["generated_text"].startswith("t5 t6")


# --- faults ----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    ("saved", "wanted", "rule"),
    [
        ("standard", {"moe_block": "dcca"}, "layers 0, 1 are not those.*moe_block='dcca'.*has no .*ascend"),
        ("standard", {"moe_block": ["standard", "dcca"]}, "in layers 1 are not those"),
        (
            "ungated",
            {"moe_block": "standard"},
            "layers 0, 1 are not those.*moe_block='standard'.*has no .*gate_up_proj",
        ),
        ("ungated", {"moe_expert_gated": True}, "moe_expert_gated=True"),
        ("ungated", {"moe_latent_size": 16}, r"its .*ascend.weight is \(32, 8\), the model's \(32, 16\)"),
        ("ungated", {"moe_latent_norm": True}, "has no .*latent_norm"),
        ("full", {"moe_latent_norm": False}, "the model has no .*latent_norm"),
    ],
)
def test_a_checkpoint_of_other_blocks_is_refused(family, saved, wanted, rule, tmp_path):
    make_model(family, saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rule):
        AutoModelForCausalLM.from_pretrained(tmp_path, **wanted)


def test_other_sizes_where_the_user_asked_for_them(tmp_path):
    make_model("olmoe_ext", "ungated").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, moe_latent_size=16, ignore_mismatched_sizes=True)
    assert model.model.layers[0].mlp.descend.weight.shape == (16, 32)


def test_a_checkpoint_without_any_layer_is_not_taken_for_another_block():
    model = make_model("olmoe_ext", "ungated")
    head = {"lm_head.weight": model.lm_head.weight.detach()}
    again = OlmoeExtForCausalLM.from_pretrained(None, config=model.config, state_dict=head)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@every_model
def test_a_latent_that_is_not_finite_names_its_layer(family):
    model = make_model(family, "full")
    with torch.no_grad():
        model.model.layers[1].mlp.descend.weight[3, 3] = float("inf")
    model.train()
    message = r"latent of model\.layers\.1\.mlp is not finite"
    with pytest.raises(FloatingPointError, match=message):
        model(IDS, labels=IDS)
    with pytest.raises(FloatingPointError, match=message):
        model(IDS)  # the loss is the caller's
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(FloatingPointError, match=message):
        model(inputs_embeds=model.get_input_embeddings()(IDS), labels=IDS)


def test_label_smoothing_in_the_trainer_does_not_hide_a_bad_latent(tmp_path):
    model = make_model("olmoe_ext", "ungated").train()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.fill_(float("nan"))
    settings = trainers.arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = trainers.build_trainer("Trainer", model, settings, trainers.rows(), [])
    with pytest.raises(FloatingPointError, match=r"model\.layers\.0\.mlp"):
        trainer.train()


def test_outlines_and_function_transforms_run_as_with_the_stock_model():
    model = make_model("olmoe_ext", "ungated", experts_implementation="batched_mm").train()
    names, weights = zip(*model.named_parameters(), strict=True)

    def loss(weights, ids):
        values = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model, values, (ids[None],), {"labels": ids[None]}).loss

    gradient = torch.func.grad(loss)(weights, IDS[0])
    assert float(gradient[0].detach().abs().max()) > 0
    assert torch.equal(copy.deepcopy(model).eval()(IDS).logits, model.eval()(IDS).logits)
    outline = model.to("meta").train()
    assert outline(IDS.to("meta"), labels=IDS.to("meta")).loss.device.type == "meta"


def test_a_configuration_changed_after_it_was_made(tmp_path):
    config = make_config("olmoe_ext", "standard")
    config.moe_block = "dcca"
    model = OlmoeExtForCausalLM(config)
    assert model.model.layers[0].mlp.descend.weight.shape == (8, 32)
    config = make_config("olmoe_ext", "mixed")
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="moe_block lists 2 blocks for num_hidden_layers=3"):
        OlmoeExtForCausalLM(config)


def test_another_reason_for_a_bad_loss_is_not_put_on_a_latent():
    model = make_model("olmoe_ext", "ungated")
    model.train()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    assert torch.isnan(model(IDS, labels=IDS).loss)


def test_generation_classes_are_ours_by_direct_import():
    assert OlmoeExtForCausalLM.config_class.model_type == "olmoe_ext"
