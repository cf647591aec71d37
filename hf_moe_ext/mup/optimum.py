"""Where a sweep's losses are least, how far that moves along the axis, and what it costs to keep the base's learning rate.

Pure functions of numbers. A loss is nats per token; one that is not finite (a run that diverged) is ``math.inf``.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_DIVERGED = math.inf


@dataclass(frozen=True)
class Optimum:
    """The least loss of a curve over learning rates.

    Attributes:
        learning_rate: of the grid.
        loss: there.
        bracketed: both neighbours on the grid are worse; False where the best one is the least or the greatest tried, so that
            a better one may lie outside.
        vertex_learning_rate: of the parabola in log2 through the best and its neighbours; None without two finite ones.
        vertex_loss: there.
    """

    learning_rate: float
    loss: float
    bracketed: bool
    vertex_learning_rate: float | None = None
    vertex_loss: float | None = None


def find_optimum(losses: Mapping[float, float]) -> Optimum:
    """The best learning rate of a grid, refined by a parabola in log2 of the rate.

    Args:
        losses: learning rate -> loss; of equal losses the smaller rate is taken.

    Raises:
        ValueError: there is no finite loss.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(f"no run of {len(losses)} has a finite loss; try smaller learning rates")
    rates = sorted(losses)
    best = min(sorted(finite), key=finite.__getitem__)
    position = rates.index(best)
    if position in (0, len(rates) - 1):
        return Optimum(best, finite[best], bracketed=False)
    around = rates[position - 1 : position + 2]
    if not all(rate in finite for rate in around):  # beyond the neighbour training diverges: bracketed, but no parabola
        return Optimum(best, finite[best], bracketed=True)
    vertex = fit_parabola([math.log2(rate) for rate in around], [finite[rate] for rate in around])
    if vertex is None:
        return Optimum(best, finite[best], bracketed=True)
    return Optimum(best, finite[best], True, 2 ** vertex[0], vertex[1])


def fit_parabola(xs: list[float], ys: list[float]) -> tuple[float, float] | None:
    """(x, y) of the lowest point of the parabola through three points; None where they lie on a line or it opens downwards.

    Newton's form: y = y0 + s (x - x0) + c (x - x0)(x - x1) with slopes s = (y1 - y0)/(x1 - x0) and
    c = ((y2 - y1)/(x2 - x1) - s)/(x2 - x0); its derivative is zero at (x0 + x1)/2 - s/(2c).
    """
    (x0, x1, x2), (y0, y1, y2) = xs, ys
    slope = (y1 - y0) / (x1 - x0)
    curvature = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)
    if curvature <= 0:
        return None
    x = (x0 + x1) / 2 - slope / (2 * curvature)
    return x, y0 + slope * (x - x0) + curvature * (x - x0) * (x - x1)


def shift_steps(learning_rate: float, base_learning_rate: float) -> float:
    """How far an optimum lies from the base's, in factors of 2; positive is higher."""
    return math.log2(learning_rate / base_learning_rate)


def average_losses(by_seed: Mapping[int, Mapping[float, float]]) -> dict[float, float]:
    """Mean over seeds, at the learning rates that all seeds have; a rate at which one diverged has diverged.

    Args:
        by_seed: seed -> learning rate -> loss.
    """
    common = set.intersection(*(set(losses) for losses in by_seed.values()))
    return {rate: statistics.fmean(losses[rate] for losses in by_seed.values()) for rate in sorted(common)}


def seed_spread(by_seed: Mapping[int, Mapping[float, float]], learning_rate: float) -> float | None:
    """Greatest less least loss over the seeds at one learning rate, nats; None with one seed."""
    losses = [losses[learning_rate] for losses in by_seed.values()]
    return max(losses) - min(losses) if len(losses) > 1 else None


def compute_regret(losses: Mapping[float, float], base_learning_rate: float) -> float | None:
    """Loss at the base's best learning rate less the least of this curve, nats; None where that rate was not run."""
    if base_learning_rate not in losses:
        return None
    return losses[base_learning_rate] - find_optimum(losses).loss


def group_losses(
    records: Iterable[Mapping[str, Any]],
) -> dict[tuple[int, str], dict[int, dict[int, dict[float, float]]]]:
    """(max_steps, mode) -> value of the axis -> seed -> learning rate -> loss.

    Args:
        records: of ``run_cells`` or ``read_cells``.
    """
    grouped: dict[tuple[int, str], dict[int, dict[int, dict[float, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for record in records:
        cell = record["cell"]
        loss = _DIVERGED if record["loss"] is None else record["loss"]
        grouped[cell["max_steps"], cell["mode"]][cell["value"]][cell["seed"]][cell["learning_rate"]] = loss
    return {
        arm: {
            value: {seed: dict(sorted(losses[seed].items())) for seed in sorted(losses)}
            for value, losses in values.items()
        }
        for arm, values in grouped.items()
    }


def summarize(records: Iterable[Mapping[str, Any]], base_value: int | None = None) -> list[dict[str, Any]]:
    """One entry per budget and mode: each value's curve, optimum, shift and regret. JSON takes it as it is.

    Curves are means over the seeds that have the base's rates at that value; a seed with fewer learning rates than another
    has not been finished and is left out.

    Args:
        records: of one sweep.
        base_value: whose best learning rate the others are to take; None: the least.

    Raises:
        ValueError: the base has no run, or none that is finite.
    """
    arms = []
    for (max_steps, mode), values in sorted(group_losses(records).items()):
        base = min(values) if base_value is None else base_value
        if base not in values:
            raise ValueError(f"{mode}, {max_steps} steps: there is no run of the base value {base}; run it first")
        complete = {value: _drop_unfinished(by_seed) for value, by_seed in sorted(values.items())}
        base_rate = find_optimum(average_losses(complete[base])).learning_rate
        arms.append(
            {
                "mode": mode,
                "max_steps": max_steps,
                "base_value": base,
                "base_learning_rate": base_rate,
                "values": [_summarize_value(value, by_seed, base_rate) for value, by_seed in complete.items()],
            }
        )
    return arms


def _summarize_value(value: int, by_seed: Mapping[int, Mapping[float, float]], base_rate: float) -> dict[str, Any]:
    losses = average_losses(by_seed)
    entry: dict[str, Any] = {
        "value": value,
        "seeds": list(by_seed),
        "losses": [[rate, _plain(loss)] for rate, loss in losses.items()],
    }
    if not any(map(math.isfinite, losses.values())):
        return entry | {"optimum": None, "shift_steps": None, "regret": None, "seed_spread": None}
    optimum = find_optimum(losses)
    return entry | {
        "optimum": asdict(optimum),
        "shift_steps": shift_steps(optimum.learning_rate, base_rate),
        "regret": _plain(compute_regret(losses, base_rate)),
        "seed_spread": _plain(seed_spread(by_seed, optimum.learning_rate)),
    }


def _drop_unfinished(by_seed: Mapping[int, Mapping[float, float]]) -> dict[int, Mapping[float, float]]:
    most = max(len(losses) for losses in by_seed.values())
    return {seed: losses for seed, losses in by_seed.items() if len(losses) == most}


def _plain(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else None
