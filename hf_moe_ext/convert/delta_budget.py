"""Which rate for which matrix: least error within a number of bytes, or fewest bytes within an error.

A matrix (of all experts of a layer) has options, each a number of bytes and an error that were measured or predicted. Least
total error within a total of bytes is a multiple-choice knapsack. It is solved by dynamic programming over the totals that
no other total beats in both bytes and error; where these become too many, only the best of each small range of bytes goes
on, which can cost a little error and never breaks the budget.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


def choose_within_bytes(
    matrices: Sequence[Sequence[Option]], num_bytes: int, max_totals: int = MAX_TOTALS
) -> list[int]:
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
    sizes, errors = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    left = least
    trail: list[tuple[Tensor, Tensor]] = []
    for options in matrices:
        left -= min(option.num_bytes for option in options)
        grown_sizes = (sizes[:, None] + torch.tensor([option.num_bytes for option in options])).reshape(-1)
        grown_errors = (
            errors[:, None] + torch.tensor([option.error for option in options], dtype=torch.float64)
        ).reshape(-1)
        kept = _undominated(grown_sizes, grown_errors, num_bytes - left)
        kept = kept[_thin(grown_sizes[kept], max_totals)]
        sizes, errors = grown_sizes[kept], grown_errors[kept]
        trail.append((kept // len(options), kept % len(options)))
    # Ascending in bytes and falling in error: the last is the best.
    place, chosen = len(sizes) - 1, []
    for before, choice in reversed(trail):
        chosen.append(int(choice[place]))
        place = int(before[place])
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
            raise ValueError(
                f"matrix {number}: no option has an error of at most {error:.4g}; the smallest is {least:.4g}"
            )
        chosen.append(min(fitting, key=lambda i: (options[i].num_bytes, options[i].error)))
    return chosen


def smallest_bytes(matrices: Sequence[Sequence[Option]]) -> int:
    """The fewest bytes that any choice takes."""
    return sum(min(option.num_bytes for option in options) for options in matrices)


def _undominated(sizes: Tensor, errors: Tensor, most: int) -> Tensor:
    """Places of those of at most ``most`` bytes that no other beats in bytes and error, ascending in bytes."""
    order = errors.argsort(stable=True)
    order = order[sizes[order].argsort(stable=True)]
    order = order[sizes[order] <= most]
    least = errors[order].cummin(0).values
    better = torch.ones_like(order, dtype=torch.bool)
    better[1:] = errors[order][1:] < least[:-1]
    return order[better]


def _thin(sizes: Tensor, max_totals: int) -> Tensor:
    """Of totals ascending in bytes the smallest, and the most exact (the last) in each of as many equal ranges of bytes."""
    if len(sizes) <= max_totals:
        return torch.arange(len(sizes))
    part = (sizes - sizes[0]) * (max_totals - 1) // (sizes[-1] - sizes[0] + 1)
    last = torch.ones_like(part, dtype=torch.bool)
    last[:-1] = part[1:] != part[:-1]
    last[0] = True
    return last.nonzero()[:, 0]
