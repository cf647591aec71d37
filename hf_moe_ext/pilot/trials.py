"""A few steps of every candidate before anything is planned: whether it can be trained here, and how fast."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_moe_ext.pilot.arm import DONE
from hf_moe_ext.pilot.candidates import Candidate
from hf_moe_ext.pilot.duration import Speed
from hf_moe_ext.pilot.plan import MIN_TRAINED
from hf_moe_ext.pilot.pool import Result, Spec
from hf_moe_ext.pilot.request import PilotRequest
from hf_moe_ext.pilot.stages import make_spec
from hf_moe_ext.pilot.subject import NUMBERS_PER_TRAINED_PARAMETER

BASE = "base"
TRIAL_STEPS = 5

Trials = dict[str, Result]
TimedRun = Callable[[str, Sequence[Spec], Mapping[str, float]], dict[str, Result]]


def try_out(
    run: TimedRun,
    candidates: Sequence[Candidate],
    settings: Callable[[Candidate], Mapping[str, Any]],
    request: PilotRequest,
    why_enough: Callable[[Trials, Sequence[str]], str | None],
    limit_s: Callable[[Trials], float],
) -> tuple[Trials, dict[str, str]]:
    """Some candidates at a time until there are enough; the base is measured whole, once: it has nothing to train.

    Args:
        run: Runs arms, some of them with a limit in seconds.
        candidates: In the order in which they are tried.
        settings: Of every arm of a candidate.
        request: Of the pilot.
        why_enough: Why, after these, the ones of these names need not be tried; None where they do.
        limit_s: Seconds that a trial may take after these; the first ones have no limit, since without them there is no pilot.

    Returns:
        Results by candidate, and the candidates left out with the reason.

    Raises:
        RuntimeError: The base failed.
    """
    trials: Trials = {}
    left_out: dict[str, str] = {}
    for start in range(0, len(candidates), request.processes):
        reason = why_enough(trials, [c.name for c in candidates[start:]]) if trials else None
        if reason is not None:
            return trials, left_out | {c.name: reason for c in candidates[start:]}
        specs, limits = [], {}
        for place, c in enumerate(candidates[start : start + request.processes], start):
            if c.name == BASE:
                specs.append(make_spec(settings(c), c, None, request.seed, 0, "final"))
            else:  # any rate will do: the speed is asked, not what it learns
                rate = min(request.learning_rates or c.learning_rates)
                specs.append(make_spec(settings(c), c, rate, request.seed, TRIAL_STEPS, "trial"))
                if place > MIN_TRAINED:
                    limits[specs[-1]["id"]] = limit_s(trials)
        for result in run("trial steps", specs, limits).values():
            name = result["spec"]["candidate"]["name"]
            if result["status"] == DONE:
                trials[name] = result
            elif name == BASE:
                raise RuntimeError(f"the frozen base cannot be measured: {result['reason']}")
            else:
                left_out[name] = result["reason"]
    return trials, left_out


def read_speeds(trials: Trials) -> dict[str, Speed]:
    """By candidate, without the base, in the order of the trials; a finalist finishes as the base did."""
    base = trials[BASE]["measured"]
    finish = float(base["wall_s"] - base["startup_s"])
    measured = {name: trial["measured"] for name, trial in trials.items() if name != BASE}
    return {name: Speed(m["startup_s"], m["step_s"], m["losses_s"], finish) for name, m in measured.items()}


def leave_out_too_large(
    candidates: Sequence[Candidate], num_parameters: int, dtype: str, processes: int
) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates that train all weights where these do not fit: there is no point in trying.

    Returns:
        The others, and those left out with the reason.
    """
    import psutil
    import torch

    needed = NUMBERS_PER_TRAINED_PARAMETER * getattr(torch, dtype).itemsize * num_parameters * processes
    if torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "on the device"
    else:
        free, where = psutil.virtual_memory().available, "of memory"
    if needed <= free:
        return list(candidates), {}
    reason = (
        f"training all weights takes at least {needed / 1e9:.1f} GB in {processes} processes, and {free / 1e9:.1f} GB "
        f"{where} are free"
    )
    large = {c.name: reason for c in candidates if c.kind in ("full", "upcycle")}
    return [c for c in candidates if c.name not in large], large
