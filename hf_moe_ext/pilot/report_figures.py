"""Figures of a pilot's report, each a picture that stands in the page itself; drawn from `pilot.json` alone."""

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct without red against green (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#B8A800")
MARKS = "osD^vP*X"


def draw_all(told: dict[str, Any]) -> dict[str, str]:
    """Data URIs by name; those that have nothing to show are left out."""
    drawings: dict[str, tuple[Callable[..., None], int, bool]] = {
        "differences": (_draw_differences, 1, bool(told["recommendation"]["comparisons"]["against_base"])),
        "pareto": (_draw_pareto, 3, any(arm["loss"] is not None for arm in told["arms"])),
        "rates": (_draw_rates, 1, any(t["loss"] is not None for arm in told["arms"] for t in arm["tried"] or ())),
    }
    return {name: _picture(told, draw, panels) for name, (draw, panels, wanted) in drawings.items() if wanted}


def _picture(told: dict[str, Any], draw: Callable[..., None], panels: int) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "pilot", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 3.6) if panels == 1 else (9.6, 3.8), layout="constrained")
        axes: Any = figure.subplots(1, panels)
        draw(axes, told)
        return _encode(figure)


def _encode(figure: "Figure") -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _style(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        arm["candidate"]: {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[(i + i // len(COLOURS)) % len(MARKS)]}
        for i, arm in enumerate(told["arms"])
    }


def _draw_differences(axes: Any, told: dict[str, Any]) -> None:
    """Every finalist against the base, with its interval."""
    comparisons = told["recommendation"]["comparisons"]["against_base"]
    style = _style(told)
    names = sorted(comparisons, key=lambda name: comparisons[name]["difference"], reverse=True)
    for place, name in enumerate(names):
        one = comparisons[name]
        bar = [[one["difference"] - one["low"]], [one["high"] - one["difference"]]]
        axes.errorbar(one["difference"], place, xerr=bar, capsize=4, markersize=7, **style[name])
    axes.axvline(0, color="#888", linewidth=1)
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("held-out loss minus that of the frozen base, nats per token (left is better)")
    axes.grid(axis="x", alpha=0.3)


def _draw_pareto(panels: Any, told: dict[str, Any]) -> None:
    """Loss against what a candidate costs, three ways."""
    style = _style(told)
    arms = [arm for arm in told["arms"] if arm["loss"] is not None]
    costs: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
        ("seconds of a step", lambda arm: arm["step_s"]),
        ("peak memory, GB", lambda arm: arm["peak_bytes"] / 1e9),
        ("trained parameters", lambda arm: arm["parameters"]["trainable"] or None),
    )
    for axes, (label, cost) in zip(panels, costs, strict=True):
        for arm in arms:
            place = cost(arm)
            if place is None:  # the base takes no steps and trains nothing
                axes.axhline(
                    arm["loss"], color="#888", linewidth=1, linestyle="--", label=f"{arm['candidate']} (frozen)"
                )
                continue
            spread = [[arm["loss"] - min(arm["loss_by_seed"])], [max(arm["loss_by_seed"]) - arm["loss"]]]
            axes.errorbar(
                place,
                arm["loss"],
                yerr=spread,
                linestyle="",
                markersize=7,
                label=arm["candidate"],
                **style[arm["candidate"]],
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    trained = [arm["parameters"]["trainable"] for arm in arms if arm["parameters"]["trainable"]]
    if trained and max(trained) > 10 * min(trained):
        panels[2].set_xscale("log")
    else:
        panels[2].ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    panels[0].set_ylabel("held-out loss, nats per token")
    shown = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _draw_rates(axes: Any, told: dict[str, Any]) -> None:
    """Loss on the choice rows by learning rate: thin for the first round, thick for the second."""
    style = _style(told)
    for arm in told["arms"]:
        tried = [t for t in arm["tried"] or () if t["loss"] is not None]
        lengths = sorted({t["steps"] for t in tried})
        for steps in lengths:
            points = sorted((t["rate"], t["loss"]) for t in tried if t["steps"] == steps)
            last = steps == lengths[-1]
            axes.plot(
                *zip(*points, strict=True), linewidth=1.8 if last else 0.8, alpha=1 if last else 0.5, markersize=5,
                label=arm["candidate"] if last else None, **style[arm["candidate"]],
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss on the choice rows")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
