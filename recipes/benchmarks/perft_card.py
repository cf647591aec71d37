"""The model card and the figure of `perft.py`, from its JSON alone."""

from pathlib import Path
from typing import Any

import matplotlib
from perft_methods import REFERENCE

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt  # after the backend is set

# Step time over LoRA q, v; peak memory over LoRA q, v; and how much slower than E LoRA on experts is at least.
TIME_LIMITS = {"R": 1.05, "D": 1.05, "S": 1.05, "E": 1.15}
MEMORY_LIMITS = {"R": 1.02}
EXPERT_LORA_OVER_E = 1.8

_HEAD = """# PERFT: what a training step costs

Time and memory of one step (forward, backward, AdamW on what is trainable) of PERFT beside LoRA on q and v, LoRA on the
expert tensors (`target_parameters`), full fine-tuning and the frozen base, on random weights of a real model's shape.
Adapters have equal active parameters per token. The methods take turns in one process over the same weights; a ratio is
taken within each round, and the brackets are its quartiles over rounds. The gradient flows down to the embeddings in
every method, as under gradient checkpointing. Every number is in [perft-speed.json](perft-speed.json).

![ratios to LoRA q, v](perft-speed.png)
"""

_RUN = """
## {name}

{device}; torch {torch}, transformers {transformers}, PEFT {peft}. {family}: hidden {hidden_size}, {num_experts} experts of
width {intermediate_size}, top {top_k}, {num_hidden_layers} layers, vocabulary {vocab_size}, {dtype};
{batch_size} x {length} tokens. Base weights {base:.1f} MB.
{rounds} rounds, {steps} timed steps per visit, seed {seed}: `{command}`

"""


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: What `perft.py` wrote as JSON.
    """
    return "".join([_HEAD, *(_render_run(name, run) for name, run in results["runs"].items())])


def missed_targets(run: dict[str, Any]) -> dict[str, str]:
    """Method -> what it should have reached and did not, in words; a time within its spread of the target is named so."""
    missed: dict[str, list[str]] = {}
    for name, method in _fitting(run).items():
        variant = name.split()[0]
        for what, value, limit in (
            ("step time", method["ratio"][1], TIME_LIMITS.get(variant)),
            ("peak memory", memory_ratios(run, name)[0], MEMORY_LIMITS.get(variant)),
        ):
            if limit is not None and value > limit:
                words = f"{what} {value:.3f} of {REFERENCE}, target at most {limit}"
                if what == "step time" and method["ratio"][0] <= limit:
                    words += " (not decided: the lower quartile meets it)"
                missed.setdefault(name, []).append(words)
    over = _expert_lora_over_e(run)
    if over is not None and over < EXPERT_LORA_OVER_E:
        missed["LoRA on experts"] = [f"{over:.2f} times the step of E, expected at least {EXPERT_LORA_OVER_E}"]
    return {name: "; ".join(words) for name, words in missed.items()}


def memory_ratios(run: dict[str, Any], name: str) -> tuple[float, float]:
    """Peak memory over that of LoRA q, v: with the base's weights, and without them."""
    mine, theirs = (_own_bytes(run["methods"][method]) for method in (name, REFERENCE))
    return (run["base_bytes"] + mine) / (run["base_bytes"] + theirs), mine / theirs


def draw_card(results: dict[str, Any], path: Path) -> None:
    """One row of panels per run: step time with its quartiles, and memory without the base's weights, both as ratios."""
    runs = results["runs"]
    rows = max(len(_fitting(run)) for run in runs.values())
    size = (11, (0.32 * rows + 1.3) * len(runs))
    figure, axes = plt.subplots(len(runs), 2, figsize=size, squeeze=False, sharey="row")
    for (name, run), (left, right) in zip(runs.items(), axes, strict=True):
        methods = _fitting(run)
        positions = range(len(methods))
        ratios = [method["ratio"] for method in methods.values()]
        spread = [[m - low for low, m, _ in ratios], [high - m for _, m, high in ratios]]
        left.errorbar([m for _, m, _ in ratios], positions, xerr=spread, fmt="o", color="C0", capsize=3)
        for position, method in zip(positions, methods, strict=True):
            limit = TIME_LIMITS.get(method.split()[0])
            if limit is not None:
                left.plot([limit], [position], "|", color="C3", markersize=12)
        left.set_xlabel(f"step time / {REFERENCE}  (red: target)")
        right.barh(positions, [memory_ratios(run, method)[1] for method in methods], color="C0", height=0.6)
        right.set_xlabel(f"peak memory without base weights / {REFERENCE}")
        left.set_yticks(positions, list(methods))
        left.invert_yaxis()
        left.set_title(f"{name}: {run['device']}", loc="left", fontsize=9)
        for axis in (left, right):
            axis.axvline(1.0, color="grey", linewidth=0.8)
            axis.set_xlim(left=0)
            axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _render_run(name: str, run: dict[str, Any]) -> str:
    head = _RUN.format(**run["shape"] | run["versions"] | run, name=name, base=run["base_bytes"] / 1e6)
    return "".join([head, _table(run), "\n", *_reading(run), *_profiles(run)])


