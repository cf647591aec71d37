"""All-to-all bytes against the paper's tables, to the last printed digit, and against counting by hand."""

import itertools
import random
from math import comb

import pytest

from hf_moe_ext.scaling import exchange

LAYERS, EXPERTS, TOP_K, RANKS, SEQUENCES, LENGTH = 24, 64, 8, 32, 256, 2048


def test_paper_all_to_all_bytes():
    def volume(width, sequences=SEQUENCES):
        return exchange.paper_iteration_all_to_all_bytes(width, TOP_K, LAYERS, RANKS, sequences, LENGTH)

    assert (volume(2048), volume(512)) == (1_597_727_834_112, 399_431_958_528)
    assert (volume(2048) / exchange.GIB_BYTES, volume(512) / exchange.GIB_BYTES) == (1488.0, 372.0)
    # A slip in the batch passes as the other block's number.
    assert volume(2048, sequences=64) / exchange.GIB_BYTES == 372.0


def test_distinct_ranks():
    found = {ranks: exchange.expected_ranks_per_token(64, ranks, 8) for ranks in (8, 32, 2)}
    assert f"{found[8]:.2f}" == "5.43"
    # Drawing with repetition, as is sometimes written, gives fewer ranks.
    repeated = {ranks: ranks * (1 - (1 - 1 / ranks) ** 8) for ranks in found}
    assert {ranks: f"{value:.2f}" for ranks, value in repeated.items()} == {8: "5.25", 32: "7.18", 2: "1.99"}
    assert all(found[ranks] > repeated[ranks] for ranks in found)
    # Over every choice of 3 of 8 experts on 4 ranks.
    choices = list(itertools.combinations(range(8), 3))
    assert len(choices) == comb(8, 3)
    mean = sum(len({expert // 2 for expert in choice}) for choice in choices) / len(choices)
    assert exchange.expected_ranks_per_token(8, 4, 3) == pytest.approx(mean, rel=1e-12)
    with pytest.raises(
        ValueError, match="ep_size must divide the 6 experts of a layer, got ep_size=4; possible: 1, 2, 3, 6"
    ):
        exchange.expected_ranks_per_token(6, 4, 2)


@pytest.mark.parametrize("implementation", exchange.IMPLEMENTATIONS)
def test_expectation_is_the_mean_of_exact_counts(implementation):
    """Over all routings of one token and all ranks."""
    wire = exchange.Exchange(width=4, num_experts=8, top_k=3, num_ranks=4)
    routings = list(itertools.combinations(range(8), 3))
    exact = [exchange.count_sent(wire, implementation, routings, rank) for rank in range(4)]
    expected = exchange.expect_sent(wire, implementation, len(routings))
    assert sum(sent.rows for sent in exact) / 4 == pytest.approx(expected.rows, rel=1e-12)
    assert sum(sent.pairs for sent in exact) / 4 == pytest.approx(expected.pairs, rel=1e-12)


def test_layer_bytes():
    wire = exchange.Exchange(width=512, num_experts=64, top_k=8, num_ranks=32)
    tokens = SEQUENCES * LENGTH // RANKS
    sent = exchange.expect_sent(wire, "all_to_all", tokens)
    step = exchange.layer_bytes(wire, "all_to_all", sent)
    assert step.payload * LAYERS * RANKS == 399_431_958_528  # the printed volume
    assert step.metadata == 31 * 2 * 8
    assert step.num_collectives == 5
    forward = exchange.layer_bytes(wire, "all_to_all", sent, exchange.INFERENCE)
    assert (step.payload / forward.payload, forward.num_collectives) == (2, 3)
    recomputed = exchange.layer_bytes(wire, "all_to_all", sent, exchange.RECOMPUTED)
    assert recomputed.payload / step.payload == 1.5
    full = exchange.layer_bytes(exchange.Exchange(2048, 64, 8, 32), "all_to_all", sent)
    assert step.payload / full.payload == 0.25
    assert step.metadata == full.metadata
    ours = exchange.layer_bytes(wire, "latent_all_to_all", exchange.Sent(rows=10, pairs=30))
    assert (ours.payload, ours.metadata) == (10 * 512 * 2 * 4, 31 * 16 + 30 * 12)
    assert ours.total == ours.payload + ours.metadata
    assert exchange.padded_rows(10, 1.2) == 12


def test_count_sent_by_hand():
    wire = exchange.Exchange(width=1, num_experts=4, top_k=2, num_ranks=2)
    routing = [[0, 1], [2, 3], [1, 2]]  # ranks 0 0 / 1 1 / 0 1
    assert exchange.count_sent(wire, "all_to_all", routing, 0) == exchange.Sent(rows=3, pairs=3)
    assert exchange.count_sent(wire, "latent_all_to_all", routing, 0) == exchange.Sent(rows=2, pairs=3)
    assert exchange.count_sent(wire, "latent_all_to_all", routing, 1) == exchange.Sent(rows=2, pairs=3)


def test_bad_values():
    with pytest.raises(ValueError, match="implementation must be one of all_to_all, latent_all_to_all, got 'deepep'"):
        exchange.expect_sent(exchange.Exchange(1, 4, 2, 2), "deepep", 1)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        exchange.Exchange(0, 4, 2, 2)
    with pytest.raises(ValueError, match="top_k must be at most num_experts=4, got 5"):
        exchange.Exchange(1, 4, 5, 2)


def test_break_even_bandwidth():
    assert f"{exchange.break_even_bandwidth_bytes_per_s(2048, 512, 8, 400e12) / 1e12:.1f}" == "4.7"
    assert f"{exchange.break_even_bandwidth_bytes_per_s(8192, 2048, 1, 400e12) / 1e9:.0f}" == "146"
    few = exchange.break_even_bandwidth_bytes_per_s(2048, 512, 8, 400e12, num_ranks=4)
    assert few / exchange.break_even_bandwidth_bytes_per_s(2048, 512, 8, 400e12) == 0.75


def test_amdahl_rows():
    rows = [
        (
            row.top_k,
            f"{row.training_ms / row.training_share:,.0f}",
            f"{row.inference_ms / row.inference_share:.0f}",
            f"{exchange.amdahl_speedup(row.training_share, 4):.2f}",
            f"{exchange.amdahl_speedup(row.inference_share, 4):.2f}",
        )
        for row in exchange.PAPER_TABLE_1
    ]
    assert rows == [
        (1, "562", "185", "1.82", "1.62"),
        (2, "751", "204", "2.15", "1.96"),
        (4, "1,295", "339", "2.71", "2.46"),
        (6, "1,900", "528", "3.01", "2.85"),
        (8, "2,596", "769", "3.21", "3.12"),
    ]
    # With the all-to-all gains that were measured instead of four.
    assert [f"{exchange.amdahl_speedup(share, gain):.2f}" for share, gain in ((0.841, 3.48), (0.918, 3.72))] == [
        "2.50",
        "3.04",
    ]


def test_random_routing_is_near_the_expectation():
    """Uniform routing of many tokens: within five standard errors."""
    wire = exchange.Exchange(width=1, num_experts=64, top_k=8, num_ranks=8)
    drawn = random.Random(0)
    routing = [drawn.sample(range(64), 8) for _ in range(4000)]
    rows = exchange.count_sent(wire, "latent_all_to_all", routing, 0).rows
    assert rows == pytest.approx(exchange.expect_sent(wire, "latent_all_to_all", 4000).rows, rel=0.01)


def test_dispatch_of_a_large_model():
    """4096 tokens, 8 of 256 experts, one per rank, width 7168, two bytes."""
    wire = exchange.Exchange(width=7168, num_experts=256, top_k=8, num_ranks=256)
    sent = exchange.expect_sent(wire, "all_to_all", 4096)
    forward = exchange.layer_bytes(wire, "all_to_all", sent, exchange.INFERENCE)
    assert sent.rows == 32_640
    assert f"{forward.payload / 2 / 1e6:.1f}" == "467.9"
    assert exchange.layer_bytes(wire, "all_to_all", sent).payload / 4096 == 456_960


def test_distinct_ranks_of_large_models():
    found = [exchange.expected_ranks_per_token(*sizes, 8) for sizes in ((256, 8), (256, 64), (64, 8))]
    assert [f"{value:.4f}" for value in found] == ["5.2947", "7.6758", "5.4326"]
    # At most min(K, EP), and K where each expert has a rank of its own.
    for experts, ranks, top_k in ((64, 4, 8), (64, 64, 8), (256, 256, 6)):
        assert exchange.expected_ranks_per_token(experts, ranks, top_k) <= min(top_k, ranks) + 1e-9
    assert exchange.expected_ranks_per_token(256, 256, 8) == pytest.approx(8, rel=1e-12)


@pytest.mark.parametrize("implementation", exchange.IMPLEMENTATIONS)
def test_one_rank_sends_nothing(implementation):
    wire = exchange.Exchange(width=64, num_experts=8, top_k=2, num_ranks=1)
    sent = exchange.expect_sent(wire, implementation, 100)
    assert exchange.layer_bytes(wire, implementation, sent).total == 0
