"""One small training that every way of running it must repeat: a tiny OLMoE, rows of uneven length, plain SGD."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe_ext import PerftConfig
from support import zoo

# Large, so that a wrong scale of the router's auxiliary gradient is far above the tolerance.
ROUTER = {"num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def attach(base: nn.Module, variant: str) -> Any:
    """An adapter with values drawn from one seed; call it where the base is not on the meta device."""
    torch.manual_seed(1)
    settings = ROUTER if variant == "R" else {}
    return get_peft_model(
        base, PerftConfig(task_type="CAUSAL_LM", variant=variant, r=4, init_weights=False, **settings)
    )


def train(base_folder: Path, output: Path, variant: str, resume: bool = False, **changes: Any) -> list[float]:
    """Four optimizer steps of eight rows each, saved at every second one; the logged losses."""
    settings = {
        "output_dir": str(output), "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.0, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "save_steps": 2, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
        # Not Adam: it divides a wrong scale of the gradients away.
        "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant",
    } | changes  # fmt: skip
    arguments = TrainingArguments(**settings)
    model = attach(AutoModelForCausalLM.from_pretrained(base_folder), variant)
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows()}), data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows() -> list[list[int]]:
    """32 sequences of 4, 9 or 14 tokens: no row twice in a run, and uneven token counts in every micro-batch."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCAB_SIZE, (4 + 5 * (i % 3),), generator=generator).tolist() for i in range(32)]


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    ids = [torch.tensor(feature["input_ids"]) for feature in features]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=zoo.PAD_ID)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}
