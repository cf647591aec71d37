"""What the runs of `sparsity_grid.py` say: the best sparsity at fixed size and budget, surfaces, answers at equal loss."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from hf_moe_ext.scaling.laws.isoflop_surface import NUM_COEFFICIENTS, fit_surface

Run = Mapping[str, Any]
ANSWERS = "answer_loss_"
# Fewest runs per coefficient of the regression of answers on loss and sparsity.
ANSWER_COEFFICIENTS = 4


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """All of it, for the JSON."""
    return {
        "groups": compare_sparsities(runs),
        "surfaces": [describe_surface(runs, budget) for budget in _values(runs, "budget_flops")],
        "best_sizes": find_best_sizes(runs),
        "answers": {name: compare_answers(runs, name) for name in _answer_columns(runs)},
        "memory": compare_memory(runs),
    }


def nominal_sizes(runs: Iterable[Run]) -> dict[float, list[Run]]:
    """Runs by size: models of one nominal size, whose widths made them differ by a few per cent."""
    groups: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["nominal_parameters"]):
        groups.setdefault(run["nominal_parameters"], []).append(run)
    return groups


def compare_sparsities(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per budget and size: the loss at each sparsity over the seeds, the best one, and whether it lies at an end.

    `verdict` is "interior" where the mean is lowest between the ends and every seed has its own lowest there too, "edge" where
    all seeds have it at one end, "unclear" where they differ, "unfinished" where fewer than two seeds have every sparsity.
    `gain_over_*` is the loss at an end less the best one, the mean over seeds with the smallest and the largest.
    """
    sparsities = _values(runs, "sparsity")
    told = []
    for budget in _values(runs, "budget_flops"):
        for size, group in nominal_sizes(run for run in runs if run["budget_flops"] == budget).items():
            told.append({"budget_flops": budget, "nominal_parameters": size, **_compare_group(group, sparsities)})
    return told


def _compare_group(group: Sequence[Run], sparsities: Sequence[float]) -> dict[str, Any]:
    losses = {s: {r["seed"]: r["loss"] for r in group if r["sparsity"] == s} for s in sparsities}
    # Only seeds that have every sparsity: a grid that is still running would compare different seeds.
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in losses.values())))
    points = [
        {
            "sparsity": s,
            "num_seeds": len(by_seed),
            "loss": statistics.mean(by_seed.values()),
            "low": min(by_seed.values()),
            "high": max(by_seed.values()),
            **_mean_of(group, s, ("total_parameters", "active_parameters", "num_tokens", "num_steps")),
        }
        for s, by_seed in losses.items()
        if by_seed
    ]
    told: dict[str, Any] = {"points": points, "num_seeds": len(seeds)}
    if len(seeds) < 2 or len(sparsities) < 3:
        return told | {"verdict": "unfinished"}
    means = {s: statistics.mean(by_seed[seed] for seed in seeds) for s, by_seed in losses.items()}
    best, ends = min(means, key=means.__getitem__), (min(means), max(means))
    of_seeds = [min(losses, key=lambda s, seed=seed: losses[s][seed]) for seed in seeds]  # type: ignore[misc]
    if best not in ends and not set(of_seeds) & set(ends):
        verdict = "interior"
    elif best in ends and set(of_seeds) == {best}:
        verdict = "edge"
    else:
        verdict = "unclear"
    gains = {
        name: _spread([losses[end][seed] - losses[best][seed] for seed in seeds])
        for name, end in zip(("gain_over_dense", "gain_over_sparsest"), ends, strict=True)
    }
    return told | {"best_sparsity": best, "best_of_seeds": of_seeds, "verdict": verdict, **gains}


def describe_surface(runs: Sequence[Run], budget: float) -> dict[str, Any]:
    """IsoFLOP surface of one budget: its error, and S* at each nominal size, of all runs and of each seed by itself."""
    chosen = [run for run in runs if run["budget_flops"] == budget]
    told: dict[str, Any] = {"budget_flops": budget, "num_runs": len(chosen)}
    lacking = len(_pairs(runs)) - len(_pairs(chosen))
    if lacking:
        return told | {"refused": f"unfinished: {lacking} pairs of size and sparsity have no run"}
    try:
        surface = _fit(chosen)
    except ValueError as error:
        return told | {"refused": str(error)}
    of_seeds = []
    for seed in _values(chosen, "seed"):
        with suppress(ValueError):  # a seed that has not run to its end
            of_seeds.append(_fit([run for run in chosen if run["seed"] == seed]))
    errors = [surface.loss(run["total_parameters"], run["sparsity"]) - run["loss"] for run in chosen]
    freedom = max(1, len(chosen) - NUM_COEFFICIENTS)
    told |= {"coefficients": list(surface.coefficients), "rmse": float(np.sqrt(np.sum(np.square(errors)) / freedom))}
    low, high = surface.parameter_range
    told["optima"] = []
    for size in nominal_sizes(chosen):
        at = min(max(size, low), high)
        best = surface.best_sparsity(at)
        told["optima"].append(
            {
                "nominal_parameters": size,
                "best_sparsity": best.value,
                "flags": [flag.message for flag in best.flags],
                "best_of_seeds": [one.best_sparsity(at).value for one in of_seeds],
            }
        )
    return told


