"""``sum_n w[t, n] * B[i] act(A[i] h[t])`` with ``i = index[t, n]``: the one primitive under every PERFT variant.

Three ways to the same numbers:

* dense-masked: all experts' bottlenecks in one GEMM, the gate scattered over them, one GEMM back. No gather, no sort,
  no data-dependent shape; ``4 tokens M r hidden`` FLOP and ``tokens * M * r`` activations.
* grouped: token-expert pairs sorted by expert, two grouped GEMMs. ``4 tokens top_k r hidden`` FLOP, but it moves
  ``tokens * top_k * hidden`` values through memory four times (gather, scatter, and both again backwards).
* gathered: the chosen experts' matrices are copied out, pair by pair, for batched GEMMs. For the few tokens of a decoding
  step, which use few of many experts; reading the others' weights is then most of the dense work.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
Path = Literal["dense", "grouped", "gathered"]

# Dense-masked work per token is 4*M*r*hidden FLOP, grouped moves about 8*top_k*hidden values instead: hidden cancels,
# so the choice hangs on M*r/top_k and on how many FLOP the device does per value moved. Forward and backward on one CPU
# core (E, 64 and 128 experts, top-8), the two are equal in float32 at 130 (512 tokens, hidden 512 or 1024) to 260 (2048
# tokens, hidden 2048), in bfloat16 with matrix instructions near 1000 (512 tokens, hidden 1024). By its FLOP per byte
# an accelerator crosses near 160 in float32 and at 600 or above in half precision; that is not measured. So dense serves
# R, D, S always and, in half precision, E up to 256 experts of rank 16.
DENSE_LIMIT_FLOAT32 = 192
DENSE_LIMIT_HALF = 512


def choose_path(num_experts: int, rank: int, top_k: int, dtype: torch.dtype) -> Path:
    """The cheaper path for these sizes; dense where the grouped GEMM cannot run (float64, or float32 under compile)."""
    limit = DENSE_LIMIT_FLOAT32 if dtype == torch.float32 else DENSE_LIMIT_HALF
    if num_experts * rank <= limit * top_k:
        return "dense"
    if dtype == torch.float64 or (torch.compiler.is_compiling() and dtype != torch.bfloat16):
        return "dense"
    return "grouped"


def routed_adapter(
    hidden: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    scale: float = 1.0,
    activation: Activation | None = None,
    dropout: float = 0.0,
    path: Path | None = None,
) -> Tensor:
    """Sum of the chosen adapters' outputs, weighted.

    Args:
        hidden: [tokens, hidden] block input.
        A: [num_experts, r, hidden] down projections, or [1, r, hidden]: one that all experts share.
        B: [num_experts, hidden, r] up projections.
        index: [tokens, top_k] adapter ids; ids outside ``0..num_experts-1`` are sentinels and contribute nothing.
            None: every adapter serves every token with weight 1.
        weights: [tokens, top_k], given exactly when ``index`` is.
        scale: factor on the result (``lora_alpha / r``).
        activation: applied to the bottleneck (parallel adapter); None for LoRA.
        dropout: probability; on the input of a LoRA adapter (one mask per token, shared by its experts), on the
            bottleneck before the activation of a parallel adapter.
        path: "dense", "grouped" or "gathered"; None chooses.

    Returns:
        [tokens, hidden] in the dtype of ``hidden``. A and B are cast to it, as autocast would.

    Raises:
        ValueError: ``index`` without ``weights`` or the other way round.
    """
    if (index is None) != (weights is None):
        raise ValueError("index and weights come together: pass both, or neither for all adapters with weight 1")
    if activation is None and dropout > 0:
        hidden, dropout = F.dropout(hidden, dropout), 0.0
    if index is None or weights is None:
        return _dense(hidden, A.to(hidden.dtype), B.to(hidden.dtype), None, scale, activation, dropout)
    num_experts, _, rank = B.shape
    weights = weights.to(hidden.dtype)
    index = torch.where((index < 0) | (index > num_experts), num_experts, index)
    # Decoding: gathering reads and writes a pair's matrices, twice what dense reads of an expert. Not in training, where
    # the backward would scatter them back.
    if path is None and not torch.is_grad_enabled() and 4 * index.numel() <= num_experts:
        path = "gathered"
    if path == "gathered":
        return _gathered(hidden, A, B, index, weights, scale, activation, dropout)
    A, B = A.to(hidden.dtype), B.to(hidden.dtype)
    if (path or choose_path(num_experts, rank, index.shape[1], hidden.dtype)) == "grouped":
        return _grouped(hidden, A, B, index, weights, scale, activation, dropout)
    gate = hidden.new_zeros(hidden.shape[0], num_experts + 1).scatter_add(1, index, weights)[:, :num_experts]
    return _dense(hidden, A, B, gate, scale, activation, dropout)


def _dense(
    hidden: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float,
    activation: Activation | None,
    dropout: float,
) -> Tensor:
    num_experts, width, rank = B.shape
    bottleneck = _activate(F.linear(hidden, A.reshape(-1, width)), activation, dropout)
    if gate is not None:
        # [tokens, 1, r] where the experts share one A.
        bottleneck = (bottleneck.view(-1, A.shape[0], rank) * gate[:, :, None]).view(-1, num_experts * rank)
    elif A.shape[0] < num_experts:
        bottleneck = bottleneck.repeat(1, num_experts)
    # The scale goes on the small tensor, not on [tokens, hidden].
    bottleneck = bottleneck * scale
    if not torch.is_grad_enabled() and hidden.shape[0] <= rank:
        # Decoding: laying out B anew for one GEMM moves num_experts * rank * hidden values, a GEMM per expert and their
        # sum num_experts * tokens * hidden.
        per_expert = bottleneck.view(-1, num_experts, rank).transpose(0, 1)
        return torch.bmm(per_expert, B.transpose(1, 2)).sum(dim=0)
    return bottleneck @ B.transpose(1, 2).reshape(num_experts * rank, width)


def _grouped(
    hidden: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor,
    weights: Tensor,
    scale: float,
    activation: Activation | None,
    dropout: float,
) -> Tensor:
    num_experts, width, rank = B.shape
    shared_A = A.shape[0] < num_experts
    # One more expert of zeros serves the sentinels, so that every row belongs to a group: the kernel leaves rows
    # outside all groups uninitialised, forward and backward. Both widths are padded to the 16 bytes the kernel asks for.
    rank_padding, width_padding = (-size % (16 // hidden.element_size()) for size in (rank, width))
    A, B = F.pad(A, (0, width_padding, 0, rank_padding, 0, 1)), F.pad(B, (0, rank_padding, 0, width_padding, 0, 1))
    if width_padding:
        hidden = F.pad(hidden, (0, width_padding))
    pair_expert, order = index.reshape(-1).sort(stable=True)
    group_sizes = pair_expert.new_zeros(num_experts + 1).scatter_add(0, pair_expert, torch.ones_like(pair_expert))
    ends = group_sizes.cumsum(0).to(torch.int32)

    token = order // index.shape[1]
    # A shared A once per token, then copied to its pairs.
    bottleneck = F.linear(hidden, A[0])[token] if shared_A else grouped_matmul(hidden[token], A.transpose(1, 2), ends)
    bottleneck = _activate(bottleneck, activation, dropout) * (weights.reshape(-1)[order] * scale)[:, None]
    pairs = grouped_matmul(bottleneck, B.transpose(1, 2), ends)
    # Gather back and sum over choices: unlike index_add this is deterministic on an accelerator.
    back = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    return pairs[back].view(*index.shape, width + width_padding).sum(dim=1)[:, :width]


def _gathered(
    hidden: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor,
    weights: Tensor,
    scale: float,
    activation: Activation | None,
    dropout: float,
) -> Tensor:
    num_experts, width, rank = B.shape
    tokens, top_k = index.shape
    A = A.expand(num_experts, rank, width)
    weights = torch.where(index < num_experts, weights, 0.0) * scale  # a sentinel borrows the last expert, for nothing
    chosen = index.clamp(max=num_experts - 1).reshape(-1)
    A, B = A[chosen].to(hidden.dtype), B[chosen].to(hidden.dtype)
    bottleneck = A.view(tokens, top_k * rank, width) @ hidden[:, :, None]
    bottleneck = _activate(bottleneck.view(tokens * top_k, rank), activation, dropout) * weights.reshape(-1, 1)
    return (B @ bottleneck[:, :, None]).view(tokens, top_k, width).sum(dim=1)


def _activate(bottleneck: Tensor, activation: Activation | None, dropout: float) -> Tensor:
    if dropout > 0:
        bottleneck = F.dropout(bottleneck, dropout)
    return bottleneck if activation is None else activation(bottleneck)


def grouped_matmul(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """``rows[start:end] @ matrices[i]`` for each group; rows [pairs, in], matrices [groups, in, out], ends [groups]."""
    if rows.dtype != torch.float64:
        return F.grouped_mm(rows, matrices, offs=ends)
    # There is no such kernel in float64: a loop, for tests.
    starts = [0, *ends.tolist()]
    return torch.cat([rows[a:b] @ matrix for a, b, matrix in zip(starts, starts[1:], matrices, strict=False)])
