"""What a run leaves behind for a reader: intervals, pictures, metrics, and the card made from them."""

import csv
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import hf_moe_ext
from hf_moe_ext.cards import CardError, format_results, write_card
from hf_moe_ext.row_losses import RowLosses, as_plain

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt


class Clock:
    """Seconds each named part of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        began = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - began, 2)


def compare_losses(
    before: RowLosses, after: RowLosses, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Loss change per token with a paired bootstrap interval over rows.

    Rows are drawn with replacement, each with both of its losses, and every draw's change is the difference of the two
    ratios (summed nats / summed tokens). The percentile interval of Efron and Tibshirani (1993), chapter 13.

    Args:
        before: Losses of the base model.
        after: Losses of the tuned model, on the same rows.
        resamples: Number of draws.
        confidence: Coverage of the interval.
        seed: Of the draws.

    Returns:
        `before`, `after`, `difference` (negative is better), `low` and `high`, in nats per token; `rows`.
    """
    if not np.array_equal(before.tokens, after.tokens):
        raise ValueError("before and after must score the same tokens of the same rows")
    generator = np.random.default_rng(seed)
    rows = len(before.tokens)
    change = after.nats - before.nats
    draws = np.empty(resamples)
    for i in range(resamples):
        chosen = generator.integers(0, rows, rows)
        draws[i] = change[chosen].sum() / before.tokens[chosen].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return {
        "before": before.mean,
        "after": after.mean,
        "difference": after.mean - before.mean,
        "low": float(low),
        "high": float(high),
        "rows": rows,
    }


def draw_loss_curve(
    log: Sequence[Mapping[str, float]], before: float, after: float, path: Path, title: str = "Fine-tuning loss"
) -> None:
    """Training loss by step, with the held-out loss before and after."""
    steps = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if steps:
        axes.plot(*zip(*steps, strict=True), label="train", color="tab:blue")
    end = max((step for step, _ in steps), default=1)
    axes.plot([0, end], [before, after], "o--", label="held-out, before and after", color="tab:orange")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_load_map(fractions: Mapping[str, Sequence[float]], path: Path) -> None:
    """Share of the held-out tokens' choices that each adapter of each layer got."""
    table = np.array(list(fractions.values()))
    layers, experts = table.shape
    figure, axes = plt.subplots(figsize=(2 + 0.8 * experts, 1.5 + 0.4 * layers), layout="constrained")
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=max(float(table.max()), 2 / experts))
    for i in range(layers):
        for j in range(experts):
            axes.text(j, i, f"{table[i, j]:.0%}", ha="center", va="center", color="white", fontsize=8)
    axes.set(xlabel="adapter", ylabel="layer", title="Load of the adapter router, held-out rows")
    axes.set_xticks(range(experts))
    axes.set_yticks(range(layers), labels=[_layer_label(name, i) for i, name in enumerate(fractions)])
    figure.colorbar(image, label="share of routed choices")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _layer_label(name: str, position: int) -> str:
    return next((part for part in name.split(".") if part.isdigit()), str(position))


def write_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Metrics as JSON, moved into place whole."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(as_plain(dict(metrics)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def write_rows(table: Mapping[str, Sequence[Any]], path: Path) -> None:
    """A table of columns as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def write_results(metrics: Mapping[str, Any], folder: Path, name: str) -> str:
    """Metrics, then the card that is rendered from them.

    Args:
        metrics: What the run measured.
        folder: Of the run.
        name: Of the metrics' file.

    Returns:
        The results as Markdown; or why there is no card.
    """
    write_metrics(metrics, folder / name)
    try:
        write_card(folder, folder / name)
        return format_results(as_plain(dict(metrics)), name)
    except CardError as error:  # a run that diverged: its files are kept, and no card praises them
        return f"No card was made of {folder / name}: {error}"


def find_versions() -> dict[str, str]:
    """Versions of what a run stands on, for its card."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")} | {
        "hf_moe_ext": hf_moe_ext.__version__
    }


def find_peak_memory() -> int:
    """Bytes that this process had at most: on its accelerator, or where there is none in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
