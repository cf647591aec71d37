"""The card and figure of `mup_coord.py`, from its JSON alone."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt  # after the backend is set

_HEAD = """# µP for Mixture of Experts: coordinate check

What grows with the width when a small Mixtral (2 layers, 8 experts, top-2, experts twice as wide as the model, heads of 16,
base width 32) takes six AdamW steps at 4e-3 on one batch of 8 x 64 bytes of Python source, at widths 64 to 512:
slope of log2(RMS) against log2(width), layer 1 unless two are given (layer 0 / layer 1), at t = 1, 3, 6 optimizer steps; Δ is
the change since t = 0. Under µP every Δ is to be within ±0.3 and the router's logits at t = 0 near -1/2 (-0.75 to -0.25).

Command: `{command}` (torch {torch}, transformers {transformers}, Python {python}){missing}.
Every number is in [mup-coord.json](mup-coord.json).

![sizes against widths](mup-coord.png)

"dcca" has a latent that grows with the width, "held" one that keeps its size. "Starts": "all 0.1" draws every matrix with
0.1 at the base width (the embedding 0.5); "outputs 0.02" draws router and head with 0.02, Transformers' default. In the
standard parametrisation ("sp") these are the standard deviations at every width.

With "all 0.1", the reference's start, µP misses the bar in Δ router of layer 1 (and, with DCCA, in Δ output at t = 1).
What falls there is not what the router learns: router update, what the change of its weights alone makes of its input, is
flat. It is the first weights times the change of their input, noise of size n^-1/2, which at these widths is the larger part.
Drawn smaller ("outputs 0.02"), with the same rules, widths and learning rate, it fades and every row of the
multiplier form ("mup") is inside, all six seeds together. Single seeds, in the JSON, differ by more than 0.1: the folded form
("mup folded"), measured with seeds 0 and 1 alone, has one row of each block outside (Δ router of layer 1: -0.35 at t = 6,
with DCCA -0.33 at t = 1).
"""
_SPEC = """
## Beside the reference

The table of `specs/mup.md`, section 5.1 and 5.2 (its batch and its random numbers are not known), standard block, all 0.1:

