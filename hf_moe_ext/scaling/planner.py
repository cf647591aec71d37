"""How many experts, how many active, at this budget on these devices: candidates priced, the best few kept, one recommended.

Shapes are sorted by what they could reach if nothing but arithmetic took time, and of each kind (block, E / K) the first few that
fit are priced in full. Quality is a quotient against the best dense model of the same budget, by each law under its own
counting; the spread between the laws is part of every answer. Shapes that no law was fitted on (latent experts, shared bases)
are priced and shown, and not recommended.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from hf_moe_ext.scaling.candidates import Candidate, enumerate_candidates
from hf_moe_ext.scaling.laws import LAWS, Answer, Counts, Flag
from hf_moe_ext.scaling.laws.downstream import check_downstream
from hf_moe_ext.scaling.plan_quality import (
    RANKING,
    count_for_laws,
    equivalent_budgets,
    mean_of,
    quick_equivalents,
)
from hf_moe_ext.scaling.plan_request import FEWEST_TOKENS_PER_PARAMETER, PlanRequest
from hf_moe_ext.scaling.pricing import (
    Run,
    Serving,
    Shortage,
    Training,
    choose_serving,
    choose_training,
    plan_run,
)

# Of each kind: how many are priced in full, and how many may be found too large on the way.
PRICED_PER_KIND, REFUSED_PER_KIND = 4, 12


@dataclass(frozen=True)
class Plan:
    """A shape, how it trains, what comes of it.

    Attributes:
        candidate: the shape.
        training: layout, memory, step time.
        run: steps, tokens, hours, cost.
        counts: of every law.
        answers: compute multipliers of every law.
        gains: dense-equivalent budget over that of the dense reference, by law.
        serving: one replica; None without a demand, a shortage where it fits no node.
        cautions: findings about tasks.
    """

    candidate: Candidate
    training: Training
    run: Run
    counts: dict[str, Counts]
    answers: dict[str, Answer]
    gains: dict[str, float] = field(default_factory=dict)
    serving: Serving | Shortage | None = None
    cautions: tuple[Flag, ...] = ()

    @property
    def quality(self) -> float:
        """Geometric mean of the ranking laws' gains: what times the dense model's compute it is worth."""
        return mean_of(self.gains)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest gain of the ranking laws."""
        values = [self.gains[name] for name in RANKING]
        return min(values), max(values)

    @cached_property
    def uncovered(self) -> tuple[str, ...]:
        """Why no recommendation may rest on the laws here: shapes they never saw, sparsities beyond their fits."""
        kinds = {"dcca": "latent experts (DCCA)", "ders": "experts on a shared base (DeRS)"}
        reasons = [f"no law was fitted on {kinds[self.candidate.block]}"] if self.candidate.block in kinds else []
        for law, variable in (("abnar", "sparsity"), ("joint", "num_experts")):
            fitted = next(one for one in LAWS[law].card.fitted if one.variable == variable)
            flag = fitted.check(self.counts[law][variable])
            if flag is not None:
                reasons.append(f"{law}: {flag.message}")
        return tuple(reasons)

    @property
    def serving_hours(self) -> float | None:
        """Device hours per million generated tokens."""
        return self.serving.gpu_hours_per_million if isinstance(self.serving, Serving) else None


@dataclass(frozen=True)
class Binding:
    """What holds the recommended plan back.

    Attributes:
        constraint: "compute", "memory", "all_to_all", "data" (or "tensor", "pipeline").
        reason: a sentence with the numbers.
        step_shares: share of a step's time of each part.
        refused: shapes that promised more and did not fit: name, gain promised, bytes needed.
    """

    constraint: str
    reason: str
    step_shares: dict[str, float]
    refused: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class PlanResult:
    """The planner's answer.

    Attributes:
        request: the question.
        plans: all that were priced in full, best first.
        pareto: none of the others of its class is better in one of quality, memory, hours, serving and worse in none.
        recommended: one of them.
        dense: the reference of all gains.
        reason: why this one.
        binding: what holds it back.
        num_candidates: enumerated.
    """

    request: PlanRequest
    plans: tuple[Plan, ...]
    pareto: tuple[Plan, ...]
    recommended: Plan
    dense: Plan
    reason: str
    binding: Binding
    num_candidates: int


@dataclass(frozen=True)
class _Promise:
    candidate: Candidate
    tokens: float
    quality: float


