"""The memory model against real training, on shapes small enough for a test; the benchmark runs those of 1 GiB and more."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import memory_model

CASES = memory_model.make_cases(scale=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_predicted_peak_is_the_measured_one(name):
    config, settings = CASES[name]
    predicted, measured = memory_model.predict(config, **settings).total, memory_model.measure(config, **settings)
    # The issue asks for a tenth. The count of saved tensors leaves no such room, but for the many small ones of deltas.
    assert predicted == pytest.approx(measured, rel=0.06 if "ders" in name else 0.02)
