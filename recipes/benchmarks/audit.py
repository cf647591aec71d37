"""What recording a model's routing costs: training steps with a RoutingRecorder beside the same steps without.

    python recipes/benchmarks/audit.py --preset cpu1 [--rounds 30] [--card_dir model_cards]

A method's model is trained with and without a recorder, turn about, in one process with one optimizer: in each round each
side has one visit, in an order drawn anew, of ``--steps`` steps; the recorder's visit ends with a reading, as a Trainer
with ``logging_steps`` would make one. The medians of rounds are compared as ratios within the round. A few percent of a
step drown where other programs run; so on a CPU the share of a step's processor time that passes inside the recorder's own
hooks is taken too, by the profiler. The numbers of a preset replace or join those in the card folder.
"""

import argparse
import cProfile
import dataclasses
import json
import random
import shlex
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from audit_card import render_card
from perft_methods import METHODS, PRESETS, Shape, attach, build_base, choose_rank
from step_cost import Step, describe_device, quartiles, ratio_quartiles, training_step
from torch import nn

from hf_moe_ext import RoutingRecorder

# Two forms of a recorder; the methods have a base router, and one of them routed adapters beside it.
RECORDERS: dict[str, dict[str, Any]] = {"recorder": {}, "with coactivation": {"coactivation": True}}
SHAPES = {"cpu1": dataclasses.replace(PRESETS["cpu2"], threads=1)} | PRESETS


def main() -> None:
    """Measure, then write JSON and Markdown."""
    options = parse_options()
    shape = SHAPES[options.preset]
    if shape.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--preset {options.preset} needs a CUDA device and this machine has none. Choose a cpu preset.")
    if shape.device == "cpu":
        torch.set_num_threads(shape.threads)
    run = measure(shape, options)
    path = options.card_dir / "routing-audit.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    results["runs"][options.preset] = run
    options.card_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    card = render_card(results)
    (options.card_dir / "routing-audit.md").write_text(card, encoding="utf-8")
    print(card)


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="cpu1")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5, help="Steps of one visit, with one reading at its end.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["full", "R 2 of 8"], metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    options = parser.parse_args(words)
    for flag in ("rounds", "steps"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag} must be at least 1; got {getattr(options, flag)}")
    return options


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """One preset's numbers, as they stand in the JSON."""
    base = build_base(shape, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(3, shape.vocab_size, (shape.batch_size, shape.length), generator=generator).to(shape.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    methods = {}
    for name in options.methods:
        model = attach(base, METHODS[name], choose_rank(METHODS[name], shape, 16))
        visits = take_turns(model, batch, shape.device, options)
        methods[name] = summarize(visits, shape.device)
        if shape.device == "cpu":
            for recorder, share in measure_share(model, batch, options.steps).items():
                methods[name]["recorders"][recorder]["own_share"] = share
        print(f"{name}: {methods[name]}", flush=True)
    return {
        "command": shlex.join(["python", "recipes/benchmarks/audit.py", *sys.argv[1:]]),
        "seed": options.seed,
        "rounds": options.rounds,
        "steps": options.steps,
        "device": describe_device(shape.device, shape.threads),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "shape": dataclasses.asdict(shape),
        "methods": methods,
    }


def take_turns(
    model: nn.Module, batch: dict[str, torch.Tensor], device: str, options: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Side -> for each round the (wall, processor) seconds of a step in its visit."""
    sides: dict[str, RoutingRecorder | None] = {"plain": None}
    sides |= {name: RoutingRecorder(model, thresholds=None, **settings) for name, settings in RECORDERS.items()}
    visits: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with training_step(model, batch) as (step, _):
        step()
        for index in range(options.rounds):
            order = list(sides)
            random.Random(options.seed * 1000 + index).shuffle(order)
            for name in order:
                visits[name].append(visit(step, sides[name], options.steps, device))
    return visits


def visit(step: Step, recorder: RoutingRecorder | None, count: int, device: str) -> tuple[float, float]:
    """(wall, processor) seconds of a step, mean over ``count`` steps after one that does not count."""
    with recorder or nullcontext():
        step()
        if recorder is not None:
            recorder.reset()
        _synchronize(device)
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            step()
        if recorder is not None:
            recorder.reading().summary()
        _synchronize(device)
        return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


def measure_share(model: nn.Module, batch: dict[str, torch.Tensor], count: int) -> dict[str, dict[str, float]]:
    """Recorder -> quartiles over steps of the share of a step's processor time inside the recorder's hooks."""
    shares: dict[str, dict[str, float]] = {}
    with training_step(model, batch) as (step, _):
        for name, settings in RECORDERS.items():
            with RoutingRecorder(model, thresholds=None, **settings):
                step()
                shares[name] = quartiles([profile_share(step) for _ in range(count)])
    return shares


def profile_share(step: Step) -> float:
    """Processor time inside the audit's hooks over that of the whole step."""
    profile, start = cProfile.Profile(time.process_time), time.process_time()
    profile.runcall(step)
    total = time.process_time() - start
    own = 0.0
    for each in profile.getstats():
        code = each.code
        if not isinstance(code, str) and Path(code.co_filename).name == "hooks.py" and code.co_name == "__call__":
            own += each.totaltime
    return own / total


def summarize(visits: dict[str, list[tuple[float, float]]], device: str) -> dict[str, Any]:
    """Median step without, and quartiles over rounds of the ratios; of processor time only where it says much."""
    plain = visits["plain"]
    summary: dict[str, Any] = {"step_seconds": statistics.median(wall for wall, _ in plain), "recorders": {}}
    for name in RECORDERS:
        ratios = {"ratio": ratio_quartiles([wall for wall, _ in visits[name]], [wall for wall, _ in plain])}
        if device == "cpu":
            ratios["processor_ratio"] = ratio_quartiles([p for _, p in visits[name]], [p for _, p in plain])
        ratios["added_ms"] = quartiles([(a - b) * 1e3 for (a, _), (b, _) in zip(visits[name], plain, strict=True)])
        summary["recorders"][name] = ratios
    return summary


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
