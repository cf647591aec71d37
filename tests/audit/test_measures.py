"""Measures by hand, readings as files, and what is judged unhealthy."""

import math

import numpy as np
import pytest
import torch

from hf_moe_ext.audit import measures
from hf_moe_ext.audit.reading import RouterReading, RoutingReading
from hf_moe_ext.audit.thresholds import RoutingThresholds, judge


def reading(counts, layer="layers.0", router="base", top_k=1, **changes):
    counts = np.array(counts, dtype=np.int64)
    return RouterReading(layer, router, len(counts), top_k, int(counts.sum()) // top_k, counts, **changes)


def test_load_of_known_counts():
    router = reading([6, 2, 0, 0], top_k=2)
    assert router.load.tolist() == [0.75, 0.25, 0, 0]
    assert router.variation == pytest.approx(math.sqrt(6) / 2)  # deviations 4, 0, -2, -2 of a mean of 2
    assert router.load_entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert router.dead == (2, 3)
    assert router.hot == ()
    assert reading([98, 1, 1, 0, 0, 0, 0, 0]).hot == (0,)
    even = reading([5, 5, 5])
    assert (even.variation, even.dead, even.hot) == (0.0, (), ())
    assert even.load_entropy == pytest.approx(1.0)


def test_an_expert_is_dead_below_a_hundredth_of_its_share():
    assert measures.dead_experts(np.array([997, 1000, 3, 0])) == (2, 3)  # a mean of 500: the limit is 5
    assert measures.dead_experts(np.array([995, 1000, 5, 0])) == (3,)


def test_nothing_seen_and_a_single_expert():
    nothing, single = reading([0, 0, 0]), reading([7])
    assert (nothing.variation, nothing.load_entropy, nothing.dead, nothing.hot) == (0.0, 0.0, (), ())
    assert nothing.load.tolist() == [0, 0, 0]
    assert (single.variation, single.load_entropy, single.dead, single.hot) == (0.0, 1.0, (), ())
    assert RoutingReading((nothing,)).summary() == {}


def test_choices_are_counted_by_group_and_ids_of_no_expert_left_out():
    index = torch.tensor([[0, 2], [2, 3], [1, -1], [2, 0]])
    mask = torch.tensor([True, True, True, False])
    assert measures.count_choices(index, 3, mask).tolist() == [[1, 1, 2]]
    groups = torch.tensor([1, 0, 1, 1])
    assert measures.count_choices(index, 3, None, groups, 2).tolist() == [[0, 0, 1], [2, 1, 2]]
    together = measures.count_coactivation(index, 3, mask)
    assert together.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_distributions(dtype):
    rows = torch.tensor(
        [[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0], [0.4, 0.3, 0.2, 0.1], [math.nan, 0, 0, 1]], dtype=dtype
    )
    mask = torch.tensor([True, True, True, False, True])
    entropy, largest, margin, tokens, invalid = measures.distribution_sums(rows, mask).tolist()
    assert entropy == pytest.approx(0.5 + 1 + 0)
    assert largest == pytest.approx(0.5 + 0.25 + 1)
    assert margin == pytest.approx(0 + 0 + 1)
    assert (tokens, invalid) == (3, 1)
    entropy, largest, margin, tokens, invalid = measures.distribution_sums(rows[3:4]).tolist()
    by_hand = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1)) / math.log(4)
    assert (entropy, largest, margin) == pytest.approx((by_hand, 0.4, 0.1))
    assert measures.distribution_sums(torch.ones(3, 1)).tolist() == [0, 3, 0, 3, 0]  # one expert has no choice
    assert measures.distribution_sums(torch.ones(0, 4)).tolist() == [0] * 5


def test_a_reading_is_read_back_from_json_and_another_is_refused():
    import json

    whole = RoutingReading(
        (
            reading([3, 1], coactivation=np.array([[3, 0], [0, 1]]), slices={"code": np.array([1, 1])}, entropy=0.5),
            reading([2, 2], router="mine", invalid=1, margin=float("nan")),
        )
    )
    again = RoutingReading.from_dict(json.loads(json.dumps(whole.as_dict())))
    assert json.dumps(again.as_dict()) == json.dumps(whole.as_dict())
    assert again.kinds == ("base", "mine")
    assert again.routers[0].coactivation.dtype == np.int64
    assert set(again.summary()) >= {"routing_load_max", "routing_entropy", "routing_load_max_mine"}
    assert "routing_margin_mine" not in again.summary()  # NaN would stop some trackers
    assert again.summary()["routing_invalid_fraction_mine"] == 0.25
    with pytest.raises(ValueError, match="must have format='hf_moe_ext routing 1'"):
        RoutingReading.from_dict({"routers": []})
    values = whole.as_dict()
    del values["routers"][0]["counts"]
    with pytest.raises(ValueError, match=r"lacks the keys \['counts'\]"):
        RoutingReading.from_dict(values)


def test_what_is_judged_and_how():
    limits = RoutingThresholds(tokens_per_expert=10)
    dead = reading([300, 300, 0, 0], layer="layers.1")
    hot = reading([1000, *[10] * 15], layer="layers.2")
    sure = reading([50, 50], layer="layers.3", max_probability=0.99)
    broken = reading([50, 50], layer="layers.4", router="mine", invalid=3)
    whole = RoutingReading((reading([50, 50]), dead, hot, sure, broken))
    found = {(f.layer, f.measure) for f in judge(whole, limits)}
    assert found == {
        ("layers.1", "dead_fraction"),
        ("layers.1", "load_entropy"),
        ("layers.2", "load_ratio"),
        ("layers.2", "variation"),
        ("layers.2", "load_entropy"),
        ("layers.3", "max_probability"),
        ("layers.4", "invalid"),
    }
    assert judge(whole, limits)[0].measure == "invalid"
    assert "PerftConfig" in next(
        f.advice
        for f in judge(RoutingReading((reading([900, 0, 0, 0], router="mine"),)), limits)
        if f.measure == "dead_fraction"
    )
    few = RoutingThresholds(tokens_per_expert=10_000)
    assert [f.measure for f in judge(whole, few)] == ["invalid"]
    everything = reading([500, 500], top_k=2)  # every token passes both: nothing to balance
    assert judge(RoutingReading((everything,)), RoutingThresholds(load_ratio=0.0)) == ()
