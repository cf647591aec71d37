"""How many experts, how many active, at this budget on these devices: candidates priced, the best few kept, one recommended.

Shapes are sorted by what they could reach if nothing but arithmetic took time, and of each kind (block, E / K) the first few that
fit are priced in full. Quality is a quotient against the best dense model of the same budget, by each law under its own
counting; the spread between the laws is part of every answer. Shapes that no law was fitted on (latent experts, shared bases)
are priced and shown, and not recommended.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hf_moe_ext.scaling.candidates import Candidate, enumerate_candidates
from hf_moe_ext.scaling.laws import Law, add_law
from hf_moe_ext.scaling.laws.downstream import check_downstream
from hf_moe_ext.scaling.plan_limits import explain_no_fit, explain_small_budget, find_binding
from hf_moe_ext.scaling.plan_quality import (
    RANKING,
    count_for_laws,
    equivalent_budgets,
    mean_of,
    quick_equivalents,
)
from hf_moe_ext.scaling.plan_request import FEWEST_TOKENS_PER_PARAMETER, PlanRequest
from hf_moe_ext.scaling.plan_result import Plan, PlanResult, Promise
from hf_moe_ext.scaling.pricing import (
    Shortage,
    Training,
    choose_serving,
    choose_training,
    plan_run,
)

# Of each kind: how many are priced in full, and how many may be found too large on the way.
PRICED_PER_KIND, REFUSED_PER_KIND = 4, 12


def plan(request: PlanRequest, own_law: Law | None = None) -> PlanResult:
    """The whole search.

    Args:
        request: the question.
        own_law: asked beside the published ones and shown; it does not rank.

    Raises:
        ValueError: nothing fits, or the budget trains nothing; says which constraint and by how much. A law of one's own that is
            called as a published one.
    """
    laws = add_law(own_law)
    candidates = list(enumerate_candidates(request))
    promises = [promise for promise in (_promise(c, request) for c in candidates) if promise is not None]
    if not promises:
        raise ValueError(explain_small_budget(candidates[0], request))
    priced, refused = _price_kinds(promises, request, laws)
    if not priced:
        raise ValueError(explain_no_fit(candidates, request, refused))
    dense = [one for one in priced if one.candidate.block == "dense"]
    if not dense:
        raise ValueError(
            "no dense model of this budget fits to compare with: " + explain_no_fit(candidates, request, refused)
        )
    reference = max(dense, key=lambda one: mean_of(equivalent_budgets(one.answers, one.counts)))
    plans = sorted((_compare(one, reference) for one in priced), key=lambda one: -one.quality)
    reference = next(one for one in plans if one.candidate == reference.candidate)
    recommended, reason = _recommend(plans, request)
    return PlanResult(
        request, tuple(plans), tuple(_pareto(plans)), recommended, reference, reason,
        find_binding(recommended, refused, reference, request), len(candidates), laws,
    )  # fmt: skip


def _promise(candidate: Candidate, request: PlanRequest) -> Promise | None:
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
    return Promise(candidate, tokens, mean_of(quick_equivalents(shape, tokens)))


def _price_kinds(
    promises: Iterable[Promise], request: PlanRequest, laws: Mapping[str, Law]
) -> tuple[list[Plan], list[tuple[Promise, Shortage]]]:
    kinds: dict[tuple[str, float], list[Promise]] = {}
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
            one = _price(promise.candidate, training, request, laws)
            if one is not None:
                priced.append(one)
                found += 1
    return priced, refused


def _price(candidate: Candidate, training: Training, request: PlanRequest, laws: Mapping[str, Law]) -> Plan | None:
    shape = candidate.shape
    run = plan_run(shape, request, training)
    if run is None or run.num_tokens < FEWEST_TOKENS_PER_PARAMETER * shape.active_parameters:
        return None
    counts = count_for_laws(shape, run.num_tokens, laws)
    answers = {name: law.compute_multiplier(counts[name]) for name, law in laws.items()}
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
    why = "the best of the plans that laws cover"
    if len(near) > 1:
        why = (
            f"of {len(near)} covered plans within {request.indifference:.0%} of the best quality, {best.quality:.2f}, "
            f"it has the {saving}"
        )
    reason = (
        f"{chosen.candidate.name}: worth {chosen.quality:.2f} times the compute of the best dense model of this budget "
        f"(laws say {low:.2f} to {high:.2f}); {why}"
    )
    if not any(chosen.answers[name].in_range for name in RANKING):
        reason += "; no law was fitted anywhere near: an extrapolation, not a forecast"
    return chosen, reason
