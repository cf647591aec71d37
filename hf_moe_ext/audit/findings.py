"""What is wrong with a model's routing, the worst first, each with what to change. Pure functions of an inspection."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from hf_moe_ext.audit.events import BASE
from hf_moe_ext.audit.inspection import Inspection
from hf_moe_ext.audit.load_distance import chance_distance, total_variation
from hf_moe_ext.audit.reading import RouterReading

# Choices that an even router would have given each expert; below that a count of zero says nothing.
FEWEST_CHOICES_PER_EXPERT = 10
NEAR_UNIFORM_ENTROPY = 0.98
LEAST_SELECTIVITY = 0.01
# Share of the way from all experts in use down to top_k of them.
COLLAPSED_BELOW = 0.1
SLICES_APART = 0.5
# Distances beyond what chance makes of them.
TIMES_CHANCE = 3.0

Severity = Literal["serious", "warning", "note"]
_RANK = {"serious": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        code: kind of finding.
        severity: how bad.
        size: 0 to 1, the order among findings of one severity.
        router: kind of router it is about: "base", or an adapter's name.
        where: the layer, or the slices.
        message: what was measured.
        change: what to do about it.
    """

    code: str
    severity: Severity
    size: float
    router: str
    where: str
    message: str
    change: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_all(inspection: Inspection) -> list[Finding]:
    """Everything worth telling, the worst first; of equal ones the earlier layer."""
    found = list(_about_sample(inspection))
    for router in inspection.reading.routers:
        if router.tokens and router.num_experts > 1:
            selectivity = inspection.selectivity.get(router.layer, {}).get(router.router)
            found += _about_load(router)
            found += _about_distribution(router, selectivity)
    found += _about_slices(inspection)
    return sorted(found, key=lambda one: (_RANK[one.severity], -one.size))


