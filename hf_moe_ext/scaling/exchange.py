"""Bytes that expert parallelism sends, and when sending less pays: the one owner of these formulas.

``paper_*`` is exactly as printed in BigMac's Table 3 (arXiv 2502.16927); the others count what a layer really sends.

Symbols: H `hidden_size`, R `latent_size` (r = R / H), E `num_experts`, k `top_k`, L `num_layers`, P `num_ranks` that share a
layer's experts, b `num_sequences`, s `sequence_length`, T `num_tokens` of one rank. 1 GiB is 2**30 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

GIB_BYTES = 2**30

Implementation = Literal["all_to_all", "latent_all_to_all"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("all_to_all", "latent_all_to_all")


def paper_iteration_all_to_all_bytes(
    width: int, top_k: int, num_layers: int, num_ranks: int, num_sequences: int, sequence_length: int
) -> float:
    """Bytes of one training iteration over all ranks: 8 b s L width k (P-1)/P; the paper prints GiB as "GB".

    The 8 is dispatch and combine, forward and backward, two bytes an element. ``width`` is H for CDAC, R for DCCA;
    ``num_sequences`` of the whole group.
    """
    whole = 8 * num_sequences * sequence_length * num_layers * width * top_k * (num_ranks - 1)
    return whole // num_ranks if whole % num_ranks == 0 else whole / num_ranks


def expected_ranks_per_token(num_experts: int, num_ranks: int, top_k: int) -> float:
    """How many distinct ranks hold a token's k distinct experts, for uniform routing: P (1 - C(E - E/P, k) / C(E, k))."""
    check_ranks(num_experts, num_ranks)
    elsewhere = comb(num_experts - num_experts // num_ranks, top_k) / comb(num_experts, top_k)
    return num_ranks * (1 - elsewhere)


def check_ranks(num_experts: int, num_ranks: int) -> None:
    """Every rank holds equally many experts.

    Raises:
        ValueError: the number of ranks does not divide the number of experts.
    """
    if num_ranks < 1 or num_experts % num_ranks:
        possible = ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)
        raise ValueError(
            f"ep_size must divide the {num_experts} experts of a layer, got ep_size={num_ranks}; possible: {possible}"
        )


@dataclass(frozen=True)
class Exchange:
    """What determines the size of a layer's exchanges on one rank.

    Attributes:
        width: elements of a row on the wire: H, or R for DCCA.
        num_experts: E of the whole layer.
        top_k: k.
        num_ranks: P, the ranks that share the experts.
        element_bytes: of a hidden state (2 in bfloat16).
        weight_bytes: of a routing weight as ``latent_all_to_all`` sends it: 4, or 8 for float64; its ids take as much.
    """

    width: int
    num_experts: int
    top_k: int
    num_ranks: int
    element_bytes: int = 2
    weight_bytes: int = 4

    def __post_init__(self) -> None:
        check_ranks(self.num_experts, self.num_ranks)
        for name in ("width", "top_k", "element_bytes", "weight_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}")


@dataclass(frozen=True)
class Sent:
    """What one rank sends to other ranks in one layer and one forward pass; rows that stay on the rank are not counted.

    Attributes:
        rows: hidden states, each way.
        pairs: (token, expert) pairs.
    """

    rows: float
    pairs: float


def expect_sent(exchange: Exchange, implementation: Implementation, num_tokens: float) -> Sent:
    """Expected rows and pairs for uniform routing of this rank's tokens; exact in the mean over ranks only."""
    _check_implementation(implementation)
    off_rank = (exchange.num_ranks - 1) / exchange.num_ranks
    pairs = num_tokens * exchange.top_k * off_rank
    if implementation == "all_to_all":
        return Sent(pairs, pairs)
    distinct = expected_ranks_per_token(exchange.num_experts, exchange.num_ranks, exchange.top_k)
    return Sent(num_tokens * distinct * off_rank, pairs)


