"""Measures of routing: pure functions of counts (numpy, after the run) and of probabilities (torch, within it)."""

import math

import numpy as np
import torch
from torch import Tensor

# An expert is dead below this part of its even share, and hot above this multiple of it.
DEAD_BELOW, HOT_ABOVE = 0.01, 4.0


def load_shares(counts: np.ndarray) -> np.ndarray:
    """[..., num_experts] share of the choices that went to each expert; zeros where there were none."""
    counts = np.asarray(counts, dtype=np.float64)
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)


def coefficient_of_variation(counts: np.ndarray) -> float:
    """Standard deviation of the load over its mean (arXiv 1701.06538, eq. 6, of counts); 0 is even, also of nothing."""
    counts = np.asarray(counts, dtype=np.float64)
    return float(counts.std() / counts.mean()) if counts.sum() else 0.0


def normalized_entropy(shares: np.ndarray) -> float:
    """``-sum f log f / log n`` of shares [n]; 1 is even. Of a single expert 1, of nothing 0."""
    shares = np.asarray(shares, dtype=np.float64)
    if len(shares) == 1:
        return 1.0
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum() / np.log(len(shares)))


def dead_experts(counts: np.ndarray, below: float = DEAD_BELOW) -> tuple[int, ...]:
    """Experts with less than ``below`` times the even share of the choices; none where nothing was seen.

    A count of zero among few tokens says little: an even router leaves an expert out of n choices with (1 - 1/E)^n.
    """
    counts = np.asarray(counts)
    return _ids(counts < below * counts.mean()) if counts.sum() else ()


def hot_experts(counts: np.ndarray, above: float = HOT_ABOVE) -> tuple[int, ...]:
    """Experts with more than ``above`` times the even share of the choices."""
    counts = np.asarray(counts)
    return _ids(counts > above * counts.mean()) if counts.sum() else ()


def _ids(chosen: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(chosen))


def count_choices(
    index: Tensor, num_experts: int, mask: Tensor | None = None, groups: Tensor | None = None, num_groups: int = 1
) -> Tensor:
    """Tokens per group and expert, over all choices.

    Args:
        index: [tokens, top_k] chosen experts; ids outside 0..num_experts-1 are not counted.
        num_experts: E.
        mask: [tokens] True where a token counts.
        groups: [tokens] each token's group, 0..num_groups-1; None: all are in the first.
        num_groups: G.

    Returns:
        [num_groups, num_experts] int64 on the index's device.
    """
    served = (index >= 0) & (index < num_experts)
    if mask is not None:
        served = served & mask[:, None]
    bins = index if groups is None else groups[:, None] * num_experts + index
    bins = torch.where(served, bins, num_groups * num_experts).reshape(-1)
    counts = torch.zeros(num_groups * num_experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:-1].view(num_groups, num_experts)


def count_coactivation(index: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """[num_experts, num_experts] int64 tokens that chose both experts; the diagonal is ``count_choices``."""
    served = (index >= 0) & (index < num_experts)
    if mask is not None:
        served = served & mask[:, None]
    chosen = torch.zeros(len(index), num_experts + 1, dtype=torch.float32, device=index.device)
    chosen = chosen.scatter_(1, torch.where(served, index, num_experts), 1.0)[:, :-1]
    return (chosen.T @ chosen).round().to(torch.int64)


def distribution_sums(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums over the counted tokens of what a router's distributions [tokens, num_experts] are like.

    Returns:
        [5] in the probabilities' dtype: entropy divided by log(num_experts), largest probability, largest minus second
        largest, tokens these are of, and tokens left out because a value is not finite.
    """
    num_experts = probabilities.shape[-1]
    count = torch.ones_like(probabilities[:, 0]) if mask is None else mask.to(probabilities.dtype)
    finite = torch.isfinite(probabilities).all(dim=-1)
    safe = torch.where(finite[:, None], probabilities, 1.0 / num_experts)
    scale = math.log(num_experts) if num_experts > 1 else 1.0
    entropy = -torch.special.xlogy(safe, safe).sum(dim=-1) / scale
    largest = safe.topk(min(2, num_experts), dim=-1).values
    margin = largest[:, 0] - largest[:, 1] if num_experts > 1 else torch.zeros_like(largest[:, 0])
    good = count * finite
    values = torch.stack([entropy, largest[:, 0], margin, torch.ones_like(count)])
    return torch.cat([values @ good, (count * ~finite).sum()[None]])
