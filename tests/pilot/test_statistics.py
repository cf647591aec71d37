"""Differences, intervals and corrections against what is known of them."""

import numpy as np
import pytest
from scipy import stats

from hf_moe_ext.pilot import statistics
from hf_moe_ext.pilot.statistics import ArmLosses, Comparison, adjust, compare, compare_all

TOKENS = np.full(400, 3.0)


def _losses(
    generator: np.random.Generator, mean: float, rows: np.ndarray, seeds: int = 3, spread: float = 0.0
) -> ArmLosses:
    """Rows that are hard for every candidate alike, a mean of the candidate, and a shift of every seed."""
    shift = generator.normal(0, spread, (seeds, 1)) if spread else np.zeros((seeds, 1))
    return ArmLosses(TOKENS * (mean + rows + shift + generator.normal(0, 0.05, (seeds, len(rows)))), TOKENS)


def test_mean_is_per_token() -> None:
    losses = ArmLosses(np.array([[4.0, 2.0], [1.0, 1.0]]), np.array([1.0, 3.0]))
    assert losses.by_seed.tolist() == [1.5, 0.5]
    assert losses.mean == 1.0


def test_row_deviation_is_that_of_a_mean_where_rows_are_alike() -> None:
    generator = np.random.default_rng(0)
    candidate = ArmLosses(generator.normal(0, 1, (1, 400)) + 5, np.ones(400))
    reference = ArmLosses(np.full((1, 400), 5.0), np.ones(400))
    one = compare(candidate, reference)
    known = stats.ttest_1samp(candidate.nats[0] - 5, 0)
    assert one.difference == pytest.approx(candidate.mean - 5)
    assert one.row_deviation == pytest.approx(candidate.nats.std(ddof=1) / 20, rel=0.06)
    assert one.p == pytest.approx(known.pvalue, abs=0.05)
    assert one.seed_deviation is None


def test_what_differs_by_seed_alone_is_students_test_over_seeds() -> None:
    shifts = np.array([0.1, 0.3, 0.2])
    candidate = ArmLosses(TOKENS * (1 + shifts[:, None]), TOKENS)
    one = compare(candidate, ArmLosses(TOKENS[None] * 1.0, TOKENS))
    assert one.row_deviation == pytest.approx(0, abs=1e-12)
    assert one.p == pytest.approx(stats.ttest_1samp(shifts, 0).pvalue, rel=1e-6)


def test_pairing_removes_what_is_hard_for_both() -> None:
    generator = np.random.default_rng(1)
    rows = generator.normal(2, 1, 400)
    a, b = _losses(generator, 0.0, rows), _losses(generator, 0.05, rows)
    assert compare(a, b).shown
    assert abs(compare(a, b).difference + 0.05) < 0.01


def test_false_alarms_are_as_rare_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No real difference, three seeds that spread more than rows: 5 % in each single comparison, and no more in a family."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)  # of 800 comparisons
    generator = np.random.default_rng(2)
    single = family = 0
    for _ in range(200):
        rows = generator.normal(2, 0.5, 400)
        base = ArmLosses((TOKENS * (2 + rows))[None], TOKENS)
        arms = {f"arm{i}": _losses(generator, 2.0, rows, spread=0.02) for i in range(4)}
        found = compare_all({"base": base, **arms}, "base")["against_base"]
        single += sum(c.p < 0.05 for c in found.values())
        family += any(c.shown for c in found.values())
    assert single / 800 < 0.08
    assert single / 800 > 0.01  # nor so careful that nothing would ever be shown
    assert family / 200 < 0.09


def test_holm_by_hand() -> None:
    def one(p: float) -> Comparison:
        return Comparison(-0.1, -0.2, 0.0, 0.01, 0.01, p, p)

    adjusted = adjust({"a": one(0.04), "b": one(0.01), "c": one(0.03)})
    assert [adjusted[n].adjusted_p for n in "abc"] == pytest.approx([0.06, 0.03, 0.06])
    assert not adjusted["a"].shown
    assert adjusted["b"].shown


def test_equal_numbers_are_no_difference() -> None:
    losses = ArmLosses(np.ones((3, 4)), np.ones(4))
    assert compare(losses, losses).p == 1.0


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        compare(ArmLosses(np.ones((1, 2)), np.ones(2)), ArmLosses(np.ones((1, 2)), np.array([1.0, 2.0])))
