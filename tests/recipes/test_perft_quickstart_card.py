"""The model card says what its JSON says."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

from perft_quickstart_card import render_card  # noqa: E402  # after the path is set

RESULTS = json.loads((ROOT / "model_cards" / "perft-quickstart.json").read_text())


def test_the_committed_card_is_rendered_from_the_committed_numbers():
    assert (ROOT / "model_cards" / "perft-quickstart.md").read_text() == render_card(RESULTS)


def test_every_perft_variant_beats_its_base_in_every_seed():
    for variant in ("R", "E", "D", "S"):
        runs = RESULTS["methods"][variant]["runs"]
        assert len(runs) == 3
        assert all(run["high"] < 0 for run in runs.values())


def test_the_reading_follows_the_numbers():
    worse = json.loads(json.dumps(RESULTS))
    for run in worse["methods"]["R"]["runs"].values():
        run["after"] += 1
    assert "R is worse than S in every seed" in render_card(worse)
    assert "R is better than S in every seed" in render_card(RESULTS)
