"""Costs by hand, and from which volume on a model pays."""

from math import inf

import pytest

from hf_moe_ext.scaling.money import Demand, Prices, break_even, compare, serving_cost_per_million, training_cost

PRICES = Prices(gpu_hour=2.5, per_gb_moved=0.1, effort_hours=80, effort_hour=100)


def test_training():
    cost = training_cost(PRICES, 8, step_s=1.8, num_steps=100_000, moved_bytes=5e11, utilisation=0.8)
    assert cost.gpu_hours == pytest.approx(8 * 1.8 * 100_000 / 3600 / 0.8)
    assert (cost.devices, cost.moved, cost.effort) == pytest.approx((500 * 2.5, 50, 8000))
    assert cost.total == pytest.approx(1250 + 50 + 8000)
    assert cost.as_dict()["total"] == cost.total


def test_serving():
    """A million answers tokens at 1,000 a second, three prompt tokens each at 10,000, half of the time idle."""
    seconds = 1e6 * (1 / 1000 + 3 / 10_000) / 0.5
    cost = serving_cost_per_million(PRICES, 2, 10_000, 1000, Demand(3, 0.5, moved_bytes=2000))
    assert cost == pytest.approx(2 * seconds / 3600 * 2.5 + 2 * 0.1)


def test_break_even_by_hand():
    found = break_even(10_000, 2.0, 4_000, 5.0)
    assert (found.one_off, found.saving_per_million) == (6000, 3)
    assert found.tokens == pytest.approx(2e9)
    assert found.until == inf
    assert found.saved(found.tokens) == pytest.approx(0)
    assert found.saved(3e9) == pytest.approx(3000)


@pytest.mark.parametrize(
    ("one_off", "serving", "other", "expected"),
    [
        (9, 5, (4, 5), (inf, 0)),  # dearer to make, no cheaper to serve
        (9, 6, (4, 5), (inf, 0)),
        (4, 5, (9, 5), (0, inf)),  # cheaper to make, no dearer to serve
        (4, 4, (9, 5), (0, inf)),
        (4, 6, (9, 5), (0, 5e6)),  # cheaper to make, dearer to serve: up to here
        (4, 5, (4, 5), (0, inf)),
        (4, 6, (4, 5), (inf, 0)),
    ],
)
def test_who_is_cheaper_when(one_off, serving, other, expected):
    found = break_even(one_off, serving, *other)
    assert (found.tokens, found.until) == expected


def test_against_a_dense_model_and_against_doing_nothing():
    found = compare(10_000, 2.0, {"dense": (4_000, 5.0), "nothing": (0.0, 4.0)})
    assert found["dense"].tokens == pytest.approx(2e9)
    assert found["nothing"].tokens == pytest.approx(5e9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Prices(-1), "gpu_hour must be at least 0, got -1"),
        (lambda: Prices(1, effort_hours=float("inf")), "effort_hours must be at least 0, got inf"),
        (lambda: Prices(1, per_gb_moved=float("nan")), "per_gb_moved must be at least 0, got nan"),
        (lambda: training_cost(PRICES, 0, 1, 1), "num_devices must be at least 1, got 0"),
        (lambda: training_cost(PRICES, 1, -1, 1), "step_s must be at least 0, got -1"),
        (lambda: training_cost(PRICES, 1, 1, 1, utilisation=0), "utilisation must be above 0 and at most 1, got 0"),
        (lambda: Demand(utilisation=1.5), "utilisation must be above 0 and at most 1, got 1.5"),
        (lambda: Demand(prefill_tokens=-1), "prefill_tokens must be at least 0, got -1"),
        (lambda: serving_cost_per_million(PRICES, 1, 0, 1, Demand()), "prefill_tokens_per_s must be above 0, got 0"),
        (lambda: break_even(1, -2, 0, 0), "serving must be at least 0, got -2"),
    ],
)
def test_bad_amounts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_amounts_are_numbers():
    with pytest.raises(TypeError, match="gpu_hour must be a number, got '2'"):
        Prices("2")
