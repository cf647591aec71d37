"""The fused forward of any deltas with pairs of token and expert sorted by expert; called by ``forward.fused``."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.ders.delta_stacks import DeltaStack, LowRankStack
from hf_moe_ext.ders.shared_base import SharedBaseExperts
from hf_moe_ext.ops.routed_adapter import grouped_matmul


class _Pairs(NamedTuple):
    """Pairs of token and choice, sorted by expert, sentinels last.

    Attributes:
        expert: [pairs], ``num_experts`` for sentinels.
        token: [pairs].
        order: [pairs] row-major place of each in [tokens, top_k].
        top_k: choices of a token.
        sizes: [num_experts + 1] pairs of each expert.
    """

    expert: Tensor
    token: Tensor
    order: Tensor
    top_k: int
    sizes: Tensor

    def combine(self, rows: Tensor) -> Tensor:
        """Sum over each token's choices: [pairs, width] to [tokens, width]; deterministic, unlike ``index_add``."""
        places = torch.arange(len(self.order), device=rows.device)
        back = torch.empty_like(self.order).scatter(0, self.order, places)
        return rows[back].view(-1, self.top_k, rows.shape[1]).sum(dim=1)


def _sort(index: Tensor, num_experts: int) -> _Pairs:
    known = (index >= 0) & (index < num_experts)
    expert, order = torch.where(known, index, num_experts).reshape(-1).sort(stable=True)
    sizes = expert.new_zeros(num_experts + 1).scatter_add(0, expert, torch.ones_like(expert))
    return _Pairs(expert, order // index.shape[1], order, index.shape[1], sizes)


def grouped(hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts) -> Tensor:
    """All pairs at once, sorted by expert."""
    dtype, wide = hidden.dtype, weights.dtype
    *firsts, down = experts.deltas
    pairs = _sort(index, experts.num_experts)
    bases = F.linear(hidden, experts.first.to(dtype)).split(experts.inner_size, dim=-1)
    biases = experts.split_first_bias()
    rows = hidden[pairs.token]
    parts = []
    for base, stack, bias in zip(bases, firsts, biases, strict=True):
        part = base[pairs.token] + _thin(rows, stack, pairs)
        parts.append(part if bias is None else part + _pad(bias)[pairs.expert].to(dtype))
    gates = weights.reshape(-1)[pairs.order, None]
    inner = experts.activate(tuple(parts)).to(wide) * gates
    back = _thin(inner.to(dtype), down, pairs).to(wide)
    if experts.down_bias is not None:
        back = back + gates * _pad(experts.down_bias)[pairs.expert]
    output = F.linear(pairs.combine(inner).to(dtype), experts.down.to(dtype)).to(wide) + pairs.combine(back)
    return output.to(dtype)


def _thin(rows: Tensor, stack: DeltaStack, pairs: _Pairs) -> Tensor:
    """``rows D^T`` of each pair's expert, [pairs, in] to [pairs, out]; 0 for sentinels."""
    if not isinstance(stack, LowRankStack):
        return _decoded_thin(rows, stack, pairs.sizes)
    A, B, out = stack.A.to(rows.dtype), stack.B.to(rows.dtype), stack.B.shape[1]
    # One more expert of zeros serves the sentinels: the kernel leaves rows outside all groups uninitialised, forward and
    # backward. All widths are padded to the 16 bytes that it asks for.
    in_padding, out_padding, rank_padding = (
        -size % (16 // rows.element_size()) for size in (rows.shape[1], out, stack.rank)
    )
    ends = pairs.sizes.cumsum(0).to(torch.int32)
    rows = F.pad(rows, (0, in_padding)) if in_padding else rows
    bottleneck = grouped_matmul(rows, F.pad(A, (0, in_padding, 0, rank_padding, 0, 1)).transpose(1, 2), ends)
    padded_B = F.pad(B, (0, rank_padding, 0, out_padding, 0, 1))
    return grouped_matmul(bottleneck, padded_B.transpose(1, 2), ends)[:, :out]


def _decoded_thin(rows: Tensor, stack: DeltaStack, sizes: Tensor) -> Tensor:
    groups = rows.split(sizes.tolist())
    # As in ``materialised``, expert 0 runs on no rows too.
    used = [stack.linear(group, e) for e, group in enumerate(groups[:-1]) if e == 0 or len(group)]
    return torch.cat([*used, used[0].new_zeros(len(groups[-1]), used[0].shape[1])])


def _pad(bias: Tensor) -> Tensor:
    """A row of zeros for the sentinels."""
    return F.pad(bias, (0, 0, 0, 1))