| quantity | {names} |
|---|{rules}|
"""
# Of the specification: quantity, layer, steps -> slopes by arm.
_REFERENCE: dict[tuple[str, int | None, tuple[int, ...]], dict[str, str]] = {
    ("router_logits", 1, (0,)): {
        "sp": "+0.51",
        "simplep": "+0.56",
        "mup": "-0.45",
        "hidden-type router": "+0.05",
        "no multiplier": "-0.45",
    },
    ("delta_router_logits", 0, (1, 3, 6)): {
        "sp": "+1.33, +1.22, +1.21",
        "simplep": "+1.10, +0.92, +0.85",
        "mup": "-0.05, -0.03, -0.01",
        "hidden-type router": "+0.18, +0.17, +0.15",
        "no multiplier": "+1.02, +0.97, +0.92",
    },
    ("delta_router_logits", 1, (1, 3, 6)): {
        "sp": "+0.98, +0.99, +0.98",
        "simplep": "+1.01, +0.85, +0.74",
        "mup": "-0.17, -0.24, -0.25",
        "hidden-type router": "+0.26, +0.23, +0.16",
        "no multiplier": "+0.85, +0.70, +0.61",
    },
    ("delta_expert_output", 1, (1, 3, 6)): {
        "sp": "+1.75, +1.64, +1.56",
        "simplep": "+0.17, +0.08, +0.09",
        "mup": "+0.07, -0.03, -0.04",
        "hidden-type router": "+0.04, -0.01, +0.01",
        "no multiplier": "+0.15, +0.05, +0.05",
    },
    ("delta_residual", 1, (1, 3, 6)): {
        "sp": "+1.68, +1.52, +1.50",
        "simplep": "+0.09, +0.05, +0.04",
        "mup": "+0.03, 0.00, +0.03",
        "hidden-type router": "+0.02, +0.03, +0.04",
        "no multiplier": "+0.09, +0.05, +0.06",
    },
    ("delta_output_logits", None, (1, 3, 6)): {
        "sp": "+0.79, +0.61, +0.52",
        "simplep": "-0.22, -0.19, -0.11",
        "mup": "-0.24, -0.19, -0.09",
        "hidden-type router": "-0.24, -0.19, -0.09",
        "no multiplier": "-0.23, -0.19, -0.09",
    },
    ("output_logits", None, (0,)): {
        "sp": "+0.49",
        "simplep": "-0.51",
        "mup": "-0.51",
        "hidden-type router": "-0.51",
        "no multiplier": "-0.51",
    },
    ("router_logit_gradient", 0, (6,)): {
        "sp": "+0.44",
        "simplep": "-0.79",
        "mup": "-0.15",
        "hidden-type router": "-0.28",
        "no multiplier": "-0.65",
    },
    ("router_logit_gradient", 1, (6,)): {
        "sp": "+0.07",
        "simplep": "-0.73",
        "mup": "-0.11",
        "hidden-type router": "-0.25",
        "no multiplier": "-0.44",
    },
    ("expert_output_gradient", 1, (0, 1, 3, 6)): {"mup": "-1.01, -1.00, -1.01, -1.03"},
    ("covariance", 1, (0, 1, 3, 6)): {"mup": "-1.60, -1.06, -1.09, -1.15"},
    ("cosine", 1, (0, 1, 3, 6)): {"mup": "-0.57, -0.03, -0.04, -0.03"},
    ("weight_gradient:mlp.gate.weight", 1, (0, 1, 3, 6)): {
        "mup": "-1.05, -0.75, -0.70, -0.83",
        "mup folded": "-0.05, +0.25, +0.30, +0.17",
    },
}
_NAMES = {
    "router_logits": "router logits",
    "delta_router_logits": "Δ router logits",
    "router_update": "router update",
    "delta_residual": "Δ residual",
    "delta_expert_output": "Δ expert output",
    "delta_latent": "Δ latent",
    "delta_attention_logits": "Δ attention logits",
    "delta_output_logits": "Δ output logits",
    "output_logits": "output logits",
    "router_logit_gradient": "router-logit gradient",
    "max_router_probability": "largest router probability",
    "expert_output_gradient": "gradient at expert output",
    "covariance": "covariance (gradient, expert output)",
    "cosine": "cosine (gradient, expert output)",
    "weight_gradient:mlp.gate.weight": "router weight gradient",
}
_PANELS = (
    ("router_logits", 0),
    ("delta_router_logits", 6),
    ("router_update", 6),
    ("delta_residual", 6),
    ("router_logit_gradient", 6),
    ("max_router_probability", 6),
)
Run = dict[str, Any]


def render_card(results: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        results: what `mup_coord.py` wrote as JSON.
    """
    runs = results["runs"]
    parts = [
        _HEAD.format(
            **{key: results[key] for key in ("command", "torch", "transformers", "python")},
            missing="; not yet run: " + ", ".join(results["missing"]) if results["missing"] else "",
        )
    ]
    for block, start in dict.fromkeys((run["block"], run["start"]) for run in runs):
        parts.append(_render_block(block, start, [r for r in runs if (r["block"], r["start"]) == (block, start)]))
    parts.append(_render_gradients(runs))
    parts.append(_render_reference([r for r in runs if (r["block"], r["start"]) == ("standard", "all 0.1")]))
    return "".join(parts)


