"""Step time and memory of PERFT R, E, D, S against LoRA on q and v, LoRA on experts and full fine-tuning.

    python recipes/benchmarks/perft.py --preset cpu4 [--rounds 12] [--card_dir model_cards]

All methods share one random base of the preset's shape in one process and take turns: in each round every method has one
visit, in an order drawn anew. A visit makes a fresh optimizer, takes a step that does not count and then the timed steps;
its median is divided by that of LoRA q, v of the same round. Adapters have equal active parameters per token, those of
LoRA q, v of rank `--r`. Memory is measured before the rounds; how, `step_cost.py` says. Each preset's numbers replace or
join those in the card folder.
"""

import argparse
import dataclasses
import json
import random
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from perft_card import draw_card, missed_targets, render_card
from perft_methods import METHODS, PRESETS, REFERENCE, Shape, attach, build_base, choose_rank, count_adapter
from step_cost import (
    count_bytes,
    describe_device,
    measure_transient_bytes,
    profile_operations,
    state_tensors,
    time_steps,
    training_step,
)
from torch import nn

SIZES = {
    "layers": "num_hidden_layers",
    **{name: name for name in ("hidden_size", "intermediate_size", "num_experts", "vocab_size", "batch_size")},
    **{name: name for name in ("length", "threads")},
}


def main() -> None:
    """Measure, then write JSON, Markdown and PNG."""
    options = parse_options()
    shape, name = resolve_shape(options)
    if shape.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"--preset {options.preset} needs a CUDA device and this machine has none. Add --device cpu, or a cpu preset."
        )
    if shape.device == "cpu":
        torch.set_num_threads(shape.threads)
    run = measure(shape, options, options.work_dir / f"{'-'.join(name.replace(',', '').split())}.json")
    path = options.card_dir / "perft-speed.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    results["runs"][name] = run
    options.card_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    card = render_card(results)
    (options.card_dir / "perft-speed.md").write_text(card, encoding="utf-8")
    draw_card(results, options.card_dir / "perft-speed.png")
    print(card)


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu2")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="Timed steps of one visit.")
    parser.add_argument("--r", type=int, default=16, help="Rank of LoRA q, v; the others follow from it.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work_dir", type=Path, default=Path("outputs/speed"), help="Every visit's numbers, as they come."
    )
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    for flag in SIZES:
        parser.add_argument(f"--{flag}", type=int, help="Instead of the preset's.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Instead of the preset's.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="Instead of the preset's.")
    options = parser.parse_args(words)
    for flag in ("rounds", "steps", "r"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag} must be at least 1; got {getattr(options, flag)}")
    return options


def resolve_shape(options: argparse.Namespace) -> tuple[Shape, str]:
    """The preset with what the command line changes, and a name that tells both."""
    flags = {**SIZES, "device": "device", "dtype": "dtype"}
    changes = {flag: getattr(options, flag) for flag in flags if getattr(options, flag) is not None}
    shape = dataclasses.replace(PRESETS[options.preset], **{flags[flag]: value for flag, value in changes.items()})
    if shape.device == "cpu" and shape.threads < 1:
        shape = dataclasses.replace(shape, threads=torch.get_num_threads())
    return shape, ", ".join([options.preset, *(f"{flag} {value}" for flag, value in changes.items())])


def measure(shape: Shape, options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """One preset's numbers, as they stand in the JSON."""
    names = list(dict.fromkeys([REFERENCE, *options.methods]))
    base = build_base(shape, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(3, shape.vocab_size, (shape.batch_size, shape.length), generator=generator).to(shape.device)
    batch = {"input_ids": ids, "labels": ids}
    models: dict[str, nn.Module] = {}
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        rank = choose_rank(METHODS[name], shape, options.r)
        models[name] = attach(base, METHODS[name], rank)
        trainable, active = count_adapter(models[name], METHODS[name], shape, rank)
        methods[name] = {"rank": rank, "trainable": trainable, "active": active}
        # Memory comes first, and with it the news that a method does not fit.
        methods[name] |= measure_memory(models[name], batch, shape.device)
        print(f"{name}: {methods[name]}", flush=True)
    fitting = [name for name in names if "does_not_fit" not in methods[name]]
    visits = take_turns({name: models[name] for name in fitting}, batch, shape.device, options, log)
    for name in fitting:
        methods[name] |= summarize(visits[name], visits[REFERENCE], shape.device)
    run = {
        "command": shlex.join(["python", "recipes/benchmarks/perft.py", *sys.argv[1:]]),
        "seed": options.seed,
        "rounds": options.rounds,
        "steps": options.steps,
        "device": describe_device(shape.device, shape.threads),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "shape": dataclasses.asdict(shape),
        "base_bytes": count_bytes([*base.parameters(), *base.buffers()]),
        "methods": {name: methods[name] for name in METHODS if name in methods},
    }
    run["profiles"] = {
        name: profile(models[name], batch, shape.device)
        for name in dict.fromkeys([REFERENCE, *missed_targets(run)])
        if missed_targets(run)
    }
    return run


def measure_memory(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> dict[str, Any]:
    """Bytes of adapter (full fine-tuning: none), optimizer state, and a step's transient peak; or why there are none."""
    try:
        with training_step(model, batch) as (step, optimizer):
            step()
            transient = measure_transient_bytes(step, device)
            state = count_bytes(state_tensors(optimizer))
    except torch.OutOfMemoryError as error:
        return {"does_not_fit": str(error).split(". ")[0]}
    whole = all(p.requires_grad for p in model.parameters())
    adapter = 0 if whole else count_bytes(p for p in model.parameters() if p.requires_grad)
    return {"adapter_bytes": adapter, "optimizer_bytes": state, "transient_bytes": transient}


def take_turns(
    models: dict[str, nn.Module], batch: dict[str, torch.Tensor], device: str, options: argparse.Namespace, log: Path
) -> dict[str, list[tuple[float, float]]]:
    """Method -> for each round the median (wall, processor) seconds of its visit."""
    visits: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    log.parent.mkdir(parents=True, exist_ok=True)
    for index in range(options.rounds):
        order = list(models)
        random.Random(options.seed * 1000 + index).shuffle(order)
        for name in order:
            with training_step(models[name], batch) as (step, _):
                steps = time_steps(step, device, 1, options.steps)
            visits[name].append((statistics.median(s[0] for s in steps), statistics.median(s[1] for s in steps)))
        log.write_text(json.dumps(visits) + "\n", encoding="utf-8")
        print(f"round {index + 1} of {options.rounds}: {visits[REFERENCE][-1][0]:.3f} s {REFERENCE}", flush=True)
    return visits


def summarize(visits: list[tuple[float, float]], reference: list[tuple[float, float]], device: str) -> dict[str, Any]:
    """Median step, and quartiles over rounds of its ratio to the reference's; processor time only where it says much."""
    summary: dict[str, Any] = {"step_seconds": statistics.median(wall for wall, _ in visits)}
    summary["ratio"] = quartiles([mine[0] / theirs[0] for mine, theirs in zip(visits, reference, strict=True)])
    if device == "cpu":
        summary["processor_ratio"] = quartiles(
            [mine[1] / theirs[1] for mine, theirs in zip(visits, reference, strict=True)]
        )
    return summary


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of a single value three times itself."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def profile(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Operation -> milliseconds of its own in one step."""
    with training_step(model, batch) as (step, _):
        step()
        return {key: time for key, time in profile_operations(step, device).items() if time >= 0.01}


if __name__ == "__main__":
    main()
