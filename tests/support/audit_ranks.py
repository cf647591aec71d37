"""What the ranks of ``tests/audit/test_distributed.py`` run: recorded training passes of models that are spread."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from hf_moe_ext import PerftConfig, RoutingRecorder
from hf_moe_ext.audit.batch import tag_batch
from support import distributed_models, distributed_training, naive_routing, zoo

ROW_SLICES = (("code", "prose", "code"), ("prose", "maths", "prose"))  # by data-parallel rank


def batch_of(index: int, number: int = 0) -> dict[str, torch.Tensor]:
    """Micro-batch ``number`` of a data-parallel rank."""
    return zoo.random_batch(seed=10 * index + number)


def record(
    rank: int, world_size: int, folders: dict[str, Path], layout: dict[str, int] | None, reentrant: bool | None
) -> dict[str, Any]:
    """Per family: the reading that all ranks share, and what this rank's routers read; ``layout`` None: DDP."""
    # What the stock lm_head does under tensor parallelism inside FSDP; nothing writes into that view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    results = {}
    for family, folder in folders.items():
        model = distributed_models.load(folder, layout, dtype=torch.float32)
        config = getattr(model.config, "distributed_config", None)
        index = rank if config is None else rank // config.tp_size
        inner = model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if layout is None else model
        recorder = RoutingRecorder(wrapped, coactivation=True)
        with naive_routing.recorded_inputs(inner) as seen, recorder, tag_batch(slices=ROW_SLICES[index]):
            for number in range(2):
                wrapped(**batch_of(index, number)).loss.backward()
        results[family] = {"reading": recorder.reading().as_dict(), "seen": seen, "index": index}
    return results


def train_slices(rank: int, world_size: int, folder: Path, out: Path) -> Any:
    """The Trainer under DDP with an adapter and a column of slices."""
    model = distributed_models.load(folder, dtype=torch.float32)
    config = PerftConfig(task_type="CAUSAL_LM", variant="R", r=4, num_experts=4, top_k=2)
    model = get_peft_model(model, config)
    trainer = distributed_training.make_trainer(model, out, max_steps=2, gradient_accumulation_steps=2)
    sources = ["code", "prose", "prose", "maths"] * 8
    data = trainer.train_dataset
    trainer.train_dataset = data.add_column("source", sources[: len(data)])
    recorder = RoutingRecorder(model, slice_column="source", slices=["code", "maths", "prose"]).attach_to(trainer)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "routing_load_max" in line]
    return recorder.reading().as_dict(), logged
