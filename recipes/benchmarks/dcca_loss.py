"""DCCA against the stock block by loss: runs of `pretrain.py` in pairs (one seed: same rows in the same order).

The learning rate of each block is chosen on modules of the train side with a seed of its own; the held-out modules are
seen by the finished settings only. Curves are read where the learning rate is still constant (`warmup_stable_decay`), so
that no arm is compared before its rate has come down with one whose rate has.
"""

import argparse
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from cells import RECIPES, Cell, run_cells
from dcca_presets import LossPreset
from step_cost import quartiles, ratio_quartiles, time_steps, training_step
from transformers import AutoModelForCausalLM

from built_in_data import split_train_modules
from pretrain import measure_ngram
from pretrain_arguments import parse_pretrain_arguments
from pretrain_data import Texts
from pretrain_model import build_config
from quickstart.corpus import read_corpus

STANDARD, DCCA = "standard", "dcca r=1/4"
# Quantile 0.975 of Student's t by degrees of freedom, for intervals over a handful of seeds.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def list_arms(preset: LossPreset) -> dict[str, tuple[str, ...]]:
    """Arm -> configuration flags. The first two are compared over all seeds, the others over fewer."""
    hidden_size = preset.hidden_size
    dcca = ("--moe_block", "dcca")
    quarter = (*dcca, "--moe_latent_size", str(hidden_size // 4))
    # As many parameters as one expert, in a form of two matrices.
    shared = str(3 * preset.intermediate_size // 2)
    half = str(preset.top_k // 2)
    main = {
        STANDARD: ("--moe_block", "standard"),
        DCCA: quarter,
        f"standard top-{half}": ("--moe_block", "standard", "--num_experts_per_tok", half),
    }
    if not preset.all_variants:
        return main
    return main | {
        "dcca r=1/2": (*dcca, "--moe_latent_size", str(hidden_size // 2)),
        "dcca r=1/8": (*dcca, "--moe_latent_size", str(hidden_size // 8)),
        "dcca r=1/4, latent norm": (*quarter, "--moe_latent_norm", "true"),
        "dcca r=1/4, shared expert": (*quarter, "--moe_shared_expert_intermediate_size", shared),
        "dcca r=1/4, gated experts": (*quarter, "--moe_expert_gated", "true"),
    }


def measure_loss(preset: LossPreset, options: argparse.Namespace) -> dict[str, Any]:
    """Search, run what is missing, and compare.

    Args:
        preset: Sizes, steps, seeds.
        options: `work_dir`, `jobs`.

    Returns:
        The part of the JSON.
    """
    work_dir = options.work_dir / "loss"
    arms = list_arms(preset)
    data = write_validation_data(work_dir / "validation_data", preset)
    common = common_flags(preset, work_dir)
    search = {
        (arm, rate): Cell(
            f"search-{slug(arm)}-{rate}",
            (
                *common,
                *arms[arm],
                "--learning_rate",
                rate,
                "--seed",
                str(preset.search_seed),
                "--dataset_name",
                str(data),
            ),
            "pretrain.py",
        )
        for arm in (STANDARD, DCCA)
        for rate in preset.learning_rates
    }
    found = run_cells(search.values(), work_dir, options.jobs, threads=1)
    rates = {
        arm: min(preset.learning_rates, key=lambda rate: found[search[arm, rate].name]["loss"]["after"])
        for arm in (STANDARD, DCCA)
    }
    cells = {}
    for arm, flags in arms.items():
        rate = rates[DCCA if "dcca" in arm else STANDARD]
        for seed in preset.seeds if arm in (STANDARD, DCCA) else preset.seeds[: preset.num_variant_seeds]:
            name = f"final-{slug(arm)}-{rate}-{seed}"
            words = (*common, *flags, "--learning_rate", rate, "--seed", str(seed), *source_flags(preset))
            cells[arm, seed] = Cell(name, words, "pretrain.py")
    # Pairs first: a benchmark that is stopped has the headline.
    ordered = sorted(cells, key=lambda key: (key[0] not in (STANDARD, DCCA), key[1]))
    measured = run_cells([cells[key] for key in ordered], work_dir, options.jobs, threads=1)
    runs = {arm: {seed: measured[cells[arm, seed].name] for a, seed in cells if a == arm} for arm in arms}
    return {
        "learning_rates": {
            arm: {"tried": {rate: found[search[arm, rate].name]["loss"]["after"] for rate in preset.learning_rates},
                  "chosen": rates[arm]}
            for arm in (STANDARD, DCCA)
        },
        "search_seed": preset.search_seed,
        "steps": preset.max_steps,
        "tokens_per_step": next(iter(runs[STANDARD].values()))["tokens_per_step"],
        "held_out_rows": next(iter(runs[STANDARD].values()))["loss"]["rows"],
        "ngram_bits_per_byte": read_or_measure_ngram(work_dir / "ngram.json", preset),
        "arms": {arm: summarize_arm(arms[arm], runs[arm], runs[STANDARD]) for arm in arms},
    }  # fmt: skip


def common_flags(preset: LossPreset, work_dir: Path) -> tuple[str, ...]:
    """What all runs share."""
    settings = {
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.intermediate_size,
        "num_hidden_layers": preset.num_hidden_layers,
        "num_attention_heads": preset.hidden_size // 32,
        "num_key_value_heads": preset.hidden_size // 32,
        "num_experts": preset.num_experts,
        "num_experts_per_tok": preset.top_k,
        "tokenizer_vocab_size": preset.vocab_size,
        "max_length": preset.length,
        "per_device_train_batch_size": preset.batch_size,
        "max_steps": preset.max_steps,
        "warmup_steps": preset.warmup_steps,
        "lr_scheduler_kwargs": json.dumps({"num_decay_steps": preset.num_decay_steps}),
        "eval_strategy": "steps",
        "eval_steps": preset.eval_steps,
        "max_curve_samples": preset.num_curve_rows,
        "max_eval_samples": preset.num_held_out_rows,
        "ngram_baseline": "false",
        "save_strategy": "no",
        "use_cpu": "true",
        "cache_dir": str(work_dir.resolve()),
    }
    words = ["--config", str(RECIPES / "configs" / "pretrain_standard.yaml")]
    return (*words, *(word for name, value in settings.items() for word in (f"--{name}", str(value))))


def source_flags(preset: LossPreset) -> tuple[str, ...]:
    """Where the finished settings read."""
    return () if preset.source_dir is None else ("--source_dir", preset.source_dir)


def write_validation_data(folder: Path, preset: LossPreset) -> Path:
    """Train modules split once more, as files; the held-out modules are in neither side."""
    corpus = split_train_modules(read_corpus(preset.source_dir))
    folder.mkdir(parents=True, exist_ok=True)
    for side, modules in (("train", corpus.train), ("test", corpus.held_out)):
        lines = [json.dumps({"text": module.text}) + "\n" for module in modules]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder.resolve()


def read_or_measure_ngram(path: Path, preset: LossPreset) -> float:
    """Bits per byte of the order-3 byte n-gram; kept, since it takes a while."""
    if not path.is_file():
        corpus = read_corpus(preset.source_dir)
        texts = Texts(tuple(m.text for m in corpus.train), tuple(m.text for m in corpus.held_out))
        path.write_text(json.dumps(measure_ngram(texts)), encoding="utf-8")
    value: float = json.loads(path.read_text(encoding="utf-8"))
    return value


def summarize_arm(
    flags: tuple[str, ...], runs: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """One arm: its losses, curves, and the relative difference to the stock block of the same seed."""
    first = next(iter(runs.values()))
    return {
        "flags": " ".join(flags),
        "parameters": first["model"]["parameters"],
        "parameters_by_part": first["model"]["parameters_by_part"],
        "loss": {str(seed): run["loss"]["after"] for seed, run in runs.items()},
        "bits_per_byte": statistics.mean(run["bits_per_byte"]["after"] for run in runs.values()),
        "difference": relative_difference(
            [run["loss"]["after"] for run in runs.values()], [reference[seed]["loss"]["after"] for seed in runs]
        ),
        "curve": {str(seed): read_curve(run["log"]) for seed, run in runs.items()},
    }


def read_curve(log: list[dict[str, Any]]) -> list[list[float]]:
    """[step, held-out nats per token] of every evaluation."""
    return [[entry["step"], entry["eval_nats_per_token"]] for entry in log if "eval_nats_per_token" in entry]


def relative_difference(losses: list[float], reference: list[float]) -> dict[str, float]:
    """Mean of the relative differences of paired runs, with its 95% interval (Student's t over the pairs).

    Args:
        losses: Of one arm, a seed each.
        reference: Of the stock block, the same seeds in the same order.

    Returns:
        `mean`, and with two pairs or more `low` and `high`; fractions, positive is worse.
    """
    differences = [a / b - 1 for a, b in zip(losses, reference, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "seeds": count}
    half = STUDENT_T[count - 1] * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": count}


def loss_at_step(curve: list[list[float]], step: float) -> float:
    """The curve at a step between its points, straight in the logarithm of the step.

    Raises:
        ValueError: the step lies outside the curve.
    """
    for (a, low), (b, high) in itertools.pairwise(curve):
        if a <= step <= b:
            share = (math.log(step) - math.log(a)) / (math.log(b) - math.log(a))
            return low + share * (high - low)
    raise ValueError(f"step must lie on the curve, from {curve[0][0]} to {curve[-1][0]}, got {step}")


def compare_equal_times(preset: LossPreset, loss: dict[str, Any] | None) -> dict[str, Any]:
    """Step times of three arms on one process, in turns, and the losses after equal times.

    Args:
        preset: Sizes.
        loss: The `loss` part.

    Raises:
        RuntimeError: there is no `loss` part yet.
    """
    if loss is None:
        raise RuntimeError("the curves are missing: run --part loss first")
    smaller = f"standard top-{preset.top_k // 2}"
    seconds = time_arms(preset, (STANDARD, DCCA, smaller))
    # The last evaluation at which the learning rate has not begun to come down.
    last_step = (preset.max_steps - preset.num_decay_steps) // preset.eval_steps * preset.eval_steps
    return {
        "step_seconds": {arm: quartiles(values) for arm, values in seconds.items()},
        "ratios": {
            f"{mine} / {theirs}": ratio_quartiles(seconds[mine], seconds[theirs])
            for mine, theirs in ((DCCA, STANDARD), (DCCA, smaller))
        },
        "comparisons": [
            compare_at_equal_time(loss["arms"], {arm: statistics.median(seconds[arm]) for arm in pair}, pair, last_step)
            for pair in ((DCCA, STANDARD), (DCCA, smaller))
        ],
    }


def time_arms(preset: LossPreset, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Seconds of a training step per arm and round, on one process and one thread, in turns."""
    torch.set_num_threads(1)
    models = {name: build_arm(preset, list_arms(preset)[name]) for name in names}
    ids = torch.randint(3, preset.vocab_size, (preset.batch_size, preset.length))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(preset.num_time_rounds):
        for name in names if number % 2 else reversed(names):
            with training_step(models[name], {"input_ids": ids, "labels": ids}) as (step, _):
                seconds[name].append(statistics.median(wall for wall, _ in time_steps(step, "cpu", 1, 3)))
    return seconds


def build_arm(preset: LossPreset, flags: tuple[str, ...]) -> Any:
    """The untrained model of an arm, as `pretrain.py` builds it."""
    words = [*common_flags(preset, Path("unused")), *flags, "--vocab_size", str(preset.vocab_size)]
    return AutoModelForCausalLM.from_config(build_config(parse_pretrain_arguments(words)))


def compare_at_equal_time(
    arms: dict[str, Any], seconds: dict[str, float], pair: tuple[str, str], last_step: int
) -> dict[str, Any]:
    """Two arms after the same time: the faster one's last step at a constant learning rate, and the other's until then.

    Args:
        arms: `arms` of the loss part.
        seconds: Of a step, by arm.
        pair: The arm in question and the one it is compared with.
        last_step: Last step with a constant learning rate.
    """
    time = last_step * min(seconds[arm] for arm in pair)
    steps = {arm: time / seconds[arm] for arm in pair}
    common = [seed for seed in arms[pair[0]]["curve"] if seed in arms[pair[1]]["curve"]]
    losses = {arm: [loss_at_step(arms[arm]["curve"][seed], steps[arm]) for seed in common] for arm in pair}
    return {
        "arms": list(pair),
        "step_seconds": {arm: seconds[arm] for arm in pair},
        "steps": steps,
        "loss": {arm: statistics.mean(losses[arm]) for arm in pair},
        "difference": relative_difference(losses[pair[0]], losses[pair[1]]),
    }


def slug(arm: str) -> str:
    """An arm's name as a folder's."""
    return "-".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())


def lower_priority(niceness: int) -> None:
    """Let everything else on the machine go first; losses do not depend on it."""
    if niceness:
        os.nice(niceness)
