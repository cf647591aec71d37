"""A candidate put on a model: the adapter, what trains, and the optimizer's groups."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedModel

from hf_moe_ext.host.blocks import iterate_experts
from hf_moe_ext.perft import PerftConfig
from hf_moe_ext.perft.calibration import choose_experts_to_adapt
from hf_moe_ext.perft.groups import ROUTER_PARAMETERS, param_groups
from hf_moe_ext.perft.report import count_trainable
from hf_moe_ext.pilot.candidates import Candidate

CALIBRATION_ROWS = 256


def load_base(path: str, dtype: str) -> PreTrainedModel:
    """The model of an arm, where it will run."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.config.use_cache = False  # training has no use for it; `generate` asks for it itself
    device = torch.accelerator.current_accelerator()
    return model if device is None else model.to(device)  # type: ignore[arg-type]  # Transformers wraps `to` untyped


def attach(model: PreTrainedModel, candidate: Candidate, rows: Dataset, collator: DataCollatorForSeq2Seq) -> nn.Module:
    """The model with what the candidate trains.

    Args:
        model: The base model.
        candidate: The method.
        rows: Encoded train rows, for the choice of experts.
        collator: Makes batches of them.

    Raises:
        ValueError: The model cannot take it.
    """
    if candidate.kind == "base":
        return model.requires_grad_(False)
    if candidate.kind in ("full", "upcycle"):
        return model
    return get_peft_model(model, build_config(model, candidate, rows, collator))


def build_config(
    model: PreTrainedModel, candidate: Candidate, rows: Dataset, collator: DataCollatorForSeq2Seq
) -> PeftConfig:
    """The PEFT configuration of a candidate that is an adapter; `lora_alpha` is twice the rank everywhere."""
    settings = dict(candidate.settings)
    rank = settings.pop("r")
    if candidate.kind == "lora":
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=settings["target_modules"])
    if candidate.kind == "lora_experts":
        names = expert_parameters(model)
        if not names:
            raise ValueError("lora-experts needs experts whose weights are one tensor [num_experts, ., .]; found none")
        return LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=names
        )
    fraction = settings.pop("expert_fraction", None)
    if fraction is not None:
        first = rows.select(range(min(CALIBRATION_ROWS, len(rows)))).to_list()
        batches = (collator(first[i : i + 8]) for i in range(0, len(first), 8))
        settings["expert_ids"] = choose_experts_to_adapt(model, batches, fraction)
    if candidate.router == "frozen":
        settings["router_aux_loss_coef"] = 0.0
    assert candidate.variant is not None
    return PerftConfig(task_type="CAUSAL_LM", variant=candidate.variant, r=rank, lora_alpha=2 * rank, **settings)


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the experts' fused weights, as PEFT's `target_parameters` wants them: `experts.down_proj` is in every layer."""
    names = sorted(
        f"{site.name.rpartition('.')[2]}.{name}"
        for site in iterate_experts(model)
        for name, parameter in site.experts.named_parameters(recurse=False)
        if parameter.ndim == 3
    )
    return list(dict.fromkeys(names))


def optimizer_groups(model: nn.Module, candidate: Candidate, learning_rate: float) -> tuple[Any, dict[str, Any]] | None:
    """For `Trainer(optimizer_cls_and_kwargs=...)`; None leaves the optimizer to the Trainer.

    A frozen router is one with rate zero, as `recipes/finetune.py --router_learning_rate 0` has it.
    """
    if candidate.router != "frozen":
        return None
    return torch.optim.AdamW, {"params": param_groups(model, learning_rate, 0.0)}


def count_parameters(model: nn.Module, candidate: Candidate) -> dict[str, int | None]:
    """Parameters of the model, those that train, and those of them that one token uses (all, where it is no adapter)."""
    frozen = ROUTER_PARAMETERS if candidate.router == "frozen" else ()
    trained = sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in frozen)
    )
    stored, active = count_trainable(model)
    return {
        "model": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": trained,
        "stored": trained if stored == 0 else stored,
        "active": trained if stored == 0 else active,
    }


def save_adapter(model: nn.Module, candidate: Candidate, folder: Path) -> int:
    """Write an adapter's files; the bytes of what a candidate must store beside the base (its whole model for full).

    An adapter is kept, whole models are not: only their bytes are counted.
    """
    if candidate.kind == "base":
        return 0
    if candidate.kind in ("full", "upcycle"):
        return sum(p.numel() * p.element_size() for p in model.state_dict().values())
    # Embeddings are as they were; asked for them, PEFT would look on the Hub.
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
