"""Step times against the specification's numbers and against sums by hand."""

from dataclasses import replace

import pytest

from hf_moe_ext.scaling.exchange import RECOMPUTED, TRAINING, Exchange, expect_sent, layer_bytes
from hf_moe_ext.scaling.feed_forward import DenseFfn, MoeFfn
from hf_moe_ext.scaling.hardware import Hardware, find_hardware
from hf_moe_ext.scaling.layout import Layout, stage_parameters
from hf_moe_ext.scaling.memory import TrainingStep
from hf_moe_ext.scaling.operations import Tokens
from hf_moe_ext.scaling.rank_seconds import Efficiency
from hf_moe_ext.scaling.roofline import (
    batch_tokens_to_compute,
    expert_width_to_hide_all_to_all,
    tokens_per_expert_to_compute,
    training_time,
)
from hf_moe_ext.scaling.shape import MoeShape

H100 = find_hardware("H100-SXM")
PERFECT = Efficiency(1, 1, 1, 1, 0, 0, 0)
SHAPE = MoeShape.uniform(
    4, 256, MoeFfn(16, 2, 128), num_heads=4, num_key_value_heads=4, vocab_size=512, context_length=128
)
STEP = TrainingStep(Tokens(8, 128), "megatron")


def test_when_experts_are_compute_bound():
    assert f"{tokens_per_expert_to_compute(H100):.1f}" == "295.2"
    assert f"{tokens_per_expert_to_compute(find_hardware('H200-SXM')):.1f}" == "206.0"
    found = [f"{batch_tokens_to_compute(H100, sparsity):.0f}" for sparsity in (0.875, 0.95, 0.98)]
    assert found == ["2362", "5904", "14761"]
    with pytest.raises(ValueError, match="sparsity must be at least 0 and below 1, got 1"):
        batch_tokens_to_compute(H100, 1)


def test_when_the_all_to_all_hides():
    assert f"{expert_width_to_hide_all_to_all(H100, 450e9):.0f}" == "1465"
    assert f"{expert_width_to_hide_all_to_all(H100, 50e9) / 1e3:.1f}k" == "13.2k"


def test_step_on_one_device_by_hand():
    time = training_time(SHAPE, Layout(), STEP, H100, PERFECT)
    flops = SHAPE.forward_flops(128)
    tokens = 8 * 128
    assert time.products == pytest.approx(3 * tokens * (flops.total - flops.experts) / H100.flops_per_s)
    # 128 tokens an expert: reading their weights takes longer than the products.
    read = SHAPE.parameters.routed * 2 / H100.memory_bytes_per_s
    assert read > tokens * flops.experts / H100.flops_per_s
    assert (time.experts, time.experts_read) == (pytest.approx(3 * read), True)
    assert time.optimizer == pytest.approx(SHAPE.total_parameters * (2 * 2 + 4 + 2 * 12) / H100.memory_bytes_per_s)
    assert time.all_to_all == time.tensor == time.pipeline == time.data == 0
    assert time.total == pytest.approx(time.products + time.experts + time.optimizer)
    assert time.binds == "memory"


def test_many_tokens_turn_experts_compute_bound():
    few, many = (
        training_time(SHAPE, Layout(), TrainingStep(Tokens(n, 128), "megatron"), H100, PERFECT) for n in (8, 64)
    )
    assert (few.experts_read, many.experts_read) == (True, False)
    assert many.binds == "compute"


def test_bound_by_reading_exactly_where_the_rule_says():
    """Tokens per expert against peak over bandwidth."""
    for tokens_per_expert, read in ((294, True), (296, False)):
        tokens = tokens_per_expert * 16 // 2
        time = training_time(SHAPE, Layout(), TrainingStep(Tokens(tokens, 1), "megatron"), H100, PERFECT)
        assert time.experts_read is read


def test_all_to_all_within_and_between_nodes():
    """16 ranks on nodes of 8: 8 of the 15 others are on another node."""
    wire = Exchange(256, 16, 2, 16)
    moved = layer_bytes(wire, "all_to_all", expect_sent(wire, "all_to_all", 1024), TRAINING).total * 4
    time = training_time(SHAPE, Layout(data=16, expert=16), STEP, H100, PERFECT)
    assert time.all_to_all == pytest.approx(moved * 8 / 15 / 50e9)
    wire = Exchange(256, 16, 2, 8)
    moved = layer_bytes(wire, "all_to_all", expect_sent(wire, "all_to_all", 1024), TRAINING).total * 4
    inside = training_time(SHAPE, Layout(data=8, expert=8), STEP, H100, PERFECT)
    assert inside.all_to_all == pytest.approx(moved / 450e9)
    assert training_time(SHAPE, Layout(data=8), STEP, H100, PERFECT).all_to_all == 0
    hidden = training_time(SHAPE, Layout(data=8, expert=8), STEP, H100, replace(PERFECT, overlap=0.75))
    assert hidden.all_to_all == pytest.approx(inside.all_to_all / 4)


