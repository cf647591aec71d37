"""PERFT R, E, D, S against the base, a frozen router and LoRA on the quickstart's task; the numbers of a model card.

    python recipes/benchmarks/perft_quickstart.py [--jobs 4] [--work_dir outputs/benchmark] [--card_dir model_cards]

Every method has the active parameters of PERFT-R (16 x top 2 of 4), as nearly as its rank allows. Its learning rate is
chosen on modules of the train side; the held-out modules are seen once per seed, by the finished setting. Each cell is
one run of `finetune.py`; finished cells are kept in the work folder, so an interrupted benchmark goes on where it was.
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

from cells import Cell, run_cells  # noqa: E402
from perft_quickstart_card import render_card  # noqa: E402

from built_in_data import build_docstrings, split_train_modules  # noqa: E402  # after the path is set
from quickstart.corpus import read_corpus  # noqa: E402

R = ("--peft", "perft", "--variant", "R", "--r", "16", "--lora_alpha", "32", "--num_experts", "4", "--top_k", "2")
BATCH = ("--router_aux_loss_scope", "batch")  # the paper's
# Ranks give 13,056 active parameters per layer at hidden size 192 (D: 12,288; its rank is whole); alpha = 2 r throughout.
METHODS = {
    "R": [*R, *BATCH],
    "R, router frozen at random": [*R, *BATCH, "--router_learning_rate", "0"],
    "E": ["--peft", "perft", "--variant", "E", "--r", "17", "--lora_alpha", "34"],
    "D": ["--peft", "perft", "--variant", "D", "--r", "8", "--lora_alpha", "16", "--num_experts", "4"],
    "S": ["--peft", "perft", "--variant", "S", "--r", "34", "--lora_alpha", "68"],
    "LoRA q, v": ["--peft", "lora", "--r", "17", "--lora_alpha", "34"],
}
LEARNING_RATES = ("1e-3", "2e-3", "4e-3", "8e-3")
SEARCH_SEED = 100
# No text is written here: the intervals are on the loss.
COMMON = (
    *("--config", str(RECIPES / "configs" / "quickstart_r.yaml"), "--num_generations", "0", "--save_strategy", "no"),
    *("--logging_steps", "25", "--use_cpu", "true"),
)


def main() -> None:
    """Search, measure, write the JSON and the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--base_cache_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="Runs at a time.")
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", nargs="+", default=list(LEARNING_RATES))
    options = parser.parse_args()

    common = (
        *COMMON,
        *("--max_steps", str(options.max_steps), "--per_device_train_batch_size", str(options.batch_size)),
        *("--base_cache_dir", str(options.base_cache_dir.resolve())),
    )
    data = write_validation_data(options.work_dir / "validation_data")
    search = {
        (method, rate): Cell(
            f"search-{_slug(method)}-{rate}",
            (
                *common,
                *METHODS[method],
                "--learning_rate",
                rate,
                "--seed",
                str(SEARCH_SEED),
                "--dataset_name",
                str(data),
            ),
        )
        for method in METHODS
        for rate in options.learning_rates
    }
    found = run_cells(search.values(), options.work_dir, options.jobs)
    chosen = {
        method: min(options.learning_rates, key=lambda rate: found[search[method, rate].name]["loss"]["after"])
        for method in METHODS
    }
    final = {
        (method, seed): Cell(
            f"final-{_slug(method)}-{chosen[method]}-{seed}",
            (*common, *METHODS[method], "--learning_rate", chosen[method], "--seed", str(seed)),
        )
        for method in METHODS
        for seed in options.seeds
    }
    measured = run_cells(final.values(), options.work_dir, options.jobs)
    results = {
        "command": shlex.join(["python", "recipes/benchmarks/perft_quickstart.py", *sys.argv[1:]]),
        "steps": options.max_steps,
        "batch_size": options.batch_size,
        "learning_rates": options.learning_rates,
        "seeds": options.seeds,
        "base": summarize_base(next(iter(measured.values()))),
        "methods": {
            method: summarize_method(
                METHODS[method],
                {rate: found[search[method, rate].name] for rate in options.learning_rates},
                chosen[method],
                {seed: measured[final[method, seed].name] for seed in options.seeds},
            )
            for method in METHODS
        },
    }
    options.card_dir.mkdir(parents=True, exist_ok=True)
    (options.card_dir / "perft-quickstart.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.card_dir / "perft-quickstart.md").write_text(render_card(results), encoding="utf-8")
    print((options.card_dir / "perft-quickstart.md").read_text(encoding="utf-8"))


def write_validation_data(folder: Path) -> Path:
    """Train modules split once more, as files `finetune.py` reads; the held-out modules are in neither side."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, rows in build_docstrings(split_train_modules(read_corpus(None))).items():
        rows.select_columns(["prompt", "completion"]).to_json(str(folder / f"{side}.jsonl"))
    return folder.resolve()


def summarize_base(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the base is, and its loss on the held-out rows."""
    kept = ("bits_per_byte", "ngram_bits_per_byte", "num_parameters")
    report = {key: value for key, value in (metrics["base"] or {}).items() if key in kept}
    return report | {"loss": metrics["loss"]["before"], "rows": metrics["loss"]["rows"]}


def summarize_method(
    arguments: list[str], search: dict[str, dict[str, Any]], chosen: str, runs: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """One method's line: search, choice, and the change of the held-out loss per seed with its 95% interval."""
    differences = [run["loss"]["difference"] for run in runs.values()]
    return {
        "arguments": shlex.join(arguments),
        "parameters": next(iter(runs.values()))["parameters"],
        "search": {rate: run["loss"]["after"] for rate, run in search.items()},
        "learning_rate": chosen,
        "runs": {
            str(seed): {key: run["loss"][key] for key in ("before", "after", "difference", "low", "high")}
            for seed, run in runs.items()
        },
        "mean_difference": statistics.mean(differences),
        "spread": statistics.stdev(differences) if len(differences) > 1 else 0.0,
        "beats_base_in_every_seed": all(run["loss"]["high"] < 0 for run in runs.values()),
    }


def _slug(method: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in method.lower()).split())


if __name__ == "__main__":
    main()
