"""Which candidate is recommended, and when none is."""

import numpy as np

from hf_moe_ext.pilot.recommendation import collect_doubts, judge_routing, recommend
from hf_moe_ext.pilot.statistics import ArmLosses

TOKENS = np.full(300, 2.0)
COSTS = {"base": 0, "small": 10, "large": 1000, "perft-r": 50, "perft-r-frozen-router": 40}


def _losses(**means: float) -> dict[str, ArmLosses]:
    generator = np.random.default_rng(0)
    rows = generator.normal(2, 0.5, 300)
    made = {}
    for name, mean in means.items():
        noise = 0.0 if name == "base" else generator.normal(0, 0.02, (3, 300))
        seeds = 1 if name == "base" else 3
        made[name.replace("_", "-")] = ArmLosses(TOKENS * (mean + rows + np.zeros((seeds, 1)) + noise), TOKENS)
    return made


def test_the_better_one_wins_where_it_is_shown() -> None:
    told = recommend(_losses(base=1.0, small=0.9, large=0.5), COSTS)
    assert (told["answer"], told["candidate"], told["within_noise"]) == ("recommended", "large", ["large"])
    assert "Shown to be worse than large: small" in told["reason"]


def test_the_cheapest_wins_among_equals() -> None:
    told = recommend(_losses(base=1.0, small=0.5005, large=0.5), COSTS)
    assert told["candidate"] == "small"
    assert sorted(told["within_noise"]) == ["large", "small"]
    assert told["best"] == "small" or "trains 10 parameters instead of 1,000" in told["reason"]


def test_a_control_is_never_what_is_recommended_where_another_is_as_good() -> None:
    losses = _losses(base=1.0, perft_r=0.5, perft_r_frozen_router=0.5)
    assert recommend(losses, COSTS)["candidate"] == "perft-r"
    routing = judge_routing(losses)
    assert routing is not None
    assert not routing["shown"]
    better = judge_routing(_losses(base=1.0, perft_r=0.3, perft_r_frozen_router=0.5))
    assert better is not None
    assert better["shown"]


def test_no_difference_where_nothing_beats_the_base() -> None:
    equal = recommend(_losses(base=1.0, small=1.0, large=1.0), COSTS)
    worse = recommend(_losses(base=1.0, small=1.1, large=1.2), COSTS)
    for told in (equal, worse):
        assert (told["answer"], told["candidate"]) == ("no difference shown", None)
    assert "Shown to be worse than the base: large, small" in worse["reason"]


def test_no_trained_candidate_is_no_recommendation() -> None:
    assert recommend(_losses(base=1.0), COSTS)["candidate"] is None


def test_doubts_name_what_went_wrong() -> None:
    arm = {
        "candidate": "small",
        "status": "done",
        "reason": None,
        "rate_at_edge": True,
        "learning_rate": 0.004,
        "metric": 0.2,
    }
    told = {
        "plan": {"left_out": {"full": "no room"}, "seeds_run": 1, "num_seeds": 3, "epochs": {"small": 0.5}},
        "data": {"held_out_rows": 20, "held_out_from": "the data set", "duplicates_dropped": 2},
        "recommendation": {"candidate": "small", "best": "small"},
        "arms": [
            arm,
            {
                **arm,
                "candidate": "large",
                "status": "failed",
                "reason": "the loss became nan",
                "rate_at_edge": False,
                "metric": 0.9,
            },
        ],
        "is_routing_learnt": None,
        "ran": {"other_budget": "The plan was made for a budget of 10 minutes"},
    }
    text = "\n".join(collect_doubts(told))
    for words in (
        "large failed: the loss became nan", "full was left out: no room", "small, 0.004, lies at the edge", "1 of 3 seeds",
        "One seed", "20 held-out rows", "2 train rows also stood", "0.50 times", "large is above the recommended small",
        "made for a budget of 10",
    ):  # fmt: skip
        assert words in text, words
