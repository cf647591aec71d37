"""Figures of a plan's report, each a picture that stands in the page itself; drawn from explained plans alone."""

import base64
import io
from collections.abc import Callable
from math import log10, nan
from typing import TYPE_CHECKING, Any

from hf_moe_ext.scaling.laws import LAWS, abnar, joint
from hf_moe_ext.scaling.laws.leverage import efficiency_leverage
from hf_moe_ext.scaling.plan_quality import multiplier_at_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIGA = 1e9
RATIOS = (1, 2, 4, 8, 16, 32, 64)
MAP_CELLS = 9
MOST_BARS = 8
# Distinct without red against green (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
_LAW_COLOURS = {"abnar": COLOURS[0], "joint": COLOURS[1], "leverage": COLOURS[2]}
_BUCKETS = ("weights", "gradients", "optimizer", "activations", "working", "logits", "exchange")
_PARTS = ("products", "experts", "all_to_all", "data", "optimizer")


def draw_all(told: dict[str, Any]) -> dict[str, str]:
    """Data URIs by name."""
    drawings: dict[str, Callable[[Any, dict[str, Any]], None]] = {
        "fixed_budget": _draw_fixed_budget,
        "fixed_parameters": _draw_fixed_parameters,
        "pareto": _draw_pareto,
        "memory": _draw_memory,
        "time": _draw_time,
        "cost": _draw_cost,
    }
    pictures = {name: _picture(told, draw) for name, draw in drawings.items()}
    return pictures | {"map": _picture(told, _draw_map, panels=2)}


def _picture(told: dict[str, Any], draw: Callable[..., None], panels: int = 1) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "plan", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 3.6) if panels == 1 else (8.4, 3.6), layout="constrained")
        axes: Any = figure.subplots(1, panels)
        draw(axes, told)
        return _encode(figure)


def _encode(figure: "Figure") -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _budget(told: dict[str, Any]) -> float:
    return float(told["recommended"]["laws"]["abnar"]["counts"]["budget_flops"])


def _draw_fixed_budget(axes: "Axes", told: dict[str, Any]) -> None:
    budget = _budget(told)
    lines = {
        "abnar": ("Abnar", [abnar.ideal_multiplier(budget, r) for r in RATIOS]),
        "joint": ("Ludziejewski", [joint.ideal_multiplier(budget, r) for r in RATIOS]),
        # That law counts forward FLOPs alone.
        "leverage": ("Ling, granularity 8", [float(efficiency_leverage(1 / r, 8, budget / 3)) for r in RATIOS]),
    }
    for law, (label, values) in lines.items():
        _draw_line(axes, law, label, values, budget)
    _mark_recommended(axes, told)
    axes.set(title=f"Equal compute, C = {budget:.2g} FLOPs, size free", ylabel="dense compute for the same loss / C")
    _label_ratios(axes)


def _draw_fixed_parameters(axes: "Axes", told: dict[str, Any]) -> None:
    budget, total = _budget(told), told["recommended"]["parameters"]["total"]
    for law, label in (("abnar", "Abnar"), ("joint", "Ludziejewski, at most N")):
        values = [multiplier_at_parameters(law, total, budget, ratio) for ratio in RATIOS]
        _draw_line(axes, law, label, values, budget)
    _mark_recommended(axes, told)
    axes.set(
        title=f"Equal compute and N = {total / GIGA:.3g} B parameters in all",
        ylabel="dense compute for the same loss / C",
    )
    _label_ratios(axes)


def _draw_line(axes: "Axes", law: str, label: str, values: list[Any], budget: float) -> None:
    """Solid where the law was fitted, dashed beyond."""
    ranges = {one.variable: one for one in LAWS[law].card.fitted}
    budget_fitted = ranges["budget_flops"].check(budget / (3 if law == "leverage" else 1)) is None if (
        "budget_flops" in ranges
    ) else True  # fmt: skip
    limit = {"abnar": 20, "joint": 32}.get(law, RATIOS[-1])
    inside = [ratio for ratio in RATIOS if ratio <= limit]
    pairs = [(ratio, value) for ratio, value in zip(RATIOS, values, strict=True) if value is not None and value > 0]
    for part, style in (
        ([p for p in pairs if p[0] in inside], "-" if budget_fitted else "--"),
        ([p for p in pairs if p[0] >= inside[-1]], "--"),
    ):
        named = label if part and part[0][0] == RATIOS[0] else None
        axes.plot(
            *zip(*part, strict=True), style, color=_LAW_COLOURS[law], marker="o", markersize=3, label=named
        ) if part else None


def _label_ratios(axes: "Axes") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATIOS, [f"{ratio}\n{1 - 1 / ratio:.3g}" for ratio in RATIOS])
    axes.set_xlabel("experts / active experts, and sparsity S; dashed: beyond the fit")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _mark_recommended(axes: "Axes", told: dict[str, Any]) -> None:
    axes.axvline(1 / (1 - told["recommended"]["sparsity"]), color="#444444", linewidth=0.8, linestyle=":")


