"""The order of the arms: successive halving over learning rates, then the finalists with every seed."""

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_moe_ext.pilot.arm import DONE
from hf_moe_ext.pilot.candidates import CONTROL_OF, RATE_FACTOR, Candidate
from hf_moe_ext.pilot.duration import FIRST_RUNG, RATES_IN_SECOND_RUNG, SECOND_RUNG
from hf_moe_ext.pilot.plan import Plan
from hf_moe_ext.pilot.pool import Result, Spec

Run = Callable[[str, Sequence[Spec]], dict[str, Result]]


@dataclass
class Search:
    """What the rungs found for one candidate.

    Attributes:
        tried: Every arm: rate, steps, and its loss on the choice rows or why it failed.
        rate: The best one of the last rung; None where every arm failed.
        loss: Its loss.
        at_edge: No rate was tried beyond it on one side.
    """

    tried: list[dict[str, Any]] = field(default_factory=list)
    rate: float | None = None
    loss: float | None = None
    at_edge: bool = False


def make_spec(
    settings: Mapping[str, Any], candidate: Candidate, rate: float | None, seed: int, steps: int, stage: str
) -> Spec:
    """An arm; its id names its files and holds all that tells it from the others."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", candidate.name).strip("-")
    if name != candidate.name:  # settings in the name: two could be written alike
        name += "-" + hashlib.sha256(candidate.name.encode()).hexdigest()[:6]
    arm = f"{name}-{stage}" if rate is None else f"{name}-lr{rate:g}-{steps}steps-seed{seed}-{stage}"
    return {
        **settings, "id": arm, "candidate": candidate.as_dict(), "learning_rate": rate, "seed": seed, "max_steps": steps,
        "stage": stage,
    }  # fmt: skip


def search_rates(
    run: Run, candidates: Sequence[Candidate], plan: Plan, settings: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, Search]:
    """Both rungs for every candidate: all rates at a quarter of the steps, two of them at half, the better one is kept.

    Where the best of the first rung lies at the edge of the grid, the second one is the next rate beyond it, so that no
    method loses by where its grid ends; else it is the runner-up.
    """
    found = {candidate.name: Search() for candidate in candidates}
    first = []
    for c in candidates:
        if len(plan.rates[c.name]) > 1:
            steps = max(1, round(FIRST_RUNG * plan.steps[c.name]))
            first += [make_spec(settings[c.name], c, rate, seed, steps, "rung1") for rate in plan.rates[c.name]]
    _note(found, run("first round of learning rates", first))
    second = []
    for c in candidates:
        rates = _second_rates(plan.rates[c.name], found[c.name])
        steps = max(1, round(SECOND_RUNG * plan.steps[c.name]))
        second += [make_spec(settings[c.name], c, rate, seed, steps, "rung2") for rate in rates]
    results = run("second round of learning rates", second)
    _note(found, results)
    for name, search in found.items():
        _choose(search, [r for r in results.values() if r["spec"]["candidate"]["name"] == name])
    return found


def _second_rates(grid: Sequence[float], search: Search) -> list[float]:
    if len(grid) == 1:
        return list(grid)
    ranked = sorted((t for t in search.tried if t["loss"] is not None), key=lambda t: (t["loss"], t["rate"]))
    if not ranked:
        return []
    best = ranked[0]["rate"]
    worked = [t["rate"] for t in ranked]
    if best == max(grid):
        return [best, best * RATE_FACTOR]
    if best == min(grid):
        return [best, best / RATE_FACTOR]
    return worked[:RATES_IN_SECOND_RUNG]


def _note(found: Mapping[str, Search], results: Mapping[str, Result]) -> None:
    for result in results.values():
        spec, done = result["spec"], result["status"] == DONE
        found[spec["candidate"]["name"]].tried.append(
            {
                "rate": spec["learning_rate"],
                "steps": spec["max_steps"],
                "loss": result["deterministic"]["loss"] if done else None,
                "reason": None if done else result["reason"],
            }
        )


def _choose(search: Search, last: Sequence[Result]) -> None:
    done = [r for r in last if r["status"] == DONE]
    if not done:
        return
    best = min(done, key=lambda r: (r["deterministic"]["loss"], r["spec"]["learning_rate"]))
    search.rate, search.loss = best["spec"]["learning_rate"], best["deterministic"]["loss"]
    tried = {t["rate"] for t in search.tried}
    search.at_edge = search.rate in (min(tried), max(tried)) and len(tried) > 1


def choose_finalists(found: Mapping[str, Search], limit: int, costs: Mapping[str, int]) -> list[str]:
    """The best on the choice rows, the cheapest one that worked among them, and a control beside what it controls.

    Args:
        found: By candidate.
        limit: Most of them; controls come on top.
        costs: Trained parameters, by candidate.
    """
    worked = sorted((n for n, s in found.items() if s.loss is not None), key=lambda n: (found[n].loss, n))
    if not worked:
        return []
    chosen = [name for name in worked if name not in CONTROL_OF][:limit] or worked[:limit]
    cheapest = min(worked, key=lambda n: (costs[n], n))
    if limit > 1 and cheapest not in chosen and cheapest not in CONTROL_OF:
        chosen[-1] = cheapest
    return chosen + [n for n, of in CONTROL_OF.items() if n in worked and of in chosen and n not in chosen]


def run_finalists(
    run: Run,
    finalists: Sequence[tuple[Candidate, float]],
    plan: Plan,
    settings: Mapping[str, Mapping[str, Any]],
    seed: int,
    deadline: float | None,
) -> tuple[dict[str, list[Result]], int]:
    """Seed by seed, so that a budget that runs out leaves equally many for all.

    Args:
        run: Runs arms.
        finalists: With their rates.
        plan: Steps and seeds.
        settings: Of every arm, by candidate.
        seed: The first one.
        deadline: On the clock of `time.monotonic`; None for none.

    Returns:
        Results by candidate, and how many seeds there were time for.
    """
    results: dict[str, list[Result]] = {candidate.name: [] for candidate, _ in finalists}
    for number in range(plan.num_seeds):
        began = time.monotonic()
        specs = [
            make_spec(settings[c.name], c, rate, seed + number, plan.steps[c.name], "final") for c, rate in finalists
        ]
        for result in run(f"finalists, seed {number + 1} of {plan.num_seeds}", specs).values():
            results[result["spec"]["candidate"]["name"]].append(result)
        took = time.monotonic() - began
        if deadline is not None and number + 1 < plan.num_seeds and time.monotonic() + took > deadline:
            return results, number + 1
    return results, plan.num_seeds
