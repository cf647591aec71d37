"""Softmax top-k routing and the two auxiliary losses of a router.

PERFT (arXiv 2411.08212) routes with a softmax over all ``M`` experts taken before top-k; the load-balance loss is that
of the Switch Transformer (arXiv 2101.03961, eq. 4-6) as PERFT's training code pools it: over all layers first, padding
masked. Its value at perfect balance is ``top_k``, not 1.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenGroups(NamedTuple):
    """Which tokens count and which belong together: the sequences of a batch, or everything as one group.

    Attributes:
        num_groups: number of groups; an upper bound where ``segment`` is given, so that nobody waits for the device.
        mask: [tokens] True where a token counts (no padding); None counts all.
        segment: [tokens] group of each token; None: equal runs of ``tokens / num_groups`` (the rows of a batch).
    """

    num_groups: int = 1
    mask: Tensor | None = None
    segment: Tensor | None = None

    def sum(self, values: Tensor) -> Tensor:
        """[num_groups, ...] sums of ``values`` [tokens, ...] over the counted tokens of each group."""
        if self.mask is not None:
            keep = self.mask.to(values.device)
            values = values * keep.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        if self.segment is not None:
            zeros = values.new_zeros(self.num_groups, *values.shape[1:])
            return zeros.index_add(0, self.segment.to(values.device), values)
        return values.reshape(self.num_groups, -1, *values.shape[1:]).sum(dim=1)

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """[tokens, ...] the value of each token's group, from ``values`` [num_groups, ...]."""
        if self.segment is not None:
            return values[self.segment.to(values.device)]
        if self.num_groups == 1:
            return values.expand(tokens, *values.shape[1:])
        return values.repeat_interleave(tokens // self.num_groups, dim=0, output_size=tokens)


class RouterSums(NamedTuple):
    """The sums over counted tokens from which both auxiliary losses are computed, one row per token group.

    Sums, not means, so that layers (and groups, and processes) are pooled by addition.

    Attributes:
        counts: [groups, num_experts] tokens sent to each expert, over all choices; carries no gradient.
        probabilities: [groups, num_experts] summed softmax probabilities.
        squared_lse: [groups] summed squared log-sum-exp of the logits.
        tokens: [groups] number of counted (layer, token) pairs.
    """

    counts: Tensor
    probabilities: Tensor
    squared_lse: Tensor
    tokens: Tensor

    def __add__(self, other: "RouterSums") -> "RouterSums":  # type: ignore[override]
        return RouterSums(*(a + b.to(a.device) for a, b in zip(self, other, strict=True)))

    def detach(self) -> "RouterSums":
        return RouterSums(*(value.detach() for value in self))

    def total(self) -> "RouterSums":
        """The same with all groups pooled into one."""
        return RouterSums(*(value.sum(dim=0, keepdim=True) for value in self))


class _WideLinear(torch.autograd.Function):
    """``F.linear`` in ``dtype``, which keeps for its backward the rows and the weight as they came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return F.linear(rows.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (rows, weight) = gradients, ctx.saved_tensors
        rows_gradient = weight_gradient = None
        # A backward called under autocast would run these products in bfloat16.
        with torch.autocast(rows.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                rows_gradient = (gradient @ weight.to(gradient.dtype)).to(rows.dtype)
            if ctx.needs_input_grad[1]:
                weight_gradient = (gradient.T @ rows.to(gradient.dtype)).to(weight.dtype)
        return rows_gradient, weight_gradient, None


def router_logits(rows: Tensor, router: Tensor) -> Tensor:
    """Logits [tokens, num_experts] of a router without bias, in at least float32, also under autocast.

    Args:
        rows: [tokens, hidden] of any floating-point dtype.
        router: [num_experts, hidden] of any floating-point dtype.
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, router.dtype), torch.float32)
    # Autocast would run a float32 linear in bfloat16, where near ties of a small router flip.
    with torch.autocast(rows.device.type, enabled=False):
        # F.linear would keep the wide copy of the rows until backward: in bfloat16 twice the bytes of all that the rest
        # of an adapter keeps. A compiler casts again by itself, and cannot trace the node without a warning.
        if torch.compiler.is_compiling():
            return F.linear(rows.to(dtype), router.to(dtype))
        return _WideLinear.apply(rows, router, dtype)


