"""Encoders of deltas: truncated SVD, random and magnitude drop, and the zero deltas that training starts from."""

import math

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_indices import Indices, SeededIndices, store_positions
from hf_moe_ext.ops.delta_metadata import LAYOUT, check_matrix, check_rank
from hf_moe_ext.ops.delta_positions import MaskStream, bernoulli_positions, check_drop_rate, count_kept
from hf_moe_ext.ops.deltas import LowRankDelta, SparseDelta


@torch.no_grad()
def low_rank_from_svd(delta: Tensor, rank: int, dtype: torch.dtype | None = None, layout: str = LAYOUT) -> LowRankDelta:
    """The nearest matrix of this rank in the Frobenius norm (truncated singular value decomposition).

    The roots of the singular values go to both factors, so that neither is badly scaled for training.

    Args:
        delta: [rows, cols]; decomposed in float64 if it is float64, else in float32.
        rank: at least 1, at most the smaller dimension.
        dtype: of the factors; None for the delta's.
        layout: how the matrix is stored.

    Raises:
        ValueError: no finite matrix, or a rank outside those bounds.
        TypeError: no floating-point tensor.
    """
    check_matrix("delta", delta)
    check_rank(rank, *delta.shape)
    U, S, Vh = torch.linalg.svd(delta.to(torch.promote_types(delta.dtype, torch.float32)), full_matrices=False)
    root, dtype = S[:rank].sqrt(), dtype or delta.dtype
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return LowRankDelta(A.to(dtype).contiguous(), B.to(dtype).contiguous(), layout)


def low_rank_at_birth(
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    layout: str = LAYOUT,
) -> LowRankDelta:
    """A zero delta to train: A Kaiming-uniform as LoRA has it, U(-1/sqrt(cols), 1/sqrt(cols)), B zero.

    The paper says that A is random and leaves its law open.

    Args:
        shape: rows and columns.
        rank: at least 1, at most the smaller dimension.
        dtype: of the factors.
        device: "meta" too, to count without memory.
        generator: of A.
        layout: how the matrix is stored.

    Raises:
        ValueError: a rank outside those bounds.
    """
    rows, cols = shape
    check_rank(rank, rows, cols)
    bound = 1 / math.sqrt(cols)
    A = torch.empty(rank, cols, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)
    return LowRankDelta(A, torch.zeros(rows, rank, dtype=dtype, device=device), layout)


@torch.no_grad()
def drop_at_random(
    delta: Tensor,
    drop_rate: float,
    stream: MaskStream,
    rescale: bool = True,
    exact: bool = False,
    stored: str | None = None,
    layout: str = LAYOUT,
) -> SparseDelta:
    """Keep a random share of the entries (DARE, arXiv 2311.03099, as DeRS Compression uses it).

    Args:
        delta: [rows, cols].
        drop_rate: p, the share that is dropped.
        stream: names the mask; another expert, matrix or layer has another one.
        rescale: divide what is kept by 1 - p, which makes the expectation over masks the delta itself.
        exact: keep exactly round(S (1 - p)) instead of each with probability 1 - p.
        stored: None to regenerate the positions; else a form of ``delta_indices.store_positions``.
        layout: how the matrix is stored.

    Raises:
        ValueError: no finite matrix, drop_rate outside (0, 1), a form that cannot hold the positions.
        TypeError: no floating-point tensor.
    """
    check_matrix("delta", delta)
    check_drop_rate(drop_rate)
    shape = (delta.shape[0], delta.shape[1])
    indices: Indices
    if exact:
        indices = SeededIndices.exact(shape, stream, drop_rate, layout)
        positions = indices.positions(delta.device)
    else:
        # Not ``SeededIndices.bernoulli``, which would generate them once more to count them.
        positions = bernoulli_positions(stream, delta.numel(), drop_rate, delta.device)
        indices = SeededIndices(shape, stream, drop_rate, len(positions), layout)
    if stored is not None:
        positions = positions.sort().values
        indices = store_positions(positions, shape, stored, layout)
    values = delta.reshape(-1)[positions]
    return SparseDelta(indices, values / (1 - drop_rate) if rescale else values)


@torch.no_grad()
def drop_small(delta: Tensor, drop_rate: float, stored: str = "bitmap", layout: str = LAYOUT) -> SparseDelta:
    """Keep the round(S (1 - p)) entries of largest magnitude, ties to the lowest position; never rescaled.

    Args:
        delta: [rows, cols].
        drop_rate: p.
        stored: form of the indices, which no seed can regenerate; see ``delta_indices.store_positions``.
        layout: how the matrix is stored.

    Raises:
        ValueError: no finite matrix, drop_rate outside (0, 1), a form that cannot hold the positions.
        TypeError: no floating-point tensor.
    """
    check_matrix("delta", delta)
    flat = delta.reshape(-1)
    num_kept = count_kept(len(flat), drop_rate)
    positions = flat.abs().sort(descending=True, stable=True).indices[:num_kept].sort().values
    indices = store_positions(positions, (delta.shape[0], delta.shape[1]), stored, layout)
    return SparseDelta(indices, flat[positions])


def sparse_at_birth(
    shape: tuple[int, int],
    drop_rate: float,
    stream: MaskStream,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = LAYOUT,
) -> SparseDelta:
    """A zero delta to train (the paper's SM): exactly round(S (1 - p)) random positions, fixed, values zero, no rescale.

    Args:
        shape: rows and columns.
        drop_rate: p.
        stream: names the mask.
        dtype: of the values; small steps vanish in bfloat16, so keep float32.
        device: of the values; "meta" too, to count without memory.
        layout: how the matrix is stored.

    Raises:
        ValueError: drop_rate outside (0, 1).
    """
    indices = SeededIndices.exact(shape, stream, drop_rate, layout)
    return SparseDelta(indices, torch.zeros(indices.num_kept, dtype=dtype, device=device))
