"""A plan as one page for whoever decides on the money: HTML that needs nothing else, or Markdown without figures."""

from typing import Any

from hf_moe_ext.scaling.plan_text import (
    SHOWN,
    cautions,
    cost_text,
    facts,
    savings,
    settling_experiment,
)
from hf_moe_ext.scaling.report_figures import draw_all

HTML, MARKDOWN = "plan_report.html.j2", "plan_report.md.j2"
CAPTIONS = {
    "cost": "What it costs against a dense model that gets as far, by each law that can tell how many tokens that takes.",
    "pareto": "Every point is a model that can be trained here. Higher is better, further left needs less memory; the bars are "
    "how far the laws disagree.",
    "fixed_budget": "How much compute sparsity saves when the model's size is free. Laws fitted on different models disagree; "
    "dashed lines are beyond what they were fitted on.",
    "fixed_parameters": "The same when the whole model may not be larger than the recommended one: then more sparsity means "
    "fewer active parameters, and there is a best point.",
    "map": "The best sparsity for each size and budget, by two laws; the star is the recommended plan. White: beyond the tokens "
    "per parameter that a law was fitted on.",
    "memory": "What fills a device.",
    "time": "Where a training step's time goes; all-to-all is what expert parallelism sends between devices.",
}


def render_html(told: dict[str, Any]) -> str:
    """One file, figures inside, no request to anywhere.

    Args:
        told: of `plan_explain.explain`.
    """
    return _render(HTML, told, figures=draw_all(told))


def render_markdown(told: dict[str, Any]) -> str:
    """The same text and tables.

    Args:
        told: of `plan_explain.explain`.
    """
    return _render(MARKDOWN, told, figures={})


def _render(template: str, told: dict[str, Any], figures: dict[str, str]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_moe_ext.scaling", "templates"),
        autoescape=template == HTML,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        told=told,
        best=told["recommended"],
        facts=[line.split(maxsplit=1) for line in facts(told)],
        cost=cost_text(told),
        savings=savings(told),
        cautions=cautions(told),
        experiment=settling_experiment(told),
        rows=told["pareto"][:SHOWN],
        left_out=max(0, len(told["pareto"]) - SHOWN),
        figures=figures,
        captions=CAPTIONS,
    )
