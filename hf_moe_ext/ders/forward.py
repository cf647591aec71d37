"""Two forwards of experts with a shared base, equal but for rounding: materialised (the paper's) and fused.

With P_g = x W_g, P_u = x W_u once per token, whatever top_k is (arXiv 2503.01359 has neither fusion nor code; rows are
tokens)::

    h_i = act(P_g + x D_g,i + b_g,i) * (P_u + x D_u,i + b_u,i)            gated; act(P_u + x D_u,i + b_u,i) un-gated
    y   = (sum_i g_i h_i) W_d + sum_i (g_i h_i) D_d,i + sum_i g_i b_d,i

which asks that the gate g_i stands on the expert's output and that nothing nonlinear follows ``down``. A bias belongs to an
expert: it never goes into the base's product, where ``down`` would count it once instead of sum_i g_i times.

The fused forward of low-rank deltas has four ways to the same numbers:

* dense-masked: one choice of all tokens at a time, all experts' bottlenecks in one GEMM, those of other experts set to 0.
  No gather, no sort, no data-dependent shape; ``2 tokens N r`` FLOP per input and output, choice and matrix.
* gathered: the factors of each pair of token and expert copied out. For the few tokens of a decoding step.
* pairwise: one pair at a time, nothing copied. For one token on a CPU.
* grouped: pairs of token and expert sorted by expert. ``2 tokens r`` FLOP there, but it moves rows of the inner width.

Sparse and quantised deltas are always grouped: expert by expert, one dense delta at a time.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.ders.delta_stacks import LowRankStack
from hf_moe_ext.ders.fused_grouped import grouped
from hf_moe_ext.ders.fused_low_rank import dense_masked, gathered, pairwise
from hf_moe_ext.ders.shared_base import SharedBaseExperts, refuse_fused

Path = Literal["dense", "grouped", "gathered", "pairwise"]


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
        gates = weights[token, choice, None].to(wide)
        rows = hidden[token]
        if experts.gates_on_input:
            rows, gates = (rows * gates).to(hidden.dtype), torch.ones_like(gates)
        rows = F.linear(rows, torch.cat(firsts), first_biases[expert])
        inner = experts.activate(rows.split(experts.inner_size, dim=-1))
        rows = F.linear(inner, down, down_biases[expert])
        if experts.post_norm is not None:
            rows = experts.post_norm(rows)
        output = output.index_add(0, token, rows.to(wide) * gates)
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
        path: of low-rank deltas, "dense", "grouped", "gathered" or "pairwise"; None chooses.

    Raises:
        ValueError: another path than "grouped" with deltas of another form; a norm behind the experts, gates on their inputs.
    """
    refuse_fused(experts.post_norm, experts.gates_on_input)
    weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    stacks = tuple(stack for stack in experts.deltas if isinstance(stack, LowRankStack))
    if len(stacks) < len(experts.deltas):
        if path not in (None, "grouped"):
            raise ValueError(f"path {path!r} is for low-rank deltas only; leave path out, or pass 'grouped'")
        path = "grouped"
    path = path or choose_few(index, experts.num_experts)
    if path == "pairwise":
        return pairwise(hidden, index, weights, experts, stacks)
    weights = weights.masked_fill(index != index.clamp(0, experts.num_experts - 1), 0.0)
    path = path or choose_path(experts.num_experts, max(stack.rank for stack in stacks), hidden.dtype)
    if path == "grouped":
        return grouped(hidden, index, weights, experts)
    return (gathered if path == "gathered" else dense_masked)(hidden, index, weights, experts, stacks)


def choose_few(index: Tensor, num_experts: int) -> Path | None:
    """The way of a decoding step, [tokens, top_k] of it; None for more tokens, and in training."""
    # In training the backward would scatter the factors back. Up to here gathering copies no more than dense-masked.
    if torch.is_grad_enabled() or not 0 < index.numel() <= num_experts:
        return None
    # One token, float32 (hidden 1024, inner 2816, 8 experts of rank 4) on a CPU core: top-1 / 2 / 4 take 1.12 / 1.22 / 1.29 of
    # one dense FFN's time, gathered 1.23 / 1.34 / 1.30 (model_cards/ders-upcycle.md and its history); more tokens were not
    # measured. A compiler or a fake tensor has no ids to ask for.
    plain = type(index) is Tensor and index.device.type == "cpu" and not torch.compiler.is_compiling()
    return "pairwise" if plain and len(index) == 1 else "gathered"


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


def _unbind(bias: Tensor | None, num_experts: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return (None,) * num_experts if bias is None else bias.to(dtype).unbind(0)


def _add(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Summed in at least float32, where a small delta survives, then cast."""
    work = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return (base.to(work) + delta.to(work)).to(dtype)
