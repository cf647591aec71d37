"""Which rate for which matrix: least error within a number of bytes, or fewest bytes within an error.

A matrix (of all experts of a layer) has options, each a number of bytes and an error that were measured or predicted. Least
total error within a total of bytes is a multiple-choice knapsack. It is solved by dynamic programming over the totals that
no other total beats in both bytes and error; where these become too many, only the best of each small range of bytes goes
on, which can cost a little error and never breaks the budget.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Totals kept after each matrix. Exact as long as there are no more, as in models of a few matrices.
MAX_TOTALS = 2048


class Option(NamedTuple):
    """One way to encode a matrix.

    Attributes:
        num_bytes: of all experts' codes.
        error: what is to be small in sum; here the mean squared relative output error.
    """

    num_bytes: int
    error: float


class _Total(NamedTuple):
    num_bytes: int
    error: float
    choice: int
    before: "_Total | None"


def choose_within_bytes(matrices: Sequence[Sequence[Option]], num_bytes: int, max_totals: int = MAX_TOTALS) -> list[int]:
    """One option of each matrix, so that the sum of errors is least and the sum of bytes at most ``num_bytes``.

    Args:
        matrices: each with at least one option.
        num_bytes: what all chosen options may take together.
        max_totals: how many totals are carried on.

    Returns:
        Index of the chosen option of each matrix.

    Raises:
        ValueError: no choice is that small; says the smallest.
    """
    least = smallest_bytes(matrices)
    if least > num_bytes:
        raise ValueError(f"target of {num_bytes:,} bytes for the deltas: the smallest they can be is {least:,}")
    totals: list[_Total] = [_Total(0, 0.0, -1, None)]
    left = least
    for options in matrices:
        left -= min(option.num_bytes for option in options)
        grown = [
            _Total(total.num_bytes + option.num_bytes, total.error + option.error, index, total)
            for total in totals
            for index, option in enumerate(options)
            if total.num_bytes + option.num_bytes + left <= num_bytes
        ]
        totals = _thin(_undominated(grown), max_totals)
    best: _Total | None = min(totals, key=lambda total: (total.error, total.num_bytes))
    chosen = []
    while best is not None and best.before is not None:
        chosen.append(best.choice)
        best = best.before
    return chosen[::-1]


def choose_within_error(matrices: Sequence[Sequence[Option]], error: float) -> list[int]:
    """The smallest option of each matrix whose own error is at most ``error``, the more exact of two equally small.

    Raises:
        ValueError: a matrix has none; says which one and its smallest error.
    """
    chosen = []
    for number, options in enumerate(matrices):
        fitting = [i for i, option in enumerate(options) if option.error <= error]
        if not fitting:
            least = min(option.error for option in options)
            raise ValueError(f"matrix {number}: no option has an error of at most {error:.4g}; the smallest is {least:.4g}")
        chosen.append(min(fitting, key=lambda i: (options[i].num_bytes, options[i].error)))
    return chosen


def smallest_bytes(matrices: Sequence[Sequence[Option]]) -> int:
    """The fewest bytes that any choice takes."""
    return sum(min(option.num_bytes for option in options) for options in matrices)


def _undominated(totals: list[_Total]) -> list[_Total]:
    """Those that no other beats in bytes and in error, ascending in bytes."""
    kept: list[_Total] = []
    for total in sorted(totals, key=lambda total: (total.num_bytes, total.error)):
        if not kept or total.error < kept[-1].error:
            kept.append(total)
    return kept


def _thin(totals: list[_Total], max_totals: int) -> list[_Total]:
    """The smallest, and the most exact in each of ``max_totals`` - 1 equal ranges of bytes."""
    if len(totals) <= max_totals:
        return totals
    first, last = totals[0].num_bytes, totals[-1].num_bytes
    best = {(total.num_bytes - first) * (max_totals - 1) // (last - first + 1): total for total in totals}
    # Ascending in bytes and so falling in error: the last of a range is its most exact. The smallest leaves most for the
    # matrices to come.
    return list(dict.fromkeys([totals[0], *best.values()]))
