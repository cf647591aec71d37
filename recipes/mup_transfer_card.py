"""The report of `mup_transfer.py`, from its JSON alone: a table per arm, and which bars hold."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_SHIFT_STEPS, MAX_REGRET, LEAST_STANDARD_REGRET = 1.0, 0.02, 0.08

_HEAD = """# µP: does the best learning rate stay where it is?

A learning rate tuned on a narrow MoE model and used on wider ones, with µP for Mixture of Experts (after arXiv 2508.09752),
and without. Every number is in [{json}]({json}), with the command that made it.

![loss against learning rate]({png})

Command: `{command}`{state}

{setup}
"""


def render(results: Mapping[str, Any], json_name: str = "mup-transfer.json", png_name: str = "mup-transfer.png") -> str:
    """Markdown of a study.

    Args:
        results: what the recipe wrote.
        json_name: file beside the card that holds them.
        png_name: the picture.
    """
    finished, planned = results["num_finished_cells"], results["num_cells"]
    state = "" if finished == planned else f" ({finished} of {planned} cells are finished; the table holds these)"
    parts = [
        _HEAD.format(
            json=json_name, png=png_name, command=results["command"], state=state, setup=_describe_setup(results)
        )
    ]
    parts += [_render_arm(arm, results["axis"]) for arm in results["arms"]]
    verdicts = judge(results)
    if verdicts:
        parts.append("\n## What was to hold\n\n| bar | measured | holds |\n|---|---:|---|\n")
        parts += [f"| {bar} | {measured} | {'yes' if holds else '**no**'} |\n" for bar, measured, holds in verdicts]
    parts.append(_render_limits(results))
    return "".join(parts)


def judge(results: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(bar, measured, whether it holds) of a sweep over widths; none for other axes, where none were set."""
    if results["axis"] != "hidden_size":
        return []
    verdicts = []
    for arm in results["arms"]:
        others = [e for e in arm["values"] if e["value"] != arm["base_value"] and e["optimum"] is not None]
        others = [e for e in others if arm["base_learning_rate"] in dict(e["losses"])]  # of a study still running
        if not others:
            continue
        where = f"mup={arm['mode']}, {arm['max_steps']} steps"
        if arm["mode"] == "none":
            widest = others[-1]
            if widest["regret"] is None:
                verdicts.append(
                    (f"{where}: a finite loss at width {widest['value']} and the base's rate", "diverged", False)
                )
            else:
                bar = f"{where}: regret at width {widest['value']} at least {LEAST_STANDARD_REGRET}"
                verdicts.append((bar, f"{widest['regret']:.4f}", widest["regret"] >= LEAST_STANDARD_REGRET))
            continue
        shift = max((e["shift_steps"] for e in others), key=abs)
        bar = f"{where}: optimum within one factor of 2 of the base's"
        verdicts.append((bar, f"{shift:+.0f} steps", abs(shift) <= MAX_SHIFT_STEPS))
        worst = max(others, key=lambda e: (e["regret"] is None, (e["regret"] or 0) - (e["seed_spread"] or 0)))
        bar = f"{where}: regret at most {MAX_REGRET} nats beyond the seed spread"
        if worst["regret"] is None:
            verdicts.append((bar, f"diverged at width {worst['value']}", False))
        else:
            spread = worst["seed_spread"] or 0.0
            measured = f"{worst['regret']:.4f} (spread {spread:.4f}, width {worst['value']})"
            verdicts.append((bar, measured, worst["regret"] - spread <= MAX_REGRET))
        greatest = max(others, key=lambda e: (e["regret"] is None, e["regret"] or 0))
        if greatest["regret"] is not None:
            bar = f"{where}: the same without the spread taken off"
            verdicts.append(
                (bar, f"{greatest['regret']:.4f} (width {greatest['value']})", greatest["regret"] <= MAX_REGRET)
            )
    return verdicts


def _render_arm(arm: Mapping[str, Any], axis: str) -> str:
    rates = sorted({rate for entry in arm["values"] for rate, _ in entry["losses"]})
    head = " | ".join(_format_rate(rate) for rate in rates)
    lines = [
        f"\n## mup={arm['mode']}, {arm['max_steps']} steps\n",
        f"Held-out nats per token, mean over seeds, by learning rate at the base; its best there is "
        f"{_format_rate(arm['base_learning_rate'])}.\n",
        f"| {axis} | seeds | {head} | parabola's lowest | shift, factors of 2 | regret | seed spread |",
        f"|---:|---:|{'---:|' * len(rates)}---:|---:|---:|---:|",
    ]
    for entry in arm["values"]:
        losses, optimum = dict(entry["losses"]), entry["optimum"]
        best = None if optimum is None else optimum["learning_rate"]
        row = [_format_loss(losses[rate], rate == best) if rate in losses else "" for rate in rates]
        lines.append(
            f"| {entry['value']} | {len(entry['seeds'])} | {' | '.join(row)} | {_format_vertex(optimum)} | "
            f"{_format(entry['shift_steps'], '+.0f')} | {_format(entry['regret'], '.4f')} | "
            f"{_format(entry['seed_spread'], '.4f')} |"
        )
    return "\n".join(lines) + "\n"


