"""Routers on the quickstart's task: the auxiliary loss's scopes, how far the base router may move, fewer adapters.

    python recipes/benchmarks/perft_router.py [--jobs 4] [--work_dir outputs/router] [--card_dir model_cards]

Three questions, each asked of one setting and answered over seeds: over which tokens should R's load be balanced; does
it pay to tune the base model's own router with E, and how strongly must it be held back; what do E with half of the
experts and one shared A cost. Every cell is one run of `finetune.py` at the learning rate that `perft_quickstart.py`
chose for R and E; finished cells are kept in the work folder, so an interrupted study goes on where it was.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RECIPES))
sys.path.insert(0, str(RECIPES / "benchmarks"))

from cells import Cell, run_cells  # noqa: E402
from perft_quickstart import COMMON, METHODS, summarize_base  # noqa: E402  # after the path is set
from perft_router_card import render_card  # noqa: E402

R, E = METHODS["R"], METHODS["E"]
R_DEFAULT = [*R, "--router_aux_loss_scope", "batch", "--router_aux_loss_coef", "0.01"]  # as the first of "scope"
# Question -> setting -> arguments. The first of each question is what the others are compared with.
STUDIES: dict[str, dict[str, list[str]]] = {
    "scope": {
        f"{scope}, weight {weight}": [*R, "--router_aux_loss_scope", scope, "--router_aux_loss_coef", weight]
        for weight in ("0.01", "0.1")
        for scope in ("batch", "sequence", "global")
    },
    "base_router": {
        "frozen": [*E],
        **{
            f"{kind}, guard {guard}": [*E, "--base_router", kind, "--base_router_drift_coef", guard]
            for kind in ("lora", "train")
            for guard in ("0", "0.1", "1")
        },
    },
    "fewer": {
        "E, all experts": [*E],
        "E, half of the experts": [*E, "--expert_fraction", "0.5"],
        "E, one shared A": [*E, "--shared_A", "true"],
        "R": R_DEFAULT,
        "R, one shared A": [*R, "--shared_A", "true"],
    },
}
WATCHED = ("router_load_max", "router_load_entropy", "base_router_divergence", "base_router_load_drift")
LAST_LINES = 2  # of the log, over which the routers' numbers are averaged


def main() -> None:
    """Run what is missing; write the JSON and the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/router"))
    parser.add_argument("--base_cache_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 2), help="Runs at a time.")
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", default="4e-3", help="Of all but a tuned base router.")
    parser.add_argument("--base_router_learning_rate", default="1e-3", help="Of a tuned base router.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    options.work_dir.mkdir(parents=True, exist_ok=True)
    cells = {
        (study, setting, seed): build_cell(arguments, seed, options)
        for study, settings in STUDIES.items()
        for setting, arguments in settings.items()
        for seed in options.seeds
    }
    found = run_cells({cell.name: cell for cell in cells.values()}.values(), options.work_dir, options.jobs)
    runs = {key: found[cell.name] for key, cell in cells.items()}
    results = {
        "command": shlex.join(["python", "recipes/benchmarks/perft_router.py", *sys.argv[1:]]),
        **{name: getattr(options, name) for name in ("max_steps", "batch_size", "learning_rate", "seeds")},
        "base_router_learning_rate": options.base_router_learning_rate,
        "base": summarize_base(next(iter(runs.values()))),
        "studies": {
            study: {
                setting: summarize(arguments, {seed: runs[study, setting, seed] for seed in options.seeds})
                for setting, arguments in settings.items()
            }
            for study, settings in STUDIES.items()
        },
    }
    options.card_dir.mkdir(parents=True, exist_ok=True)
    (options.card_dir / "perft-router.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.card_dir / "perft-router.md").write_text(render_card(results), encoding="utf-8")
    print((options.card_dir / "perft-router.md").read_text(encoding="utf-8"))


def build_cell(arguments: list[str], seed: int, options: argparse.Namespace) -> Cell:
    """One run; the same arguments in two studies make the same cell, which runs once."""
    tuned = ["--router_learning_rate", options.base_router_learning_rate] if "--base_router" in arguments else []
    words = (
        *COMMON,
        *("--max_steps", str(options.max_steps), "--per_device_train_batch_size", str(options.batch_size)),
        *("--base_cache_dir", str(options.base_cache_dir.resolve()), "--learning_rate", options.learning_rate),
        *arguments,
        *tuned,
        *("--seed", str(seed)),
    )
    defaults = ("peft", "perft", "router_aux_loss", "router_aux_loss_scope", "router_aux_loss_coef")
    name = "-".join(word.lstrip("-").replace(".", "_") for word in arguments if word.lstrip("-") not in defaults)
    return Cell(f"{name}-{seed}", words)


def summarize(arguments: list[str], runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One setting's line: loss per seed with its interval, and what its routers did in the end."""
    differences = [run["loss"]["difference"] for run in runs.values()]
    return {
        "arguments": shlex.join(arguments),
        "parameters": next(iter(runs.values()))["parameters"],
        "runs": {
            str(seed): {key: run["loss"][key] for key in ("after", "difference", "low", "high")}
            | last_values(run["log"])
            for seed, run in runs.items()
        },
        "mean_difference": statistics.mean(differences),
        "spread": statistics.stdev(differences) if len(differences) > 1 else 0.0,
    }


def last_values(log: list[dict[str, Any]]) -> dict[str, float]:
    """The routers' numbers at the end of training, averaged over the last lines of the log that have them."""
    values = {}
    for key in WATCHED:
        seen = [entry[key] for entry in log if key in entry][-LAST_LINES:]
        if seen:
            values[key] = statistics.mean(seen)
    return values


if __name__ == "__main__":
    main()
