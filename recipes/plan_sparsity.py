"""Worked examples of the sparsity planner: a node for a week, a card at home, a cluster for a month.

    python recipes/plan_sparsity.py [--example node_week home cluster] [--output_dir outputs/plan_sparsity]

For each example: a report (HTML and Markdown), the table of all priced plans, the JSON that every number of the recommended plan
can be made again from, and a folder with its config.json. Seconds each, on a CPU. Prices are examples: write your own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.money import Prices
from hf_moe_ext.scaling.plan_explain import as_csv, explain
from hf_moe_ext.scaling.plan_files import emit_config
from hf_moe_ext.scaling.plan_request import Inference, PlanRequest
from hf_moe_ext.scaling.plan_text import format_plan
from hf_moe_ext.scaling.planner import plan
from hf_moe_ext.scaling.report import render_html, render_markdown

WEEK_HOURS, MONTH_HOURS = 7 * 24, 30 * 24


def make_examples() -> dict[str, PlanRequest]:
    """The three questions by name."""
    return {
        # One node of eight devices for a week; the model will write ten billion tokens, and an API serves them today.
        "node_week": PlanRequest(
            find_hardware("H100-SXM"),
            num_devices=8,
            gpu_hours=8 * WEEK_HOURS,
            prices=Prices(gpu_hour=2.5, effort_hours=40, effort_hour=80),
            token_supply=2e12,
            inference=Inference(1e10, present_cost_per_million=2.0),
        ),
        # A gaming card for two weeks; the price is its power and a share of what it cost.
        "home": PlanRequest(
            find_hardware("RTX-4090"),
            gpu_hours=14 * 24,
            prices=Prices(gpu_hour=0.3, currency="EUR"),
            context_length=2048,
            token_supply=5e10,
            utilisation=0.8,
        ),
        # 512 devices for a month, as a sum of money; not more than 10^13 tokens to read.
        "cluster": PlanRequest(
            find_hardware("H100-SXM"),
            num_devices=512,
            money=512 * MONTH_HOURS * 2.0,
            prices=Prices(gpu_hour=2.0, per_gb_moved=0.05),
            moved_bytes=50e12,
            token_supply=1e13,
            imbalance=1.2,
            target="reasoning",
        ),
    }


def run_example(request: PlanRequest, folder: Path) -> dict[str, Any]:
    """Plan and write everything into a folder of its own.

    Raises:
        ValueError: nothing fits, or the folder already has a plan.
    """
    result = plan(request)
    told = explain(result)
    emit_config(result.recommended, request, folder / "model")
    texts = {
        "explain.json": json.dumps(told, indent=2) + "\n",
        "plans.csv": as_csv(result),
        "report.md": render_markdown(told),
        "report.html": render_html(told),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Run the examples; 2 where one has no answer."""
    examples = make_examples()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--example", nargs="+", choices=list(examples), default=list(examples))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/plan_sparsity"))
    arguments = parser.parse_args(argv)
    for name in arguments.example:
        try:
            told = run_example(examples[name], arguments.output_dir / name)
        except (ValueError, OSError) as error:
            print(f"plan_sparsity: {name}: {error}", file=sys.stderr)
            return 2
        print(f"--- {name} ({arguments.output_dir / name})\n{format_plan(told)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
