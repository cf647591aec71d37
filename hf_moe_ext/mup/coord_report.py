"""A coordinate check for people and for files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hf_moe_ext.mup.coord_check import CoordCheck
from hf_moe_ext.mup.coord_probe import FEATURES, WEIGHT_GRADIENT
from hf_moe_ext.mup.coord_verdict import DELTA, JUDGED_STEPS, Finding, Row
from hf_moe_ext.mup.output_file import write_whole

_NAMES = {
    "residual": "residual stream",
    "expert_output": "expert output",
    "latent": "latent",
    "router_logits": "router logits",
    "attention_logits": "attention logits",
    "output_logits": "output logits",
    "router_update": "router update",
    "router_logit_gradient": "router-logit gradient",
    "max_router_probability": "largest router probability",
    "expert_output_gradient": "gradient at expert output",
    "covariance": "covariance (gradient, expert output)",
    "cosine": "cosine (gradient, expert output)",
    f"{WEIGHT_GRADIENT}:mlp.gate.weight": "router weight gradient",
}
# Of the table and the figure, in this order; the JSON has every row.
_SHOWN = [name for feature in FEATURES for name in (feature, DELTA + feature)]
_SHOWN += [name for name in _NAMES if name not in FEATURES]
_PANELS = (
    *(DELTA + feature for feature in FEATURES),
    "router_logits",
    "router_update",
    "router_logit_gradient",
    "max_router_probability",
)


def label(quantity: str) -> str:
    """A quantity's name for people."""
    return f"Δ {label(quantity.removeprefix(DELTA))}" if quantity.startswith(DELTA) else _NAMES.get(quantity, quantity)


def print_check(check: CoordCheck, console: Console) -> None:
    """Write what was run, the slopes and the verdict."""
    settings = check.settings
    blocks = ", ".join(dict.fromkeys(settings.moe_blocks))
    console.print(
        f"{settings.model_type}, mup={settings.mup!r} ({settings.mup_form}), blocks: {blocks}"
        f"{', latent held' if settings.hold_latent else ''}; widths {', '.join(map(str, settings.widths))}; seeds "
        f"{', '.join(map(str, settings.seeds))}; {settings.num_steps} AdamW steps at {settings.lr:g} on one batch of "
        f"{settings.num_sequences} x {settings.sequence_length} tokens",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    for note in check.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    console.print(_make_table(check))
    console.print(
        "Slope of log2(RMS) against log2(hidden size), all seeds together [least, largest of one seed]; * outside what is "
        "asked.",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    for line in explain_findings(check):
        console.print(line, soft_wrap=True, markup=False)


def _make_table(check: CoordCheck) -> Table:
    steps = [step for step in (0, *JUDGED_STEPS) if step <= check.settings.num_steps]
    rows = {(row.quantity, row.layer, row.step): row for row in check.rows}
    failed = {(f.row.quantity, f.row.layer, f.row.step) for f in check.findings if not f.ok}
    table = Table(box=box.SIMPLE)
    table.add_column("quantity")
    table.add_column("layer")
    for step in steps:
        table.add_column(f"t={step}", justify="right")
    for quantity in _SHOWN:
        for layer in sorted(
            {key[1] for key in rows if key[0] == quantity}, key=lambda layer: -1 if layer is None else layer
        ):
            cells = []
            for step in steps:
                key = quantity, layer, step
                cells.append(f"{_spread(rows[key])}{'*' if key in failed else ''}" if key in rows else "")
            table.add_row(label(quantity), "" if layer is None else str(layer), *cells)
    return table


def _spread(row: Row) -> str:
    if not math.isfinite(row.slope):
        return "no slope"
    return f"{row.slope:+.2f} [{min(row.seed_slopes):+.2f}, {max(row.seed_slopes):+.2f}]"


def explain_findings(check: CoordCheck) -> list[str]:
    """The verdict, one line for each row that is outside."""
    judged = sorted({finding.row.step for finding in check.findings})
    lines = [
        f"FAILED {label(row.quantity)}{'' if row.layer is None else f', layer {row.layer}'}, t={row.step}: "
        + (
            f"slope {row.slope:+.2f}, asked is {finding.low:+.2f} to {finding.high:+.2f}"
            if math.isfinite(row.slope)
            else "no slope, because a size is zero or not finite: nothing moved, or the training diverged"
        )
        for finding in check.findings
        if not finding.ok
        for row in (finding.row,)
    ]
    if any(_only_the_start_fades(check, finding) for finding in check.findings):
        lines.append(
            "The router's own updates (router update) are inside: what shrinks is its first weights times the change of their "
            "input, of size n^-1/2 under µP, which is noise of narrow models; wider ones, or smaller first weights of the "
            "router (model_init), show what is learned"
        )
    passed = sum(finding.ok for finding in check.findings)
    verdict = "passed" if check.ok else "FAILED"
    missing = [step for step in JUDGED_STEPS if step > check.settings.num_steps]
    unseen = f"; t={', '.join(map(str, missing))} not reached" if missing else ""
    return [
        *lines,
        f"coordinate check {verdict}: {passed} of {len(check.findings)} rows at t={', '.join(map(str, judged))} are inside"
        f"{unseen}",
    ]


def _only_the_start_fades(check: CoordCheck, finding: Finding) -> bool:
    """Whether a router's logits change less in wider models although what it has learned does not."""
    row = finding.row
    if finding.ok or row.quantity != DELTA + "router_logits" or not row.slope < finding.low:
        return False
    return finding.low <= check.slope("router_update", row.step, row.layer) <= finding.high


def as_json(check: CoordCheck) -> str:
    """JSON; what has no slope is null."""
    return json.dumps(_without_nan(check.as_dict()), indent=1)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(check: CoordCheck, path: Path) -> None:
    """Write the whole file or none."""
    write_whole(path, lambda partial: partial.write_text(as_json(check) + "\n", encoding="utf-8"))


def write_png(check: CoordCheck, path: Path) -> None:
    """Draw sizes against widths, the last layer's, one line for each step; the whole file or none.

    Raises:
        ValueError: no matplotlib.
    """
    figure = draw_check(check)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))


