"""Upcycled models by loss: runs of `upcycle.py`, an arm each, every arm with the learning rate that suits it.

The rate is searched with a seed and with held-out rows of its own (`--data_seed`, drawn from the same modules: a few rows
may be in both); the arms are then compared over other seeds, all on the same rows.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from cells import Cell, run_cells
from dcca_loss import STUDENT_T, relative_difference
from ders_presets import QualityPreset

VANILLA, DENSE, WITH_DELTAS = "vanilla", "dense", ("low_rank", "sparse")
GAIN_BAR = 0.05  # nats per token that every arm must gain on its own step 0


def measure_quality(preset: QualityPreset, options: argparse.Namespace) -> dict[str, Any]:
    """Search, run what is missing, and compare.

    Args:
        preset: Arms, rates, seeds, flags of all runs.
        options: `work_dir`, `jobs`, `source_dir`.

    Returns:
        The part of the JSON.
    """
    search = {
        (arm, rate): make_cell(preset, options, arm, rate, preset.search_seed, data_seed=1)
        for arm in preset.arms
        for rate in preset.learning_rates
    }
    work_dir = options.work_dir / "quality"
    prepare_parent(preset, options)
    found = run_cells(search.values(), work_dir, options.jobs, threads=1)
    tried = {
        arm: {rate: found[search[arm, rate].name]["loss"]["after"] for rate in preset.learning_rates}
        for arm in preset.arms
    }
    rates = {arm: min(losses, key=losses.__getitem__) for arm, losses in tried.items()}
    ratio_search = {
        (arm, ratio): make_cell(preset, options, arm, rates[arm], preset.search_seed, data_seed=1, ratio=ratio)
        for arm in preset.arms
        for ratio in (preset.delta_ratios if arm in WITH_DELTAS else ("1",))
    }
    found = run_cells(ratio_search.values(), work_dir, options.jobs, threads=1)
    tried_ratios: dict[str, dict[str, float]] = {arm: {} for arm in preset.arms}
    for (arm, ratio), cell in ratio_search.items():
        tried_ratios[arm][ratio] = found[cell.name]["loss"]["after"]
    ratios = {arm: min(losses, key=losses.__getitem__) for arm, losses in tried_ratios.items()}
    cells = {
        (arm, seed): make_cell(preset, options, arm, rates[arm], seed, data_seed=0, ratio=ratios[arm])
        for seed in preset.seeds
        for arm in preset.arms
    }
    measured = run_cells(cells.values(), work_dir, options.jobs, threads=1)
    runs = {arm: {seed: measured[cells[arm, seed].name]["arms"][arm] for seed in preset.seeds} for arm in preset.arms}
    first = next(iter(next(iter(runs.values())).values()))
    return {
        "search_seed": preset.search_seed,
        "seeds": list(preset.seeds),
        "steps": first["steps"],
        "tokens_per_step": first["tokens_per_step"],
        "held_out_rows": first["loss"]["rows"],
        "arms": {
            arm: {"tried": tried[arm], "chosen": rates[arm], "tried_ratios": tried_ratios[arm], "ratio": ratios[arm]}
            | summarize_arm(runs[arm], runs)
            for arm in preset.arms
        },
        "with_one_rate": compare_one_rate(preset, options, rates, ratios),
    }


def compare_one_rate(
    preset: QualityPreset, options: argparse.Namespace, rates: dict[str, str], ratios: dict[str, str]
) -> dict[str, Any]:
    """The arms whose deltas have a rate of their own, with the rate of everything else, over the same seeds."""
    work_dir, found = options.work_dir / "quality", {}
    for arm in (arm for arm in preset.arms if ratios[arm] != "1"):
        cells = {seed: make_cell(preset, options, arm, rates[arm], seed, data_seed=0) for seed in preset.seeds}
        measured = run_cells(cells.values(), work_dir, options.jobs, threads=1)
        runs = {seed: measured[cell.name]["arms"][arm] for seed, cell in cells.items()}
        found[arm] = summarize_arm(runs, {arm: runs})
    return found


def make_cell(
    preset: QualityPreset, options: argparse.Namespace, arm: str, rate: str, seed: int, data_seed: int, ratio: str = "1"
) -> Cell:
    """One run of one arm."""
    words = (
        *("--config", str(Path(__file__).resolve().parent.parent / "configs" / "upcycle.yaml")),
        *("--cache_dir", str(options.work_dir.resolve()), "--use_cpu", "true", *preset.flags),
        *("--arms", arm, "--learning_rate", rate, "--seed", str(seed), "--data_seed", str(data_seed)),
        *(() if options.source_dir is None else ("--source_dir", str(options.source_dir))),
        *(() if ratio == "1" else ("--delta_learning_rate_ratio", ratio)),
    )
    return Cell(f"{arm}-{rate}-{seed}" + ("" if ratio == "1" else f"-x{ratio}"), words, "upcycle.py")


def prepare_parent(preset: QualityPreset, options: argparse.Namespace) -> Path:
    """The quickstart's dense parent, once, before several runs want it at a time."""
    import upcycle
    from upcycle_arguments import parse_upcycle_arguments

    return upcycle.prepare_parent(
        parse_upcycle_arguments(make_cell(preset, options, preset.arms[0], "1e-3", 0, 0).arguments)
    )


def summarize_arm(runs: dict[int, dict[str, Any]], arms: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """One arm over its seeds: losses, gain on step 0, worth of its deltas, difference to vanilla and to dense."""
    after = {seed: run["loss"]["after"] for seed, run in runs.items()}
    result: dict[str, Any] = {
        "parameters": next(iter(runs.values()))["parameters"],
        "model_bytes": next(iter(runs.values()))["model_bytes"],
        "before": next(iter(runs.values()))["loss"]["before"],
        "after": {str(seed): loss for seed, loss in after.items()},
        "gain": interval([run["loss"]["before"] - run["loss"]["after"] for run in runs.values()]),
    }
    if all("loss_levelled" in run for run in runs.values()):
        result["worth_of_deltas"] = interval([r["loss_levelled"] - r["loss"]["after"] for r in runs.values()])
    for other in (VANILLA, DENSE):
        if other in arms and arms[other] is not runs:
            reference = [arms[other][seed]["loss"]["after"] for seed in runs]
            result[f"against_{other}"] = relative_difference(list(after.values()), reference) | {
                "nats": interval([a - b for a, b in zip(after.values(), reference, strict=True)])
            }
    return result


def interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds with its 95% interval (Student's t), smallest and largest."""
    mean, count = statistics.mean(values), len(values)
    found = {"mean": mean, "least": min(values), "most": max(values), "seeds": count}
    if count < 2:
        return found
    half = STUDENT_T[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return found | {"low": mean - half, "high": mean + half}
