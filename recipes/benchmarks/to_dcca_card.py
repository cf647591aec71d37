"""The card of `to_dcca.py`, from its JSON alone."""

import statistics
from typing import Any

_HEAD = """# Converting a trained model to DCCA

`hf-moe to-dcca` on the quickstart's base ({parameters:,} parameters), fitted on {num_tokens:,} tokens of the standard
library's train modules and measured on its held-out modules: perplexity of the source {source:.2f}.

Command: `{command}`; every number below is in [to-dcca.json](to-dcca.json), which it writes. Mean over seeds {seeds}
[smallest, largest]; a seed draws the calibration text.

"""
_LABELS = {
    "data": "fitted on data, layer after layer",
    "independent": "fitted on data, each layer by itself",
    "svd": "SVD of the weights",
}


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: What `to_dcca.py` wrote as JSON.
    """
    runs = results["runs"]
    first = runs[0]
    head = _HEAD.format(
        parameters=first["num_parameters_source"],
        source=first["perplexity_source"],
        command=results["command"],
        num_tokens=results["num_tokens"],
        seeds=", ".join(map(str, results["seeds"])),
    )
    fits = [run for run in runs if not run["distill_steps"]]
    distilled = [run for run in runs if run["distill_steps"]]
    tail = (
        "\nHidden error: squared difference of the hidden states after the last layer from the source's, over their squared "
        "norm. One small model: the error of another depends on how much of its experts' inputs and outputs a subspace "
        "holds, and on how long it is distilled; `hf-moe to-dcca` measures both and says so.\n"
    )
    return head + _fits(fits) + (_distilled(distilled, results) if distilled else "") + tail


def _fits(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| R / H | parameters | "
        + " | ".join(f"{label}: perplexity, hidden error" for label in _LABELS.values())
        + " |",
        "|---:|---:|" + "---|" * len(_LABELS),
    ]
    for ratio in sorted({run["ratio"] for run in runs}):
        same = [run for run in runs if run["ratio"] == ratio]
        cells = []
        for method in _LABELS:
            found = [run for run in same if run["method"] == method]
            error = statistics.mean(run["relative_hidden_error"] for run in found) if found else 0.0
            cells.append(f"{_spread([r['perplexity_converted'] for r in found])}, {error:.4f}" if found else "-")
        lines.append(f"| {ratio:g} | {same[0]['num_parameters']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _distilled(runs: list[dict[str, Any]], results: dict[str, Any]) -> str:
    lines = [
        f"\nDistilled for {results['distill_steps']} steps of 4 x 256 tokens (KL divergence to the source's predictions, peak "
        f"rate {results['learning_rate']:g}; fitted and distilled on {results['distill_tokens']:,} tokens; seeds "
        f"{', '.join(str(seed) for seed in sorted({run['seed'] for run in runs}))}):\n",
        "| R / H | source | converted | distilled | of the gap recovered | seconds |",
        "|---:|---:|---|---|---|---:|",
    ]
    for ratio in sorted({run["ratio"] for run in runs}):
        same = [run for run in runs if run["ratio"] == ratio]
        values = {key: [run[key] for run in same] for key in same[0]}
        recovered = _spread([100 * value for value in values["recovered_fraction"]], digits=0, unit=" %")
        lines.append(
            f"| {ratio:g} | {same[0]['perplexity_source']:.2f} | {_spread(values['perplexity_converted'])} "
            f"| {_spread(values['perplexity_distilled'])} | {recovered} | {statistics.mean(values['seconds']):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int = 2, unit: str = "") -> str:
    mean = f"{statistics.mean(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
