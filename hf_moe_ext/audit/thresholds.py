"""``RoutingThresholds``: from which values on a router deserves a warning, and what to change then."""

from dataclasses import dataclass, fields

from hf_moe_ext.audit.reading import RouterReading, RoutingReading


class RoutingWarning(UserWarning):
    """A router looks unhealthy."""


@dataclass(frozen=True)
class RoutingThresholds:
    """Limits of a healthy router; None leaves a measure out.

    Attributes:
        dead_fraction: most of a layer's experts that may be dead (below a hundredth of the even share).
        load_ratio: most that one expert may get, in multiples of the even share.
        variation: largest coefficient of variation of the load.
        load_entropy: smallest entropy of the load, 1 being even.
        max_probability: largest mean probability of the first choice: beyond, the router no longer weighs experts.
        tokens_per_expert: choices that an expert must get on the average before anything is judged.

    Raises:
        ValueError: a limit outside its range.
    """

    dead_fraction: float | None = 0.25
    load_ratio: float | None = 8.0
    variation: float | None = 2.0
    load_entropy: float | None = 0.6
    max_probability: float | None = 0.98
    tokens_per_expert: int = 100

    def __post_init__(self) -> None:
        unit = ("dead_fraction", "load_entropy", "max_probability")
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and (value < 0 or (each.name in unit and value > 1)):
                rule = "between 0 and 1" if each.name in unit else "at least 0"
                raise ValueError(f"{each.name} must be {rule}, or None to leave it out, got {value}")


@dataclass(frozen=True)
class RoutingFinding:
    """One measure of one router past its limit.

    Attributes:
        layer: path of the experts.
        router: "base" or the adapter's name.
        measure: name of the limit; "invalid" for values that are not finite.
        value: what was seen.
        limit: what was allowed.
        advice: what to change.
    """

    layer: str
    router: str
    measure: str
    value: float
    limit: float
    advice: str

    def __str__(self) -> str:
        return f"{self.layer} ({self.router}): {self.measure} is {self.value:.3g}, past {self.limit:.3g}"


def judge(reading: RoutingReading, thresholds: RoutingThresholds) -> tuple[RoutingFinding, ...]:
    """What is past a limit, the worst router of each measure first; values that are not finite before all."""
    found = [finding for router in reading.routers for finding in _judge_router(router, thresholds)]
    return tuple(sorted(found, key=lambda f: (f.measure != "invalid", -_badness(f))))


def _judge_router(router: RouterReading, limits: RoutingThresholds) -> list[RoutingFinding]:
    found = []

    def check(measure: str, value: float | None, limit: float | None, below: bool = False) -> None:
        if value is not None and limit is not None and (value < limit if below else value > limit):
            advice = _advice(measure, router.router)
            found.append(RoutingFinding(router.layer, router.router, measure, float(value), limit, advice))

    check("invalid", router.invalid, 0)
    # One expert has nothing to balance; with top_k = num_experts every one gets every token.
    if router.num_experts > router.top_k and router.counts.mean() >= limits.tokens_per_expert:
        check("dead_fraction", len(router.dead) / router.num_experts, limits.dead_fraction)
        check("load_ratio", router.load.max() * router.num_experts, limits.load_ratio)
        check("variation", router.variation, limits.variation)
        check("load_entropy", router.load_entropy, limits.load_entropy, below=True)
        if router.top_k < router.num_experts:
            check("max_probability", router.max_probability, limits.max_probability)
    return found


def _badness(finding: RoutingFinding) -> float:
    ratio = finding.value / finding.limit if finding.limit else float("inf")
    return 1 / max(ratio, 1e-9) if finding.measure == "load_entropy" else ratio


def _advice(measure: str, router: str) -> str:
    if measure == "invalid":
        return (
            "the router's values are not finite: look for a learning rate too high, a broken checkpoint, or float16 without "
            "loss scaling (use bfloat16)"
        )
    if router != "base":
        return (
            "raise router_aux_loss_coef in PerftConfig, lower num_experts or raise top_k, or lower the router's learning rate"
            if measure != "max_probability"
            else "raise router_z_loss_coef in PerftConfig, or lower the router's learning rate"
        )
    if measure == "max_probability":
        return (
            "where the router trains, add a z-loss or lower its learning rate; where it is frozen, the data is narrow"
        )
    return (
        "where the router trains, set output_router_logits=True and raise router_aux_loss_coef in the model's configuration; "
        "where it is frozen, the data uses few experts: adapt only those (expert-selective PERFT-E) or mix the data"
    )
