"""Two forwards of experts with a shared base, equal but for rounding: materialised (the paper's) and fused.

With P_g = x W_g, P_u = x W_u once per token, whatever top_k is (arXiv 2503.01359 has neither fusion nor code; rows are
tokens)::

    h_i = act(P_g + x D_g,i + b_g,i) * (P_u + x D_u,i + b_u,i)            gated; act(P_u + x D_u,i + b_u,i) un-gated
    y   = (sum_i g_i h_i) W_d + sum_i (g_i h_i) D_d,i + sum_i g_i b_d,i

which asks that the gate g_i stands on the expert's output and that nothing nonlinear follows ``down``. A bias belongs to an
expert: it never goes into the base's product, where ``down`` would count it once instead of sum_i g_i times.

The fused forward of low-rank deltas has two ways to the same numbers, as ``ops.routed_adapter`` has:

* dense-masked: one choice of all tokens at a time, all experts' bottlenecks in one GEMM, those of other experts set to 0.
  No gather, no sort, no data-dependent shape; ``2 tokens N r`` FLOP per input and output, choice and matrix.
* grouped: pairs of token and expert sorted by expert. ``2 tokens r`` FLOP there, but it moves rows of the inner width.

Sparse and quantised deltas are always grouped: expert by expert, one dense delta at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.ders.delta_stacks import DeltaStack, LowRankStack
from hf_moe_ext.ops.routed_adapter import grouped_matmul

Path = Literal["dense", "grouped"]


@dataclass(frozen=True, eq=False)
class SharedBaseExperts:
    """The weights of one layer's experts.

    Attributes:
        first: base [2 * inner, hidden], gate rows before up rows; un-gated [inner, hidden].
        down: base [hidden, inner].
        deltas: of each matrix in the order of ``first``, then down: (gate, up, down) or (up, down).
        act: on the gate, or on the un-gated expert's one input.
        first_bias: [num_experts, 2 * inner] or [num_experts, inner]; None without.
        down_bias: [num_experts, hidden]; None without.
    """

    first: Tensor
    down: Tensor
    deltas: tuple[DeltaStack, ...]
    act: Callable[[Tensor], Tensor]
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """How many experts share the base."""
        return self.deltas[0].num_experts

    @property
    def inner_size(self) -> int:
        """Inner width of an expert."""
        return self.down.shape[1]

    def activate(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Gate and up, or up alone, each [..., inner], to the inner rows."""
        return self.act(parts[0]) * parts[1] if len(parts) == 2 else self.act(parts[0])