def plan(request: PlanRequest) -> PlanResult:
    """The whole search.

    Raises:
        ValueError: nothing fits, or the budget trains nothing; says which constraint and by how much.
    """
    candidates = list(enumerate_candidates(request))
    promises = [promise for promise in (_promise(c, request) for c in candidates) if promise is not None]
    if not promises:
        raise ValueError(_explain_small_budget(candidates[0], request))
    priced, refused = _price_kinds(promises, request)
    if not priced:
        raise ValueError(_explain_no_fit(candidates, request, refused))
    dense = [one for one in priced if one.candidate.block == "dense"]
    if not dense:
        raise ValueError(
            "no dense model of this budget fits to compare with: " + _explain_no_fit(candidates, request, refused)
        )
    reference = max(dense, key=lambda one: mean_of(equivalent_budgets(one.answers, one.counts)))
    plans = sorted((_compare(one, reference) for one in priced), key=lambda one: -one.quality)
    reference = next(one for one in plans if one.candidate == reference.candidate)
    recommended, reason = _recommend(plans, request)
    return PlanResult(
        request, tuple(plans), tuple(_pareto(plans)), recommended, reference, reason,
        _find_binding(recommended, refused, reference, request), len(candidates),
    )  # fmt: skip


def _promise(candidate: Candidate, request: PlanRequest) -> _Promise | None:
    """What it would reach if only arithmetic took time; None if trained on too few tokens to be judged."""
    shape = candidate.shape
    terms = shape.training_flops()
    if request.budget_flops is not None:
        tokens = request.budget_flops / terms.total
    else:
        eff, hardware = request.efficiency, request.hardware
        seconds = (terms.total - terms.experts) / (hardware.flops_per_s * eff.gemm)
        seconds += terms.experts / (hardware.grouped_peak * eff.grouped)
        tokens = (request.step_seconds or 0.0) * request.num_devices / seconds
    if request.token_supply is not None:
        tokens = min(tokens, request.token_supply * request.max_epochs)
    if tokens < max(request.step_tokens, FEWEST_TOKENS_PER_PARAMETER * shape.active_parameters):
        return None
    return _Promise(candidate, tokens, mean_of(quick_equivalents(shape, tokens)))


def _price_kinds(
    promises: Iterable[_Promise], request: PlanRequest
) -> tuple[list[Plan], list[tuple[_Promise, Shortage]]]:
    kinds: dict[tuple[str, float], list[_Promise]] = {}
    for promise in sorted(promises, key=lambda one: -one.quality):
        kinds.setdefault((promise.candidate.block, promise.candidate.expert_ratio), []).append(promise)
    priced, refused = [], []
    for members in kinds.values():
        found = missed = 0
        for promise in members:
            if found >= PRICED_PER_KIND or missed >= REFUSED_PER_KIND * (1 + found):
                break
            training = choose_training(promise.candidate.shape, request)
            if isinstance(training, Shortage):
                refused.append((promise, training))
                # Shapes that miss by more than half are passed over without being counted: a smaller one may still fit.
                missed += training.needed_bytes < 1.5 * training.usable_bytes
                continue
            one = _price(promise.candidate, training, request)
            if one is not None:
                priced.append(one)
                found += 1
    return priced, refused


def _price(candidate: Candidate, training: Training, request: PlanRequest) -> Plan | None:
    shape = candidate.shape
    run = plan_run(shape, request, training)
    if run is None or run.num_tokens < FEWEST_TOKENS_PER_PARAMETER * shape.active_parameters:
        return None
    counts = count_for_laws(shape, run.num_tokens)
    answers = {name: law.compute_multiplier(counts[name]) for name, law in LAWS.items()}
    return Plan(
        candidate, training, run, counts, answers,
        serving=choose_serving(candidate, request),
        cautions=check_downstream(shape, run.num_tokens, request.target),
    )  # fmt: skip


def _compare(one: Plan, reference: Plan) -> Plan:
    own = equivalent_budgets(one.answers, one.counts)
    theirs = equivalent_budgets(reference.answers, reference.counts)
    return replace(one, gains={name: own[name] / theirs[name] for name in own if name in theirs})


def _costs(one: Plan) -> tuple[float, ...]:
    serving = one.serving_hours
    served = () if one.serving is None else (float("inf") if serving is None else serving,)
    return (-one.quality, one.training.memory.total, one.run.gpu_hours, *served)


