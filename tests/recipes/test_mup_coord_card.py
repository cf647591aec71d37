"""The card of the coordinate check and the JSON it is made from."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "model_cards" / "mup-coord.json").read_text())


@pytest.fixture
def render_card(monkeypatch):
    pytest.importorskip("matplotlib", reason="the card's module draws with matplotlib")
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes" / "benchmarks"), *sys.path])
    from mup_coord_card import render_card

    return render_card


def test_card_is_the_one_its_numbers_make(render_card):
    assert (ROOT / "model_cards" / "mup-coord.md").read_text(encoding="utf-8") == render_card(RESULTS)


def test_only_what_is_missing_is_called_not_yet_run(render_card):
    assert "not yet run" not in render_card(RESULTS | {"missing": []})
    assert "; not yet run: held, sp." in render_card(RESULTS | {"missing": ["held, sp"]})


def test_the_card_says_what_the_numbers_say_of_the_smaller_start():
    """The multiplier form with six seeds has every row inside, the folded form with two has one outside, in each block."""
    found = {
        (run["block"], run["arm"]): (len(run["settings"]["seeds"]), [f for f in run["findings"] if not f["ok"]])
        for run in RESULTS["runs"]
        if run["start"] == "outputs 0.02"
    }
    for block, slope, step in (("standard", -0.35, 6), ("dcca", -0.33, 1)):
        assert found[block, "mup"] == (6, [])
        num_seeds, (outside,) = found[block, "mup folded"]
        assert (num_seeds, outside["quantity"], outside["layer"]) == (2, "delta_router_logits", 1)
        assert (round(outside["slope"], 2), outside["step"]) == (slope, step)