def materialised(hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts) -> Tensor:
    """``sum_i g_i E_i(x)``, each used expert's matrices built in turn: the reference, and what the paper does.

    Autograd keeps each used expert's matrices. ``W + D`` is summed in at least float32.

    Args:
        hidden: [tokens, hidden].
        index: [tokens, top_k] expert ids; ids outside ``0..num_experts-1`` are sentinels and add nothing.
        weights: [tokens, top_k] gates, of any sum.
        experts: the weights; cast to the dtype of ``hidden``, as autocast would.

    Returns:
        [tokens, hidden] in the dtype of ``hidden``, summed in at least float32.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    output = torch.zeros_like(hidden, dtype=wide)
    bases = (*experts.first.split(experts.inner_size), experts.down)
    first_biases = _unbind(experts.first_bias, experts.num_experts, hidden.dtype)
    down_biases = _unbind(experts.down_bias, experts.num_experts, hidden.dtype)
    for expert in range(experts.num_experts):
        token, choice = torch.where(index == expert)
        # Expert 0 runs on no rows too: without a graph, deltas would have no gradient, and other ranks would wait for it.
        if token.numel() == 0 and expert > 0:
            continue
        *firsts, down = (
            _add(base, stack.matrix(expert), hidden.dtype) for base, stack in zip(bases, experts.deltas, strict=True)
        )
        rows = F.linear(hidden[token], torch.cat(firsts), first_biases[expert])
        inner = experts.activate(rows.split(experts.inner_size, dim=-1))
        rows = F.linear(inner, down, down_biases[expert])
        output = output.index_add(0, token, rows.to(wide) * weights[token, choice, None].to(wide))
    return output.to(hidden.dtype)


def fused(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts, path: Path | None = None
) -> Tensor:
    """``sum_i g_i E_i(x)``, the base once per token; no expert's whole matrix is ever held.

    Arguments and result are those of ``materialised``.

    Args:
        hidden: [tokens, hidden].
        index: [tokens, top_k] expert ids; ids outside ``0..num_experts-1`` are sentinels and add nothing.
        weights: [tokens, top_k] gates, of any sum.
        experts: the weights; cast to the dtype of ``hidden``, as autocast would.
        path: of low-rank deltas, "dense" or "grouped"; None chooses.

    Raises:
        ValueError: "dense" with deltas of another form.
    """
    known = (index >= 0) & (index < experts.num_experts)
    weights = torch.where(known, weights, 0.0).to(torch.promote_types(hidden.dtype, torch.float32))
    stacks = tuple(stack for stack in experts.deltas if isinstance(stack, LowRankStack))
    if len(stacks) < len(experts.deltas):
        if path == "dense":
            raise ValueError("path 'dense' is for low-rank deltas only; leave path out, or pass 'grouped'")
        path = "grouped"
    if (path or choose_path(experts.num_experts, max(stack.rank for stack in stacks), hidden.dtype)) == "dense":
        return _fused_dense(hidden, index, weights, experts, stacks)
    return _fused_grouped(hidden, index, weights, experts)


# Bottlenecks of all experts up to which dense-masked is cheaper. Forward and backward on one CPU core in float32 (512
# tokens, hidden 1024, inner 1408), dense-masked and grouped against one dense FFN, top-1 / 2 / 4: 1.2 / 1.1 / 1.6 and 1.4 /
# 1.2 / 2.3 at 32, 1.5 / 1.5 / 2.1 and 1.3 / 1.5 / 2.6 at 128, 1.5 / - / 2.7 and 1.3 / - / 2.2 at 256, 2.1 / 2.8 / 4.4 and
# 1.1 / 1.4 / 2.7 at 512. An accelerator was not measured.
DENSE_LIMIT = 128


def choose_path(num_experts: int, rank: int, dtype: torch.dtype) -> Path:
    """The cheaper way for these sizes; dense where the grouped GEMM cannot run (float64, or float32 under compile)."""
    if num_experts * rank <= DENSE_LIMIT:
        return "dense"
    if dtype == torch.float64 or (torch.compiler.is_compiling() and dtype != torch.bfloat16):
        return "dense"
    return "grouped"


def _fused_dense(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts, stacks: tuple[LowRankStack, ...]
) -> Tensor:
    """A choice of all tokens at a time; every shape is known beforehand."""
    dtype, wide = hidden.dtype, weights.dtype
    *firsts, down = stacks
    biases = _split_bias(experts.first_bias, len(firsts))
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


def _flat_A(stack: LowRankStack, dtype: torch.dtype) -> Tensor:
    """[num_experts * rank, in]."""
    return stack.A.reshape(-1, stack.A.shape[2]).to(dtype)


def _flat_B(stack: LowRankStack, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[num_experts * rank, out], and below it the biases [num_experts, out]: one product adds both."""
    B = stack.B.transpose(1, 2).reshape(-1, stack.B.shape[1])
    return (B if bias is None else torch.cat([B, bias])).to(dtype)


def _mask(bottleneck: Tensor, mask: Tensor, with_bias: bool) -> Tensor:
    """The chosen expert's bottleneck in its place among zeros, and its 1 for the bias: [tokens, num_experts * (rank + 1)]."""
    masked = (bottleneck.view(*mask.shape, -1) * mask[..., None]).view_as(bottleneck)
    return torch.cat([masked, mask], dim=-1) if with_bias else masked


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


def _fused_grouped(hidden: Tensor, index: Tensor, weights: Tensor, experts: SharedBaseExperts) -> Tensor:
    """All pairs at once, sorted by expert."""
    dtype, wide = hidden.dtype, weights.dtype
    *firsts, down = experts.deltas
    pairs = _sort(index, experts.num_experts)
    bases = F.linear(hidden, experts.first.to(dtype)).split(experts.inner_size, dim=-1)
    biases = _split_bias(experts.first_bias, len(firsts))
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


def _split_bias(bias: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    """Of gate and up, or of up alone."""
    return (None,) * count if bias is None else bias.chunk(count, dim=-1)


def _pad(bias: Tensor) -> Tensor:
    """A row of zeros for the sentinels."""
    return F.pad(bias, (0, 0, 0, 1))


def _unbind(bias: Tensor | None, num_experts: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return (None,) * num_experts if bias is None else bias.to(dtype).unbind(0)


def _add(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Summed in at least float32, where a small delta survives, then cast."""
    work = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return (base.to(work) + delta.to(work)).to(dtype)
