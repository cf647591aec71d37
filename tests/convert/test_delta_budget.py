"""Rates within a budget: equal to trying everything, never above the budget."""

import itertools
import random

import pytest

from hf_moe_ext.convert.delta_budget import Option, choose_within_bytes, choose_within_error, smallest_bytes


def random_matrices(seed: int, count: int, options: int, convex: bool) -> list[list[Option]]:
    source = random.Random(seed)
    matrices = []
    for _ in range(count):
        size = source.randint(50, 500)
        level = source.uniform(0.1, 10)
        if convex:
            shares = sorted(source.uniform(0.01, 1) for _ in range(options))
            matrices.append([Option(round(size * share), level * (1 - share) ** 2) for share in shares])
        else:
            matrices.append([Option(source.randint(1, size), source.uniform(0, level)) for _ in range(options)])
    return matrices


def brute_force(matrices: list[list[Option]], num_bytes: int) -> float:
    sums = (
        (sum(option.num_bytes for option in each), sum(option.error for option in each))
        for each in itertools.product(*matrices)
    )
    return min(error for size, error in sums if size <= num_bytes)


def total(matrices: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    options = [options[i] for options, i in zip(matrices, chosen, strict=True)]
    return sum(o.num_bytes for o in options), sum(o.error for o in options)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("convex", [True, False])
def test_equals_brute_force(seed: int, convex: bool) -> None:
    matrices = random_matrices(seed, 5, 5, convex)
    least = smallest_bytes(matrices)
    largest = sum(max(o.num_bytes for o in options) for options in matrices)
    for share in (0, 0.1, 0.3, 0.6, 1):
        budget = round(least + share * (largest - least))
        size, error = total(matrices, choose_within_bytes(matrices, budget))
        assert size <= budget
        assert error == pytest.approx(brute_force(matrices, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_thinned_totals_keep_the_budget_and_little_error(seed: int) -> None:
    matrices = random_matrices(seed, 8, 5, True)
    budget = round(1.5 * smallest_bytes(matrices)) + 200
    exact = total(matrices, choose_within_bytes(matrices, budget, max_totals=10**6))
    size, error = total(matrices, choose_within_bytes(matrices, budget, max_totals=50))
    assert size <= budget
    assert exact[1] <= error <= 1.05 * exact[1]


def test_many_matrices_are_within_a_percent_of_the_bound_by_relaxation() -> None:
    """288 matrices as in a large model; the Lagrangian dual is below every choice."""
    matrices = random_matrices(3, 288, 10, True)
    budget = round(0.4 * sum(max(o.num_bytes for o in options) for options in matrices))
    size, error = total(matrices, choose_within_bytes(matrices, budget))
    assert size <= budget
    duals = (
        sum(min(o.error + price * o.num_bytes for o in options) for options in matrices) - price * budget
        for price in (10**e for e in [x / 20 for x in range(-100, 1)])
    )
    assert error <= 1.01 * max(duals)


def test_a_target_below_everything_names_the_smallest() -> None:
    matrices = [[Option(10, 1.0), Option(20, 0.5)], [Option(7, 1.0)]]
    with pytest.raises(ValueError, match=r"target of 16 bytes for the deltas: the smallest they can be is 17"):
        choose_within_bytes(matrices, 16)
    assert choose_within_bytes(matrices, 17) == [0, 0]


def test_within_error_takes_the_cheapest_that_is_good_enough() -> None:
    matrices = [[Option(10, 0.4), Option(8, 0.2), Option(30, 0.0)], [Option(5, 0.3), Option(5, 0.1)]]
    assert choose_within_error(matrices, 0.3) == [1, 1]
    assert choose_within_error(matrices, 0.1) == [2, 1]
    with pytest.raises(ValueError, match=r"matrix 1: no option has an error of at most 0.05; the smallest is 0.1"):
        choose_within_error(matrices, 0.05)
