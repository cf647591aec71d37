"""One recommendation with its reason and its doubts, or "no difference shown"."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_moe_ext.pilot.candidates import CONTROL_OF
from hf_moe_ext.pilot.statistics import ArmLosses, Comparison, compare_all

ARM, NO_DIFFERENCE = "recommended", "no difference shown"
FEW_ROWS = 200


def recommend(
    losses: Mapping[str, ArmLosses], costs: Mapping[str, int], base: str = "base", seed: int = 0
) -> dict[str, Any]:
    """Decide by the held-out losses.

    A trained candidate is recommended only if it is shown to beat the frozen base; among those not shown to be worse than the
    best, the one that trains the fewest parameters.

    Args:
        losses: By finalist, the base among them.
        costs: Trained parameters by finalist.
        base: Name of the frozen base.
        seed: Of the bootstrap.

    Returns:
        `answer` ("recommended" or "no difference shown"), `candidate`, `reason`, `comparisons`, `within_noise`.
    """
    found = compare_all(losses, base, seed)
    against_base: dict[str, Comparison] = found["against_base"]
    against_best: dict[str, Comparison] = found["against_best"]
    told: dict[str, Any] = {
        "comparisons": {
            key: {n: c.as_dict() for n, c in found[key].items()} for key in ("against_base", "against_best")
        },
        "best": found["best"],
        "within_noise": [],
    }
    better = [name for name, c in against_base.items() if c.shown and c.difference < 0]
    if not better:
        return {
            "answer": NO_DIFFERENCE,
            "candidate": None,
            "reason": _no_difference(found["best"], against_base),
            **told,
        }
    best = min(better, key=lambda name: (losses[name].mean, name))
    # A control only answers a question; nobody wants to ship it.
    near = [n for n in better if n == best or not against_best.get(n, _EQUAL).shown]
    usable = [n for n in near if n not in CONTROL_OF] or near
    chosen = min(usable, key=lambda name: (costs[name], losses[name].mean, name))
    told["within_noise"] = sorted(near, key=lambda name: losses[name].mean)
    return {
        "answer": ARM,
        "candidate": chosen,
        "reason": _reason(chosen, best, near, against_base, against_best, costs),
        **told,
    }


_EQUAL = Comparison(0.0, 0.0, 0.0, 0.0, None, 1.0, 1.0)


def _no_difference(best: str | None, against_base: Mapping[str, Comparison]) -> str:
    if best is None:
        return "No trained candidate finished, so there is nothing to compare with the frozen base"
    worse = sorted(name for name, c in against_base.items() if c.shown and c.difference > 0)
    text = (
        f"No trained candidate is shown to have a lower held-out loss than the frozen base; the best of them, {best}, differs "
        f"by {describe(against_base[best])}"
    )
    return text + (f". Shown to be worse than the base: {', '.join(worse)}" if worse else "")


def _reason(
    chosen: str,
    best: str,
    near: Sequence[str],
    against_base: Mapping[str, Comparison],
    against_best: Mapping[str, Comparison],
    costs: Mapping[str, int],
) -> str:
    text = f"{chosen} lowers the held-out loss of the frozen base by {describe(against_base[chosen], sign=-1)}"
    others = [name for name in near if name != chosen]
    if chosen != best:
        text += (
            f". {best} has the lowest loss, but the difference to {chosen} ({describe(against_best[chosen])}) is not shown, and "
            f"{chosen} trains {costs[chosen]:,} parameters instead of {costs[best]:,}"
        )
    elif others:
        text += f". No difference is shown to {', '.join(others)}; {chosen} has the lowest loss and trains the fewest parameters"
    worse = [name for name, c in against_best.items() if c.shown]
    if worse:
        text += f". Shown to be worse than {best}: {', '.join(worse)}"
    return text


def describe(comparison: Comparison, sign: int = 1) -> str:
    """A difference with its interval, in words; `sign=-1` turns it round."""
    low, high = sorted((sign * comparison.low, sign * comparison.high))
    return (
        f"{sign * comparison.difference:.4f} nats per token (95 % interval {low:.4f} to {high:.4f}, p = "
        f"{comparison.adjusted_p:.2g} for all comparisons together)"
    )


def collect_doubts(told: Mapping[str, Any]) -> list[str]:
    """What speaks against trusting the answer.

    Args:
        told: What `pilot.json` holds, without the doubts.
    """
    plan, facts, recommendation = told["plan"], told["data"], told["recommendation"]
    doubts = [
        f"{arm['candidate']} failed{'' if arm['status'] == 'failed' else ' with a seed'}: {arm['reason']}"
        for arm in told["arms"]
        if arm["reason"] is not None
    ]
    for reason in dict.fromkeys(plan["left_out"].values()):
        names = [name for name, why in plan["left_out"].items() if why == reason]
        doubts.append(f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} left out: {reason}")
    if told["ran"]["other_budget"]:
        doubts.append(told["ran"]["other_budget"])
    doubts += [
        f"The best learning rate of {arm['candidate']}, {arm['learning_rate']:g}, lies at the edge of those tried"
        for arm in told["arms"]
        if arm.get("rate_at_edge")
    ]
    if plan["seeds_run"] < plan["num_seeds"]:
        doubts.append(f"The budget ran out after {plan['seeds_run']} of {plan['num_seeds']} seeds")
    if plan["seeds_run"] < 2:
        doubts.append("One seed: the spread between seeds is not in the intervals, which are too narrow")
    if facts["held_out_rows"] < FEW_ROWS:
        doubts.append(f"{facts['held_out_rows']} held-out rows are few: small differences cannot be shown")
    if facts["held_out_from"] == "the data set" and facts["duplicates_dropped"]:
        doubts.append(f"{facts['duplicates_dropped']} train rows also stood among the held-out rows and were dropped")
    name = recommendation["candidate"]
    epochs = plan["epochs"].get(name or recommendation["best"])
    if epochs is not None:
        doubts.append(
            f"A finalist read its train rows {epochs:.2f} times; a longer training can order the candidates otherwise"
        )
    return doubts + _metric_doubts(told, name) + _control_doubts(told)


def _metric_doubts(told: Mapping[str, Any], name: str | None) -> list[str]:
    scored = {arm["candidate"]: arm["metric"] for arm in told["arms"] if arm.get("metric") is not None}
    if name is None or name not in scored:
        return []
    best = max(scored, key=lambda n: scored[n])
    if best == name or scored[best] <= scored[name]:
        return []
    return [
        f"By the metric, {best} is above the recommended {name}: {scored[best]:.4g} and {scored[name]:.4g} (higher taken as better)"
    ]


def _control_doubts(told: Mapping[str, Any]) -> list[str]:
    routing = told.get("is_routing_learnt")
    return [routing["text"]] if routing and not routing["shown"] else []


def judge_routing(losses: Mapping[str, ArmLosses], seed: int = 0) -> dict[str, Any] | None:
    """Is learning to route worth anything: the candidate against its control whose router never learns."""
    from hf_moe_ext.pilot.statistics import compare

    for control, routed in CONTROL_OF.items():
        if control in losses and routed in losses:
            one = compare(losses[routed], losses[control], seed)
            shown = one.shown and one.difference < 0
            verdict = "is shown to be worth something" if shown else "is not shown to be worth anything"
            text = f"Learning to route {verdict} here: {routed} differs from {control} by {describe(one)}"
            return {"shown": shown, "text": text, **one.as_dict()}
    return None
