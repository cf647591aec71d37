"""What a recorder has seen, in numbers: ``RouterReading`` of one router, ``RoutingReading`` of all of a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from hf_moe_ext.audit.measures import (
    coefficient_of_variation,
    dead_experts,
    hot_experts,
    load_shares,
    normalized_entropy,
)

FORMAT = "hf_moe_ext routing 1"


@dataclass(frozen=True, eq=False)
class RouterReading:
    """One router over all tokens seen, summed over processes, padding left out.

    Attributes:
        layer: path of the experts module.
        router: "base", or the adapter's name.
        num_experts: ids it can send.
        top_k: choices per token.
        tokens: that were routed.
        counts: [num_experts] int64, tokens that chose each expert.
        entropy: of a token's distribution over all experts divided by its largest value, mean over tokens; None unknown.
        max_probability: mean over tokens.
        margin: largest minus second largest probability, mean over tokens.
        coactivation: [num_experts, num_experts] int64, tokens that chose both; the diagonal is ``counts``.
        slices: name of a data slice -> its counts.
        invalid: tokens whose probabilities or weights were not finite; they are in ``counts`` as they were routed.
    """

    layer: str
    router: str
    num_experts: int
    top_k: int
    tokens: int
    counts: np.ndarray
    entropy: float | None = None
    max_probability: float | None = None
    margin: float | None = None
    coactivation: np.ndarray | None = None
    slices: dict[str, np.ndarray] = field(default_factory=dict)
    invalid: int = 0

    @property
    def load(self) -> np.ndarray:
        """[num_experts] share of the choices; sums to 1, or is 0 where nothing was seen."""
        return load_shares(self.counts)

    @property
    def variation(self) -> float:
        """Coefficient of variation of the load; 0 is even."""
        return coefficient_of_variation(self.counts)

    @property
    def load_entropy(self) -> float:
        """Entropy of the load divided by its largest value; 1 is even."""
        return normalized_entropy(self.load)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts with (almost) no token, by ``measures.dead_experts``."""
        return dead_experts(self.counts)

    @property
    def hot(self) -> tuple[int, ...]:
        """Experts with several times their even share, by ``measures.hot_experts``."""
        return hot_experts(self.counts)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, as JSON takes them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {"counts": self.counts.tolist(), "slices": {k: v.tolist() for k, v in self.slices.items()}}
        values["coactivation"] = None if self.coactivation is None else self.coactivation.tolist()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reading of ``as_dict``."""
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a router's reading has the unknown keys {unknown}; it was written by another version")
        if missing := sorted({"layer", "router", "num_experts", "top_k", "tokens", "counts"} - set(values)):
            raise ValueError(f"a router's reading lacks the keys {missing}; write it with RoutingReading.as_dict")
        arrays: dict[str, Any] = {"counts": np.asarray(values["counts"], dtype=np.int64)}
        arrays["slices"] = {k: np.asarray(v, dtype=np.int64) for k, v in values.get("slices", {}).items()}
        if values.get("coactivation") is not None:
            arrays["coactivation"] = np.asarray(values["coactivation"], dtype=np.int64)
        return cls(**{**values, **arrays})


@dataclass(frozen=True, eq=False)
class RoutingReading:
    """All routers of a model, in the order of its layers, a layer's base router before its adapters'."""

    routers: tuple[RouterReading, ...] = ()

    def of(self, router: str = "base") -> tuple[RouterReading, ...]:
        """The routers of one kind: "base", or an adapter's name."""
        return tuple(each for each in self.routers if each.router == router)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of routers seen: "base", and adapters by name."""
        return tuple(dict.fromkeys(each.router for each in self.routers))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, as JSON takes them."""
        return {"format": FORMAT, "routers": [each.as_dict() for each in self.routers]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reading of ``as_dict``.

        Raises:
            ValueError: it is none, or one of another version.
        """
        if values.get("format") != FORMAT or not isinstance(values.get("routers"), list):
            raise ValueError(
                f"a routing reading must have format={FORMAT!r} and a list of routers, got format={values.get('format')!r}; "
                "give what RoutingReading.as_dict wrote"
            )
        return cls(tuple(RouterReading.from_dict(each) for each in values["routers"]))

    def summary(self) -> dict[str, float]:
        """Scalars for ``Trainer.log``, per kind of router; of an adapter the key ends in its name.

        ``routing_load_max``: largest share of one expert in any layer. ``routing_load_entropy`` and ``routing_variation``:
        mean over layers. ``routing_dead_fraction``, ``routing_hot_fraction``: of all experts of all layers.
        ``routing_entropy``, ``routing_max_probability``, ``routing_margin``: of the tokens' distributions, mean over layers.
        ``routing_invalid_fraction``: of the tokens, where there are any.
        """
        values: dict[str, float] = {}
        for kind in self.kinds:
            suffix = "" if kind == "base" else f"_{kind}"
            routers = [each for each in self.of(kind) if each.tokens]
            values |= {f"{key}{suffix}": value for key, value in _summarize(routers).items()}
        return values


def _summarize(routers: list[RouterReading]) -> dict[str, float]:
    if not routers:
        return {}
    experts = sum(each.num_experts for each in routers)
    values = {
        "routing_load_max": max(float(each.load.max()) for each in routers),
        "routing_load_entropy": _mean([each.load_entropy for each in routers]),
        "routing_variation": _mean([each.variation for each in routers]),
        "routing_dead_fraction": sum(len(each.dead) for each in routers) / experts,
        "routing_hot_fraction": sum(len(each.hot) for each in routers) / experts,
    }
    for name in ("entropy", "max_probability", "margin"):
        known = [value for each in routers if (value := getattr(each, name)) is not None and math.isfinite(value)]
        if known:
            values[f"routing_{name}"] = _mean(known)
    if invalid := sum(each.invalid for each in routers):
        values["routing_invalid_fraction"] = invalid / sum(each.tokens for each in routers)
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
