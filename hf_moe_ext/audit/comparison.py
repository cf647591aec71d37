"""Two inspections beside each other: has the routing drifted, has the loss risen, and by more than is allowed?

A limit is passed by a value above it. Where the two are of different text, part of every difference is the luck of the draw, so
the value must also be more than ``TIMES_CHANCE`` times what chance would make of two samples of these sizes; what is not is told
as a caution. Of the same text nothing is left to chance.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_moe_ext.audit.inspection import Inspection, TokenLoss
from hf_moe_ext.audit.load_distance import chance_distance, chance_divergence, divergence, total_variation
from hf_moe_ext.audit.reading import RouterReading

FEWEST_SLICE_TOKENS = 200
TIMES_CHANCE = 2.0


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
        kl: divergence of the new load from the old one, nats.
        load_chance: total variation that two samples of one load would have; 0 for the same text.
        kl_chance: the same of the divergence.
    """

    layer: str
    router: str
    load: float
    kl: float
    load_chance: float
    kl_chance: float


@dataclass(frozen=True)
class LossChange:
    """One slice's loss, or that of everything.

    Attributes:
        slice: its name; None for everything.
        old: nats per token then.
        new: nats per token now.
        tokens: scored, the fewer of the two.
        chance: standard error of the difference, as if tokens were independent; 0 for the same text.
    """

    slice: str | None
    old: float
    new: float
    tokens: int
    chance: float

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
    same_text = old.data.data_hash == new.data.data_hash and old.data.num_tokens == new.data.num_tokens
    before = {(one.layer, one.router): one for one in old.reading.routers}
    routers = tuple(_change(before[one.layer, one.router], one, same_text) for one in new.reading.routers)
    same_tokens = old.model.tokenizer_hash == new.model.tokenizer_hash
    losses = tuple(_losses(old, new, same_text)) if same_tokens else ()
    past, by_chance = _judge(routers, losses, limits)
    cautions = (*_cautions(old, new), *(f"{one.as_text()}, but no more than chance may do" for one in by_chance))
    return Comparison(routers, losses, past, cautions, limits)


def _change(old: RouterReading, new: RouterReading, same_text: bool) -> RouterChange:
    pair = new.counts, old.counts
    chance = (0.0, 0.0) if same_text else (chance_distance(*pair), chance_divergence(*pair))
    return RouterChange(new.layer, new.router, total_variation(*pair), divergence(*pair), *chance)


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


def _losses(old: Inspection, new: Inspection, same_text: bool) -> Iterator[LossChange]:
    pairs: dict[str | None, tuple[TokenLoss, TokenLoss]] = {None: (old.loss, new.loss)}
    pairs |= {
        name: (old.slice_losses[name], new.slice_losses[name]) for name in new.slice_losses if name in old.slice_losses
    }
    for name, pair in pairs.items():
        variance = sum(one.deviation**2 / max(1, one.tokens) for one in pair)
        chance = 0.0 if same_text or not variance > 0 else math.sqrt(variance)
        yield LossChange(name, pair[0].loss, pair[1].loss, min(one.tokens for one in pair), chance)


def _judge(
    routers: tuple[RouterChange, ...], losses: tuple[LossChange, ...], limits: ComparisonLimits
) -> tuple[tuple[Exceeded, ...], list[Exceeded]]:
    """What is past its limit, of each measure the worst first; and what would be, were it not within reach of chance."""
    past: list[Exceeded] = []
    by_chance: list[Exceeded] = []
    for what, limit, values in (
        (
            "the change of load (total variation)",
            limits.load,
            [(_name(one), one.load, one.load_chance) for one in routers],
        ),
        ("the divergence (KL, nats)", limits.kl, [(_name(one), one.kl, one.kl_chance) for one in routers]),
        (
            "the rise of the loss (nats per token)",
            limits.loss,
            [
                ("everything" if one.slice is None else f"slice {one.slice}", one.rise, one.chance)
                for one in losses
                if one.slice is None or one.tokens >= FEWEST_SLICE_TOKENS
            ],
        ),
    ):
        # Not a number is nothing that anybody allowed; it stands first.
        for where, value, chance in sorted(values, key=lambda one: -one[1] if math.isfinite(one[1]) else -math.inf):
            if not value <= limit:
                (by_chance if value <= TIMES_CHANCE * chance else past).append(Exceeded(what, where, value, limit))
    return tuple(past), by_chance


def _name(router: RouterChange) -> str:
    return f"the {router.router} router of {router.layer}"


def _cautions(old: Inspection, new: Inspection) -> Iterator[str]:
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


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