def _describe_setup(results: Mapping[str, Any]) -> str:
    model, s = results["model"], results["settings"]
    experts = model.get("num_local_experts", model.get("num_experts"))
    return (
        f"{model['model_type']}, moe_block {model['moe_block']}: {model['num_hidden_layers']} layers, {experts} experts, top-"
        f"{model['num_experts_per_tok']}, base width {model['hidden_size']} (expert width {model['intermediate_size']}, heads "
        f"of {results['head_dim']}), {model['vocab_size']} bytes as vocabulary, untied. Rows of {s['length']} bytes of the "
        f"source of Python's standard library, {s['batch_size']} per step. AdamW, betas 0.9 and 0.95, epsilon "
        f"{s['adam_epsilon']:g}, weight decay {s['weight_decay']:g}, clipping {s['max_grad_norm'] or 'off'}; "
        f"`warmup_stable_decay`: linear warm-up over {s['warmup_steps']} steps, constant to {s['stable_until']:.0%} of the "
        f"steps, then linear to {s['final_lr_ratio']:.0%} of the peak. Load-balance loss {model['router_aux_loss_coef']}. "
        f"First weights: std {model['initializer_range']} at the base, embedding {s['embedding_std']}; without µP these at "
        f"every width. Loss without the load-balance loss, on {s['num_held_out_rows']} rows of modules no run trains on; "
        f"{results['device']}; torch {results['versions']['torch']}, transformers {results['versions']['transformers']}."
    )


def _render_limits(results: Mapping[str, Any]) -> str:
    steps = " and ".join(str(steps) for steps in sorted({arm["max_steps"] for arm in results["arms"]}))
    lines = [
        "\n## What this does not show\n",
        f"- {steps} steps of a model of two layers on one text: at this size seeds differ by a few hundredths of a nat, so the "
        "losses do not rank the stable parametrisations (mup, simplep) against each other. Shift and regret are the signal.",
        "- Only the learning rate is compared. Depth, batch size, number of steps, number of experts, top-k and granularity "
        "are not covered by the theory; `--axis` and a second `--max_steps` show where it stops.",
        "- Regret is of the mean curve over seeds, against its own best; seed spread is greatest less least loss at that rate.",
    ]
    for arm in results["arms"]:
        found = [(e["value"], e["optimum"]["loss"]) for e in arm["values"] if e["optimum"] is not None]
        losses = ", ".join(f"{loss:.4f} at {value}" for value, loss in found)
        lines.append(
            f"- Best loss of mup={arm['mode']} ({arm['max_steps']} steps), the rate tuned at each value: {losses}."
        )
    lines += _compare_tuned(results["arms"])
    outside = [
        f"mup={arm['mode']} at {entry['value']} ({arm['max_steps']} steps)"
        for arm in results["arms"]
        for entry in arm["values"]
        if entry["optimum"] is not None and not entry["optimum"]["bracketed"]
    ]
    if outside:
        lines.append(f"- Best rate at the edge of the grid, so the true one may lie outside: {'; '.join(outside)}.")
    return "\n".join(lines) + "\n"


def _compare_tuned(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a model without µP, tuned at its own width, ends lower than one with it."""
    best = {
        (arm["mode"], arm["max_steps"]): {e["value"]: e["optimum"]["loss"] for e in arm["values"] if e["optimum"]}
        for arm in arms
    }
    lines = []
    for (mode, steps), losses in best.items():
        standard = best.get(("none", steps), {}) if mode == "mup" else {}
        lower = [str(value) for value, loss in losses.items() if value in standard and standard[value] < loss]
        if lower:
            lines.append(
                f"- With the rate tuned at each value by itself ({steps} steps), mup=none ends lower than mup=mup at "
                f"{', '.join(lower)}: what µP saves here is the tuning, not loss."
            )
    return lines


def _format_rate(rate: float) -> str:
    power = len(bin(round(1 / rate))) - 3 if rate <= 1 else 0
    return f"2^-{power}" if rate == 2.0**-power else f"{rate:g}"


def _format_loss(loss: float | None, best: bool) -> str:
    text = "diverged" if loss is None else f"{loss:.4f}"
    return f"**{text}**" if best else text


def _format_vertex(optimum: Mapping[str, Any] | None) -> str:
    if optimum is None or optimum["vertex_learning_rate"] is None:
        return "not bracketed" if optimum is not None and not optimum["bracketed"] else "-"
    return f"{optimum['vertex_learning_rate']:.4f}"


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