def require_matplotlib() -> Any:
    """The class of a figure, which needs no display.

    Raises:
        ValueError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "a PNG needs matplotlib, which is not installed; `pip install matplotlib`, or leave the PNG out"
        ) from error
    return Figure


def draw_check(check: CoordCheck) -> Any:
    """A matplotlib figure: sizes of the last layer against widths, a line for each step, mean over seeds."""
    rows = {(row.quantity, row.layer, row.step): row for row in check.rows}
    last = max(layer for _, layer, _ in rows if layer is not None)
    panels = [(name, last if any((name, last) == key[:2] for key in rows) else None) for name in _PANELS]
    panels = [(name, layer) for name, layer in panels if any((name, layer) == key[:2] for key in rows)]
    columns = 5
    figure = require_matplotlib()(figsize=(3.2 * columns, 3.0 * math.ceil(len(panels) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
    for axis, (quantity, layer) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, [row for key, row in rows.items() if key[:2] == (quantity, layer)], check.settings.widths)
        axis.set_title(label(quantity) + ("" if layer is None else f", layer {layer}"), fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"{check.settings.model_type}, mup={check.settings.mup!r}: RMS against hidden size, t optimizer steps (slope)"
    )
    return figure


def _draw_panel(axis: Any, rows: Sequence[Row], widths: Sequence[int]) -> None:
    for row in rows:
        if row.step not in (0, *JUDGED_STEPS):
            continue
        means = [sum(row.sizes[width]) / len(row.sizes[width]) for width in sorted(widths)]
        shade = f"C{(0, *JUDGED_STEPS).index(row.step)}"
        axis.plot(sorted(widths), means, "o-", color=shade, markersize=3, label=f"t={row.step} ({row.slope:+.2f})")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(sorted(widths), [str(width) for width in sorted(widths)])
    axis.minorticks_off()
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
