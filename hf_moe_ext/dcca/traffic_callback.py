"""The meter in a Trainer: what each optimizer step really sent, written beside the checkpoints."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from hf_moe_ext.dcca.meter import KEYS, Flow, TrafficMeter

FILE_NAME = "traffic.json"
FORMAT = "hf_moe_ext traffic 1"


class TrafficCallback(TrainerCallback):
    """Counts the all-to-alls of every optimizer step and writes ``traffic.json`` into the Trainer's output folder.

    Read it with ``hf-moe traffic --config ... --measured output_dir/traffic.json``. The numbers are per step: the mean
    over steps and ranks, and the rank that sent most. Counting passes every operator of a step through Python; give
    ``num_steps`` to stop after that many.

    Args:
        num_steps: steps to count; None for all.
        timed: also time the exchanges, each waited for at once (see `TrafficMeter`).
    """

    def __init__(self, num_steps: int | None = None, timed: bool = False) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, or None for all steps, got {num_steps}")
        self.num_steps = num_steps
        self.meter = TrafficMeter(timed=timed)
        self.counted_steps = 0
        self._inside = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a step that an error ended in an earlier run; its half is not counted as a step."""
        if self._inside:
            self._inside = False
            self.meter.__exit__(None, None, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here, over all micro-batches."""
        if not self._inside and (self.num_steps is None or self.counted_steps < self.num_steps):
            self.meter.__enter__()
            self._inside = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop until the next step, so that evaluation and saving are not counted."""
        if self._inside:
            self._inside = False
            self.meter.__exit__(None, None, None)
            self.counted_steps += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather every rank's counts; the main process writes the file."""
        if self._inside:  # training was stopped within a step
            self._inside = False
            self.meter.__exit__(None, None, None)
        if not self.counted_steps:
            return
        report = summarize(self.meter, self.counted_steps, args.device)
        if state.is_world_process_zero:
            write_report(report, Path(args.output_dir) / FILE_NAME)


def summarize(meter: TrafficMeter, num_steps: int, device: Any = "cpu") -> dict[str, Any]:
    """Counts per step, mean over ranks and largest rank; a collective where there are several processes."""
    names = [each.name for each in fields(Flow)]
    table = torch.tensor(
        [[getattr(meter.flows[key], name) for name in names] for key in KEYS], dtype=torch.float64, device=device
    )
    world_size, largest = 1, table.clone()
    if distributed.is_available() and distributed.is_initialized():
        world_size = distributed.get_world_size()
        distributed.all_reduce(table)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    mean, most = (table / world_size / num_steps).tolist(), (largest / num_steps).tolist()
    flows = [
        {"kind": kind, "direction": direction, "pass": part}
        | {name: mean[i][j] for j, name in enumerate(names)}
        | {"largest_rank_off_rank_bytes": most[i][names.index("off_rank_bytes")]}
        for i, (kind, direction, part) in enumerate(KEYS)
        if mean[i][0]
    ]
    return {"format": FORMAT, "num_steps": num_steps, "world_size": world_size, "timed": meter.timed, "flows": flows}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
