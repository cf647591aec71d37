"""Successive halving on losses that are written down here."""

import math

from hf_moe_ext.pilot.candidates import BY_NAME
from hf_moe_ext.pilot.plan import Plan
from hf_moe_ext.pilot.stages import Search, choose_finalists, make_spec, run_finalists, search_rates

CANDIDATES = [BY_NAME[name] for name in ("perft-r", "lora-qv", "perft-s")]
PLAN = Plan(
    tuple(c.name for c in CANDIDATES), {c.name: 80 for c in CANDIDATES}, {c.name: (1e-3, 2.5e-4, 4e-3) for c in CANDIDATES},
    {}, 2, 3, 0.0, {}, 20.0,
)  # fmt: skip
SETTINGS: dict[str, dict] = {c.name: {} for c in CANDIDATES}


class Landscape:
    """A loss for every rate; a rate above the limit fails."""

    def __init__(self, best: dict[str, float], limit: float = 1.0) -> None:
        self.best, self.limit = best, limit
        self.ran: list[dict] = []

    def __call__(self, stage: str, specs) -> dict:
        self.ran += specs
        return {spec["id"]: {"spec": spec, **self._result(spec)} for spec in specs}

    def _result(self, spec: dict) -> dict:
        if spec["learning_rate"] > self.limit:
            return {"status": "failed", "reason": "nan"}
        distance = abs(math.log(spec["learning_rate"] / self.best[spec["candidate"]["name"]]))
        return {"status": "done", "deterministic": {"loss": 1 + distance - spec["max_steps"] / 1000}}


def test_the_best_rate_is_found_and_followed_beyond_the_grid() -> None:
    run = Landscape({"perft-r": 1e-3, "lora-qv": 1.6e-2, "perft-s": 6e-5})
    found = search_rates(run, CANDIDATES, PLAN, SETTINGS, 0)
    assert {name: search.rate for name, search in found.items()} == {
        "perft-r": 1e-3,
        "lora-qv": 1.6e-2,
        "perft-s": 6.25e-5,
    }
    assert {name: search.at_edge for name, search in found.items()} == {
        "perft-r": False,
        "lora-qv": True,
        "perft-s": True,
    }
    steps = {(spec["stage"], spec["max_steps"]) for spec in run.ran}
    assert steps == {("rung1", 20), ("rung2", 40)}
    assert len(run.ran) == 3 * 3 + 3 * 2  # every method gets as many arms


def test_rates_that_fail_leave_the_others() -> None:
    run = Landscape({"perft-r": 4e-3, "lora-qv": 1e-3, "perft-s": 1e-3}, limit=2e-3)
    found = search_rates(run, CANDIDATES, PLAN, SETTINGS, 0)
    assert {name: search.rate for name, search in found.items()} == {"perft-r": 1e-3, "lora-qv": 1e-3, "perft-s": 1e-3}
    assert [t["reason"] for t in found["perft-r"].tried if t["rate"] == 4e-3] == ["nan"]


def test_a_candidate_of_which_every_arm_fails_is_out() -> None:
    found = search_rates(Landscape({c.name: 1e-3 for c in CANDIDATES}, limit=1e-9), CANDIDATES, PLAN, SETTINGS, 0)
    assert all(search.rate is None for search in found.values())
    assert choose_finalists(found, 4, {c.name: 1 for c in CANDIDATES}) == []


def test_finalists_are_the_best_with_the_cheapest_and_the_control() -> None:
    losses = {"perft-r": 1.0, "lora-qv": 1.1, "full": 1.2, "perft-s": 1.3, "perft-r-frozen-router": 1.4}
    found = {name: Search(rate=1e-3, loss=loss) for name, loss in losses.items()}
    costs = {"perft-r": 50, "lora-qv": 30, "full": 1000, "perft-s": 10, "perft-r-frozen-router": 40}
    assert choose_finalists(found, 3, costs) == ["perft-r", "lora-qv", "perft-s", "perft-r-frozen-router"]
    assert choose_finalists(found, 1, costs) == ["perft-r", "perft-r-frozen-router"]


def test_seeds_stop_at_the_deadline_with_equally_many_for_all() -> None:
    finalists = [(candidate, 1e-3) for candidate in CANDIDATES[:2]]
    results, seeds = run_finalists(
        Landscape({c.name: 1e-3 for c in CANDIDATES}), finalists, PLAN, SETTINGS, 5, deadline=0.0
    )
    assert seeds == 1
    results, seeds = run_finalists(Landscape({c.name: 1e-3 for c in CANDIDATES}), finalists, PLAN, SETTINGS, 5, None)
    assert seeds == 3
    assert [r["spec"]["seed"] for r in results["perft-r"]] == [5, 6, 7]


def test_ids_differ_where_settings_do() -> None:
    from hf_moe_ext.pilot.candidates import read_candidate

    texts = ("perft-r", "perft-r:r=4,top_k=1", "perft-r:r=4,top_k=2", "perft-r:top_k=1")
    ids = {make_spec({}, read_candidate(text), 1e-3, 0, 8, "rung1")["id"] for text in texts}
    assert len(ids) == 4
    assert all("/" not in one and ":" not in one for one in ids)
