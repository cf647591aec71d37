"""``measure_drift`` against a comparison by hand."""

import math

import pytest
import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig
from hf_moe_ext.audit.drift import measure_drift
from support import naive_routing, zoo

LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def by_hand(family, models, batch, layer):
    """Overlap, divergence and shift of the load of one layer, token by token; ``models``: the reference, then the other."""
    mask = batch["attention_mask"].reshape(-1).tolist()
    chosen, distributions = [], []
    for model in models:
        with torch.no_grad(), naive_routing.recorded_inputs(model) as seen:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        _, block, router = next(found for found in naive_routing.blocks(model) if found[0] == layer)
        logits = naive_routing.naive_logits(block, router, seen[layer][0])
        chosen.append([set(naive_routing.choose(family, x, [0.0] * len(x), router.top_k, None)) for x in logits])
        distributions.append([naive_routing.scores(family, x) for x in logits])
    overlap = divergence = tokens = 0.0
    counts = [[0] * len(distributions[0][0]) for _ in range(2)]
    for old, new, p, q, keep in zip(*chosen, *distributions, mask, strict=True):
        if keep:
            tokens += 1
            overlap += len(old & new) / len(old)
            divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            for row, ids in zip(counts, (old, new), strict=True):
                for i in ids:
                    row[i] += 1
    choices = sum(counts[0])
    shift = sum(abs(a - b) for a, b in zip(*counts, strict=True)) / choices / 2
    return tokens, overlap / tokens, divergence / tokens, shift


def test_drift_from_another_model_is_that_by_hand():
    model, reference = zoo.build("olmoe", seed=0), zoo.build("olmoe", seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in zoo.routers(model):
            weight.add_(torch.randn_like(weight) * 0.2)
    batch = zoo.random_batch()
    model.train()
    found = measure_drift(model, [batch, batch], reference)
    assert model.training
    assert all(module.training for module in model.modules())
    assert [each.layer for each in found] == LAYERS
    for each in found:
        tokens, overlap, divergence, shift = by_hand("olmoe", (reference, model.eval()), batch, each.layer)
        assert each.tokens == 2 * tokens
        assert 0 < each.overlap < 1
        assert each.overlap == pytest.approx(overlap)
        assert each.divergence == pytest.approx(divergence, rel=1e-5)
        assert each.load_shift == pytest.approx(shift)


def test_drift_from_the_base_is_that_of_the_adapters():
    base, batch = zoo.build("olmoe"), zoo.random_batch()
    config = PerftConfig(task_type="CAUSAL_LM", variant="S", r=8, lora_alpha=32, init_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(zoo.build("olmoe"), config)
    found = measure_drift(model, [batch])
    assert found == measure_drift(model, [batch], base)
    assert found[0].overlap == 1.0  # before the first adapter
    assert found[0].divergence == pytest.approx(0.0, abs=1e-9)
    assert found[1].overlap < 1.0
    assert found[1].divergence > 0.001
    with torch.no_grad(), model.disable_adapter():
        plain = model(**batch).logits
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, plain)  # and they are on again


def test_what_cannot_be_compared_is_refused():
    model, batch = zoo.build("olmoe"), zoo.random_batch()
    with pytest.raises(ValueError, match="reference=None compares with the model without its adapters"):
        measure_drift(model, [batch])
    with pytest.raises(ValueError, match="at least one batch"):
        measure_drift(model, [], model)
    with pytest.raises(ValueError, match="must have the model's layers"):
        measure_drift(model, [batch], zoo.build("mixtral"))
