"""An explained plan to read in a terminal, and the sentences that the reports share."""

import json
from typing import Any

GIGA = 1e9
SHOWN = 15


def format_plan(told: dict[str, Any], details: bool = False) -> str:
    """The recommendation, what binds, the Pareto set; with all intermediate values where they are wanted.

    Args:
        told: of `plan_explain.explain`.
        details: of the recommended plan.
    """
    best = told["recommended"]
    lines = [
        told["reason"],
        "",
        *(f"  {line}" for line in facts(told)),
        "",
        f"binds: {told['binding']['constraint']}; ",
    ]
    lines[-1] += told["binding"]["reason"]
    lines += [f"caution: {text}" for text in cautions(told)]
    lines += [
        "",
        "Pareto set, best first (quality: times the compute of the best dense model; * recommended; ? not covered):",
    ]
    lines += [_table_line(one, one["name"] == best["name"]) for one in told["pareto"][:SHOWN]]
    if len(told["pareto"]) > SHOWN:
        lines.append(f"  and {len(told['pareto']) - SHOWN} more; --csv FILE writes all")
    if details:
        lines += ["", json.dumps(best, indent=2)]
    return "\n".join(lines)


def _table_line(one: dict[str, Any], chosen: bool) -> str:
    mark = "*" if chosen else " " if one["covered"] else "?"
    spread = f"{one['quality']:5.2f} ({one['quality_low']:.2f} to {one['quality_high']:.2f})"
    size = f"{one['total_parameters'] / GIGA:8.2f}B {one['active_parameters'] / GIGA:6.2f}B active"
    return f"{mark} {spread:22} {size} {one['memory_bytes'] / GIGA:6.1f} GB {one['gpu_hours']:10.0f} h  {one['name']}"


def facts(told: dict[str, Any]) -> list[str]:
    """The recommended plan in a few lines."""
    best, run = told["recommended"], told["recommended"]["run"]
    layout, step = best["layout"], best["step"]
    ways = {0: "one copy per device", 1: "shared optimizer states (ZeRO-1)", 3: "everything shared (FSDP)"}
    lines = [
        f"parameters  {best['parameters']['total'] / GIGA:.3g} B, {best['parameters']['active'] / GIGA:.3g} B active "
        "(input embedding counted)",
        f"tokens      {run['num_tokens'] / GIGA:.4g} B in {run['num_steps']} steps of {step['batch_tokens']}; "
        f"{best['tokens_per_active_parameter']:.3g} per active parameter",
        f"devices     {layout['world_size']}, {ways[layout['zero']]}, experts over {layout['expert']} rank(s)"
        + (f" by {layout['dispatch']}" if layout["expert"] > 1 else ""),
        f"memory      {best['memory']['total'] / GIGA:.1f} GB of {told['derived']['usable_bytes'] / GIGA:.1f} GB usable",
        f"time        {best['time']['total']:.3g} s a step, {run['hours'] / 24:.3g} days, {run['gpu_hours']:.0f} device hours",
        f"evidence    {best['laws_in_range']} of {len(best['ranking_laws'])} laws were fitted where this is asked",
        *own_fits(best),
    ]
    money = cost_text(told)
    return lines + ([f"cost        {money}"] if money else [])


def own_fits(best: dict[str, Any]) -> list[str]:
    """What the user's own fit says of a plan, and whether its runs reach there; nothing without one."""
    lines = []
    for name, law in best["laws"].items():
        if law["provenance"] != "own runs":
            continue
        gain = f"{best['gains'][name]:.2f} times dense" if name in best["gains"] else "no dense model of the same loss"
        doubts = "; ".join(flag["message"] for flag in law["flags"]) or "within its runs"
        lines.append(f"own fit     {name}: {gain}; {doubts}")
    return lines


def cost_text(told: dict[str, Any]) -> str:
    """Training, and a million tokens served; empty without prices."""
    cost, prices = told["recommended"]["run"]["total_cost"], told["request"]["prices"]
    if cost is None or prices is None:
        return ""
    text = f"{cost:,.0f} {prices['currency']} to train"
    serving = told["recommended"]["serving"]
    if serving and serving["fits"]:
        text += f", {serving['cost_per_million']:.3g} per million tokens served"
    return text


def cautions(told: dict[str, Any]) -> list[str]:
    """What of the recommended plan rests on little."""
    best = told["recommended"]
    found = [
        f"{name}: {flag['message']}"
        for name in best["ranking_laws"]
        for flag in best["laws"][name]["flags"]
        if flag["kind"] in ("outside_range", "artefact", "not_covered")
    ]
    if best["serving"] and not best["serving"]["fits"]:
        lacking = best["serving"]["needed_bytes"] - best["serving"]["usable_bytes"]
        found.append(f"serving fits no node: {lacking / GIGA:.3g} GB of a device are lacking")
    precision = told["assumptions"].get("precision")
    return found + best["cautions"] + ([precision] if precision else [])


def savings(told: dict[str, Any]) -> list[str]:
    """What the recommended plan saves against a dense model of equal loss, and from which volume."""
    lines = []
    hours = told["recommended"]["run"]["gpu_hours"]
    currency = (told["request"]["prices"] or {}).get("currency", "")
    for law, other in told["equal_loss_dense"].items():
        if other is None:
            lines.append(f"By the {law} law no dense shape that fits these devices reaches the same loss.")
            continue
        run = other["run"]
        text = (
            f"By the {law} law a dense model of the same loss ({other['name']}) takes {run['gpu_hours']:,.0f} device hours, "
            f"{run['gpu_hours'] / hours:.2f} times as many"
        )
        cost = run["total_cost"]
        lines.append(text + (f" ({cost:,.0f} {currency})." if cost is not None else "."))
    for name, one in told["break_even"].items():
        lines.append(f"Against {name}: {_break_even_text(one, currency)}")
    return lines


def _break_even_text(one: dict[str, Any], currency: str) -> str:
    verb = "saves" if one["saved_over_demand"] >= 0 else "costs"
    more = "" if verb == "saves" else " more"
    saved = f"{verb} {abs(one['saved_over_demand']):,.0f} {currency}{more} over the whole demand."
    if one["tokens"] is None:
        return f"never cheaper; {saved}"
    if one["tokens"] == 0:
        until = "for good" if one["until"] is None else f"up to {one['until']:.3g} generated tokens"
        return f"cheaper from the start, {until}; {saved}"
    return f"cheaper from {one['tokens']:.3g} generated tokens on; {saved}"


def settling_experiment(told: dict[str, Any]) -> dict[str, Any]:
    """Small runs that would tell which law is right here: the recommended E / K, its neighbours and dense, at two small budgets.

    Two per cent of the budget: each pair of sparsity and budget with three seeds.
    """
    counts = told["recommended"]["laws"]["joint"]["counts"]
    ratio = counts["num_experts"]
    ratios = sorted({1.0, max(1.0, ratio / 4), max(1.0, ratio / 2), ratio, 2 * ratio})
    share, seeds = 0.02, 3
    hours = told["recommended"]["run"]["gpu_hours"] * share
    low, high = told["recommended"]["spread"]
    # The larger budget of each pair is four times the smaller: 1/5 and 4/5 of a pair's share.
    pair = told["derived"]["expected_flops"] * share / (len(ratios) * seeds)
    return {
        "expert_ratios": ratios,
        "seeds": seeds,
        "budgets_flops": [pair / 5, pair * 4 / 5],
        "gpu_hours": hours,
        "share": share,
        "decides": f"whether the gain is nearer {low:.2f} or {high:.2f}",
    }
