"""What users do with models whose experts share a base: generate, train, compile, adapt."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from support import naive, trainers
from support.latent_models import assert_same, make_model
from support.shared_base import IDS, every_block, every_model, fill_deltas, gradients


@every_model
@every_block
def test_generation_with_a_cache(family, block):
    model = fill_deltas(make_model(family, block))
    cached, plain = (
        model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


@every_model
@every_block
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, block, reentrant):
    found = []
    for checkpointed in (False, True):
        model = fill_deltas(make_model(family, block, dtype=torch.float64)).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        found.append({n: g for n, g in gradients(model, inputs_embeds=embedded).items() if g is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-12, rtol=0)


@pytest.mark.filterwarnings(
    # The compiler looks at every tensor where a graph ends.
    "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("mixtral_ext", "low_rank"),
        *(
            pytest.param(family, block, marks=pytest.mark.slow)
            for family, block in [
                ("qwen3_moe_ext", "universal"),
                ("olmoe_ext", "sparse"),
                ("mixtral_ext", "quantized"),
                ("qwen3_moe_ext", "some_layers"),
            ]
        ),
    ],
)
def test_compiles(family, block):
    model = fill_deltas(make_model(family, block)).train()
    torch._dynamo.reset()
    # Only low-rank deltas have shapes that no routing decides; a graph ends at the others and begins again.
    whole = block not in ("sparse", "quantized")
    loss = torch.compile(model, fullgraph=whole, backend="aot_eager")(IDS, labels=IDS).loss
    expected = model(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("block", ["low_rank", "sparse", "quantized", "universal"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(family, block):
    # 2^-8 of a bfloat16 number through two layers and a head, of logits near 1: some hundredths.
    model = fill_deltas(make_model(family, block))
    exact = model(IDS).logits
    assert float((model.to(torch.bfloat16)(IDS).logits.float() - exact).abs().median()) < 0.02 * float(exact.std())


@every_model
@pytest.mark.parametrize("block", ["low_rank", "sparse", "quantized", "some_layers"])
def test_the_trainer_resumes_where_it_was(family, block, tmp_path):
    def train(folder, resume=None):
        model = fill_deltas(make_model(family, block, seed=1)).train()
        settings = trainers.arguments(
            folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2, gradient_accumulation_steps=1
        )
        trainer = trainers.build_trainer("Trainer", model, settings, trainers.rows(16), [])
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(resumed, whole)
    born = fill_deltas(make_model(family, block, seed=1)).state_dict()
    moved = {name.rpartition(".")[2] for name in born if not torch.equal(born[name], whole[name])}
    assert {"gate_up_proj", "down_proj"} <= moved
    assert not any(name.endswith(("_codes", "_scales", "_stream", "_positions")) for name in moved)


@every_model
@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
@pytest.mark.parametrize("block", ["low_rank", "universal"])
def test_perft_attaches(family, variant, block, tmp_path):
    from peft import AutoPeftModelForCausalLM, get_peft_model

    fill_deltas(make_model(family, block)).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = base(IDS).logits
    model = get_peft_model(base, PerftConfig(variant=variant, r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, expected)  # a no-op at birth
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".perft_" in name for name in trained)
    trainer = trainers.build_trainer(
        "Trainer", model, trainers.arguments(tmp_path / "run", learning_rate=0.1), trainers.rows(), []
    )
    trainer.train()
    changed = model.eval()(IDS).logits
    assert not torch.allclose(changed, expected)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, changed)
    assert torch.equal(model.unload()(IDS).logits, expected)


@every_model
@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
def test_perft_adds_what_the_loop_adds(family, variant):
    """`output - base output` of each layer against per-token loops, with all gradients; ids include the universal expert's."""
    from peft import get_peft_model

    model = fill_deltas(make_model(family, "universal", dtype=torch.float64))
    own = {"num_experts": 4, "top_k": 2} if variant == "R" else {}
    tuned = get_peft_model(model, PerftConfig(variant=variant, r=4, lora_alpha=6, init_weights=False, **own))
    layers = [layer.mlp.experts for layer in model.model.layers]
    calls = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: calls.append([layer, *args]))
        layer.base_layer.register_forward_hook(lambda layer, args, output: calls[-1].append(output))
        layer.register_forward_hook(lambda layer, args, output: calls[-1].append(output))
    tuned(input_ids=IDS)
    assert [call[0] for call in calls] == layers
    for layer, hidden, index, weights, base_output, output in calls:
        inputs = {"A": layer.perft_A["default"], "B": layer.perft_B["default"]}
        if variant == "R":
            inputs["router"] = layer.perft_router["default"]
            _, index, weights = naive.route(hidden, inputs["router"], 2, True)
        elif variant == "E":
            assert (index[:, -1] == 8).all()  # the universal one, for every token
        else:
            index = weights = None
        slow = naive.routed_adapter(hidden, index, weights, inputs["A"], inputs["B"], scale=1.5, kind="lora")
        fast = output - base_output
        assert slow.abs().max() > 1e-2
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)
        direction = torch.randn(fast.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad((fast * direction).sum(), list(inputs.values()), retain_graph=True)
        expected = torch.autograd.grad((slow * direction).sum(), list(inputs.values()), retain_graph=True)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
