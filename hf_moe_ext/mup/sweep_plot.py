"""Loss against learning rate, a curve per value of the axis and a panel per parametrisation."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_sweep(
    arms: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], axis: str = "hidden_size", title: str = ""
) -> None:
    """Write a picture of a sweep; in each panel a circle at each curve's best rate and a line at the base's.

    Args:
        arms: of ``summarize``.
        path: PNG to write.
        axis: what the values are of.
        title: above all panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not arms:
        raise ValueError("draw_sweep: no arm to draw; run some cells first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_sweep needs matplotlib: pip install 'hf_moe_ext[recipes]', or read the table of summarize()"
        ) from error

    # Not through pyplot, whose backend and open figures are the caller's.
    figure = Figure(figsize=(5 * len(arms), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    budgets = {arm["max_steps"] for arm in arms}
    for panel, arm in zip(panels, arms, strict=True):
        for number, entry in enumerate(arm["values"]):
            points = [(rate, loss) for rate, loss in entry["losses"] if loss is not None]
            if not points:
                continue
            color = f"C{number}"
            panel.plot(*zip(*points, strict=True), marker=".", color=color, label=f"{axis} {entry['value']}")
            optimum = entry["optimum"]
            panel.plot([optimum["learning_rate"]], [optimum["loss"]], "o", color=color, fillstyle="none", markersize=10)
        panel.axvline(arm["base_learning_rate"], color="grey", linewidth=0.8, linestyle="--")
        name = f"mup={arm['mode']}" + (f", {arm['max_steps']} steps" if len(budgets) > 1 else "")
        panel.set(title=name, xlabel="learning rate at the base")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
