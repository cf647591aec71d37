"""What a reader sees of a run of `upcycle.py`: one table and one picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt

ARM_NAMES = {
    "low_rank": "shared base, low-rank deltas",
    "sparse": "shared base, sparse deltas",
    "vanilla": "full copies (vanilla upcycling)",
    "dense": "dense model, trained on",
}


def format_upcycling(metrics: Mapping[str, Any]) -> str:
    """Markdown of the numbers."""
    arms: Mapping[str, Any] = metrics["arms"]
    first = next(iter(arms.values()))
    lines = [
        f"Command: `{metrics['command']}`",
        "",
        f"{first['steps']} steps of {first['tokens_per_step']:,} tokens for every arm; losses on {first['loss']['rows']} "
        "held-out rows, nats per token.",
        "",
        "| arm | parameters | MB on disk | before | after | change | 95% interval | experts levelled | bits per byte |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        loss = arm["loss"]
        levelled = f"{arm['loss_levelled']:.4f}" if "loss_levelled" in arm else "-"
        lines.append(
            f"| {ARM_NAMES[name]} | {arm['parameters']:,} | {arm['model_bytes'] / 1e6:.1f} | {loss['before']:.4f} | "
            f"{loss['after']:.4f} | {loss['difference']:+.4f} | [{loss['low']:+.4f}, {loss['high']:+.4f}] | {levelled} | "
            f"{arm['bits_per_byte']:.3f} |"
        )
    lines += [
        "",
        "*Experts levelled*: the same model measured with its deltas at zero, or with its full copies at their mean: what "
        "the experts' differences are worth.",
        "",
        *(f"![{name}]({name})" for name in metrics["pictures"]),
    ]
    return "\n".join(lines)


def draw_arms(arms: Mapping[str, Any], path: Path) -> None:
    """Training loss by step of every arm, and the held-out loss each ends with."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, arm in arms.items():
        steps = [(entry["step"], entry["loss"]) for entry in arm["log"] if "loss" in entry]
        (line,) = axes.plot(*zip(*steps, strict=True), alpha=0.7, label=ARM_NAMES[name]) if steps else axes.plot([], [])
        ends = [0, arm["steps"]], [arm["loss"]["before"], arm["loss"]["after"]]
        axes.plot(*ends, "o:", color=line.get_color(), label="" if steps else ARM_NAMES[name])
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Training loss (lines), held-out loss (dots)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
