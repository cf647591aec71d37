"""How long one fit of a scaling law takes, and its warm-started bootstrap: 60 starts on synthetic runs of a known law.

    python recipes/benchmarks/scaling_fit.py --processes 2

Prints one line per form: runs, seconds of the fit, seconds of the bootstrap, and their ratio per refit.
"""

import argparse
import time
import warnings
from math import exp, log

import numpy as np

from hf_moe_ext.scaling.fit import DegenerateFitWarning, fit
from hf_moe_ext.scaling.fit_intervals import bootstrap
from hf_moe_ext.scaling.fit_solver import FitSettings
from hf_moe_ext.scaling.laws import abnar, joint, routed
from hf_moe_ext.scaling.runs import Runs, make_runs

NOISE = 0.002


def make_grid(seed: int) -> Runs:
    """5 budgets, 6 sparsities and 9 sizes around the compute-optimal ones; losses of three laws, with a little noise."""
    rows = []
    for budget in (3e19, 6e19, 1e20, 3e20, 1e21):
        for ratio in (1, 2, 4, 8, 16, 32):
            best = abnar.optimum(budget, ratio)
            for step in range(-4, 5):
                size = best.active_parameters * exp(step * log(3) / 4)
                rows.append((size * best.total_parameters / best.active_parameters, size, budget / (6 * size), ratio))
    total, active, tokens, experts = np.array(rows, dtype=float).T
    noise = np.exp(NOISE * np.random.default_rng(seed).normal(size=(3, len(total))))
    return make_runs(
        {
            "total_parameters": total,
            "active_parameters": active,
            "dense_parameters": active,
            "num_tokens": tokens,
            "num_experts": experts,
            "sparsity": 1 - 1 / experts,
            "abnar": abnar.loss(total, tokens, 1 - 1 / experts) * noise[0],
            "joint": joint.loss(active, tokens, experts) * noise[1],
            "routed": routed.ROUTERS["S-Base"].loss(active, experts) * noise[2],
        }
    )


def main() -> None:
    """Time each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="starts at a time")
    parser.add_argument("--starts", type=int, default=60, help="points of the start grid")
    parser.add_argument("--resamples", type=int, default=60, help="refits of the bootstrap")
    given = parser.parse_args()
    warnings.simplefilter("ignore", DegenerateFitWarning)
    grid = make_grid(seed=0)
    for form in ("abnar", "joint", "routed"):
        runs = Runs({**grid.columns, "loss": grid[form]})
        settings = FitSettings(num_starts=given.starts, num_processes=given.processes)
        begin = time.perf_counter()
        fitted = fit(form, runs, settings)
        middle = time.perf_counter()
        bootstrap(fitted, given.resamples)
        end = time.perf_counter()
        print(
            f"{form}: {len(runs)} runs, {given.starts} starts on {given.processes} processes {middle - begin:.1f} s, "
            f"{given.resamples} refits {end - middle:.1f} s, RMSE {fitted.rmse:.4f}"
        )


if __name__ == "__main__":
    main()