def effective_experts(load: np.ndarray) -> float:
    """``exp`` of the entropy of the load [num_experts]: how many evenly used experts it is worth."""
    positive = load[load > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _about_sample(inspection: Inspection) -> Iterator[Finding]:
    if not math.isfinite(inspection.loss.loss):
        yield Finding(
            "loss-not-finite", "serious", 1.0, BASE, "the model", "the loss is not a number",
            "look for NaN or infinity in the weights (hf-moe doctor reads an adapter's), or load the model in float32",
        )  # fmt: skip
    for router in inspection.reading.routers:
        if router.invalid:
            yield Finding(
                "routing-not-finite", "serious", router.invalid / max(1, router.tokens), router.router, _where(router),
                f"the probabilities of {router.invalid} of {router.tokens} tokens are not finite",
                "look for NaN or infinity in the weights, or load the model in float32",
            )  # fmt: skip
    thin = [router for router in inspection.reading.routers if not _enough(router)]
    if thin:
        worst = max(thin, key=lambda router: router.num_experts / max(1, router.counts.sum()))
        needed = math.ceil(FEWEST_CHOICES_PER_EXPERT * worst.num_experts / worst.top_k)
        yield Finding(
            "few-tokens", "note", 0.5, BASE, f"{len(thin)} routers",
            f"{worst.tokens} tokens are too few to tell dead experts from unlucky ones among {worst.num_experts}",
            f"give more text, or raise --max-tokens: at least {needed} tokens",
        )  # fmt: skip


def _about_load(router: RouterReading) -> Iterator[Finding]:
    effective = effective_experts(router.load)
    top_k = min(router.top_k, router.num_experts)
    used = (effective - top_k) / max(1, router.num_experts - top_k)
    if _enough(router) and top_k < router.num_experts and used < COLLAPSED_BELOW:
        first = np.argsort(-router.counts, kind="stable")[:top_k]
        yield Finding(
            "collapsed-router", "serious", 1.0 - used, router.router, _where(router),
            f"{router.load[first].sum():.0%} of the choices go to {_experts(first.tolist())} of {router.num_experts}: as good as "
            f"{effective:.1f} experts in even use",
            "train on with a larger router_aux_loss_coef, from an earlier checkpoint; or lower the routers' learning rate",
        )  # fmt: skip
    if router.dead and _enough(router):
        share = len(router.dead) / router.num_experts
        yield Finding(
            "dead-experts", "serious", share, router.router, _where(router),
            f"{_experts(router.dead)} of {router.num_experts} got {_none_or(router)} of {router.tokens} tokens",
            "if the text is what the model is for, they cost memory for nothing: train on with a larger router_aux_loss_coef, look at "
            "the router's rows and biases for them, or plan fewer experts; else inspect with text of more kinds",
        )  # fmt: skip
    if router.hot and _enough(router):
        largest = int(router.counts.argmax())
        multiple = float(router.load[largest] * router.num_experts)
        yield Finding(
            "hot-experts", "warning", min(1.0, multiple / router.num_experts), router.router, _where(router),
            f"several times an even share of the choices for {_experts(router.hot)}; expert {largest} gets {multiple:.1f} times",
            "with expert parallelism the device that holds it makes the others wait: raise router_aux_loss_coef, or place hot experts "
            "apart",
        )  # fmt: skip


def _about_distribution(router: RouterReading, selectivity: float | None) -> Iterator[Finding]:
    flat = router.entropy is not None and router.entropy > NEAR_UNIFORM_ENTROPY
    if selectivity is not None and selectivity < LEAST_SELECTIVITY and router.router != BASE:
        kind = "nearly the same flat" if flat else "nearly the same"
        yield Finding(
            "router-ignores-input", "warning", 1.0 - selectivity, router.router, _where(router),
            f"the adapter's router gives every token {kind} distribution: the token decides {selectivity:.2%} of the choice",
            "it has not learnt to route: train longer, give routers a larger learning rate (param_groups), lower router_aux_loss_coef; "
            "or take variant D or S, which have no router, for the same quality",
        )  # fmt: skip
    elif flat:
        yield Finding(
            "near-uniform-router", "warning", float(router.entropy or 0.0), router.router, _where(router),
            f"probabilities are nearly even: entropy {router.entropy:.1%} of its largest value",
            "the choice of experts is close to chance: train the router longer or faster, or lower router_aux_loss_coef",
        )  # fmt: skip


def _about_slices(inspection: Inspection) -> Iterator[Finding]:
    routers = [one for one in inspection.reading.routers if len(one.slices) > 1]
    for kind in dict.fromkeys(router.router for router in routers):
        pairs = [pair for router in routers if router.router == kind for pair in _distances(router)]
        apart = [pair for pair in pairs if pair[0] > max(SLICES_APART, TIMES_CHANCE * pair[1])]
        for names in dict.fromkeys(pair[3] for pair in apart):
            distance, _, router, _ = max((p for p in apart if p[3] == names), key=lambda pair: pair[0])
            yield Finding(
                "slices-apart", "warning", distance, kind, f"slices {names[0]} and {names[1]}, {kind} router",
                f"{distance:.0%} of the choices of {names[0]} go to other experts than those of {names[1]}, most in {router.layer}",
                "good if it is meant: then keep both in the training text, or one forgets; if not, look whether a slice differs in "
                "form (language, template, padding) rather than in content",
            )  # fmt: skip
        if pairs and kind != BASE and all(distance <= TIMES_CHANCE * chance for distance, chance, _, _ in pairs):
            yield Finding(
                "slices-alike", "note", 0.4, kind, f"all slices, {kind} router",
                f"no two slices are routed further apart than chance explains (at most {max(p[0] for p in pairs):.1%})",
                "the adapters do not share the slices out among them; fewer of them may do as well",
            )  # fmt: skip


def _distances(router: RouterReading) -> Iterator[tuple[float, float, RouterReading, tuple[str, str]]]:
    for one, other in combinations(sorted(router.slices), 2):
        counts = router.slices[one], router.slices[other]
        if min(count.sum() for count in counts) >= FEWEST_CHOICES_PER_EXPERT:
            yield total_variation(*counts), chance_distance(*counts), router, (one, other)


def _enough(router: RouterReading) -> bool:
    return bool(router.counts.sum() >= FEWEST_CHOICES_PER_EXPERT * router.num_experts)


def _none_or(router: RouterReading) -> str:
    count = int(router.counts[list(router.dead)].sum())
    return "none" if count == 0 else f"{count} in all"


def _where(router: RouterReading) -> str:
    return f"{router.layer}, {router.router} router"


def _experts(ids: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"expert{'' if len(ids) == 1 else 's'} {shown}"
