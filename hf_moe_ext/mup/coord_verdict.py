"""Slopes of sizes against widths, and what is asked of them. Pure functions of numbers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

DELTA = "delta_"  # before a feature's name: its change since the start
CHANGE_BAR = 0.3  # on the absolute slope of every change
JUDGED_STEPS = (1, 3, 6)
# Router logits at the start shrink as the root of the width under µP; a router that is taken for a hidden weight starts at
# slope 0. Measured -0.45 against +0.05, so the window's upper end is in the middle.
START_WINDOW = (-0.75, -0.25)
ROUTER_LOGITS = "router_logits"


@dataclass(frozen=True)
class Size:
    """One measured number.

    Attributes:
        quantity: of what.
        layer: number of the layer; None: of the model as a whole.
        step: optimizer steps before it was measured.
        width: hidden size of the model.
        seed: that the weights were drawn with.
        value: the number.
    """

    quantity: str
    layer: int | None
    step: int
    width: int
    seed: int
    value: float


@dataclass(frozen=True)
class Row:
    """How a quantity grows with the width.

    Attributes:
        quantity: of what.
        layer: number of the layer; None: of the model as a whole.
        step: optimizer steps before.
        slope: of log2(size) against log2(width), all seeds together.
        seed_slopes: of each seed by itself.
        sizes: width -> size, one for each seed.
    """

    quantity: str
    layer: int | None
    step: int
    slope: float
    seed_slopes: tuple[float, ...]
    sizes: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True)
class Finding:
    """What is asked of a row, and whether it holds.

    Attributes:
        row: what is judged.
        low: least slope allowed.
        high: largest slope allowed.
    """

    row: Row
    low: float
    high: float

    @property
    def ok(self) -> bool:
        """Whether the slope is inside; no slope is outside."""
        return self.low <= self.row.slope <= self.high


def fit_slope(widths: Sequence[float], sizes: Sequence[float]) -> float:
    """Slope of log2(size) against log2(width) by least squares.

    Args:
        widths: at least two different ones.
        sizes: one for each width; the widths may repeat.

    Returns:
        NaN where a size is zero, negative or not finite: it has no logarithm to fit.

    Raises:
        ValueError: lengths that differ, or fewer than two different widths.
    """
    if len(widths) != len(sizes):
        raise ValueError(f"fit_slope: as many sizes as widths are needed; got {len(sizes)} and {len(widths)}")
    if len(set(widths)) < 2:
        raise ValueError(f"fit_slope: a slope needs at least two different widths; got {list(widths)}")
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.nan
    x, y = [math.log2(width) for width in widths], [math.log2(size) for size in sizes]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    rise = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / math.fsum((a - mean_x) ** 2 for a in x)


def fit_rows(sizes: Iterable[Size]) -> list[Row]:
    """One row for each quantity, layer and step, in the order of their first measurement.

    Raises:
        ValueError: a row was measured at fewer than two widths.
    """
    measured: dict[tuple[str, int | None, int], list[Size]] = defaultdict(list)
    for size in sizes:
        measured[size.quantity, size.layer, size.step].append(size)
    return [_fit_row(*key, found) for key, found in measured.items()]


def _fit_row(quantity: str, layer: int | None, step: int, found: list[Size]) -> Row:
    seeds = sorted({size.seed for size in found})
    by_seed = [[size for size in found if size.seed == seed] for seed in seeds]
    return Row(
        quantity,
        layer,
        step,
        slope=fit_slope([size.width for size in found], [size.value for size in found]),
        seed_slopes=tuple(fit_slope([s.width for s in own], [s.value for s in own]) for own in by_seed),
        sizes={
            width: tuple(size.value for size in found if size.width == width)
            for width in sorted({size.width for size in found})
        },
    )


def judge(rows: Iterable[Row], router_start: bool) -> list[Finding]:
    """What is asked of the rows.

    Every change since the start is to be of the same size at every width after 1, 3 and 6 steps. At the start nothing is
    asked of router, attention and output logits, which µP lets shrink with the width, but of the router, where
    ``router_start``: there a router that is scaled as a hidden weight, which is stable too, shows.

    Args:
        rows: of ``fit_rows``.
        router_start: whether the router is one of µP.
    """
    findings = []
    for row in rows:
        if row.quantity.startswith(DELTA) and row.step in JUDGED_STEPS:
            findings.append(Finding(row, -CHANGE_BAR, CHANGE_BAR))
        elif row.quantity == ROUTER_LOGITS and row.step == 0 and router_start:
            findings.append(Finding(row, *START_WINDOW))
    return findings
