"""The formulas against the paper's tables, to the last printed digit, and against counting by hand."""

import itertools
import random
import subprocess
import sys
from math import comb

import pytest

from hf_moe_ext.scaling import cost

XL = {"hidden_size": 2048, "latent_size": 512}
LAYERS, EXPERTS, TOP_K, RANKS, VOCAB, PADDED_VOCAB, SEQUENCES, LENGTH = 24, 64, 8, 32, 50_257, 50_304, 256, 2048


def test_loads_no_torch():
    code = "import hf_moe_ext.scaling.cost, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_paper_parameters():
    standard, dcca = (
        cost.paper_parameters(block, **XL, num_experts=EXPERTS, num_layers=LAYERS, vocab_size=VOCAB)
        for block in ("standard", "dcca")
    )
    assert (standard, dcca, dcca - standard) == (3_728_906_240, 3_779_237_888, 50_331_648)
    assert (f"{standard / 1e9:.2f}", f"{dcca / 1e9:.2f}", f"{dcca / standard - 1:.2%}") == ("3.73", "3.78", "1.35%")
    medium = [
        cost.paper_parameters(block, 1024, 256, num_experts=EXPERTS, num_layers=LAYERS, vocab_size=VOCAB)
        for block in ("standard", "dcca")
    ]
    assert medium == [958_483_456, 971_066_368]


def test_paper_flops():
    def flops(block, vocab_size):
        return cost.paper_iteration_flops(
            block, **XL, top_k=TOP_K, num_layers=LAYERS, vocab_size=vocab_size, num_sequences=SEQUENCES,
            sequence_length=LENGTH,
        )  # fmt: skip

    standard, dcca = flops("standard", PADDED_VOCAB), flops("dcca", PADDED_VOCAB)
    assert (standard, dcca) == (3_490_674_540_281_856, 3_649_004_214_681_600)
    assert (f"{standard / 1e12:,.2f}", f"{dcca / 1e12:,.2f}") == ("3,490.67", "3,649.00")
    assert f"{dcca / standard - 1:.2%}" == "4.54%"
    assert f"{flops('standard', VOCAB) / 1e12:,.2f}" == "3,490.37"


def test_paper_all_to_all_bytes():
    def volume(width, sequences=SEQUENCES):
        return cost.paper_iteration_all_to_all_bytes(width, TOP_K, LAYERS, RANKS, sequences, LENGTH)

    assert (volume(2048), volume(512)) == (1_597_727_834_112, 399_431_958_528)
    assert (volume(2048) / cost.GIB_BYTES, volume(512) / cost.GIB_BYTES) == (1488.0, 372.0)
    # A slip in the batch passes as the other block's number.
    assert volume(2048, sequences=64) / cost.GIB_BYTES == 372.0


def test_layer_parameters():
    standard = cost.layer_parameters("standard", 2048, EXPERTS, 512)
    dcca = cost.layer_parameters("dcca", 2048, EXPERTS, 2048, 512)
    assert standard == cost.LayerParameters(134_217_728, 0, 131_072)
    assert dcca == cost.LayerParameters(134_217_728, 2_097_152, 131_072)
    assert dcca.projections / dcca.experts == 0.015625
    gated = {f: cost.layer_parameters("dcca", 2048, EXPERTS, f, 512, gated=True) for f in (1344, 1365, 1408)}
    assert [gated[f].experts for f in gated] == [132_120_576, 134_184_960, 138_412_032]
    assert gated[1344].experts + gated[1344].projections == standard.experts
    vanilla = cost.layer_parameters("standard", 2048, 4, 4 * 2048)
    assert vanilla.experts == standard.experts
    with pytest.raises(ValueError, match='latent_size is needed for block="dcca"'):
        cost.layer_parameters("dcca", 2048, 64, 512)


