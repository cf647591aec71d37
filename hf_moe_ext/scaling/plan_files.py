"""A recommended plan as files to start from: config.json of the model, training arguments, an accelerate configuration."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hf_moe_ext.scaling.laws.leverage import learning_rate
from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.plan_result import Plan

CONFIG, ARGUMENTS = "config.json", "training_arguments.json"
_ARCHITECTURES = {"olmoe_ext": "OlmoeExtForCausalLM", "mixtral_ext": "MixtralExtForCausalLM"}


def model_config(plan: Plan) -> dict[str, Any]:
    """What ``AutoConfig.from_pretrained`` of the folder reads."""
    config = plan.candidate.config
    sparse = plan.candidate.block != "dense"
    return {"architectures": [_ARCHITECTURES[config["model_type"]]], **config, "output_router_logits": sparse}


def training_arguments(plan: Plan, request: PlanRequest) -> dict[str, Any]:
    """Keys of ``transformers.TrainingArguments``; the learning rate is a published fit's, to be tuned.

    That fit counts forward FLOPs without embeddings, as the law it was printed beside.
    """
    layout, step = plan.training.layout, plan.training.step
    arguments: dict[str, Any] = {
        "output_dir": "outputs/planned",
        "max_steps": plan.run.num_steps,
        "per_device_train_batch_size": step.tokens.num_sequences,
        "gradient_accumulation_steps": step.num_micro_batches,
        "gradient_checkpointing": step.recompute == "full",
        "bf16": step.precision == "autocast",
        "learning_rate": learning_rate(plan.counts["leverage"]["budget_flops"]),
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": max(1, plan.run.num_steps // 5)},
        "warmup_steps": max(1, min(2000, plan.run.num_steps // 50)),
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "save_steps": max(1, plan.run.num_steps // 20),
        "seed": 0,
    }
    if layout.zero == 3:
        arguments["fsdp"] = "full_shard auto_wrap"
    return arguments


def launch_notes(plan: Plan, request: PlanRequest) -> dict[str, Any]:
    """What is not the Trainer's to set: processes, row length, expert parallelism."""
    layout = plan.training.layout
    return {
        "num_processes": layout.world_size,
        "max_length": request.context_length,
        "precision": plan.training.step.precision,
        "zero": layout.zero,
        "distributed_config": {"ep_size": layout.expert, "ep_implementation": layout.dispatch}
        if layout.expert > 1
        else None,
    }


def emit_config(plan: Plan, request: PlanRequest, folder: Path) -> list[Path]:
    """Write config.json, training_arguments.json and launch.json; a folder that has one of them is refused.

    Raises:
        ValueError: such a file is there.
        OSError: it cannot be written.
    """
    files = {
        CONFIG: model_config(plan),
        ARGUMENTS: training_arguments(plan, request),
        "launch.json": launch_notes(plan, request),
    }
    present = [name for name in files if (folder / name).exists()]
    if present:
        raise ValueError(f"--emit-config: {folder} already has {', '.join(present)}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, content in files.items():
            (Path(temporary) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in files:
            (Path(temporary) / name).rename(folder / name)
    return [folder / name for name in files]
