"""What a reader sees of a run of `upcycle.py`: its arms by name, and one picture."""

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
