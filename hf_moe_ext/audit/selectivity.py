"""Does a router look at the token? The information that its distribution carries about which token it is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_ext.audit.events import RoutingEvent


@dataclass
class _Sums:
    probabilities: Tensor  # [num_experts]
    entropy: Tensor  # nats
    tokens: Tensor


def selectivity(mean_probabilities: Tensor, mean_entropy: float) -> float:
    """``(H(mean p) - mean H(p)) / log E``: the mutual information of token and expert, as a share of the most there can be.

    0: every token gets the same distribution, flat or not. 1: each token one expert for sure, and all experts alike.

    Args:
        mean_probabilities: [num_experts] over the tokens.
        mean_entropy: of the tokens' distributions, nats.
    """
    if len(mean_probabilities) == 1:
        return 0.0
    mixed = -float(torch.special.xlogy(mean_probabilities, mean_probabilities).sum())
    return min(1.0, max(0.0, (mixed - mean_entropy) / math.log(len(mean_probabilities))))


class SelectivitySums:
    """Sums it over routing events; a listener for ``watch_routing``."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], _Sums] = {}

    def __call__(self, event: RoutingEvent) -> None:
        """Add the counted tokens of one router in one forward pass."""
        if event.probabilities is None:
            return
        p = event.probabilities.double()
        counted = torch.isfinite(p).all(dim=-1)
        if event.batch.mask is not None:
            counted &= event.batch.mask
        p = p[counted]
        new = _Sums(p.sum(dim=0), -torch.special.xlogy(p, p).sum(), counted.sum())
        old = self._sums.get((event.layer, event.router))
        if old is not None:
            new = _Sums(old.probabilities + new.probabilities, old.entropy + new.entropy, old.tokens + new.tokens)
        self._sums[event.layer, event.router] = new

    def result(self) -> dict[str, dict[str, float]]:
        """Layer -> router -> selectivity."""
        found: dict[str, dict[str, float]] = {}
        for (layer, router), sums in self._sums.items():
            if tokens := int(sums.tokens):
                value = selectivity(sums.probabilities / tokens, float(sums.entropy) / tokens)
                found.setdefault(layer, {})[router] = value
        return found