def _table(run: dict[str, Any]) -> str:
    lines = [
        f"| method | rank | trainable | active | step, s | over {REFERENCE} | processor time over it | step peak, MB "
        "| adapter + optimizer, MB | memory over it | without base weights |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, method in run["methods"].items():
        counts = f"| {name} | {method['rank'] or ''} | {method['trainable']:,} | {method['active']:,} "
        if "does_not_fit" in method:
            lines.append(f"{counts}| does not fit: {method['does_not_fit']} | | | | | | |")
            continue
        whole, own = memory_ratios(run, name)
        held = (method["adapter_bytes"] + method["optimizer_bytes"]) / 1e6
        lines.append(
            f"{counts}| {method['step_seconds']:.3f} | {_spread(method['ratio'])} "
            f"| {_spread(method.get('processor_ratio'))} | {method['transient_bytes'] / 1e6:.1f} | {held:.1f} "
            f"| {whole:.3f} | {own:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _reading(run: dict[str, Any]) -> list[str]:
    missed = missed_targets(run)
    aimed = [name for name in _fitting(run) if name.split()[0] in TIME_LIMITS]
    lines = [f"- Targets met: {', '.join(name for name in aimed if name not in missed) or 'none'}.\n"]
    lines += [f"- Not met: {name}: {words}.\n" for name, words in missed.items()]
    over = _expert_lora_over_e(run)
    if over is not None:
        lines.append(f"- LoRA on experts takes {over:.2f} times the step of E.\n")
    wide = [name for name in aimed if run["methods"][name]["ratio"][2] - run["methods"][name]["ratio"][0] > 0.1]
    if wide:
        lines.append(f"- Quartiles more than 0.1 apart, so the machine was not calm: {', '.join(wide)}.\n")
    own = {name: memory_ratios(run, name)[1] for name in aimed if name.split()[0] in MEMORY_LIMITS}
    over_limit = [f"{name} {own[name]:.3f}" for name in own if own[name] > MEMORY_LIMITS[name.split()[0]]]
    if over_limit:
        lines.append(
            f"- Without the base's weights these hold more than 2 % above {REFERENCE}: {', '.join(over_limit)}. R stores "
            "all its adapters, their gradients and their moments, whatever it uses per token.\n"
        )
    return lines


def _profiles(run: dict[str, Any]) -> list[str]:
    """For each method that missed a target: the operations that take most more time than in the reference."""
    lines = []
    for name, times in run["profiles"].items():
        if name == REFERENCE:
            continue
        theirs = run["profiles"][REFERENCE]
        more = {key: times.get(key, 0.0) - theirs.get(key, 0.0) for key in {**times, **theirs}}
        most = sorted(more, key=lambda key: -more[key])[:6]
        lines.append(
            f"- Profile of {name}, milliseconds of one step more than {REFERENCE}: "
            + ", ".join(f"`{key}` {more[key]:+.1f}" for key in most)
            + ".\n"
        )
    return lines


def _fitting(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: method for name, method in run["methods"].items() if "does_not_fit" not in method}


def _own_bytes(method: dict[str, Any]) -> int:
    """Everything but the base's weights."""
    total: int = method["adapter_bytes"] + method["optimizer_bytes"] + method["transient_bytes"]
    return total


def _expert_lora_over_e(run: dict[str, Any]) -> float | None:
    fitting = _fitting(run)
    if "E" not in fitting or "LoRA on experts" not in fitting:
        return None
    ratio: float = fitting["LoRA on experts"]["ratio"][1] / fitting["E"]["ratio"][1]
    return ratio


def _spread(quartiles: list[float] | None) -> str:
    if quartiles is None:
        return ""
    low, median, high = quartiles
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"
