"""How long the planner takes for its worked examples: the search alone, the explained plan, the HTML report.

    python recipes/benchmarks/planner_time.py

One process; prints processor seconds beside the clock's, which differ on a machine that does other things.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_moe_ext.scaling.plan_explain import explain
from hf_moe_ext.scaling.planner import plan
from hf_moe_ext.scaling.report import render_html

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plan_sparsity import make_examples


def _time(function: Callable[[], Any]) -> tuple[Any, str]:
    clock, processor = time.perf_counter(), time.process_time()
    value = function()
    return value, f"{time.process_time() - processor:6.2f} s ({time.perf_counter() - clock:.2f} s by the clock)"


def main() -> None:
    """Print one line per example and stage."""
    for name, request in make_examples().items():
        result, searched = _time(lambda request=request: plan(request))  # type: ignore[misc]
        told, explained = _time(lambda result=result: explain(result))  # type: ignore[misc]
        _, drawn = _time(lambda told=told: render_html(told))  # type: ignore[misc]
        print(f"{name:10} search {searched}, {result.num_candidates} shapes, {len(result.plans)} priced in full")
        print(f"{'':10} explain {explained}, report {drawn}")


if __name__ == "__main__":
    main()