def count_sent(
    exchange: Exchange, implementation: Implementation, top_k_index: Sequence[Sequence[int]], rank: int
) -> Sent:
    """Exact rows and pairs of one rank from its tokens' global expert ids, [tokens][top_k]."""
    _check_implementation(implementation)
    local = exchange.num_experts // exchange.num_ranks
    owners = [[expert // local for expert in token] for token in top_k_index]
    pairs = sum(owner != rank for token in owners for owner in token)
    rows = pairs if implementation == "all_to_all" else sum(len(set(token) - {rank}) for token in owners)
    return Sent(rows, pairs)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes one rank sends to other ranks in one layer.

    Attributes:
        payload: hidden states, gradients of them included; shrinks with the width.
        metadata: counts, ids and routing weights; does not.
        num_collectives: all-to-alls.
    """

    payload: float
    metadata: float
    num_collectives: int

    @property
    def total(self) -> float:
        """Payload and metadata."""
        return self.payload + self.metadata


@dataclass(frozen=True)
class Passes:
    """How often a layer is run in one step: a forward pass, a backward pass, forward again if it is recomputed."""

    forward: int = 1
    backward: int = 1
    recompute: int = 0


INFERENCE, TRAINING, RECOMPUTED = Passes(1, 0, 0), Passes(1, 1, 0), Passes(1, 1, 1)


def layer_bytes(
    exchange: Exchange, implementation: Implementation, sent: Sent, passes: Passes = TRAINING
) -> LayerBytes:
    """Bytes and collectives of one layer on one rank, from the rows and pairs of one forward pass.

    Each pass moves every row twice (out and back). Metadata: ``all_to_all`` sends one int64 count per expert and keeps
    weights at home; ``latent_all_to_all`` two int64 per rank, an id and a weight per pair, and a weight's gradient per
    pair backward.
    """
    _check_implementation(implementation)
    forward = passes.forward + passes.recompute
    payload = 2 * sent.rows * exchange.width * exchange.element_bytes * (forward + passes.backward)
    peers = exchange.num_ranks - 1
    if implementation == "all_to_all":
        counts = exchange.num_experts // exchange.num_ranks * peers * 8
        return LayerBytes(payload, counts * forward, 3 * forward + 2 * passes.backward)
    metadata = (16 * peers + 2 * exchange.weight_bytes * sent.pairs) * forward
    metadata += exchange.weight_bytes * sent.pairs * passes.backward
    return LayerBytes(payload, metadata, 4 * forward + 3 * passes.backward)


def padded_rows(rows: float, capacity_factor: float) -> float:
    """Rows that travel when every expert's share is padded to a capacity; ours and the stock dispatch are dropless."""
    return rows * capacity_factor


def _check_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")


# --- When it pays -----------------------------------------------------------------------------------------------------


def break_even_bandwidth_bytes_per_s(
    hidden_size: int,
    latent_size: int,
    top_k: int,
    flops_per_s: float,
    element_bytes: int = 2,
    num_ranks: int | None = None,
) -> float:
    """Link speed of a rank below which DCCA's saved bytes outweigh its projections: k(1-r)B (P-1)/P FLOPS / (2R).

    Args:
        hidden_size: H.
        latent_size: R.
        top_k: k.
        flops_per_s: what the rank computes the projections at.
        element_bytes: B.
        num_ranks: P; None for many.
    """
    off_rank = 1.0 if num_ranks is None else (num_ranks - 1) / num_ranks
    r = latent_size / hidden_size
    return top_k * (1 - r) * element_bytes * off_rank * flops_per_s / (2 * latent_size)


def amdahl_speedup(share: float, cut: float) -> float:
    """Speed-up of the whole when the part that takes ``share`` of the time becomes ``cut`` times faster."""
    return 1 / (1 - share + share / cut)


@dataclass(frozen=True)
class MeasuredShare:
    """A row of BigMac's Table 1: all-to-all time of CDAC, 64 experts on 32 ranks, and its share of an iteration."""

    top_k: int
    training_ms: float
    training_share: float
    inference_ms: float
    inference_share: float


PAPER_TABLE_1 = (
    MeasuredShare(1, 336.9, 0.599, 94.9, 0.512),
    MeasuredShare(2, 535.6, 0.713, 132.9, 0.652),
    MeasuredShare(4, 1089.5, 0.841, 268.7, 0.792),
    MeasuredShare(6, 1692.8, 0.891, 457.0, 0.865),
    MeasuredShare(8, 2383.4, 0.918, 696.5, 0.906),
)
