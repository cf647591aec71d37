"""An inspection as one page: the worst first, figures inside, no request to anywhere; and the same in a few lines of text."""

import math
from typing import Any

from hf_moe_ext.audit.comparison import Comparison, Exceeded
from hf_moe_ext.audit.findings import Finding, find_all
from hf_moe_ext.audit.inspection import Inspection
from hf_moe_ext.audit.report_figures import draw_all

TEMPLATE = "inspection_report.html.j2"
SHOWN_FINDINGS, SHOWN_OTHERS, SHOWN_CHANGES = 24, 6, 12
CAPTIONS = {
    "load": "Share of the choices that each expert got, times the number of experts: 1 is an even share. Dead experts stand out "
    "in a colour of their own.",
    "change": "How the share of each expert has changed since the old inspection.",
    "slices": "Which part of a slice's choices would have to move to other experts to look like the other slices' (total "
    "variation): 0 is routed alike, 1 shares no expert.",
    "measures": "Evenness of load: 1 is even. Entropy of a token's choice: 1 is chance, 0 is certain. Decided by the token: 0 means "
    "that the router does not look at its input.",
}


def render_html(inspection: Inspection, comparison: Comparison | None = None, old: Inspection | None = None) -> str:
    """One file.

    Args:
        inspection: what to tell.
        comparison: with ``old``, where there is one.
        old: the inspection it was compared with.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_moe_ext.audit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found = group_findings(find_all(inspection))
    changes = sorted(comparison.routers, key=lambda one: -one.load)[:SHOWN_CHANGES] if comparison else []
    return environment.get_template(TEMPLATE).render(
        inspection=inspection,
        verdict=verdict(found),
        groups=found[:SHOWN_FINDINGS],
        left_out=max(0, len(found) - SHOWN_FINDINGS),
        kinds=list(dict.fromkeys(one.router for one in inspection.reading.routers)),
        facts=facts(inspection),
        comparison=comparison,
        exceeded=group_exceeded(comparison) if comparison else [],
        old=old,
        changes=changes,
        slices=sorted(inspection.slice_losses.items(), key=lambda item: -item[1].loss),
        figures=draw_all(inspection, old),
        captions=CAPTIONS,
        nats=nats,
    )


def format_text(inspection: Inspection, comparison: Comparison | None = None) -> str:
    """A few lines for a terminal."""
    found = group_findings(find_all(inspection))
    lines = [f"{name}: {text}" for name, text in facts(inspection)]
    lines += ["", verdict(found)]
    for worst, others in found[:SHOWN_FINDINGS]:
        lines.append(f"  {worst.severity} ({worst.code}), {worst.where}: {worst.message}")
        lines += [f"    also {one.where}: {one.message}" for one in others[:SHOWN_OTHERS]]
        if len(others) > SHOWN_OTHERS:
            lines.append(f"    and {len(others) - SHOWN_OTHERS} more like it, in --json")
        lines.append(f"    next: {worst.change}")
    if len(found) > SHOWN_FINDINGS:
        lines.append(f"  and {len(found) - SHOWN_FINDINGS} kinds more, in --json")
    if comparison is not None:
        lines += ["", *_compared(comparison)]
    return "\n".join(lines)


def group_findings(found: list[Finding]) -> list[tuple[Finding, list[Finding]]]:
    """Findings of one kind, for one kind of router, together: the worst of them, and the others; the worst kind first."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for one in found:
        groups.setdefault((one.code, one.router), []).append(one)
    return [(group[0], group[1:]) for group in groups.values()]


def verdict(groups: list[tuple[Finding, list[Finding]]]) -> str:
    """One sentence on how bad it is."""
    found = [one for worst, others in groups for one in (worst, *others)]
    if not found:
        return "Nothing wrong was found in the routing."
    counts = {level: sum(one.severity == level for one in found) for level in ("serious", "warning", "note")}
    plural = {"serious": "serious", "warning": "warnings", "note": "notes"}
    told = [f"{count} {plural[level] if count > 1 else level}" for level, count in counts.items() if count]
    return f"To look at: {', '.join(told)}; the worst first."


def facts(inspection: Inspection) -> list[tuple[str, str]]:
    """Name and text of what was inspected, on what."""
    model, data = inspection.model, inspection.data
    routers = inspection.reading.routers
    shapes = dict.fromkeys((one.router, one.num_experts, one.top_k) for one in routers)
    told = [
        ("model", f"{model.name} ({model.model_type})" + (f" with adapter {model.adapter}" if model.adapter else "")),
        ("routers", "; ".join(f"{router}: {k} of {e} experts" for router, e, k in shapes)),
        ("text", f"{data.name}: {data.num_tokens:,} tokens of {data.num_examples:,} of {data.num_rows:,} rows"),
        ("loss", f"{nats(inspection.loss.loss)} nats a token over {inspection.loss.tokens:,} tokens"),
    ]
    if inspection.slice_losses:
        worst = max(inspection.slice_losses, key=lambda name: inspection.slice_losses[name].loss)
        told.append(("slices", f"{len(inspection.slice_losses)} of column {data.slice_column}; largest loss: {worst}"))
    return told


def group_exceeded(comparison: Comparison) -> list[tuple[Exceeded, list[Exceeded]]]:
    """Limits passed, those of one measure together: the worst, and the others."""
    groups: dict[str, list[Exceeded]] = {}
    for one in comparison.exceeded:
        groups.setdefault(one.what, []).append(one)
    return [(group[0], group[1:]) for group in groups.values()]


def nats(value: float) -> str:
    """A loss to read."""
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def _compared(comparison: Comparison) -> list[str]:
    limits = comparison.limits
    lines = [f"Against the old inspection (limits: load {limits.load:g}, KL {limits.kl:g}, loss {limits.loss:g}):"]
    for worst, others in group_exceeded(comparison):
        lines += [f"  past the limit: {one.as_text()}" for one in (worst, *others[:SHOWN_OTHERS])]
        if len(others) > SHOWN_OTHERS:
            lines.append(f"  and {len(others) - SHOWN_OTHERS} more, in --json")
    if not comparison.exceeded:
        lines.append("  nothing is past a limit")
    lines += [f"  {_loss_line(one)}" for one in comparison.losses]
    lines += [f"  caution: {text}" for text in comparison.cautions]
    return lines


def _loss_line(one: Any) -> str:
    name = "all" if one.slice is None else f"slice {one.slice}"
    return f"loss of {name}: {nats(one.old)} then, {nats(one.new)} now"
