"""From the pilot to the full job: the command that runs it, and what it will take."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hf_moe_ext.pilot.candidates import Candidate
from hf_moe_ext.pilot.request import PilotRequest
from hf_moe_ext.pilot.training import SCHEDULE, num_warmup_steps

OUTPUT = "outputs/full"


def write_commands(
    candidate: Candidate, rate: float, request: PilotRequest, train_rows: int, expert_parameters: Sequence[str] = ()
) -> list[str]:
    """Commands that run the full job, in order.

    Args:
        candidate: The recommended one.
        rate: Its learning rate.
        request: The pilot's.
        train_rows: Of the full job.
        expert_parameters: Names of the experts' weights, for LoRA on them.
    """
    steps = math.ceil(train_rows / request.batch_size) * request.full_epochs
    model, commands = request.model, []
    if candidate.kind == "upcycle":
        model = "outputs/upcycled"
        settings = [
            word for key, value in candidate.settings.items() for word in (f"--{key.replace('_', '-')}", str(value))
        ]
        commands.append(["hf-moe", "upcycle", request.model, "--output", model, "--seed", str(request.seed), *settings])
    words = {
        "model_name_or_path": model, "dtype": request.dtype, "dataset_name": request.data, "max_length": request.max_length,
        **finetune_flags(candidate, expert_parameters), "learning_rate": f"{rate:g}", "lr_scheduler_type": SCHEDULE,
        "warmup_steps": num_warmup_steps(round(steps)), "num_train_epochs": f"{request.full_epochs:g}",
        "per_device_train_batch_size": request.batch_size, "seed": request.seed, "output_dir": OUTPUT,
    }  # fmt: skip
    commands.append(["accelerate", "launch", "recipes/finetune.py", *_flags(words)])
    return [shlex.join(map(str, command)) for command in commands]


def finetune_flags(candidate: Candidate, expert_parameters: Sequence[str] = ()) -> dict[str, Any]:
    """The candidate as arguments of `recipes/finetune.py`."""
    settings = dict(candidate.settings)
    if candidate.kind in ("full", "upcycle"):
        return {"peft": "full"}
    rank = {"r": settings.pop("r"), "lora_alpha": 2 * candidate.settings["r"]}
    if candidate.kind == "lora":
        return {"peft": "lora", **rank, "lora_target_modules": settings["target_modules"]}
    if candidate.kind == "lora_experts":
        return {"peft": "lora", **rank, "lora_target_parameters": list(expert_parameters)}
    frozen = {"router_learning_rate": 0, "router_aux_loss_coef": 0} if candidate.router == "frozen" else {}
    return {"peft": "perft", "variant": candidate.variant, **rank, **settings, **frozen}


def _flags(words: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in words.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def estimate_here(step_s: float, request: PilotRequest, train_rows: int) -> dict[str, float]:
    """The full job on this machine, at the pilot's own speed."""
    steps = math.ceil(train_rows / request.batch_size) * request.full_epochs
    return {"steps": steps, "hours": steps * step_s / 3600}


def price_full_job(request: PilotRequest, train_rows: int, tokens_per_row: float) -> dict[str, Any] | None:
    """The planner's cost model on the hardware that was named; None where none was.

    It prices a step that trains all weights on one device: an adapter takes less memory and no more time.

    Raises:
        ValueError: There is no such hardware, or the model is one the planner cannot count.
    """
    if request.hardware is None:
        return None
    from hf_moe_ext.scaling.hardware import find_hardware
    from hf_moe_ext.scaling.layout import Layout
    from hf_moe_ext.scaling.memory import TrainingStep, training_memory
    from hf_moe_ext.scaling.money import Prices, training_cost
    from hf_moe_ext.scaling.operations import Tokens
    from hf_moe_ext.scaling.roofline import training_time
    from hf_moe_ext.scaling.shape import MoeShape

    hardware = find_hardware(request.hardware, request.hardware_file)
    shape = MoeShape.from_hf(request.model)
    step = TrainingStep(Tokens(request.batch_size, max(1, round(tokens_per_row))), "autocast")
    seconds = training_time(shape, Layout(), step, hardware).total
    steps = math.ceil(train_rows / request.batch_size) * request.full_epochs
    memory = training_memory(shape, Layout(), step).total
    told: dict[str, Any] = {
        "hardware": hardware.name, "steps": steps, "step_s": seconds, "hours": seconds * steps / 3600,
        "memory_bytes": memory, "fits": memory <= hardware.memory_bytes, "cost": None, "currency": request.currency,
    }  # fmt: skip
    if request.price is not None:
        told["cost"] = training_cost(Prices(request.price, currency=request.currency), 1, seconds, steps).total
    return told
