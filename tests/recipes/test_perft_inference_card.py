"""The card of decoding speed says what its JSON says, and the numbers meet what we promise."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

from perft_inference import quartiles, summarize  # noqa: E402  # after the path is set
from perft_inference_card import meets_target, render_card  # noqa: E402

RESULTS = json.loads((ROOT / "model_cards" / "perft-inference.json").read_text())


def test_the_committed_card_is_rendered_from_the_committed_numbers():
    assert (ROOT / "model_cards" / "perft-inference.md").read_text() == render_card(RESULTS)


def test_decoding_with_r_keeps_nine_tenths_of_the_bases_speed():
    assert RESULTS["shape"]["hidden_size"] >= 1024
    assert set(RESULTS["batches"]) == {"1", "16"}
    for methods in RESULTS["batches"].values():
        assert set(methods) == {"base", "R", "E", "D", "S", "LoRA q, v"}
        assert meets_target(methods)


def test_the_target_is_a_tenth():
    assert meets_target({"R": {"speed_ratio": {"median": 0.9}}})
    assert not meets_target({"R": {"speed_ratio": {"median": 0.899}}})


def test_ratios_are_taken_between_neighbouring_steps():
    base = [[9.0, 1.0, 2.0, 4.0], [9.0, 10.0, 20.0, 40.0]]  # the second round ran ten times slower, for both
    own = [[18.0, 2.0, 4.0, 8.0], [18.0, 20.0, 40.0, 80.0]]
    summary = summarize({"base": base, "R": own})["R"]
    assert summary["speed_ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert summary["first_token_ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert summary["first_token_ms"] == 18000
    assert summary["token_p50_ms"] == 14000  # between 8 and 20 s
    assert summary["token_p95_ms"] == 80000
    assert summary["tokens_per_second"] == pytest.approx(1 / 14)


def test_quartiles_of_one_value_are_that_value():
    assert quartiles([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
