"""The card and the figure of `ders.py`, from its JSON alone."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt  # after the backend is set

STEP_BARS = {1: 1.2, 2: 1.3, 4: 1.65}  # fused low rank over one dense FFN, forward and backward, by top_k
DECODE_BAR, VANILLA_BAR = 1.2, 1.8
TRAINING_BAR, INFERENCE_BAR, GAIN_BAR = 0.21, 0.44, 0.05
FUSED, VANILLA = "low rank, fused", "vanilla MoE (grouped_mm)"

_HEAD = """# DeRS: upcycling to a shared base with light deltas

A dense model becomes a Mixture of Experts whose experts are one shared base plus a delta each (DeRS, arXiv 2503.01359),
beside vanilla upcycling (every expert a full copy) and the dense model itself. Every number is in
[ders-upcycle.json](ders-upcycle.json), with the command that made it; [brackets] are quartiles over rounds for times, and
95% intervals over seeds (Student's t) for losses.
"""
_WORK = {"step": "forward and backward", "forward": "forward, no graph", "decode": "one token, no graph"}


def render_card(results: dict[str, Any]) -> str:
    """Markdown of whatever parts were measured.

    Args:
        results: `ders-upcycle.json`.
    """
    parts = [_HEAD]
    for preset, run in results["runs"].items():
        parts.append(f"\n## {preset}\n")
        for name, render in (
            ("time", _time),
            ("memory", _memory),
            ("quality", _quality),
            ("compression", _compression),
        ):
            if name in run:
                parts.append(render(run[name]))
    return "".join(parts)


def _source(part: dict[str, Any]) -> str:
    low, high = part["load_average"]
    return f"\nCommand: `{part['command']}` on {part['device']}; load average {low} before, {high} after.\n"


def _time(part: dict[str, Any]) -> str:
    sizes = part["sizes"]
    arms = list(part["cells"][0]["ratio"])
    lines = [
        f"\n### Time of one layer's experts over one dense FFN\n\nHidden {sizes['hidden_size']}, inner "
        f"{sizes['intermediate_size']}, {sizes['num_experts']} experts, {sizes['dtype']}; rank {sizes['rank']}, drop rate "
        f"{sizes['drop_rate']}, {sizes['bits']} bit; all arms in turns, "
        f"{sizes['rounds']} rounds (sparse, quantised and materialised: the last {sizes['slow_rounds']}).\n",
        f"| work | tokens | threads | top-k | {' | '.join(arms)} |",
        "|---" * 4 + "|---:" * len(arms) + "|",
    ]
    for cell in part["cells"]:
        ratios = " | ".join(_ratio(cell["ratio"][arm]) for arm in arms)
        lines.append(f"| {_WORK[cell['work']]} | {cell['tokens']} | {cell['threads']} | {cell['top_k']} | {ratios} |")
    lines += ["", *(_bar(cell) for cell in part["cells"] if _limit(cell) is not None)]
    lines += ["", "Longest operations of a fused step at top-2, milliseconds of their own: " + ", ".join(
        f"`{name}` {value:.1f}" for name, value in part["profile"].items()) + "."]  # fmt: skip
    return "\n".join(lines) + "\n" + _source(part)


def _limit(cell: dict[str, Any]) -> float | None:
    return {"step": STEP_BARS.get(cell["top_k"]), "decode": DECODE_BAR}.get(cell["work"])


def _bar(cell: dict[str, Any]) -> str:
    limit, found = _limit(cell), cell["ratio"][FUSED]["median"]
    assert limit is not None
    text = (
        f"- {_WORK[cell['work']]}, {cell['threads']} thread(s), top-{cell['top_k']}: {found:.2f} of one dense FFN, bar "
        f"{limit:g}: {_verdict(found <= limit)}."
    )
    if cell["work"] == "step" and cell["top_k"] == 2:
        times = cell["vanilla_over"][FUSED]["median"]
        text += f" {times:.2f} times faster than the vanilla MoE, bar {VANILLA_BAR}: {_verdict(times >= VANILLA_BAR)}."
    return text


def _memory(part: dict[str, Any]) -> str:
    sizes = part["sizes"]
    lines = [
        f"\n### Memory\n\nWhole models: hidden {sizes['hidden_size']}, inner {sizes['intermediate_size']}, "
        f"{sizes['num_hidden_layers']} layers, vocabulary {sizes['vocab_size']}, {sizes['num_experts']} experts, top-"
        f"{sizes['top_k']}, {sizes['dtype']}, {sizes['batch_size']} x {sizes['length']} tokens. Bytes of allocated tensors: "
        "training is weights, AdamW's moments and the peak of one step; inference is weights and the peak of one forward "
        "without a graph.\n",
        "| model | parameters | MB on disk | training, MB | saved | inference, MB | saved |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in part["arms"].items():
        saved = part["saved"].get(name)
        shares = ["", ""] if saved is None else [f"{saved[k]:.1%}" for k in ("training_bytes", "inference_bytes")]
        lines.append(
            f"| {name} | {arm['parameters']:,} | {arm['disk_bytes'] / 1e6:.1f} | {arm['training_bytes'] / 1e6:.1f} | "
            f"{shares[0]} | {arm['inference_bytes'] / 1e6:.1f} | {shares[1]} |"
        )
    saved = part["saved"][FUSED]
    lines += [
        "",
        f"Low rank, fused, against vanilla: training {saved['training_bytes']:.1%} less (the paper's {TRAINING_BAR:.0%}: "
        f"{_verdict(saved['training_bytes'] >= TRAINING_BAR)}), inference {saved['inference_bytes']:.1%} less (the paper's "
        f"{INFERENCE_BAR:.0%}: {_verdict(saved['inference_bytes'] >= INFERENCE_BAR)}). The paper keeps a whole universal FFN "
        "in every layer of both models (Coder-MoE, its Table 6); here there is none.",
    ]
    return "\n".join(lines) + "\n" + _source(part)


def _quality(part: dict[str, Any]) -> str:
    lines = [
        f"\n### Loss after equal tokens\n\nThe quickstart's dense Llama, trained on for {part['steps']} steps of "
        f"{part['tokens_per_step']:,} tokens of the standard library, as what it was upcycled to; {part['held_out_rows']} "
        f"held-out rows, seeds {', '.join(map(str, part['seeds']))}. The learning rate of each arm is its best of those "
        f"tried with seed {part['search_seed']}, and so is, at that rate, how many times it the deltas have.\n",
        "| arm | parameters | MB | rate | deltas' | before | after | gain | worth of the deltas | against vanilla | against dense |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in part["arms"].items():
        after = sum(arm["after"].values()) / len(arm["after"])
        lines.append(
            f"| {name} | {arm['parameters']:,} | {arm['model_bytes'] / 1e6:.1f} | {arm['chosen']} | "
            f"{'x ' + arm['ratio'] if len(arm['tried_ratios']) > 1 else '-'} | {arm['before']:.4f} | "
            f"{after:.4f} | {_interval(arm['gain'])} | {_interval(arm.get('worth_of_deltas'))} | "
            f"{_relative(arm.get('against_vanilla'))} | {_relative(arm.get('against_dense'))} |"
        )
    least = {name: arm["gain"]["least"] for name, arm in part["arms"].items()}
    worth = {name: a["worth_of_deltas"]["least"] for name, a in part["arms"].items() if "worth_of_deltas" in a}
    lines += [
        "",
        f"- Every arm gains at least {GAIN_BAR} nats on its own step 0 in every seed: "
        f"{_verdict(min(least.values()) >= GAIN_BAR)} (least: {_list(least)}).",
        "- Every arm loses when its experts are levelled (deltas to zero; full copies to their mean), in every seed: "
        f"{_verdict(min(worth.values()) > 0)} (least: {_list(worth)}).",
        *(
            f"- {name} with one rate for all, as the paper has it: {sum(arm['after'].values()) / len(arm['after']):.4f}, worth "
            f"of the deltas {_interval(arm.get('worth_of_deltas'))}."
            for name, arm in part["with_one_rate"].items()
        ),
        "",
        "Losses of the search: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{rate} {loss:.4f}" for rate, loss in arm["tried"].items())
            for name, arm in part["arms"].items()
        )
        + ". Deltas' rate: "
        + "; ".join(
            f"{name}: " + ", ".join(f"x {ratio} {loss:.4f}" for ratio, loss in arm["tried_ratios"].items())
            for name, arm in part["arms"].items()
            if len(arm["tried_ratios"]) > 1
        )
        + ".",
    ]
    return "\n".join(lines) + "\n" + _source(part)


def _compression(part: dict[str, Any]) -> str:
    lines = [
        f"\n### Compression of the trained vanilla models\n\nAgainst their dense parent; rise of the loss, nats per token, on "
        f"{part['held_out_rows']} held-out rows, over the seeds of training (and of masks). Cosine of an expert's matrix to "
        f"the parent's: median {part['cosine']['median']:.4f}, least {part['cosine']['least']:.4f}. Bytes: base and deltas, "
        "values at 2 bytes, with scales, seeds or positions, as a share of the full experts at 2 bytes.\n",
        "![rise of the loss by bytes](ders-upcycle.png)\n",
        "| encoding | rise of the loss | least | most | bytes |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in part["encodings"]:
        rise = row["rise"]
        lines.append(
            f"| {row['encoding']} | {_interval(rise)} | {rise['least']:+.4f} | {rise['most']:+.4f} | {row['share']:.1%} |"
        )
    return "\n".join(lines) + "\n" + _source(part)


def draw_compression(results: dict[str, Any], path: Path) -> None:
    """Rise of the loss by bytes, of each preset that has it; nothing where none has."""
    runs = {name: run["compression"] for name, run in results["runs"].items() if "compression" in run}
    if not runs:
        return
    figure, panels = plt.subplots(1, len(runs), figsize=(8 * len(runs), 5), layout="constrained", squeeze=False)
    families = ("random drop", "magnitude drop", "least squares", "min-max")
    for axes, (name, part) in zip(panels[0], runs.items(), strict=True):
        for family in families:
            rows = [row for row in part["encodings"] if family in row["encoding"]]
            rows.sort(key=lambda row: row["share"])
            shares, means = [row["share"] for row in rows], [max(row["rise"]["mean"], 1e-5) for row in rows]
            axes.plot(shares, means, "o-", label=family)
            for row, x, y in zip(rows, shares, means, strict=True):
                words = row["encoding"].replace(family, "").strip(" ,")
                axes.annotate(words, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(
            xlabel="base and deltas, share of the full experts' bytes", ylabel="rise of the loss, nats per token",
            yscale="log", title=f"Compression of a trained upcycled MoE ({name}); rises below 1e-5 drawn there",
        )  # fmt: skip
        axes.legend()
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _verdict(holds: bool) -> str:
    return "met" if holds else "**missed**"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _interval(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:+.4f}" + (f" [{found['low']:+.4f}, {found['high']:+.4f}]" if "low" in found else "")


def _relative(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:+.2%}" + (f" [{found['low']:+.2%}, {found['high']:+.2%}]" if "low" in found else "")


def _list(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
