"""Efficiencies from one measured run: what the roofline has to assume so that it predicts that run.

One run gives one number, seconds per step: products outside and inside the experts are then scaled alike. Seconds of single
parts, where a profile tells them, fix those parts' own efficiencies first.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from hf_moe_ext.scaling.hardware import Hardware
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.memory import TrainingStep
from hf_moe_ext.scaling.rank_seconds import Efficiency
from hf_moe_ext.scaling.roofline import StepTime, training_time
from hf_moe_ext.scaling.shape import MoeShape

# Part that can be measured by itself -> the efficiency that it fixes.
PARTS = {"experts_s": "grouped", "all_to_all_s": "link", "optimizer_s": "memory"}
LOWEST = 1e-6


@dataclass(frozen=True)
class Measured:
    """Seconds of one optimizer step, and of its parts where they are known.

    Attributes:
        step_s: of a whole step.
        experts_s: of the routed experts.
        all_to_all_s: of all-to-alls that do not hide.
        optimizer_s: of the optimizer's pass.
    """

    step_s: float
    experts_s: float | None = None
    all_to_all_s: float | None = None
    optimizer_s: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "step_s":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name} must be a number of seconds, got {value!r}")
            if not (isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be above 0, got {value}")


def read_measured(path: Path) -> Measured:
    """From a run's ``trainer_state.json`` (or its folder), a recipe's ``metrics.json``, or a JSON of `Measured`'s keys.

    Raises:
        ValueError: no seconds per step in it.
        OSError: no such file.
    """
    if path.is_dir():
        found = [path / name for name in ("trainer_state.json", "metrics.json") if (path / name).exists()]
        if not found:
            raise ValueError(
                f"{path} holds neither trainer_state.json nor metrics.json; pass the output folder of a run"
            )
        path = found[0]
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    names = {field.name for field in fields(Measured)}
    if "step_s" in values:
        unknown = sorted(values.keys() - names)
        if unknown:
            raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(names))}")
        return Measured(**values)
    for logged in reversed([*_mappings(values.get("log_history"))]):
        rate = _find(logged, "train_steps_per_second")
        if rate is not None:
            if not rate > 0:
                raise ValueError(f"{path}: train_steps_per_second must be above 0, got {rate}")
            return Measured(1 / rate)
    seconds, steps = _find(values, "train", ("seconds",)), values.get("steps")
    if seconds is not None and isinstance(steps, int) and steps > 0:
        return Measured(seconds / steps)
    raise ValueError(
        f"{path} has no train_steps_per_second, which Trainer logs when training ends, and no step_s; finish a run, or write "
        '{"step_s": seconds} into a JSON file'
    )


def calibrate(
    shape: MoeShape,
    layout: Layout,
    step: TrainingStep,
    hardware: Hardware,
    measured: Measured,
    start: Efficiency | None = None,
) -> Efficiency:
    """The efficiencies at which `training_time` gives what was measured; those nothing was measured of stay as ``start``.

    Raises:
        ValueError: no efficiency up to 1 does: the run was faster than the peaks allow, or other parts alone take longer.
    """
    eff = start or Efficiency()

    def predict(candidate: Efficiency) -> StepTime:
        return training_time(shape, layout, step, hardware, candidate)

    free = ["gemm", "grouped"]
    for key, name in PARTS.items():
        seconds = getattr(measured, key)
        if seconds is not None:
            eff = replace(eff, **{name: _solve_part(predict, eff, key, name, seconds)})
            free = [one for one in free if one != name]
    ratio = {name: getattr(eff, name) / max(getattr(eff, one) for one in free) for name in free}

    def scaled(value: float) -> Efficiency:
        return replace(eff, **{name: value * share for name, share in ratio.items()})

    return scaled(_solve("step_s", lambda value: predict(scaled(value)).total, measured.step_s))


def _solve_part(
    predict: Callable[[Efficiency], StepTime], eff: Efficiency, key: str, name: str, seconds: float
) -> float:
    part = key.removesuffix("_s")
    if getattr(predict(eff), part) == 0:
        raise ValueError(f"{key}={seconds:g} was measured, but this layout has no such part; leave it out")
    return _solve(key, lambda value: getattr(predict(replace(eff, **{name: value})), part), seconds)


def _solve(name: str, seconds_at: Callable[[float], float], wanted: float) -> float:
    """The share in (0, 1] at which a time that falls with it is as wanted."""
    fastest, slowest = seconds_at(1.0), seconds_at(LOWEST)
    if wanted < fastest * (1 - 1e-12):
        raise ValueError(
            f"{name}={wanted:.6g} s is shorter than the {fastest:.6g} s that the peaks allow; check the hardware, the layout "
            "and the tokens per step"
        )
    if wanted > slowest:
        raise ValueError(
            f"{name}={wanted:.6g} s is longer than {slowest:.6g} s at a millionth of the peak; check the run"
        )
    low, high = LOWEST, 1.0
    for _ in range(200):
        middle = (low * high) ** 0.5
        if seconds_at(middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def _mappings(rows: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _find(values: Mapping[str, Any], name: str, path: tuple[str, ...] = ()) -> float | None:
    for key in path:
        inner = values.get(key)
        values = inner if isinstance(inner, dict) else {}
    value = values.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
