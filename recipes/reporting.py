"""What a run leaves behind for a reader: intervals, pictures, and the results in the README card."""

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from hf_moe_ext.row_losses import RowLosses, as_plain

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt

RESULTS_HEADING = "## Results of this run"


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


def append_results(results: str, path: Path) -> None:
    """Put the results under the card that the adapter wrote, or start one."""
    card = path.read_text(encoding="utf-8") if path.exists() else "# Measured, nothing trained\n"
    # PEFT's template follows, forty headings of "More Information Needed"; an earlier run's results too
    card = card.split("# Model Card for Model ID")[0].split(RESULTS_HEADING)[0].rstrip()
    path.write_text(f"{card}\n\n{RESULTS_HEADING}\n\n{results}\n", encoding="utf-8")


def format_results(metrics: Mapping[str, Any]) -> str:
    """Markdown tables of the numbers, and some of the texts."""
    lines = [f"Command: `{metrics['command']}`", ""]
    if base := metrics.get("base"):
        lines += [
            f"Base model: {base['bits_per_byte']:.3f} bits per byte on held-out modules; an interpolated order-3 byte "
            f"n-gram of the same text: {base['ngram_bits_per_byte']:.3f}.",
            "",
        ]
    lines += ["| held-out | before | after | change | 95% interval |", "|---|---|---|---|---|"]
    loss = metrics["loss"]
    lines.append(
        f"| loss, nats per answer token ({loss['rows']} rows) | {loss['before']:.4f} | {_number(loss.get('after'))} | "
        f"{_number(loss.get('difference'))} | {_interval(loss)} |"
    )
    if text := metrics.get("text_metric"):
        lines += [
            f"| {text['name']}, 0 to 100 ({text['rows']} rows) | {text['before']:.2f} | {_number(text.get('after'), 2)} "
            f"| | baselines: name words {text['name_words']:.2f}, shuffled pairs {_number(text.get('shuffled'), 2)} |"
        ]
    for group, scores in metrics.get("accuracy", {}).items():
        lines.append(
            f"| accuracy, {group} ({scores['rows']} rows) | {scores['before']:.1%} | "
            f"{'-' if scores.get('after') is None else format(scores['after'], '.1%')} | | "
            f"majority class {scores['majority_class']:.1%} |"
        )
    if parameters := metrics.get("parameters"):
        active = "an unknown part" if parameters["active"] is None else format(parameters["active"], ",")
        lines += ["", f"Trainable parameters: {parameters['trainable']:,}, of which a token uses {active}."]
    if pictures := metrics.get("pictures"):
        lines += ["", *(f"![{name}]({name})" for name in pictures)]
    if samples := metrics.get("samples"):
        lines += ["", "| prompt ends with | reference | before | after |", "|---|---|---|---|"]
        lines += [
            "| " + " | ".join(_cell(sample.get(key)) for key in ("prompt", "reference", "before", "after")) + " |"
            for sample in samples[:8]
        ]
    return "\n".join(lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(loss: Mapping[str, float]) -> str:
    return f"[{loss['low']:.4f}, {loss['high']:.4f}]" if "low" in loss else "-"


def _cell(text: str | None) -> str:
    return "-" if text is None else " ".join(text.split())[-120:].replace("|", "\\|")