def test_recomputation_repeats_the_forward_pass():
    layout = Layout(data=8, expert=8)
    none, full = (training_time(SHAPE, layout, replace(STEP, recompute=r), H100, PERFECT) for r in ("none", "full"))
    assert full.products == pytest.approx(none.products * 4 / 3)
    wire = Exchange(256, 16, 2, 8)
    sent = expect_sent(wire, "all_to_all", 1024)
    assert full.all_to_all == pytest.approx(4 * layer_bytes(wire, "all_to_all", sent, RECOMPUTED).total / 450e9)


def test_imbalance_lengthens_routed_parts_alone():
    step = TrainingStep(Tokens(64, 128), "megatron")
    uneven = TrainingStep(Tokens(64, 128, imbalance=1.5), "megatron")
    layout = Layout(data=8, expert=8)
    even, slow = (training_time(SHAPE, layout, one, H100, PERFECT) for one in (step, uneven))
    assert slow.experts == pytest.approx(1.5 * even.experts)
    assert slow.all_to_all == pytest.approx(1.5 * even.all_to_all)
    assert (slow.products, slow.data, slow.optimizer) == (even.products, even.data, even.optimizer)


def test_gradients_of_dense_and_expert_parts():
    """Rings of DP and of EDP: 2 (n - 1) / n of the bytes; ZeRO-1 as much in two and four bytes, ZeRO-3 half as much more."""
    layout = Layout(data=8, expert=4)
    local = stage_parameters(SHAPE, layout, 0)
    step = TrainingStep(Tokens(8, 128), "float32")
    time = {zero: training_time(SHAPE, replace(layout, zero=zero), step, H100, PERFECT).data for zero in (0, 1, 2, 3)}
    by_hand = 2 * 4 * (7 / 8 * local.dense + 1 / 2 * local.experts) / 450e9
    assert time[0] == time[1] == time[2] == pytest.approx(by_hand)
    assert time[3] == pytest.approx(1.5 * by_hand)
    # Between nodes a ring is as slow as its slowest hop.
    far = training_time(SHAPE, Layout(data=16), step, H100, PERFECT).data
    assert far == pytest.approx(2 * 15 / 16 * 4 * SHAPE.total_parameters / 50e9)


def test_tensor_parallel_all_reduces():
    """Four per layer and micro-batch: b s d w, 2 (TP - 1) / TP of them on the wire."""
    time = training_time(SHAPE, Layout(tensor=4), replace(STEP, num_micro_batches=2), H100, PERFECT)
    assert time.tensor == pytest.approx(2 * 4 * 4 * 2 * 3 / 4 * 1024 * 256 * 2 / 450e9)


def test_pipeline_bubble():
    """(PP - 1) / m of the stages' time, and the sends."""
    one = training_time(SHAPE, Layout(), replace(STEP, num_micro_batches=8), H100, PERFECT)
    two = training_time(SHAPE, Layout(pipeline=2), replace(STEP, num_micro_batches=8), H100, PERFECT)
    sends = 8 * 2 * 1024 * 256 * 2 / 450e9
    assert two.products == pytest.approx(one.products / 2)
    assert two.pipeline == pytest.approx((two.products + two.experts) / 8 + sends)


def test_the_same_work_on_more_ranks_costs_as_much():
    """Without communication, ranks x seconds of computing do not change with the layout, but for what is on all ranks."""
    dense = MoeShape.uniform(4, 256, DenseFfn(1024), num_heads=4, vocab_size=512, context_length=128)
    one = training_time(dense, Layout(), STEP, H100, PERFECT).products
    assert training_time(dense, Layout(tensor=4), STEP, H100, PERFECT).products * 4 == pytest.approx(one)
    big = TrainingStep(Tokens(512, 128), "megatron")
    whole = training_time(SHAPE, Layout(), big, H100, PERFECT).experts
    for layout in (Layout(tensor=2), Layout(tensor=2, expert_tensor=2), Layout(tensor=2, expert=2), Layout(pipeline=2)):
        assert training_time(SHAPE, layout, big, H100, PERFECT).experts * 2 == pytest.approx(whole), layout


def test_a_layout_that_needs_an_unknown_link():
    alone = Hardware("alone", 1e12, 1e10, 1e11, intra_node_bytes_per_s=1e10, devices_per_node=2)
    assert training_time(SHAPE, Layout(data=2), STEP, alone).data > 0
    with pytest.raises(ValueError, match="'alone' has no inter_node_bytes_per_s"):
        training_time(SHAPE, Layout(data=4), STEP, alone)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("gemm", 0, "above 0 and at most 1, got 0"),
        ("grouped", 1.2, "above 0 and at most 1, got 1.2"),
        ("overlap", -0.1, "at least 0 and at most 1, got -0.1"),
        ("collective_s", -1, "at least 0, got -1"),
        ("memory", float("nan"), "above 0 and at most 1, got nan"),
    ],
)
def test_bad_efficiencies(name, value, rule):
    with pytest.raises(ValueError, match=f"{name} must be {rule}"):
        Efficiency(**{name: value})