def _draw_map(axes: Any, told: dict[str, Any]) -> None:
    budget, total = _budget(told), told["recommended"]["parameters"]["total"]
    budgets = _spaced(min(3e19, budget / 3), max(1e21, budget * 3))
    totals = _spaced(min(1e8, total / 3), max(1e10, total * 3))
    for panel, (law, title) in zip(axes, (("abnar", "Abnar"), ("joint", "Ludziejewski (1:32 at most)")), strict=True):
        values = [[_best_sparsity(law, n, c) for c in budgets] for n in totals]
        drawn = panel.pcolormesh(budgets, totals, values, vmin=0, vmax=1, cmap="viridis", shading="nearest")
        panel.set(xscale="log", yscale="log", title=f"Best S by {title}", xlabel="training FLOPs C")
        panel.plot([budget], [total], marker="*", color="white", markeredgecolor="black", markersize=12)
    axes[0].set_ylabel("parameters in all, N")
    axes[0].figure.colorbar(drawn, ax=list(axes), label="sparsity S of lowest loss")


def _best_sparsity(law: str, total: float, budget: float) -> float:
    """Not a number, which is drawn as nothing, where a dense model would read more tokens than the law was fitted on."""
    fitted = {one.variable: one for one in LAWS[law].card.fitted}.get("tokens_per_parameter")
    if fitted is not None and budget / (6 * total) > fitted.high * total:
        return nan
    value = LAWS[law].optimal_sparsity(total, budget).value
    return nan if value is None else value


def _spaced(low: float, high: float) -> list[float]:
    step = (log10(high) - log10(low)) / (MAP_CELLS - 1)
    return [10 ** (log10(low) + step * i) for i in range(MAP_CELLS)]


def _draw_pareto(axes: "Axes", told: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    for covered, marker, colour, label in (
        (True, "o", COLOURS[0], "laws cover it"),
        (False, "^", COLOURS[7], "beyond every fit, or a kind no law knows"),
    ):
        rows = [one for one in told["pareto"] if one["covered"] is covered]
        if rows:
            x, y = [one["memory_bytes"] / GIGA for one in rows], [one["quality"] for one in rows]
            low = [one["quality"] - one["quality_low"] for one in rows]
            high = [one["quality_high"] - one["quality"] for one in rows]
            axes.errorbar(
                x, y, [low, high], fmt=marker, color=colour, markersize=4, elinewidth=0.6, alpha=0.8, label=label
            )
    best = told["recommended"]
    axes.plot(
        [best["memory"]["total"] / GIGA], [best["quality"]], "*", color=COLOURS[5], markersize=13, label="recommended"
    )
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(-6, 9)]))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(
        title="Pareto set; bars: spread between laws",
        xlabel="GB on each device",
        ylabel="times a dense model's compute",
    )
    axes.legend(frameon=False)


def _bars(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The recommended plan, the dense reference, and the best of the Pareto set beside them."""
    best, dense = told["recommended"]["name"], told["dense_reference"]["name"]
    rows = [one for one in told["pareto"] if one["name"] not in (best, dense)]
    first = [
        {"name": f"{told[key]['name']}", "memory": told[key]["memory"], "time": told[key]["time"]}
        for key in (("recommended",) if best == dense else ("recommended", "dense_reference"))
    ]
    return first + rows[: MOST_BARS - len(first)]


def _draw_memory(axes: "Axes", told: dict[str, Any]) -> None:
    rows = _bars(told)
    _stack(axes, rows, {part: [one["memory"][part] / GIGA for one in rows] for part in _BUCKETS})
    axes.axvline(told["derived"]["usable_bytes"] / GIGA, color="#444444", linewidth=0.8, linestyle=":")
    axes.set(title="Memory of a device at the worst moment (dotted: usable)", xlabel="GB")


def _draw_time(axes: "Axes", told: dict[str, Any]) -> None:
    rows = _bars(told)
    values = {part: [100 * one["time"][part] / one["time"]["total"] for one in rows] for part in _PARTS}
    _stack(axes, rows, values)
    axes.set(title="Where a step's time goes", xlabel="per cent of a step")


def _stack(axes: "Axes", rows: list[dict[str, Any]], values: dict[str, list[float]]) -> None:
    left = [0.0] * len(rows)
    places = range(len(rows))
    for colour, (part, sizes) in zip(COLOURS, values.items(), strict=False):
        axes.barh(places, sizes, left=left, color=colour, label=part.replace("_", "-"), height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(places, [one["name"] for one in rows], fontsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_cost(axes: "Axes", told: dict[str, Any]) -> None:
    priced = told["recommended"]["run"]["total_cost"] is not None
    bars = [("recommended", told["recommended"]["run"])]
    bars += [
        (f"dense, equal loss\nby {law}", one["run"]) for law, one in told["equal_loss_dense"].items() if one is not None
    ]
    values = [run["total_cost"] if priced else run["gpu_hours"] for _, run in bars]
    drawn = axes.barh(range(len(bars)), values, color=[COLOURS[5], *[COLOURS[7]] * (len(bars) - 1)], height=0.6)
    axes.bar_label(drawn, [f"{value:,.0f}" for value in values], padding=3)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    unit = told["request"]["prices"]["currency"] if priced else "device hours"
    axes.set(title="What the same loss costs to train", xlabel=unit)
