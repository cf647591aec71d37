"""What holds a plan back, and what is lacking where there is none: the constraint and by how much."""

from hf_moe_ext.scaling.candidates import Candidate
from hf_moe_ext.scaling.plan_quality import mean_of, quick_equivalents
from hf_moe_ext.scaling.plan_request import FEWEST_TOKENS_PER_PARAMETER, PlanRequest
from hf_moe_ext.scaling.plan_result import Binding, Plan, Promise
from hf_moe_ext.scaling.pricing import Shortage, choose_training


def find_binding(
    chosen: Plan, refused: list[tuple[Promise, Shortage]], reference: Plan, request: PlanRequest
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


def explain_small_budget(smallest: Candidate, request: PlanRequest) -> str:
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


def explain_no_fit(candidates: list[Candidate], request: PlanRequest, refused: list[tuple[Promise, Shortage]]) -> str:
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
