"""Adapters for some experts only, how they are chosen, and one A shared by all experts of a layer."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_moe_ext import PerftConfig, choose_experts_to_adapt, count_trainable
from hf_moe_ext.perft.layer import PerftLayer
from support import zoo
from support.perft import assert_equal_gradients, batch, gradients, trainable


def build(family="olmoe", dtype=torch.float64, **arguments):
    base = zoo.build(family, dtype=dtype)
    torch.manual_seed(1)
    return get_peft_model(base, PerftConfig(r=4, init_weights=False, task_type="CAUSAL_LM", **arguments))


def layers(model):
    return [m for m in model.modules() if isinstance(m, PerftLayer)]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_it_equals_adapters_of_zero_for_the_others(family):
    chosen = [6, 1, 3]
    some, every = build(family, variant="E", expert_ids=chosen), build(family, variant="E")
    with torch.no_grad():
        for small, large in zip(layers(some), layers(every), strict=True):
            for name in ("perft_A", "perft_B"):
                values = torch.zeros_like(getattr(large, name)["default"])
                values[chosen] = getattr(small, name)["default"]
                getattr(large, name)["default"].copy_(values)
    inputs = batch()
    ours, theirs = some(**inputs), every(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-10, rtol=0)
    expected = {name: g[chosen] for name, g in gradients(every, theirs.loss).items()}
    assert_equal_gradients(gradients(some, ours.loss), expected)
    assert any(g.abs().max() > 0 for g in expected.values())


def test_layers_may_differ_and_a_saved_adapter_remembers(tmp_path):
    sites = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    model = build(dtype=torch.float32, variant="E", expert_ids={sites[0]: [2], sites[1]: [0, 5, 7]}).eval()
    assert [len(layer.perft_A["default"]) for layer in layers(model)] == [1, 3]
    stored, active = count_trainable(model)
    one = 2 * 32 * 4
    assert (stored, active) == (4 * one, 4 * one), "a token meets at most its top 3"
    assert stored == sum(p.numel() for p in trainable(model).values())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["expert_ids"] == {
        sites[0]: [2],
        sites[1]: [0, 5, 7],
    }
    again = PeftModel.from_pretrained(zoo.build("olmoe"), tmp_path)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    again.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=True)
    again.set_adapter("other")
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def brute_force(model, batches, by):
    """Counted from the model's own router logits, token by token."""
    use = None
    for inputs in batches:
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True
        )
        for layer, logits in enumerate(outputs.router_logits):
            if use is None:
                use = [[0.0] * logits.shape[1] for _ in outputs.router_logits]
            for token, counts in enumerate(inputs["attention_mask"].flatten().tolist()):
                probabilities = logits[token].float().softmax(0)
                best = probabilities.topk(3)
                for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                    use[layer][i] += counts * (1.0 if by == "tokens" else p)
    return use


@pytest.mark.parametrize("by", ["tokens", "weights"])
def test_the_chosen_are_the_most_used(by):
    model = zoo.build("olmoe").train()
    batches = [batch(seed=1), batch(rows=4, length=9, seed=2)]
    chosen = choose_experts_to_adapt(model, batches, expert_fraction=0.3, by=by)
    assert model.training
    assert list(chosen) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for ids, use in zip(chosen.values(), brute_force(model.eval(), batches, by), strict=True):
        assert len(ids) == 3, "0.3 of 8 experts, rounded up"
        least = min(use[i] for i in ids)
        assert all(use[i] <= least for i in set(range(8)) - set(ids))
        assert len({round(value, 6) for value in use}) > 4, "a tie could hide a wrong choice"
    adapted = get_peft_model(model, PerftConfig(variant="E", expert_ids=chosen))
    assert count_trainable(adapted)[0] == 2 * 3 * 2 * 32 * 16


def test_an_adapted_model_gives_the_same_names_and_keeps_its_modes():
    model = build(dtype=torch.float32, variant="S").train()
    frozen = model.get_base_model().model.norm.eval()
    chosen = choose_experts_to_adapt(model, [batch()])
    assert chosen.keys() == choose_experts_to_adapt(zoo.build("olmoe"), [batch()]).keys()
    assert (model.training, frozen.training) == (True, False)


def test_all_experts_on_request():
    chosen = choose_experts_to_adapt(zoo.build("mixtral"), [batch()], expert_fraction=1.0)
    assert all(ids == [0, 1, 2, 3] for ids in chosen.values())


@pytest.mark.parametrize("variant", ["R", "E", "D"])
@pytest.mark.parametrize("adapter", ["lora", "parallel"])
def test_a_shared_A_equals_equal_ones(variant, adapter):
    shared = build(variant=variant, adapter=adapter, shared_A=True)
    twin = build(variant=variant, adapter=adapter)
    state = shared.state_dict()
    for key, value in twin.state_dict().items():
        if ".perft_A." in key:
            state[key] = state[key].expand_as(value).clone()
    twin.load_state_dict(state)
    inputs = batch()
    ours, theirs = shared(**inputs), twin(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-10, rtol=0)
    expected = {
        name: g.sum(dim=0, keepdim=True) if ".perft_A." in name else g
        for name, g in gradients(twin, theirs.loss).items()
    }
    assert_equal_gradients(gradients(shared, ours.loss), expected)
    assert count_trainable(shared)[0] == sum(p.numel() for p in trainable(shared).values())
    used = {"R": 2, "E": 3, "D": 4}[variant]
    router = 4 * 32 if variant == "R" else 0
    assert count_trainable(shared)[1] == 2 * (32 * 4 * (1 + used) + router)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "R", "expert_ids": [0]}, "expert_ids chooses among the base model's experts; variant='R'"),
        ({"variant": "E", "expert_ids": []}, "none empty; got \\[\\]"),
        ({"variant": "E", "expert_ids": [1, 1]}, "different whole numbers"),
        ({"variant": "E", "expert_ids": [-1]}, "at least 0"),
        ({"variant": "E", "expert_ids": {"a": [0.5]}}, "whole numbers"),
        ({"variant": "S", "shared_A": True}, "shared_A=True needs several adapters"),
        ({"variant": "E", "shared_A": 2}, "shared_A must be True or False; got 2"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerftConfig(**arguments)


BOTH = {f"model.layers.{i}.mlp.experts": [1] for i in range(2)}


def test_experts_that_are_not_there():
    base = zoo.build("olmoe")
    before = dict(base.named_modules()).keys()
    for ids, message in (
        ([8], "names expert 8 of .*, which has 8"),
        (BOTH | {"typo": [3]}, "entry for 'typo', which is not adapted"),
        ({"model.layers.0.mlp.experts": [1]}, "no entry for"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, PerftConfig(variant="E", expert_ids=ids))
        assert dict(base.named_modules()).keys() == before
    for arguments, message in (
        ({"expert_fraction": 0.0}, "expert_fraction must be in"),
        ({"by": "loss"}, "by must be 'tokens' or 'weights'"),
        ({"batches": []}, "the batches hold no token"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_experts_to_adapt(base, **({"batches": [batch()]} | arguments))
    with pytest.raises(ValueError, match="no MoE block found in LlamaForCausalLM"):
        choose_experts_to_adapt(zoo.build("llama"), [batch()])
