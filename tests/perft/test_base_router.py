"""Tuning the base model's own router with an adapter, and the guard that holds it back."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_moe_ext import PerftConfig, RouterLoadCallback, count_trainable, record_router_load
from hf_moe_ext.perft.base_router import BaseRouterLayer
from support import zoo
from support.perft import assert_equal_gradients, batch, exact_cross_entropy, gradients, loss_tokens, trainable

FAMILIES = ["olmoe", "mixtral", "gpt_oss", "deepseek_v3", "hunyuan_v1_moe", "granitemoe"]


def tuned(family="olmoe", dtype=torch.float64, variant="E", init_weights=False, **arguments):
    base = zoo.build(family, dtype=dtype)
    if dtype == torch.float64:
        base.loss_function = exact_cross_entropy
    config = PerftConfig(variant=variant, r=4, init_weights=init_weights, task_type="CAUSAL_LM", **arguments)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def layers(model):
    return [m for m in model.modules() if isinstance(m, BaseRouterLayer)]


@pytest.mark.parametrize("base_router", ["lora", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_a_router_with_that_weight(family, base_router):
    """Output and gradient are those of the same model whose router weight was changed by hand."""
    model, inputs = tuned(family, base_router=base_router, base_router_drift_coef=0.0), batch()
    twin = tuned(family, base_router="frozen")
    state = {k: v for k, v in model.state_dict().items() if "perft_base_router" not in k}
    twin.load_state_dict(
        {k.replace("gate.base_layer", "gate").replace("router.base_layer", "router"): v for k, v in state.items()}
    )
    weights = dict(zip([layer.site.name for layer in layers(model)], zoo.routers(twin), strict=True))
    for layer in layers(model):
        weight = weights[layer.site.name]
        weight.data += layer.difference("default").detach()
        weight.requires_grad_()
    ours, theirs = model(**inputs), twin(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-10, rtol=0)
    differences = [layer.difference("default") for layer in layers(model)]
    grads = gradients(model, ours.loss)
    expected = torch.autograd.grad(theirs.loss, list(weights.values()))
    if base_router == "train":
        for layer, gradient in zip(layers(model), expected, strict=True):
            name = next(n for n in grads if layer.site.name in n and n.endswith("perft_base_router.default"))
            torch.testing.assert_close(grads[name], gradient, atol=1e-10, rtol=0)
            assert gradient.abs().max() > 0
    assert all(difference.abs().max() > 0 for difference in differences)


@pytest.mark.parametrize("base_router", ["lora", "train"])
def test_a_no_op_at_birth_and_gone_after_unload(base_router):
    base, inputs = zoo.build("olmoe"), batch()
    before, state = base(**inputs).logits, copy.deepcopy(base.state_dict())
    model = get_peft_model(base, PerftConfig(variant="S", base_router=base_router))
    assert torch.equal(model(**inputs).logits, before)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "base_router" in name:
                parameter.normal_()
    assert not torch.equal(model(**inputs).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)
    unloaded = model.unload()
    assert not layers(unloaded)
    assert unloaded.state_dict().keys() == state.keys()
    assert torch.equal(unloaded(**inputs).logits, before)


@pytest.mark.parametrize("base_router", ["lora", "train"])
def test_save_and_reopen(base_router, tmp_path):
    model, inputs = tuned(dtype=torch.float32, variant="R", base_router=base_router).eval(), batch()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("olmoe"), tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    again.load_adapter(str(tmp_path), "other")
    again.set_adapter("other")
    again.delete_adapter("default")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    wanted = {"perft_base_router"} if base_router == "train" else {"perft_base_router_A", "perft_base_router_B"}
    from safetensors.torch import load_file

    names = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == wanted | {"perft_A", "perft_B", "perft_router"}


def explicit_drift(model, inputs):
    """Per sequence: the mean over layers of the mean over its tokens of KL(old || tuned), token by token."""
    found = layers(model)
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))) for layer in found]
    coefficients, model_state = found[0].state.coefficients, found[0].state
    model_state.coefficients = {}
    loss = model(**inputs).loss
    model_state.coefficients = coefficients
    for hook in hooks:
        hook.remove()
    rows, length = inputs["input_ids"].shape
    values = [torch.zeros((), dtype=torch.float64) for _ in range(rows)]
    for layer, hidden in seen:
        weight = layer._weight().detach()
        for row in range(rows):
            divergences = []
            for token in range(length):
                if not inputs["attention_mask"][row, token]:
                    continue
                h = hidden.reshape(rows, length, -1)[row, token].detach()
                old, new = (weight @ h).softmax(0), ((weight + layer.difference("default")) @ h).softmax(0)
                divergences.append((old * (old.log() - new.log())).sum())
            values[row] = values[row] + sum(divergences) / len(divergences) / len(found)
    return loss, values


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("base_router", ["lora", "train"])
def test_the_guards_gradient_is_that_of_the_definition(base_router, reentrant):
    model, inputs = tuned(base_router=base_router, base_router_drift_coef=3.0).train(), batch()
    loss, values = explicit_drift(model, inputs)
    tokens = loss_tokens(inputs)
    shares = [int(labels[1:].ne(-100).sum()) / tokens for labels in inputs["labels"]]
    guard = sum(3.0 * share * value for share, value in zip(shares, values, strict=True))
    expected = gradients(model, loss + guard)
    plain = gradients(model, explicit_drift(model, inputs)[0])
    name = next(n for n in expected if "base_router" in n)
    assert (expected[name] - plain[name]).abs().max() > 1e-4, "the guard must be seen to act"
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.loss, loss, atol=1e-12, rtol=0)
    outputs.loss.backward()
    assert_equal_gradients({n: p.grad for n, p in trainable(model).items()}, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled():
    torch._dynamo.reset()
    model = tuned(dtype=torch.float32, base_router="lora", base_router_drift_coef=3.0).train()
    inputs = batch()
    expected = gradients(model, model(**inputs).loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal_gradients(gradients(model, compiled(**inputs, use_cache=False).loss), expected, atol=1e-5)


def test_the_drift_is_recorded_and_the_guard_lowers_it(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from support.trainers import arguments, collate, rows

    drift = {}
    for coefficient in (0.0, 100.0):
        model = tuned(dtype=torch.float32, base_router="train", base_router_drift_coef=coefficient, init_weights=True)
        with record_router_load(model) as load:
            model(**batch())
        assert all(v == {"divergence": 0.0, "load_drift": 0.0} for v in load.drift().values()), "nothing has moved yet"
        trainer = Trainer(
            model,
            TrainingArguments(**arguments(tmp_path / str(coefficient), max_steps=8, learning_rate=0.02)),
            train_dataset=Dataset.from_dict({"input_ids": rows(18)}),
            data_collator=collate,
            callbacks=[RouterLoadCallback(model)],
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "base_router_load_drift" in entry]
        drift[coefficient] = log[-1]
        with record_router_load(model) as load:
            model(**batch())
        for values in load.drift().values():
            assert values["divergence"] > 0
            assert 0 < values["load_drift"] < 1
    for key in ("base_router_divergence", "base_router_load_drift"):
        assert drift[100.0][key] < drift[0.0][key] / 2


def test_counts_and_mixed_batches():
    frozen = tuned("olmoe", dtype=torch.float32, variant="S")
    lora = tuned("olmoe", dtype=torch.float32, variant="S", base_router="lora")
    whole = tuned("olmoe", dtype=torch.float32, variant="S", base_router="train")
    added = [count_trainable(m)[0] - count_trainable(frozen)[0] for m in (lora, whole)]
    assert added == [2 * (4 * 32 + 8 * 4), 2 * 8 * 32]
    assert count_trainable(whole)[0] == sum(p.numel() for p in trainable(whole).values())
    whole.eval()
    inputs = batch()
    with pytest.raises(ValueError, match="default tunes the base model's router, which a batch shares"):
        whole(**inputs, adapter_names=["default", "__base__", "default"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_router": "full"}, "base_router must be one of frozen, lora, train; got 'full'"),
        ({"base_router_drift_coef": 0.1}, "base_router_drift_coef=0.1 holds back a base router that trains"),
        (
            {"base_router": "train", "base_router_drift_coef": -1.0},
            "base_router_drift_coef must be a number of at least 0",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerftConfig(variant="R", **arguments)


def test_patterns_reach_the_base_router():
    model = tuned(base_router="lora", rank_pattern={"experts": 2}, alpha_pattern={"experts": 64})
    assert [layer.scales["default"] for layer in layers(model)] == [32.0, 32.0]
    assert [len(layer.perft_base_router_A["default"]) for layer in layers(model)] == [2, 2]


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    from safetensors.torch import load_file, save_file

    tuned(dtype=torch.float32, base_router="train").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("perft_base_router"))
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    base = zoo.build("olmoe")
    modules = dict(base.named_modules()).keys()
    with pytest.raises(ValueError, match=r"perft_base_router\.default has shape"):
        PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()).keys() == modules


def test_a_quantised_router_is_refused_before_anything_changes():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = zoo.build("hunyuan_v1_moe")
    quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("gate.wg"))
    modules = dict(base.named_modules()).keys()
    with pytest.raises(ValueError, match=r"adds to the weight of 'model.layers.0.mlp.gate', which is quantised"):
        get_peft_model(base, PerftConfig(variant="E", base_router="lora"))
    assert dict(base.named_modules()).keys() == modules


def test_a_router_that_changes_its_input_is_refused():
    """As Gemma 4's: it scales what it is called with, so the weight sees other rows."""
    base = zoo.build("olmoe")
    for layer in base.model.layers:
        layer.mlp.gate.scale = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="one weight row per expert applied to its input"):
        get_peft_model(base, PerftConfig(variant="E", base_router="lora"))