def test_mended_model_counts_what_a_model_has():
    """A model of these shapes, counted tensor by tensor."""
    hidden, latent, experts, layers, vocab = 12, 3, 4, 5, 7
    attention = [(hidden, hidden), (hidden,)] * 4 + [(hidden,)] * 4
    cdac = [(hidden, latent), (latent,), (latent, hidden), (hidden,)] * experts
    dcca = [(latent, hidden), (hidden,), (hidden, latent), (latent,)] * experts + [(hidden, latent)] * 2
    outside = [(vocab, hidden), (hidden,), (hidden,)]

    def count(shapes):
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)

    for block, tensors in (("standard", cdac), ("dcca", dcca)):
        whole = layers * count([*attention, (experts, hidden), *tensors]) + count(outside)
        assert cost.model_parameters(block, hidden, latent, experts, layers, vocab) == whole


def test_token_flops():
    standard = cost.token_flops("standard", 2048, EXPERTS, TOP_K, 512, LENGTH)
    dcca = cost.token_flops("dcca", 2048, EXPERTS, TOP_K, 2048, LENGTH, 512)
    assert standard.experts == dcca.experts == 2 * 2 * 8 * 2048 * 512
    assert dcca.projections / dcca.experts == 1 / TOP_K
    assert standard.projections == 0
    # Three forward passes, without the router, and the head: the printed iteration.
    for block, one in (("standard", standard), ("dcca", dcca)):
        tokens = SEQUENCES * LENGTH
        whole = 3 * tokens * (LAYERS * (one.total - one.router) + 2 * VOCAB * 2048)
        assert whole == cost.paper_iteration_flops(
            block, **XL, top_k=TOP_K, num_layers=LAYERS, vocab_size=VOCAB, num_sequences=SEQUENCES,
            sequence_length=LENGTH,
        )  # fmt: skip


