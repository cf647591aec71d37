"""From the arms' results to what `pilot.json` holds: one row per candidate, the recommendation, the full job."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from hf_moe_ext.pilot.arm import DONE, FAILED
from hf_moe_ext.pilot.candidates import Candidate
from hf_moe_ext.pilot.full_job import estimate_here, price_full_job, write_commands
from hf_moe_ext.pilot.plan import Plan
from hf_moe_ext.pilot.pool import Result
from hf_moe_ext.pilot.recommendation import collect_doubts, judge_routing, recommend
from hf_moe_ext.pilot.request import PilotRequest
from hf_moe_ext.pilot.stages import Search
from hf_moe_ext.pilot.statistics import ArmLosses
from hf_moe_ext.pilot.subject import Subject

BASE = "base"
# Two runs with one seed and one plan share these columns; the rest of a row are times and memory.
DETERMINISTIC = (
    "candidate", "label", "status", "reason", "learning_rate", "rate_at_edge", "tried", "choice_loss", "finalist", "steps",
    "tokens", "loss", "loss_by_seed", "seeds", "metric", "metric_by_seed", "metric_scores", "parameters", "stored_bytes", "routing",
)  # fmt: skip
MEASURED = ("step_s", "prefill_s", "decode_s", "peak_bytes", "wall_s")


def conclude(
    request: PilotRequest,
    subject: Subject,
    facts: Mapping[str, Any],
    plan: Plan,
    trials: Mapping[str, Result],
    found: Mapping[str, Search],
    results: Mapping[str, Sequence[Result]],
    seeds_run: int,
    candidates: Mapping[str, Candidate],
    ran: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything the report shows.

    Args:
        request: What was asked.
        subject: The model.
        facts: Of the rows.
        plan: That was carried out.
        trials: The trial steps, the base's measurement among them.
        found: What the search for rates found, by candidate.
        results: The finalists', by candidate, seed by seed.
        seeds_run: Of the planned ones.
        candidates: By name.
        ran: `minutes`, `resumed`, `machine`, `other_budget` (a sentence, where the plan was made for another one).
    """
    arms = [_row(candidates[BASE], trials[BASE], None, [trials[BASE]], request)]
    arms += [
        _row(candidates[name], trials[name], found[name], results.get(name, []), request) for name in plan.candidates
    ]
    losses = {arm["candidate"]: _losses([r for r in _results(arm, trials, results) if r["status"] == DONE]) for arm in arms
              if arm["finalist"] and arm["status"] == DONE}  # fmt: skip
    costs = {arm["candidate"]: arm["parameters"]["trainable"] for arm in arms}
    told: dict[str, Any] = {
        "format": 1,
        "model": {"name": subject.name, "model_type": subject.model_type, "parameters": subject.num_parameters},
        "settings": {k: str(v) if k == "hardware_file" and v else v for k, v in asdict(request).items()},
        "data": {key: value for key, value in facts.items() if key != "right_choices"},
        "plan": {**plan.as_dict(), "seeds_run": seeds_run},
        "ran": dict(ran),
        "deterministic_columns": list(DETERMINISTIC),
        "measured_columns": list(MEASURED),
        "arms": arms,
        "finalists": [arm["candidate"] for arm in arms if arm["finalist"] and arm["candidate"] != BASE],
        "recommendation": recommend(losses, costs, BASE, request.seed),
        "is_routing_learnt": judge_routing(losses, request.seed),
    }
    told["recommendation"]["full_job"] = _full_job(told, request, subject, facts, candidates)
    told["recommendation"]["doubts"] = collect_doubts(told)
    return told


def _results(
    arm: Mapping[str, Any], trials: Mapping[str, Result], results: Mapping[str, Sequence[Result]]
) -> Sequence[Result]:
    return [trials[BASE]] if arm["candidate"] == BASE else results[arm["candidate"]]


def _row(
    candidate: Candidate, trial: Result, search: Search | None, finals: Sequence[Result], request: PilotRequest
) -> dict[str, Any]:
    """One candidate: deterministic columns, then measured ones."""
    done = [r for r in finals if r["status"] == DONE]
    failed = [r["reason"] for r in finals if r["status"] == FAILED]
    if search is not None and search.rate is None:
        failed = [t["reason"] for t in search.tried]
    row: dict[str, Any] = dict.fromkeys((*DETERMINISTIC, *MEASURED))
    row |= {
        "candidate": candidate.name, "label": candidate.label, "status": FAILED if failed and not done else DONE,
        "reason": failed[0] if failed else None, "finalist": bool(finals),
        "parameters": trial["deterministic"]["parameters"],
        "step_s": trial["measured"].get("step_s"), "peak_bytes": trial["measured"]["peak_bytes"],
    }  # fmt: skip
    if search is not None:
        row |= {
            "learning_rate": search.rate, "rate_at_edge": search.at_edge, "tried": search.tried, "choice_loss": search.loss,
        }  # fmt: skip
    if not done:
        return row
    first, losses = done[0]["deterministic"], _losses(done)
    scores = [r["deterministic"]["metric"] for r in done]
    key = next(iter(scores[0]), None)
    row |= {
        "steps": first["steps"], "tokens": first["tokens"], "loss": losses.mean, "loss_by_seed": losses.by_seed.tolist(),
        "seeds": [r["spec"]["seed"] for r in done], "stored_bytes": first["stored_bytes"],
        "routing": _mean_values([r["deterministic"]["routing"] for r in done]),
        "metric_scores": _mean_values(scores), "metric": None if key is None else float(np.mean([s[key] for s in scores])),
        "metric_by_seed": None if key is None else [s[key] for s in scores],
        **{name: median(r["measured"][name] for r in done) for name in MEASURED if name in done[0]["measured"]},
        "peak_bytes": max(r["measured"]["peak_bytes"] for r in done),
    }  # fmt: skip
    return row


def _mean_values(many: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in many])) for key in many[0]}


def _losses(results: Sequence[Result]) -> ArmLosses:
    told = [r["deterministic"] for r in results]
    return ArmLosses(np.array([one["nats"] for one in told]), np.array(told[0]["row_tokens"]))


def _full_job(
    told: Mapping[str, Any],
    request: PilotRequest,
    subject: Subject,
    facts: Mapping[str, Any],
    candidates: Mapping[str, Candidate],
) -> dict[str, Any] | None:
    name = told["recommendation"]["candidate"]
    if name is None:
        return None
    arm = next(arm for arm in told["arms"] if arm["candidate"] == name)
    rows = facts["train_rows"] + facts["choice_rows"]
    try:
        price = price_full_job(request, rows, facts["train_tokens_per_row"])
        unpriced = None if price else "no hardware was named (--hardware, --price)"
    except ValueError as error:
        price, unpriced = None, f"the planner cannot count this model: {error}"
    return {
        "commands": write_commands(candidates[name], arm["learning_rate"], request, rows, subject.expert_parameters),
        "epochs": request.full_epochs,
        "here": estimate_here(arm["step_s"], request, rows),
        "planner": price,
        "not_priced": unpriced,
        "steps_per_epoch": math.ceil(rows / request.batch_size),
    }