def _render_block(block: str, start: str, runs: list[Run]) -> str:
    lines = [
        f"\n## {block}, {start}\n",
        "| arm | router t=0 | Δ router | router update | Δ expert output | Δ residual | Δ attention logits | Δ output logits "
        "| largest router probability, narrowest to widest, t=6 | within the bars |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        probability = _find(run, "max_router_probability", 1, 6)["sizes"].values()
        ends = [sum(sizes) / len(sizes) for sizes in probability]
        cells = [
            _slopes(run, "router_logits", (0,), (0, 1)),
            *(_slopes(run, name, (1, 3, 6), (0, 1)) for name in ("delta_router_logits", "router_update")),
            *(
                _slopes(run, f"delta_{name}", (1, 3, 6), (1,))
                for name in ("expert_output", "residual", "attention_logits")
            ),
            _slopes(run, "delta_output_logits", (1, 3, 6), (None,)),
            f"{ends[0]:.2f} to {ends[-1]:.2f}",
            _verdict(run),
        ]
        lines.append(f"| {run['arm']}, {len(run['settings']['seeds'])} seeds | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _verdict(run: Run) -> str:
    failed = [f for f in run["findings"] if not f["ok"]]
    if not failed:
        return f"all {len(run['findings'])}"
    names = dict.fromkeys(
        _NAMES[f["quantity"]] + ("" if f["layer"] is None else f" {f['layer']}") + (" t=0" if f["step"] == 0 else "")
        for f in failed
    )
    return f"{len(failed)} of {len(run['findings'])} are not: {', '.join(names)}"


def _render_gradients(runs: list[Run]) -> str:
    names = (
        "expert_output_gradient",
        "covariance",
        "cosine",
        "router_logit_gradient",
        "weight_gradient:mlp.gate.weight",
    )
    lines = [
        "\n## Gradients\n",
        "Slopes at t = 0, 1, 3, 6 (layer 0 / layer 1); theory: gradient -1; covariance -3/2, then -1; cosine and router-logit "
        "gradient -1/2, then 0; router weight gradient one less than the router-logit gradient in the multiplier form, equal "
        "to it folded.\n",
        "| block, start, arm | " + " | ".join(_NAMES[name] for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for run in runs:
        if run["arm"] in ("mup", "mup folded"):
            cells = [_slopes(run, name, (0, 1, 3, 6), (0, 1)) for name in names]
            lines.append(f"| {run['block']}, {run['start']}, {run['arm']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _render_reference(runs: list[Run]) -> str:
    if not runs:
        return ""
    names = [run["arm"] for run in runs]
    lines = []
    for (quantity, layer, steps), values in _REFERENCE.items():
        cells = [
            f"{_slopes(run, quantity, steps, (layer,))} (reference {values[run['arm']]})"
            if run["arm"] in values
            else ""
            for run in runs
        ]
        where = ("" if layer is None else f", layer {layer}") + f", t={', '.join(map(str, steps))}"
        lines.append(f"| {_NAMES[quantity]}{where} | " + " | ".join(cells) + " |")
    return _SPEC.format(names=" | ".join(names), rules="|".join("---" for _ in names)) + "\n".join(lines) + "\n"


def _find(run: Run, quantity: str, layer: int | None, step: int) -> dict[str, Any]:
    for row in run["rows"]:
        if (row["quantity"], row["layer"], row["step"]) == (quantity, layer, step):
            return dict(row)
    raise KeyError(f"no row of {quantity!r}, layer {layer}, step {step}")


def _slopes(run: Run, quantity: str, steps: tuple[int, ...], layers: tuple[int | None, ...]) -> str:
    return " / ".join(
        ", ".join(_signed(_find(run, quantity, layer, step)["slope"]) for step in steps) for layer in layers
    )


def _signed(slope: float | None) -> str:
    return "none" if slope is None else f"{slope:+.2f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Sizes against widths: a row of panels for each block and start, a line for each arm."""
    groups = list(dict.fromkeys((run["block"], run["start"]) for run in results["runs"]))
    arms = list(dict.fromkeys(run["arm"] for run in results["runs"]))
    figure, axes = plt.subplots(
        len(groups),
        len(_PANELS),
        figsize=(3.3 * len(_PANELS), 2.7 * len(groups) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    lines: dict[str, Any] = {}
    for group, row in zip(groups, axes, strict=True):
        for (quantity, step), axis in zip(_PANELS, row, strict=True):
            axis.set_yscale("log", base=2)
            for run in results["runs"]:
                if (run["block"], run["start"]) == group:
                    lines[run["arm"]] = _draw_line(axis, run, quantity, step, arms)
            low, high = axis.get_ylim()
            if high < 8 * low:  # noise of a flat line is not to fill the panel
                middle = (low * high) ** 0.5
                axis.set_ylim(middle / 8**0.5, middle * 8**0.5)
            axis.set_xscale("log", base=2)
            axis.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
            axis.minorticks_off()
            axis.tick_params(labelsize=8)
            axis.set_title(f"{_NAMES[quantity]}, t={step}", fontsize=9)
        row[0].set_ylabel(f"{group[0]}, {group[1]}", fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=10)
    figure.suptitle("RMS in layer 1 against the hidden size, mean of the seeds")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_line(axis: Any, run: Run, quantity: str, step: int, arms: list[str]) -> Any:
    sizes = _find(run, quantity, 1, step)["sizes"]
    means = [sum(values) / len(values) if None not in values else float("nan") for values in sizes.values()]
    number = arms.index(run["arm"])
    # The two forms of µP coincide: the second is dashed, so that the first shows.
    style = {"linestyle": "--" if run["arm"] == "mup folded" else "-", "linewidth": 3 if run["arm"] == "mup" else 1.5}
    (line,) = axis.plot([int(w) for w in sizes], means, marker="o", markersize=4, color=f"C{number}", **style)
    return line
