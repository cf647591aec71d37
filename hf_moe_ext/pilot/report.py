"""A pilot as one page for whoever decides: HTML that needs nothing else, or Markdown without figures."""

from pathlib import Path
from typing import Any

from hf_moe_ext.perft.report import format_bytes
from hf_moe_ext.pilot.folder import write_text
from hf_moe_ext.pilot.report_figures import draw_all

HTML, MARKDOWN = "pilot_report.html.j2", "pilot_report.md.j2"
HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
NONE = "–"
CAPTIONS = {
    "differences": "Each finalist against the frozen base on the held-out rows, with its 95 % interval over rows and seeds.",
    "pareto": "Lower is better, further left is cheaper; bars are the seeds' spread. Times and memory are of this run.",
    "rates": "Learning rates, chosen on rows that neither trained nor compared: thin lines are the first round (a quarter of "
    "the steps), thick ones the second (half).",
}


def write_reports(told: dict[str, Any], folder: Path) -> list[Path]:
    """`report.html` and `report.md`."""
    pages = {HTML_FILE: render_html(told), MARKDOWN_FILE: render_markdown(told)}
    for name, text in pages.items():
        write_text(folder / name, text)
    return [folder / name for name in pages]


def render_html(told: dict[str, Any]) -> str:
    """One file, figures inside, no request to anywhere.

    Args:
        told: What `pilot.json` holds.
    """
    return _render(HTML, told, draw_all(told))


def render_markdown(told: dict[str, Any]) -> str:
    """The same text and tables.

    Args:
        told: What `pilot.json` holds.
    """
    return _render(MARKDOWN, told, {})


def format_answer(told: dict[str, Any]) -> str:
    """The answer in a few lines, for the terminal."""
    answer = told["recommendation"]
    lines = [headline(told), f"{answer['reason']}."]
    lines += [f"- doubt: {doubt}." for doubt in answer["doubts"]]
    if answer["full_job"]:
        lines += ["The full job:", *(f"  {command}" for command in answer["full_job"]["commands"])]
    return "\n".join(lines)


def headline(told: dict[str, Any]) -> str:
    """One line."""
    name = told["recommendation"]["candidate"]
    return "No difference shown: keep the base model as it is" if name is None else f"Recommended: {name}"


def tabulate(told: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of texts: what two runs with one seed share, and what they do not; heads first."""
    first: list[tuple[str, ...]] = [
        (
            "candidate",
            "what",
            "loss",
            "seeds",
            "metric",
            "rate",
            "steps",
            "trained",
            "active",
            "stored",
            "load, max",
        )
    ]
    second: list[tuple[str, ...]] = [("candidate", "step", "prompt", "per token", "peak memory", "an arm")]
    for arm in told["arms"]:
        spread = "" if not arm["loss_by_seed"] or len(arm["loss_by_seed"]) < 2 else (
            f" ({min(arm['loss_by_seed']):.4f}–{max(arm['loss_by_seed']):.4f})")  # fmt: skip
        loss = (
            arm["status"]
            if arm["status"] == "failed"
            else NONE
            if arm["loss"] is None
            else f"{arm['loss']:.4f}{spread}"
        )
        routing = arm["routing"] or {}
        load = routing.get("routing_load_max_default", routing.get("routing_load_max"))
        first.append((
            arm["candidate"], arm["label"], loss, str(len(arm["seeds"] or ())) if arm["seeds"] else NONE,
            _number(arm["metric"], "{:.4g}"), _number(arm["learning_rate"], "{:g}"), _number(arm["steps"], "{:,}"),
            f"{arm['parameters']['trainable']:,}", _number(arm["parameters"]["active"], "{:,}"),
            NONE if arm["stored_bytes"] is None else format_bytes(arm["stored_bytes"]), _number(load, "{:.0%}"),
        ))  # fmt: skip
        second.append((
            arm["candidate"], _time(arm["step_s"]), _time(arm["prefill_s"]), _time(arm["decode_s"]),
            NONE if arm["peak_bytes"] is None else format_bytes(arm["peak_bytes"]), _time(arm["wall_s"]),
        ))  # fmt: skip
    return first, second


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def compare_rows(told: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of texts of every comparison, heads first."""
    rows: list[tuple[str, ...]] = [
        ("comparison", "difference", "95 % interval", "over rows", "over seeds", "p", "p, all together", "shown")
    ]
    best = told["recommendation"]["best"]
    for family, other in (("against_base", "base"), ("against_best", best)):
        for name, one in told["recommendation"]["comparisons"][family].items():
            rows.append((
                f"{name} – {other}", f"{one['difference']:+.4f}", f"{one['low']:+.4f} to {one['high']:+.4f}",
                f"± {one['row_deviation']:.4f}", _number(one["seed_deviation"], "± {:.4f}"), f"{one['p']:.2g}",
                f"{one['adjusted_p']:.2g}", "yes" if one["adjusted_p"] < 0.05 else "no",
            ))  # fmt: skip
    return rows


def _render(template: str, told: dict[str, Any], figures: dict[str, str]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_moe_ext.pilot", "templates"),
        autoescape=template == HTML,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first, second = tabulate(told)
    return environment.get_template(template).render(
        told=told,
        headline=headline(told),
        answer=told["recommendation"],
        chosen=told["recommendation"]["candidate"],
        full_job=told["recommendation"]["full_job"],
        losses=first,
        times=second,
        comparisons=compare_rows(told),
        figures=figures,
        captions=CAPTIONS,
        gigabytes=lambda count: f"{count / 1e9:.1f} GB",
    )
