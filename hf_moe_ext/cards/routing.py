"""Routing health as a card states it: how a layer's choices spread over its experts."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from hf_moe_ext.cards.facts import Metrics


def read_routing(metrics: Metrics) -> list[dict[str, Any]]:
    """Per router: largest and least share of the choices, the entropy of the load over its maximum, experts left out.

    Reads `routing`, which is `RoutingReading.as_dict` of `audit`, and without it `router_load`, shares by layer.
    """
    return [
        {
            "layer": layer,
            "router": router,
            "num_experts": metrics.derived(len(shares), key, "{}"),
            "largest": metrics.derived(max(shares), key, "{:.1%}"),
            "least": metrics.derived(min(shares), key, "{:.1%}"),
            "entropy": metrics.derived(relative_entropy(shares), key, "{:.3f}"),
            "unused": metrics.derived(sum(share == 0 for share in shares), key, "{}"),
        }
        for layer, router, shares, key in _list_loads(metrics)
    ]


def _list_loads(metrics: Metrics) -> Iterator[tuple[str, str, list[float], str]]:
    routers = (metrics.values.get("routing") or {}).get("routers")
    for place, reading in enumerate(routers or []):
        if total := sum(reading["counts"]):  # a router that saw no token has no load
            shares = [count / total for count in reading["counts"]]
            yield reading["layer"], reading["router"], shares, f"routing.routers[{place}].counts"
    if routers is None:
        for layer, shares in (metrics.values.get("router_load") or {}).items():
            yield layer, "adapter's", list(shares), f"router_load.{layer}"


def relative_entropy(shares: Sequence[float]) -> float:
    """Entropy of the shares over that of even ones: 1 is even, 0 is one expert for all."""
    if len(shares) < 2:
        return 1.0
    return sum(share * math.log(1 / share) for share in shares if share > 0) / math.log(len(shares))
