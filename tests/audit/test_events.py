"""``watch_routing``: what is heard of each router, and that nothing is left behind."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig
from hf_moe_ext.audit.batch import tag_batch
from hf_moe_ext.audit.events import RoutingEvent, watch_routing
from hf_moe_ext.audit.measures import count_choices
from support import naive_routing, zoo


def run(model, batch, **kwargs):
    """Events of one pass."""
    events: list[RoutingEvent] = []
    with torch.no_grad(), watch_routing(model, events.append):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **kwargs)
    return events


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_events_are_what_routers_did(family):
    model, batch = zoo.build(family), zoo.random_batch()
    naive_routing.spread_corrections(model)
    with naive_routing.recorded_inputs(model) as seen:
        events = run(model, batch)
    twin = naive_routing.count(family, model, seen, [batch["attention_mask"]])
    assert [event.layer for event in events] == list(twin)
    for event in events:
        assert event.router == "base"
        assert len(event.index) == batch["input_ids"].numel()
        counts = count_choices(event.index, event.num_experts, event.batch.mask)[0]
        assert counts.tolist() == twin[event.layer]["counts"]
        expected = torch.tensor(batch["attention_mask"].bool().reshape(-1).tolist())
        assert torch.equal(event.batch.mask, expected)
        block = model.get_submodule(event.layer.rpartition(".")[0])
        router = next(r for name, _, r in naive_routing.blocks(model) if name == event.layer)
        logits = naive_routing.naive_logits(block, router, seen[event.layer][0])
        for row, found in zip(logits, event.probabilities, strict=True):
            values = naive_routing.scores(family, row)
            torch.testing.assert_close(found, torch.tensor(values) / sum(values), rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind():
    model = zoo.build("olmoe")
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    run(model, zoo.random_batch())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_listeners_hear_the_same_and_leave_by_themselves():
    model, batch = zoo.build("olmoe"), zoo.random_batch()
    first, second = [], []
    with watch_routing(model, first.append):
        with watch_routing(model, second.append):
            model(**batch)
        model(**batch)
    model(**batch)
    assert len(second) == 2
    assert len(first) == 4
    assert first[0] is second[0]


def test_positions_rows_and_tags():
    model, batch = zoo.build("olmoe"), zoo.random_batch(batch=3, length=8)
    with tag_batch(slices=["a", "b", "a"], examples=[7, "x", 9]):
        event = run(model, batch)[0]
    mask = batch["attention_mask"]
    for row in range(3):
        ours = (event.batch.rows == row) & event.batch.mask
        assert event.batch.positions[ours].tolist() == list(range(int(mask[row].sum())))
    assert event.batch.slices == ("a", "b", "a")
    assert event.batch.examples == (7, "x", 9)
    assert torch.equal(event.batch.input_ids, batch["input_ids"])


def test_tags_that_do_not_fit_the_batch_are_refused():
    with (
        pytest.raises(ValueError, match="slices must be one per row of the batch, which has 3, got 2"),
        tag_batch(["a"] * 2),
    ):
        run(zoo.build("olmoe"), zoo.random_batch(batch=3))


def test_a_packed_row_has_positions_of_its_own():
    model = zoo.build("olmoe")
    events = []
    with watch_routing(model, events.append):
        model(input_ids=torch.randint(3, 90, (1, 7)), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    assert events[0].batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert events[0].batch.mask is None


@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
def test_an_adapter_with_a_router_is_heard_beside_the_base(variant):
    settings = {"R": {"num_experts": 4, "top_k": 2}, "D": {"num_experts": 2}}.get(variant, {})
    config = PerftConfig(task_type="CAUSAL_LM", variant=variant, r=4, init_weights=False, **settings)
    model, batch = get_peft_model(zoo.build("qwen3_moe"), config), zoo.random_batch()
    events = run(model.eval(), batch)
    kinds = ["base", "default"] if variant == "R" else ["base"]
    layers = ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert [(e.layer, e.router) for e in events] == [(layer, kind) for layer in layers for kind in kinds]
    for event in events:
        assert torch.equal(event.batch.mask, batch["attention_mask"].bool().reshape(-1))
    if variant == "R":
        event = events[1]
        assert event.num_experts == 4
        assert event.index.shape == (36, 2)
        assert event.weights.shape == (36, 2)
        expected = event.probabilities.topk(2)
        assert torch.equal(expected.indices, event.index)
    assert all(not m.routing_listeners for m in model.modules() if hasattr(m, "routing_listeners"))


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"No MoE block found in LlamaForCausalLM.*needs a Mixture-of-Experts"):
        run(zoo.build("llama"), zoo.random_batch())
    with pytest.raises(ValueError, match=r"cannot be served: .*Experts at .* takes"):
        run(zoo.build("llama4"), zoo.random_batch())