def routing_probabilities(logits: Tensor, scoring: str = "softmax") -> Tensor:
    """The distribution [..., num_experts] over all experts that logits stand for, in at least float32.

    Args:
        logits: [..., num_experts] of any floating-point dtype.
        scoring: "softmax", or the function whose values are divided by their sum: "sigmoid" or "sqrtsoftplus".
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid() if scoring == "sigmoid" else F.softplus(logits).sqrt()
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


@torch.no_grad()
def choose_experts(logits: Tensor, top_k: int) -> Tensor:
    """[tokens, top_k] ids of the largest logits [tokens, num_experts], best first, ties to the lowest id."""
    # A stable sort instead of topk: topk breaks ties as it likes, and a recomputed forward (gradient checkpointing)
    # must choose the same experts as the first one.
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def expert_weights(logits: Tensor, index: Tensor, normalize: bool) -> Tensor:
    """Softmax probabilities, taken over all experts, of the chosen ones.

    Args:
        logits: [tokens, num_experts].
        index: [tokens, top_k] chosen experts.
        normalize: divide them by their sum.

    Returns:
        [tokens, top_k] in the logits' dtype.
    """
    weights = logits.softmax(dim=-1).gather(-1, index)
    return weights / weights.sum(dim=-1, keepdim=True) if normalize else weights


def router_sums(logits: Tensor, index: Tensor, groups: TokenGroups = TokenGroups()) -> RouterSums:  # noqa: B008
    """Sum what the auxiliary losses need over the tokens of one layer.

    Args:
        logits: [tokens, num_experts].
        index: [tokens, top_k] chosen experts, each once.
        groups: which tokens count and which belong together.
    """
    with torch.no_grad():
        counts = groups.sum(torch.zeros_like(logits).scatter(1, index, 1.0))
        tokens = groups.sum(torch.ones_like(logits[:, 0]))
    return RouterSums(counts, groups.sum(logits.softmax(dim=-1)), groups.sum(logits.logsumexp(dim=-1).square()), tokens)


def load_balance_loss(counts: Tensor, probabilities: Tensor, tokens: Tensor) -> Tensor:
    """``M * sum_i f[i] P[i]``: ``f`` the share of tokens choosing expert i (summed over choices), ``P`` its mean probability.

    Args:
        counts: [..., num_experts] tokens per expert.
        probabilities: [..., num_experts] summed softmax probabilities.
        tokens: [...] number of (layer, token) pairs; none at all gives 0.

    Returns:
        [...]: ``top_k`` at perfect balance, ``M`` times the largest probability mass at collapse.
    """
    tokens = tokens.clamp(min=1)[..., None]
    return counts.shape[-1] * ((counts / tokens) * (probabilities / tokens)).sum(dim=-1)


def router_z_loss(squared_lse: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5); both arguments [...]."""
    return squared_lse / tokens.clamp(min=1)


def router_losses_gradient(
    logits: Tensor, counts: Tensor, tokens: Tensor, load_balance: Tensor, z: Tensor, groups: TokenGroups
) -> Tensor:
    """Gradient of ``sum over groups of load_balance * load_balance_loss + z * router_z_loss`` at the logits.

    Written out rather than left to autograd, whose many small operations cost more than the router itself.

    Args:
        logits: [tokens, num_experts].
        counts: [groups, num_experts] tokens per expert; constants of the gradient.
        tokens: [groups] what counts and probabilities are divided by.
        load_balance: [groups] weight of each group's load-balance loss.
        z: [groups] weight of its z-loss.
        groups: which tokens count and which belong together.

    Returns:
        [tokens, num_experts] in the logits' dtype.
    """
    tokens = tokens.clamp(min=1)
    slope = (counts.shape[-1] * load_balance / tokens.square())[:, None] * counts  # by a token's probability
    rows = logits.shape[0]
    slope, z = groups.spread(slope, rows), groups.spread(2 * z / tokens, rows)
    probabilities = logits.softmax(dim=-1)
    mean = (probabilities * slope).sum(dim=-1, keepdim=True)
    gradient = probabilities * (slope - mean + (z * logits.logsumexp(dim=-1))[:, None])
    if groups.mask is not None:
        gradient = gradient * groups.mask.to(device=gradient.device, dtype=gradient.dtype)[:, None]
    return gradient


class DriftSums(NamedTuple):
    """How far a tuned router has moved from the one it started as, summed over counted tokens.

    Attributes:
        divergence: [groups] Kullback-Leibler divergence of the tuned router's probabilities from the old ones, nats.
        before: [num_experts] old probabilities.
        after: [num_experts] tuned probabilities.
        tokens: [groups] number of counted tokens.
    """

    divergence: Tensor
    before: Tensor
    after: Tensor
    tokens: Tensor

    def __add__(self, other: "DriftSums") -> "DriftSums":  # type: ignore[override]
        return DriftSums(*(a + b.to(a.device) for a, b in zip(self, other, strict=True)))

    def detach(self) -> "DriftSums":
        return DriftSums(*(value.detach() for value in self))


def drift_sums(
    hidden: Tensor,
    weight: Tensor,
    delta: Tensor,
    bias: Tensor | None = None,
    groups: TokenGroups = TokenGroups(),  # noqa: B008
) -> DriftSums:
    """Compare the softmax over all experts of a router with that of the same router plus ``delta``.

    Args:
        hidden: [tokens, hidden] what the router reads.
        weight: [num_experts, hidden] the old weight.
        delta: [num_experts, hidden] what was added to it.
        bias: [num_experts] of both.
        groups: which tokens count and which belong together.
    """
    logits = F.linear(hidden, weight, bias)
    old, new = logits.log_softmax(dim=-1), (logits + F.linear(hidden, delta)).log_softmax(dim=-1)
    everything = TokenGroups(1, groups.mask)
    with torch.no_grad():
        before, after = everything.sum(old.exp())[0], everything.sum(new.exp())[0]
        tokens = groups.sum(torch.ones_like(logits[:, 0]))
    return DriftSums(groups.sum((old.exp() * (old - new)).sum(dim=-1)), before, after, tokens)
