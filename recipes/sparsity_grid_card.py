"""The card of `sparsity_grid.py`, from its JSON alone, and its picture."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity_grid_summary import ANSWERS

_HEAD = """# Is there an optimal sparsity at a fixed size and a fixed budget?

A grid of small MoE models over total parameters N, sparsity S = 1 - K/E and training FLOPs C. Every number is in
[{json}]({json}), with the commands that made it.

![loss against sparsity]({png})

Command: `{command}`{state}

{setup}
"""


def render(
    results: Mapping[str, Any], json_name: str = "sparsity-grid.json", png_name: str = "sparsity-grid.png"
) -> str:
    """Markdown of a grid.

    Args:
        results: what the recipe wrote.
        json_name: file beside the card that holds them.
        png_name: the picture.
    """
    finished, planned = results["num_finished_cells"], results["num_cells"]
    state = "" if finished == planned else f" ({finished} of {planned} runs are finished; the tables hold these)"
    head = _HEAD.format(
        json=json_name, png=png_name, command=results["command"], state=state, setup=_describe_setup(results)
    )
    parts = [head, _render_answer(results), _render_groups(results), _render_sizes(results), _render_surfaces(results)]
    parts += [_render_fit(one) for one in results.get("fits", ())]
    return "\n".join([*parts, _render_answers(results), _render_limits(results)])


def _describe_setup(results: Mapping[str, Any]) -> str:
    s, runs = results["settings"], results["runs"]
    low, high = (f"{end(run['num_steps'] for run in runs):,}" for end in (min, max))
    rates = ", ".join(f"{_rate(rate)} for E = {experts}" for experts, rate in results["learning_rates"].items())
    search = results["search"][0]
    return (
        f"olmoe_ext, {s['num_hidden_layers']} layers, top-{s['top_k']} of E experts with renormalised weights, the active "
        f"experts together about four widths wide, bytes as tokens, untied embeddings; N counts all parameters. E = {s['top_k']} "
        f"is the dense equivalent, S = 0. Width and expert width are chosen to reach N within a few per cent. C is exact "
        f"forward and backward FLOPs; the number of steps ({low} to {high}, of {s['batch_size']} rows of {s['length']} bytes) "
        f"follows from it. AdamW, clipping {s['max_grad_norm']:g}, warm-up over {s['warmup_fraction']:.0%} of the steps, linear "
        f"decay over the last {1 - s['stable_until']:.0%}. µP carries one learning rate over the widths; it was chosen per "
        f"number of experts at N = {search['total_parameters']:,.0f}, C = {search['budget_flops']:g} with a seed of its own: "
        f"{rates}. Loss: nats per byte without the load-balance loss, on {s['num_held_out_rows']} rows of modules of Python's "
        f"standard library that no run trains on. {len(runs)} runs, {results['seconds'] / 3600:.1f} hours of one process."
    )


def _render_answer(results: Mapping[str, Any]) -> str:
    """The question of the title, answered by the groups."""
    told = [group for group in results["groups"] if "best_sparsity" in group]
    if not told:
        return "## Answer\n\nNone yet: no pair of C and N has two seeds of three sparsities.\n"
    lines = ["## Answer\n"]
    for verdict, meaning in (
        ("interior", "the best sparsity lies between the ends of the grid, for every seed"),
        ("edge", "the best sparsity is an end of the grid for every seed, so the optimum may lie beyond it"),
        ("unclear", "seeds differ on whether the best one is an end"),
    ):
        found = [group for group in told if group["verdict"] == verdict]
        if found:
            where = "; ".join(f"{_place(group)}: S = {group['best_sparsity']:g}" for group in found)
            lines.append(f"- **{verdict}**, {len(found)} of {len(told)} pairs of C and N: {meaning}. {where}.")
    if len(told) < len(results["groups"]):
        missing = "; ".join(_place(group) for group in results["groups"] if "best_sparsity" not in group)
        lines.append(f"- Unfinished, and not counted: {missing}.")
    lines += [
        _describe_trend(told, "budget_flops", "C", "falls"),
        _describe_trend(told, "nominal_parameters", "N", "rises"),
    ]
    return "\n".join(lines) + "\n"


def _describe_trend(groups: Sequence[Mapping[str, Any]], by: str, name: str, published: str) -> str:
    """Which way the best sparsity moves along one axis with the other held."""
    held = "nominal_parameters" if by == "budget_flops" else "budget_flops"
    moves = {"rises": 0, "falls": 0, "stays": 0}
    for value in sorted({group[held] for group in groups}):
        row = sorted((group for group in groups if group[held] == value), key=lambda group: group[by])
        for one, other in itertools.pairwise(row):
            change = other["best_sparsity"] - one["best_sparsity"]
            moves["rises" if change > 0 else "falls" if change < 0 else "stays"] += 1
    counted = ", ".join(f"{what} {count}" for what, count in moves.items())
    return (
        f"- From one {name} to the next larger, the other held, the best sparsity of the grid (times): {counted}. In arXiv "
        f"2501.12370 it {published}."
    )


def _render_groups(results: Mapping[str, Any]) -> str:
    sparsities = sorted({point["sparsity"] for group in results["groups"] for point in group["points"]})
    lines = [
        "## Loss at fixed C and N\n",
        "Mean over seeds, and how far the highest lies above the lowest; the best in bold. Gains: loss at S = "
        f"{sparsities[0]:g} and at S = {sparsities[-1]:g} less the best one, mean over seeds [smallest, largest].\n",
        "| C | N | "
        + " | ".join(f"S = {s:g}" for s in sparsities)
        + " | gain over the first | gain over the last | best by seed | verdict |",
        "|---:|---:|" + "---:|" * len(sparsities) + "---|---|---|---|",
    ]
    for group in results["groups"]:
        points = {point["sparsity"]: point for point in group["points"]}
        cells = []
        for s in sparsities:
            if s not in points:
                cells.append("-")
                continue
            text = f"{points[s]['loss']:.4f}"
            text = f"**{text}**" if s == group.get("best_sparsity") else text
            cells.append(f"{text} ({points[s]['high'] - points[s]['low']:.4f})")
        gains = [_interval(group.get(name)) for name in ("gain_over_dense", "gain_over_sparsest")]
        seeds = ", ".join(f"{s:g}" for s in group.get("best_of_seeds", ()))
        lines.append(
            f"| {group['budget_flops']:g} | {group['nominal_parameters']:,.0f} | {' | '.join(cells)} | {' | '.join(gains)} | "
            f"{seeds} | {group['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def _render_sizes(results: Mapping[str, Any]) -> str:
    sparsities = sorted({one["sparsity"] for one in results["best_sizes"]})
    lines = [
        "## Loss at fixed C, N free\n",
        "Lowest mean loss over the sizes of the grid, and that size; * where it is the smallest or largest of the grid, so the "
        "true one may lie beyond; - where a size or a seed is missing.\n",
        "| C | " + " | ".join(f"S = {s:g}" for s in sparsities) + " |",
        "|---:|" + "---:|" * len(sparsities),
    ]
    for budget in sorted({one["budget_flops"] for one in results["best_sizes"]}):
        row = {one["sparsity"]: one for one in results["best_sizes"] if one["budget_flops"] == budget}
        cells = [
            f"{row[s]['mean']:.4f} at {row[s]['nominal_parameters']:,.0f}{'*' if row[s]['at_edge'] else ''}"
            if s in row
            else "-"
            for s in sparsities
        ]
        lines.append(f"| {budget:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _render_surfaces(results: Mapping[str, Any]) -> str:
    lines = [
        "## IsoFLOP surfaces\n",
        "Loss of one budget as a surface of degree 2 in ln N and -ln(1 - S) (arXiv 2501.12370, equation 8), which uses each "
        "model's exact N; S* of all runs [of the seeds by themselves], \\* where it is an edge of the sampled S.\n",
        "| C | runs | RMSE | S* by N |",
        "|---:|---:|---:|---|",
    ]
    for one in results["surfaces"]:
        if "refused" in one:
            lines.append(f"| {one['budget_flops']:g} | {one['num_runs']} | - | {one['refused']} |")
            continue
        optima = "; ".join(
            f"{best['nominal_parameters']:,.0f}: {best['best_sparsity']:.3f}{chr(92) + '*' if best['flags'] else ''} "
            f"{_ends(best['best_of_seeds'])}"
            for best in one["optima"]
        )
        lines.append(f"| {one['budget_flops']:g} | {one['num_runs']} | {one['rmse']:.4f} | {optima} |")
    return "\n".join(lines) + "\n"


def _render_fit(fit: Mapping[str, Any]) -> str:
    lines = [
        f"## Fit: {fit['form']}\n",
        f"`{fit['command']}`\n",
        f"{fit['formula']}: {fit['num_runs']} runs, {fit['num_parameters']} parameters, {fit['degrees_of_freedom']} degrees of "
        f"freedom, RMSE {fit['rmse']:.4f} nats per byte. It predicts inside its runs; a coefficient under a warning means nothing "
        "by itself.\n",
        f"| coefficient | value | {fit['level']:.0%} of {fit['num_resamples']} refits |",
        "|---|---:|---|",
        *(
            f"| {name} | {one['value']:.4g} | {one['low']:.4g} to {one['high']:.4g} |"
            for name, one in fit["coefficients"].items()
        ),
        "",
    ]
    for held in fit["hold_outs"]:
        where = f"- Held out {held['variable']} >= {held['bound']:.4g}:"
        if "refused" in held:
            lines.append(f"{where} {held['refused']}.")
        else:
            lines.append(
                f"{where} RMSE {held['rmse']:.4f} on {held['num_held']} runs (fitted to {held['num_fitted']}); the "
                f"{fit['level']:.0%} interval covers {held['covered']:.0%} of them."
            )
    lines.append(f"- Outliers (Bonferroni, 5 %): {len(fit['outliers'])}.")
    lines += [f"- Warning: {message}." for message in fit["warnings"]]
    return "\n".join(lines) + "\n"


def _render_answers(results: Mapping[str, Any]) -> str:
    if not results["answers"]:
        return ""
    lines = [
        "## Answers at equal loss\n",
        "Loss of the right answer given the end of its question, nats per byte; no run trains on these files. Answer loss = "
        "polynomial of degree 2 in the held-out loss + slope (-ln(1 - S)): a slope above 0 says that at equal loss sparser "
        f"models answer worse; ± is its standard error over runs. [Slopes of the seeds by themselves.] The first {results['settings']['num_answer_rows']} rows.\n",
        "| file | lowest | highest | correlation with the loss | slope per factor e of E/K | scatter |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for column, one in results["answers"].items():
        name = column.removeprefix(ANSWERS)
        if "refused" in one:
            lines.append(f"| {name} | - | - | - | {one['refused']} | - |")
            continue
        seeds = ", ".join(f"{slope:+.4f}" for slope in one["slope_of_seeds"])
        lines.append(
            f"| {name} | {one['lowest']:.3f} | {one['highest']:.3f} | {one['correlation_with_loss']:.3f} | "
            f"{one['slope']:+.4f} ± {one['slope_standard_error']:.4f} [{seeds}] | {one['scatter']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _render_limits(results: Mapping[str, Any]) -> str:
    runs, memory = results["runs"], results["memory"]
    ratios = [run["num_tokens"] / run["active_parameters"] for run in runs]
    fewest = sum(ratio < 1 for ratio in ratios)
    lines = [
        "## What this does not show\n",
        f"- Models of {min(r['total_parameters'] for r in runs):,} to {max(r['total_parameters'] for r in runs):,} parameters, "
        f"trained for {min(r['budget_flops'] for r in runs):g} to {max(r['budget_flops'] for r in runs):g} FLOPs on one text: that "
        "an optimum exists here says how to look for one, not where it lies at another scale.",
        f"- Tokens per active parameter from {min(ratios):.2g} to {max(ratios):.4g}; {fewest} runs have less than 1. Published "
        "laws were fitted to compute-optimal training and are worse at both ends.",
        "- The learning rate was chosen at one size and one budget per number of experts; what a choice per cell would add is "
        "not known, and part of a difference in S may be its tuning.",
        "- At these widths embeddings and attention are a large part of the active parameters, which bounds what sparsity can "
        "save.",
        f"- Peak memory by the package's formula over the measured one, of all cells: {memory['lowest_ratio']:.3f} to "
        f"{memory['highest_ratio']:.3f}. Bytes of the all-to-all are by formula, for {results['settings']['expert_parallel']} "
        "ranks and bfloat16; nothing was sent.",
    ]
    if results["answers"]:
        lines.append(
            "- The answers measure how well a model of code writes English answers; none of these models reasons."
        )
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A panel per budget: loss against -log2(1 - S), a curve per size; and answers against the loss, coloured by S."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budgets = sorted({group["budget_flops"] for group in results["groups"]})
    figure = Figure(figsize=(4.3 * (len(budgets) + bool(results["answers"])), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(budgets) + bool(results["answers"]), squeeze=False)[0]
    sizes = sorted({group["nominal_parameters"] for group in results["groups"]})
    colours = {size: f"C{number}" for number, size in enumerate(sizes)}
    for panel, budget in zip(panels, budgets, strict=False):
        _draw_budget(panel, [group for group in results["groups"] if group["budget_flops"] == budget], colours)
        panel.set_title(f"C = {budget:g} FLOPs")
    panels[0].set_ylabel("held-out loss, nats per byte")
    panels[0].legend(fontsize=8, title="N")
    if results["answers"]:
        _draw_answers(panels[-1], results, figure)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def _draw_budget(panel: Any, groups: Sequence[Mapping[str, Any]], colours: Mapping[float, str]) -> None:
    for group in groups:
        points = group["points"]
        ratios, losses = [1 / (1 - point["sparsity"]) for point in points], [point["loss"] for point in points]
        below = [point["loss"] - point["low"] for point in points]
        above = [point["high"] - point["loss"] for point in points]
        label, colour = f"{group['nominal_parameters']:,.0f}", colours[group["nominal_parameters"]]
        panel.errorbar(ratios, losses, [below, above], marker=".", capsize=2, color=colour, label=label)
        if "best_sparsity" in group:
            ratio = 1 / (1 - group["best_sparsity"])
            panel.plot([ratio], [losses[ratios.index(ratio)]], "o", color=colour, fillstyle="none", markersize=11)
    panel.set_xscale("log", base=2)
    ticks = sorted({1 / (1 - point["sparsity"]) for group in groups for point in group["points"]})
    panel.set_xticks(ticks, labels=[f"{1 - 1 / ratio:.3g}" for ratio in ticks])
    panel.set_xlabel("sparsity S = 1 - K/E")
    panel.grid(alpha=0.3)


def _draw_answers(panel: Any, results: Mapping[str, Any], figure: Any) -> None:
    markers = "os^v"
    for number, column in enumerate(results["answers"]):
        found = [(run["loss"], run[column], 1 / (1 - run["sparsity"])) for run in results["runs"]]
        loss, answer, ratio = zip(*found, strict=True)
        drawn = panel.scatter(
            loss, answer, c=ratio, norm="log", cmap="viridis", s=14, marker=markers[number % len(markers)],
            label=column.removeprefix(ANSWERS),
        )  # fmt: skip
    panel.set(title="answers", xlabel="held-out loss, nats per byte", ylabel="answer loss, nats per byte")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.colorbar(drawn, ax=panel, label="E / K")


def _ends(values: Sequence[float]) -> str:
    return f"[{min(values):.3f}, {max(values):.3f}]" if values else "[-]"


def _place(group: Mapping[str, Any]) -> str:
    return f"C {group['budget_flops']:g}, N {group['nominal_parameters']:,.0f}"


def _rate(rate: float) -> str:
    power = len(bin(round(1 / rate))) - 3 if rate <= 1 else 0
    return f"2^-{power}" if rate == 2.0**-power else f"{rate:g}"


def _interval(one: Mapping[str, float] | None) -> str:
    return "-" if one is None else f"{one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
