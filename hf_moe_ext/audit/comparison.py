"""Two inspections beside each other: has the routing drifted, has the loss risen, and by more than is allowed?"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_moe_ext.audit.inspection import Inspection, TokenLoss
from hf_moe_ext.audit.load_distance import chance_distance, divergence, total_variation

FEWEST_SLICE_TOKENS = 200


@dataclass(frozen=True)
class ComparisonLimits:
    """What is still allowed.

    Attributes:
        load: largest total variation between the loads of any router, 0 to 1.
        kl: largest divergence of any router's new load from its old one, nats.
        loss: largest rise of the loss, over all and of any slice with enough tokens, nats per token.
    """

    load: float = 0.1
    kl: float = 0.05
    loss: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ValueError(f"--max-{name} must be at least 0, got {value}")


@dataclass(frozen=True)
class RouterChange:
    """One router, old and new.

    Attributes:
        layer: path of the experts.
        router: "base" or the adapter's name.
        load: total variation between the loads.
        chance: what two samples of one load would have, see ``chance_distance``.
        kl: divergence of the new load from the old one, nats.
    """

    layer: str
    router: str
    load: float
    chance: float
    kl: float


@dataclass(frozen=True)
class LossChange:
    """One slice's loss, or that of everything (``slice`` is None)."""

    slice: str | None
    old: float
    new: float
    tokens: int

    @property
    def rise(self) -> float:
        """Nats per token; above 0 is worse."""
        return self.new - self.old


@dataclass(frozen=True)
class Exceeded:
    """A limit that was passed: what, where, by how much."""

    what: str
    where: str
    value: float
    limit: float

    def as_text(self) -> str:
        """One line."""
        return f"{self.what} of {self.where} is {self.value:.4f}, {self.value - self.limit:.4f} above the limit {self.limit:g}"


@dataclass(frozen=True)
class Comparison:
    """Result of ``compare``.

    Attributes:
        routers: in layer order.
        losses: of everything first, then of the slices both have.
        exceeded: limits passed, the worst of each kind first.
        cautions: what to keep in mind.
        limits: what was allowed.
    """

    routers: tuple[RouterChange, ...]
    losses: tuple[LossChange, ...]
    exceeded: tuple[Exceeded, ...]
    cautions: tuple[str, ...]
    limits: ComparisonLimits

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a loss that is not a number is None."""
        losses = [{**asdict(one), "rise": one.rise} for one in self.losses]
        return {
            "limits": asdict(self.limits),
            "exceeded": [{**asdict(one), "value": _finite(one.value)} for one in self.exceeded],
            "cautions": list(self.cautions),
            "losses": [{key: _finite(value) for key, value in one.items()} for one in losses],
            "routers": [asdict(one) for one in self.routers],
        }


def compare(old: Inspection, new: Inspection, limits: ComparisonLimits | None = None) -> Comparison:
    """The new inspection beside the old one.

    Args:
        old: of another data snapshot, or another version of the model.
        new: the present one.
        limits: what is allowed.

    Raises:
        ValueError: their routers are not the same in number and shape.
    """
    limits = limits or ComparisonLimits()
    _check_shapes(old, new)
    before = {(one.layer, one.router): one for one in old.reading.routers}
    routers = tuple(
        RouterChange(
            one.layer,
            one.router,
            total_variation(one.counts, before[one.layer, one.router].counts),
            chance_distance(one.counts, before[one.layer, one.router].counts),
            divergence(one.counts, before[one.layer, one.router].counts),
        )
        for one in new.reading.routers
    )
    same_tokens = old.model.tokenizer_hash == new.model.tokenizer_hash
    losses = tuple(_losses(old, new)) if same_tokens else ()
    exceeded = [*_worst(routers, "load", limits.load), *_worst(routers, "kl", limits.kl), *_risen(losses, limits.loss)]
    return Comparison(routers, losses, tuple(exceeded), tuple(_cautions(old, new, routers)), limits)


def _check_shapes(old: Inspection, new: Inspection) -> None:
    shapes = [
        {(one.layer, one.router): (one.num_experts, one.top_k) for one in each.reading.routers} for each in (old, new)
    ]
    for (layer, router), shape in shapes[0].items():
        other = shapes[1].get((layer, router))
        if other is None:
            raise ValueError(
                f"--against: the old inspection has a {router} router in {layer}, this model has none; {_SAME}"
            )
        if other != shape:
            raise ValueError(
                f"--against: in {layer} the {router} router chose {shape[1]} of {shape[0]} experts, now {other[1]} of "
                f"{other[0]}; {_SAME}"
            )
    if extra := [key for key in shapes[1] if key not in shapes[0]]:
        raise ValueError(f"--against: the old inspection has no {extra[0][1]} router in {extra[0][0]}; {_SAME}")


_SAME = "only inspections of routers of the same number and shape can be compared"


def _losses(old: Inspection, new: Inspection) -> Iterator[LossChange]:
    yield LossChange(None, old.loss.loss, new.loss.loss, min(old.loss.tokens, new.loss.tokens))
    for name, loss in new.slice_losses.items():
        if name in old.slice_losses:
            before: TokenLoss = old.slice_losses[name]
            yield LossChange(name, before.loss, loss.loss, min(before.tokens, loss.tokens))


def _worst(routers: tuple[RouterChange, ...], measure: str, limit: float) -> list[Exceeded]:
    what = {"load": "the change of load (total variation)", "kl": "the divergence (KL, nats)"}[measure]
    past = [
        Exceeded(what, f"the {one.router} router of {one.layer}", getattr(one, measure), limit)
        for one in routers
        if not getattr(one, measure) <= limit
    ]
    return sorted(past, key=lambda one: -one.value)


def _risen(losses: tuple[LossChange, ...], limit: float) -> list[Exceeded]:
    """Not a number is no rise that anybody allowed."""
    past = [
        Exceeded(
            "the rise of the loss (nats per token)",
            "everything" if one.slice is None else f"slice {one.slice}",
            one.rise,
            limit,
        )
        for one in losses
        if not one.rise <= limit and (one.slice is None or one.tokens >= FEWEST_SLICE_TOKENS)
    ]
    return sorted(past, key=lambda one: (math.isfinite(one.value), -one.value if math.isfinite(one.value) else 0.0))


def _cautions(old: Inspection, new: Inspection, routers: tuple[RouterChange, ...]) -> Iterator[str]:
    same_data = old.data.data_hash == new.data.data_hash
    same_model = (old.model.config_hash, old.model.adapter_hash) == (new.model.config_hash, new.model.adapter_hash)
    if not same_data and not same_model:
        yield "both the model's configuration and the data differ: which of the two changed the routing cannot be told"
    if same_data and old.data.num_tokens != new.data.num_tokens:
        yield f"{old.data.num_tokens} tokens were read of the same data then, {new.data.num_tokens} now: give the same --max-tokens"
    if old.model.tokenizer_hash != new.model.tokenizer_hash:
        yield "the tokenizers differ: losses per token are not compared"
    if old.slice_losses.keys() != new.slice_losses.keys():
        only = sorted(old.slice_losses.keys() ^ new.slice_losses.keys())
        yield f"slices that only one side has are not compared: {', '.join(only[:8])}"
    noisy = [one for one in routers if one.load <= 2 * one.chance]
    if noisy and not same_data:
        yield f"{len(noisy)} of {len(routers)} routers changed by no more than twice what chance does to samples of this size"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