def _pairs(runs: Iterable[Run]) -> set[tuple[float, float]]:
    return {(run["nominal_parameters"], run["sparsity"]) for run in runs}


def _fit(runs: Sequence[Run]) -> Any:
    return fit_surface(*([run[name] for run in runs] for name in ("total_parameters", "sparsity", "loss")))


def find_best_sizes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per budget and sparsity with every size and seed: the size of the lowest mean loss, and whether it is an end of the grid."""
    told, sizes, num_seeds = [], list(nominal_sizes(runs)), len(_values(runs, "seed"))
    for budget in _values(runs, "budget_flops"):
        for sparsity in _values(runs, "sparsity"):
            groups = nominal_sizes(r for r in runs if r["budget_flops"] == budget and r["sparsity"] == sparsity)
            if list(groups) != sizes or any(len(group) < num_seeds for group in groups.values()):
                continue
            losses = {size: [run["loss"] for run in group] for size, group in groups.items()}
            best = min(losses, key=lambda size: statistics.mean(losses[size]))
            told.append(
                {"budget_flops": budget, "sparsity": sparsity, "nominal_parameters": best, **_spread(losses[best]),
                 "at_edge": best in (sizes[0], sizes[-1])}
            )  # fmt: skip
    return told


def compare_answers(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """Answers at equal held-out loss: answer loss = polynomial of degree 2 in the loss + slope * (-ln(1 - S)).

    The slope is what a run's answers cost beyond what its loss says, per factor e of E/K; positive means that at equal loss a
    sparser model answers worse. Of all runs, and of each seed by itself; the rest is the regression's own scatter.
    """
    told: dict[str, Any] = {"num_runs": len(runs)}
    fits = [_regress(runs, name), *(_regress([r for r in runs if r["seed"] == s], name) for s in _values(runs, "seed"))]
    if any(fit is None for fit in fits):
        return told | {"refused": f"fewer than {ANSWER_COEFFICIENTS + 1} runs of a seed, or of one sparsity only"}
    (slope, error, scatter, correlation), *of_seeds = (fit for fit in fits if fit is not None)
    return told | {
        "slope": slope,
        "slope_standard_error": error,
        "slope_of_seeds": [one[0] for one in of_seeds],
        "scatter": scatter,
        "correlation_with_loss": correlation,
        "lowest": min(run[name] for run in runs),
        "highest": max(run[name] for run in runs),
    }


def _regress(runs: Sequence[Run], name: str) -> tuple[float, float, float, float] | None:
    """Slope, its standard error, scatter, and the correlation of answers and loss."""
    if len(runs) <= ANSWER_COEFFICIENTS or len({run["sparsity"] for run in runs}) < 2:
        return None
    loss, sparsity, answers = (np.array([run[key] for run in runs]) for key in ("loss", "sparsity", name))
    centred = loss - loss.mean()
    features = np.stack([np.ones_like(loss), centred, centred**2, -np.log1p(-sparsity)], axis=1)
    solution = np.linalg.lstsq(features, answers, rcond=None)[0]
    scatter = np.sqrt(np.sum((features @ solution - answers) ** 2) / (len(runs) - ANSWER_COEFFICIENTS))
    error = scatter * np.sqrt(np.linalg.inv(features.T @ features)[3, 3])
    return float(solution[3]), float(error), float(scatter), float(np.corrcoef(loss, answers)[0, 1])


def compare_memory(runs: Sequence[Run]) -> dict[str, float]:
    """Formula over measurement: smallest and largest."""
    ratios = [run["memory_formula_bytes"] / run["memory_measured_bytes"] for run in runs]
    return {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}


def _answer_columns(runs: Sequence[Run]) -> list[str]:
    return [name for name in runs[0] if name.startswith(ANSWERS)]


def _values(runs: Iterable[Run], name: str) -> list[Any]:
    return sorted({run[name] for run in runs})


def _mean_of(group: Sequence[Run], sparsity: float, names: Sequence[str]) -> dict[str, float]:
    chosen = [run for run in group if run["sparsity"] == sparsity]
    return {name: statistics.mean(run[name] for run in chosen) for name in names}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
