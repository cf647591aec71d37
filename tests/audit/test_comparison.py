"""Distances between loads against their definitions, and which limit is passed where."""

import dataclasses
import json
import math

import numpy as np
import pytest

from hf_moe_ext.audit.comparison import ComparisonLimits, compare
from hf_moe_ext.audit.inspection import TokenLoss
from hf_moe_ext.audit.load_distance import chance_distance, chance_divergence, divergence, total_variation
from support.inspected import DATA, MODEL, inspection, router

OLD = [500, 300, 200, 1000]
NEW = [520, 300, 180, 1000]


def test_distances_by_their_definitions() -> None:
    f, g = [c / 2000 for c in NEW], [c / 2000 for c in OLD]
    assert total_variation(np.array(NEW), np.array(OLD)) == pytest.approx(
        sum(abs(a - b) for a, b in zip(f, g, strict=True)) / 2
    )
    smooth = [[(c + 0.5) / 2002 for c in each] for each in (NEW, OLD)]
    expected = sum(a * math.log(a / b) for a, b in zip(*smooth, strict=True))
    assert divergence(np.array(NEW), np.array(OLD)) == pytest.approx(expected, rel=1e-12)
    assert divergence(np.array(OLD), np.array(OLD)) == total_variation(np.array(OLD), np.array(OLD)) == 0.0
    assert total_variation(np.array([7, 0]), np.array([0, 9])) == 1.0
    assert math.isfinite(divergence(np.array([7, 0]), np.array([0, 9])))
    # Of another number of tokens, but the same shares.
    assert total_variation(np.array([1, 3]), np.array([100, 300])) == pytest.approx(0.0, abs=1e-15)


def test_distance_by_chance_is_what_samples_have() -> None:
    generator = np.random.default_rng(0)
    shares = [0.5, 0.2, 0.2, 0.1]
    drawn = [(generator.multinomial(3000, shares), generator.multinomial(800, shares)) for _ in range(2000)]
    seen = np.mean([total_variation(*pair) for pair in drawn])
    expected = np.mean([chance_distance(*pair) for pair in drawn])
    assert expected == pytest.approx(seen, rel=0.03)
    assert chance_distance(np.zeros(3), np.ones(3)) == 1.0


def test_nothing_changed() -> None:
    told = compare(inspection(router(OLD)), inspection(router(OLD)))
    assert told.exceeded == ()
    assert told.cautions == ()
    assert [(one.load, one.kl) for one in told.routers] == [(0.0, 0.0)]
    assert told.losses[0].rise == 0.0


def test_each_limit_is_passed_by_what_it_is_about() -> None:
    old = inspection(
        router(OLD), router(OLD, layer=1), slice_losses={"a": TokenLoss(1.0, 500), "b": TokenLoss(3.0, 500)}
    )
    moved = [0, 300, 700, 1000]
    new = inspection(
        router(NEW), router(moved, layer=1), loss=2.3, slice_losses={"a": TokenLoss(1.0, 500), "b": TokenLoss(3.6, 500)}
    )
    told = compare(old, new)
    assert [(one.what.split(" (")[0], one.where) for one in told.exceeded] == [
        ("the change of load", "the base router of model.layers.1.mlp.experts"),
        ("the divergence", "the base router of model.layers.1.mlp.experts"),
        ("the rise of the loss", "slice b"),
        ("the rise of the loss", "everything"),
    ]
    assert told.exceeded[0].value == pytest.approx(0.25)
    assert "is 0.2500, 0.1500 above the limit 0.1" in told.exceeded[0].as_text()
    assert compare(old, new, ComparisonLimits(load=0.26, kl=9, loss=0.7)).exceeded == ()
    json.dumps(told.as_dict(), allow_nan=False)


def test_what_chance_may_do_is_a_caution_unless_the_text_is_the_same() -> None:
    counts, others = [30, 20, 10, 40], [20, 20, 20, 40]
    noisy = TokenLoss(2.0, 400, deviation=2.0)
    old = inspection(router(counts), slice_losses={"a": noisy})
    other_data = dataclasses.replace(DATA, data_hash="d1")
    rising = {"a": dataclasses.replace(noisy, loss=2.2)}
    told = compare(old, inspection(router(others), data=other_data, slice_losses=rising), ComparisonLimits(kl=0.02))
    assert told.routers[0].load == pytest.approx(0.1)
    assert told.routers[0].load_chance == pytest.approx(chance_distance(np.array(counts), np.array(others)))
    assert told.losses[1].chance == pytest.approx(2.0 * math.sqrt(2 / 400))
    assert told.exceeded == ()
    assert len([text for text in told.cautions if "no more than chance may do" in text]) == 2
    told = compare(old, inspection(router(others), slice_losses=rising), ComparisonLimits(kl=0.02, load=0.09))
    assert len(told.exceeded) == 3
    assert told.cautions == ()


def test_divergence_by_chance_is_what_samples_have() -> None:
    generator = np.random.default_rng(0)
    drawn = [(generator.multinomial(3000, [0.25] * 4), generator.multinomial(800, [0.25] * 4)) for _ in range(2000)]
    seen = np.mean([divergence(*pair) for pair in drawn])
    assert chance_divergence(*drawn[0]) == pytest.approx(seen, rel=0.05)
    assert chance_divergence(np.zeros(3), np.ones(3)) == math.inf


def test_a_lower_loss_and_small_slices_pass() -> None:
    old = inspection(router(OLD), loss=2.0, slice_losses={"a": TokenLoss(1.0, 199)})
    new = inspection(router(OLD), loss=1.0, slice_losses={"a": TokenLoss(5.0, 500)})
    assert compare(old, new).exceeded == ()


def test_a_loss_that_is_not_a_number_is_past_every_limit() -> None:
    told = compare(inspection(router(OLD)), inspection(router(OLD), loss=math.nan), ComparisonLimits(loss=1e9))
    assert [one.where for one in told.exceeded] == ["everything"]
    assert told.as_dict()["exceeded"][0]["value"] is None
    json.dumps(told.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        ([router([1, 2, 3])], r"chose 1 of 4 experts, now 1 of 3"),
        ([router(OLD, top_k=2)], r"chose 1 of 4 experts, now 2 of 4"),
        ([router(OLD, layer=1)], r"has a base router in model\.layers\.0\.mlp\.experts, this model has none"),
        ([router(OLD), router(OLD, kind="mine")], r"the old inspection has no mine router"),
    ],
)
def test_other_shapes_are_refused(routers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(inspection(router(OLD)), inspection(*routers))


@pytest.mark.parametrize("name", ["load", "kl", "loss"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_limits_that_are_none(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--max-{name} must be at least 0"):
        ComparisonLimits(**{name: value})


def test_cautions_say_what_cannot_be_told() -> None:
    old = inspection(router(OLD), slice_losses={"a": TokenLoss(1.0, 500)})
    other_data = dataclasses.replace(DATA, data_hash="d1")
    other_model = dataclasses.replace(MODEL, config_hash="c1")
    both = " ".join(compare(old, inspection(router(NEW), model=other_model, data=other_data)).cautions)
    assert "which of the two changed the routing cannot be told" in both
    assert "slices that only one side has are not compared: a" in both
    fewer = dataclasses.replace(DATA, num_tokens=10)
    assert "give the same --max-tokens" in compare(old, inspection(router(OLD), data=fewer)).cautions[0]
    tokenizer = dataclasses.replace(MODEL, tokenizer_hash="t1")
    told = compare(old, inspection(router(OLD), model=tokenizer, loss=9.0))
    assert "the tokenizers differ" in told.cautions[0]
    assert told.losses == ()
    assert told.exceeded == ()
