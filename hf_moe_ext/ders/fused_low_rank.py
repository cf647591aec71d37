"""The fused forward of low-rank deltas without a sort: dense-masked for many tokens, gathered or pair by pair for few.

Called by ``forward.fused``, which says what they compute and zeroes the gates of sentinels, but for ``pairwise``.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.ders.delta_stacks import LowRankStack
from hf_moe_ext.ders.shared_base import SharedBaseExperts


def dense_masked(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts, stacks: tuple[LowRankStack, ...]
) -> Tensor:
    """A choice of all tokens at a time; every shape is known beforehand."""
    dtype, wide = hidden.dtype, weights.dtype
    *firsts, down = stacks
    biases = experts.split_first_bias()
    firsts_A = [_flat_A(stack, dtype) for stack in firsts]
    firsts_B = [_flat_B(stack, bias, dtype) for stack, bias in zip(firsts, biases, strict=True)]
    down_A, down_B = _flat_A(down, dtype), _flat_B(down, experts.down_bias, dtype)

    bases = F.linear(hidden, experts.first.to(dtype)).split(experts.inner_size, dim=-1)
    bottlenecks = F.linear(hidden, torch.cat(firsts_A)).split([len(A) for A in firsts_A], dim=-1)
    # [tokens, top_k, num_experts]; a sentinel's row is 0.
    chosen = (index[..., None] == torch.arange(experts.num_experts, device=index.device)).to(dtype)
    inners, backs = [], []
    for choice in range(index.shape[1]):
        mask = chosen[:, choice]
        parts = tuple(
            torch.addmm(base, _mask(bottleneck, mask, with_bias=bias is not None), B)
            for base, bottleneck, B, bias in zip(bases, bottlenecks, firsts_B, biases, strict=True)
        )
        inner = experts.activate(parts).to(wide) * weights[:, choice, None]
        inners.append(inner)
        backs.append(_mask(F.linear(inner.to(dtype), down_A), mask, with_bias=False).to(wide))
    # In turn: a stack would be one more copy of all of them.
    combined, back = reduce(torch.add, inners), reduce(torch.add, backs)
    if experts.down_bias is not None:
        back = torch.cat([back, (chosen * weights[..., None]).sum(dim=1)], dim=-1)
    output = F.linear(combined.to(dtype), experts.down.to(dtype)).to(wide) + back.to(dtype) @ down_B
    return output.to(dtype)


def gathered(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts, stacks: tuple[LowRankStack, ...]
) -> Tensor:
    """The factors of the pairs, and of them only, copied out for batched products: [pairs, rank, in], [pairs, out, rank].

    Written for few launches: a decoding step's base takes less time than some thirty of them.
    """
    dtype, wide = hidden.dtype, weights.dtype
    tokens, top_k = index.shape
    *firsts, down = stacks
    # A sentinel borrows an expert; its gate is 0.
    chosen = index.clamp(0, experts.num_experts - 1).view(-1)
    bases = F.linear(hidden, experts.first.to(dtype)).view(tokens, len(firsts), 1, -1).unbind(1)
    parts = []
    for base, stack, bias in zip(bases, firsts, experts.split_first_bias(), strict=True):
        A, B = stack.A.index_select(0, chosen).to(dtype), stack.B.index_select(0, chosen).to(dtype)
        bottleneck = torch.bmm(A.view(tokens, top_k * stack.rank, -1), hidden[:, :, None])
        part = torch.bmm(B, bottleneck.view(tokens * top_k, stack.rank, 1)).view(tokens, top_k, -1) + base
        parts.append(part if bias is None else part + bias.index_select(0, chosen).to(dtype).view_as(part))
    inner = experts.activate(tuple(parts))
    A, B = down.A.index_select(0, chosen).to(dtype), down.B.index_select(0, chosen).to(dtype)
    bottleneck = torch.bmm(A, inner.view(tokens * top_k, -1, 1)).to(wide) * weights.view(-1, 1, 1)
    back = torch.bmm(B, bottleneck.to(dtype)).to(wide).view(tokens, top_k, -1).sum(dim=1)
    if experts.down_bias is not None:
        own = experts.down_bias.index_select(0, chosen).to(wide)
        back = back + torch.bmm(weights[:, None], own.view(tokens, top_k, -1))[:, 0]
    combined = torch.bmm(weights[:, None], inner.to(wide))[:, 0]
    return (F.linear(combined.to(dtype), experts.down.to(dtype)) + back).to(dtype)


def pairwise(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts, stacks: tuple[LowRankStack, ...]
) -> Tensor:
    """Pair by pair, its factors read where they lie; asks the device for ids and gates. For one token on a CPU.

    As few operations as can be: one of them takes a few hundredths of the time of a token's base.
    """
    if len(hidden) != 1:
        rows = [(hidden[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(len(hidden))]
        return torch.cat([pairwise(*row, experts, stacks) for row in rows]) if rows else torch.zeros_like(hidden)
    dtype, wide = hidden.dtype, weights.dtype
    *firsts, down = stacks
    biases = experts.split_first_bias()
    bases = F.linear(hidden, _cast(experts.first, dtype)).view(len(firsts), -1).unbind(0)
    row = hidden[0]
    # A sentinel borrows an expert at a gate of 0.
    pairs = [
        (i, gate) if 0 <= i < experts.num_experts else (0, gate * 0.0)
        for i, gate in zip(index[0].tolist(), weights[0].unbind(0), strict=True)
    ]
    inners = []
    for i, gate in pairs:
        parts = []
        for base, stack, bias in zip(bases, firsts, biases, strict=True):
            base = base if bias is None else base + _cast(bias[i], dtype)
            parts.append(torch.addmv(base, _cast(stack.B[i], dtype), _cast(stack.A[i], dtype).mv(row)))
        inners.append(_cast(experts.activate(tuple(parts)), wide) * gate)
    combined = reduce(torch.add, inners)
    output = _cast(F.linear(_cast(combined, dtype), _cast(experts.down, dtype)), wide)
    for (i, gate), inner in zip(pairs, inners, strict=True):
        output = torch.addmv(
            output, _cast(down.B[i], wide), _cast(_cast(down.A[i], dtype).mv(_cast(inner, dtype)), wide)
        )
        if experts.down_bias is not None:
            output = output + gate * _cast(experts.down_bias[i], wide)
    return _cast(output, dtype)[None]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A comparison costs a tenth of a call that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _flat_A(stack: LowRankStack, dtype: torch.dtype) -> Tensor:
    """[num_experts * rank, in]."""
    return stack.A.reshape(-1, stack.A.shape[2]).to(dtype)


def _flat_B(stack: LowRankStack, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[num_experts * rank, out], and below it the biases [num_experts, out]: one product adds both."""
    B = stack.B.transpose(1, 2).reshape(-1, stack.B.shape[1])
    return (B if bias is None else torch.cat([B, bias])).to(dtype)


def _mask(bottleneck: Tensor, mask: Tensor, with_bias: bool) -> Tensor:
    """The chosen expert's bottleneck in its place among zeros, and its 1 for the bias: [tokens, num_experts * (rank + 1)]."""
    rank = bottleneck.shape[1] // mask.shape[1]
    masked = (bottleneck.view(*mask.shape, rank) * mask[..., None]).view_as(bottleneck)
    return torch.cat([masked, mask], dim=-1) if with_bias else masked