def _pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Within the covered and within the uncovered: where laws know nothing, a number must not push out one that they know."""
    plans = list(plans)

    def beaten(one: Plan) -> bool:
        mine = _costs(one)
        for other in plans:
            theirs = _costs(other)
            rivals = bool(other.uncovered) == bool(one.uncovered) and theirs != mine
            if rivals and all(a <= b for a, b in zip(theirs, mine, strict=True)):
                return True
        return False

    return [one for one in plans if not beaten(one)]


def _recommend(plans: list[Plan], request: PlanRequest) -> tuple[Plan, str]:
    covered = [one for one in plans if not one.uncovered]
    best = covered[0]
    near = [one for one in covered if one.quality >= best.quality * (1 - request.indifference)]
    if request.inference is not None:
        served = [one for one in near if one.serving_hours is not None] or near
        chosen = min(served, key=lambda one: (one.serving_hours or 0.0, one.training.memory.total))
        saving = "lowest cost of serving"
    else:
        chosen = min(near, key=lambda one: one.training.memory.total)
        saving = "least memory"
    low, high = chosen.spread
    reason = (
        f"{chosen.candidate.name}: worth {chosen.quality:.2f} times the compute of the best dense model of this budget "
        f"(laws say {low:.2f} to {high:.2f}); of {len(near)} covered plans within {request.indifference:.0%} of the best "
        f"quality, {best.quality:.2f}, it has the {saving}"
    )
    if not any(chosen.answers[name].in_range for name in RANKING):
        reason += "; no law was fitted anywhere near: an extrapolation, not a forecast"
    return chosen, reason


def _find_binding(
    chosen: Plan, refused: list[tuple[_Promise, Shortage]], reference: Plan, request: PlanRequest
) -> Binding:
    parts = {k: v for k, v in chosen.training.time.as_dict().items() if isinstance(v, float) and k != "total"}
    shares = {name: seconds / chosen.training.time.total for name, seconds in parts.items()}
    base = mean_of(quick_equivalents(reference.candidate.shape, reference.run.num_tokens))
    limit = 1 - chosen.counts["joint"]["num_experts"] ** -1
    better = sorted(
        (
            (promise.candidate.name, promise.quality / base, shortage.needed_bytes)
            for promise, shortage in refused
            if promise.candidate.block in ("dense", "standard")
            and promise.quality / base > chosen.quality
            and promise.candidate.shape.sparsity <= max(0.95, limit)
        ),
        key=lambda one: -one[1],
    )[:5]
    shown = tuple(better)
    if chosen.run.limited_by == "data":
        spare = chosen.run.affordable_tokens - chosen.run.num_tokens
        text = (
            f"tokens run out: the budget would pay for {spare:.3g} more than the {chosen.run.num_tokens:.3g} there are"
        )
        return Binding("data", text, shares, shown)
    if better and better[0][1] > chosen.quality * (1 + request.indifference):
        name, gain, needed = better[0]
        text = (
            f"{name} promised {gain:.2f} and needs {needed / 1e9:.1f} GB on each device, "
            f"{(needed - request.usable_bytes) / 1e9:.1f} GB more than usable"
        )
        return Binding("memory", text, shares, shown)
    binds = chosen.training.time.binds
    share = {"compute": shares["products"] + shares["experts"]}.get(binds, shares.get(binds, shares["optimizer"]))
    words = {"all_to_all": "the experts' exchange", "compute": "arithmetic", "memory": "reading weights and states"}
    text = f"{words.get(binds, binds)} takes {share:.0%} of a step, and no better shape was refused for memory"
    return Binding(binds, text, shares, shown)


def _explain_small_budget(smallest: Candidate, request: PlanRequest) -> str:
    shape = smallest.shape
    needed = max(request.step_tokens, FEWEST_TOKENS_PER_PARAMETER * shape.active_parameters)
    supply = request.token_supply
    if supply is not None and supply * request.max_epochs < needed:
        return (
            f"token_supply={supply:.4g} (times max_epochs={request.max_epochs:g}) is too small: even {smallest.name} needs "
            f"{needed:.4g} tokens (one batch, and one token per active parameter), {needed / (supply * request.max_epochs):.3g} "
            "times as many; find more text, or fine-tune an existing model"
        )
    flops = shape.training_flops().total * needed
    return (
        f"the budget is too small: it comes to {request.expected_flops:.4g} FLOPs, and even {smallest.name} needs {flops:.4g} "
        f"for {needed:.4g} tokens (one batch, and one token per active parameter), "
        f"{flops / request.expected_flops:.3g} times as many; give more budget or a smaller batch_tokens"
    )


def _explain_no_fit(candidates: list[Candidate], request: PlanRequest, refused: list[tuple[_Promise, Shortage]]) -> str:
    training = choose_training(candidates[0].shape, request)
    if isinstance(training, Shortage):
        needed, name = training.needed_bytes, candidates[0].name
    else:
        promise, shortage = min(refused, key=lambda pair: pair[1].needed_bytes)
        needed, name = shortage.needed_bytes, promise.candidate.name
    usable = request.usable_bytes
    return (
        f"no shape fits into memory_bytes={usable:.4g} of a device: the most frugal, {name}, needs {needed:.4g} at "
        f"micro-batches of one sequence of {request.context_length}, {(needed - usable) / 1e9:.3g} GB more; shorten "
        "context_length, shrink vocab_size, or give devices with more memory"
    )