def test_distinct_ranks():
    found = {ranks: cost.expected_ranks_per_token(64, ranks, 8) for ranks in (8, 32, 2)}
    assert f"{found[8]:.2f}" == "5.43"
    # Drawing with repetition, as is sometimes written, gives fewer ranks.
    repeated = {ranks: ranks * (1 - (1 - 1 / ranks) ** 8) for ranks in found}
    assert {ranks: f"{value:.2f}" for ranks, value in repeated.items()} == {8: "5.25", 32: "7.18", 2: "1.99"}
    assert all(found[ranks] > repeated[ranks] for ranks in found)
    # Over every choice of 3 of 8 experts on 4 ranks.
    choices = list(itertools.combinations(range(8), 3))
    assert len(choices) == comb(8, 3)
    mean = sum(len({expert // 2 for expert in choice}) for choice in choices) / len(choices)
    assert cost.expected_ranks_per_token(8, 4, 3) == pytest.approx(mean, rel=1e-12)
    with pytest.raises(
        ValueError, match="ep_size must divide the 6 experts of a layer, got ep_size=4; possible: 1, 2, 3, 6"
    ):
        cost.expected_ranks_per_token(6, 4, 2)


@pytest.mark.parametrize("implementation", cost.IMPLEMENTATIONS)
def test_expectation_is_the_mean_of_exact_counts(implementation):
    """Over all routings of one token and all ranks."""
    exchange = cost.Exchange(width=4, num_experts=8, top_k=3, num_ranks=4)
    routings = list(itertools.combinations(range(8), 3))
    exact = [cost.count_sent(exchange, implementation, routings, rank) for rank in range(4)]
    expected = cost.expect_sent(exchange, implementation, len(routings))
    assert sum(sent.rows for sent in exact) / 4 == pytest.approx(expected.rows, rel=1e-12)
    assert sum(sent.pairs for sent in exact) / 4 == pytest.approx(expected.pairs, rel=1e-12)


def test_layer_bytes():
    exchange = cost.Exchange(width=512, num_experts=64, top_k=8, num_ranks=32)
    tokens = SEQUENCES * LENGTH // RANKS
    sent = cost.expect_sent(exchange, "all_to_all", tokens)
    step = cost.layer_bytes(exchange, "all_to_all", sent)
    assert step.payload * LAYERS * RANKS == 399_431_958_528  # the printed volume
    assert step.metadata == 31 * 2 * 8
    assert step.num_collectives == 5
    forward = cost.layer_bytes(exchange, "all_to_all", sent, cost.INFERENCE)
    assert (step.payload / forward.payload, forward.num_collectives) == (2, 3)
    recomputed = cost.layer_bytes(exchange, "all_to_all", sent, cost.RECOMPUTED)
    assert recomputed.payload / step.payload == 1.5
    full = cost.layer_bytes(cost.Exchange(2048, 64, 8, 32), "all_to_all", sent)
    assert step.payload / full.payload == 0.25
    assert step.metadata == full.metadata
    ours = cost.layer_bytes(exchange, "latent_all_to_all", cost.Sent(rows=10, pairs=30))
    assert (ours.payload, ours.metadata) == (10 * 512 * 2 * 4, 31 * 16 + 30 * 12)
    assert ours.total == ours.payload + ours.metadata
    assert cost.padded_rows(10, 1.2) == 12


def test_count_sent_by_hand():
    exchange = cost.Exchange(width=1, num_experts=4, top_k=2, num_ranks=2)
    routing = [[0, 1], [2, 3], [1, 2]]  # ranks 0 0 / 1 1 / 0 1
    assert cost.count_sent(exchange, "all_to_all", routing, 0) == cost.Sent(rows=3, pairs=3)
    assert cost.count_sent(exchange, "latent_all_to_all", routing, 0) == cost.Sent(rows=2, pairs=3)
    assert cost.count_sent(exchange, "latent_all_to_all", routing, 1) == cost.Sent(rows=2, pairs=3)


def test_bad_values():
    with pytest.raises(ValueError, match="implementation must be one of all_to_all, latent_all_to_all, got 'deepep'"):
        cost.expect_sent(cost.Exchange(1, 4, 2, 2), "deepep", 1)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        cost.Exchange(0, 4, 2, 2)
    with pytest.raises(ValueError, match="top_k must be at most num_experts=4, got 5"):
        cost.Exchange(1, 4, 5, 2)


def test_break_even_bandwidth():
    assert f"{cost.break_even_bandwidth_bytes_per_s(2048, 512, 8, 400e12) / 1e12:.1f}" == "4.7"
    assert f"{cost.break_even_bandwidth_bytes_per_s(8192, 2048, 1, 400e12) / 1e9:.0f}" == "146"
    few = cost.break_even_bandwidth_bytes_per_s(2048, 512, 8, 400e12, num_ranks=4)
    assert few / cost.break_even_bandwidth_bytes_per_s(2048, 512, 8, 400e12) == 0.75


def test_amdahl_rows():
    rows = [
        (
            row.top_k,
            f"{row.training_ms / row.training_share:,.0f}",
            f"{row.inference_ms / row.inference_share:.0f}",
            f"{cost.amdahl_speedup(row.training_share, 4):.2f}",
            f"{cost.amdahl_speedup(row.inference_share, 4):.2f}",
        )
        for row in cost.PAPER_TABLE_1
    ]
    assert rows == [
        (1, "562", "185", "1.82", "1.62"),
        (2, "751", "204", "2.15", "1.96"),
        (4, "1,295", "339", "2.71", "2.46"),
        (6, "1,900", "528", "3.01", "2.85"),
        (8, "2,596", "769", "3.21", "3.12"),
    ]
    # With the all-to-all gains that were measured instead of four.
    assert [f"{cost.amdahl_speedup(share, gain):.2f}" for share, gain in ((0.841, 3.48), (0.918, 3.72))] == [
        "2.50",
        "3.04",
    ]


def test_random_routing_is_near_the_expectation():
    """Uniform routing of many tokens: within five standard errors."""
    exchange = cost.Exchange(width=1, num_experts=64, top_k=8, num_ranks=8)
    drawn = random.Random(0)
    routing = [drawn.sample(range(64), 8) for _ in range(4000)]
    rows = cost.count_sent(exchange, "latent_all_to_all", routing, 0).rows
    assert rows == pytest.approx(cost.expect_sent(exchange, "latent_all_to_all", 4000).rows, rel=0.01)
