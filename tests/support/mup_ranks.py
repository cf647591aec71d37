"""What the ranks of ``tests/mup/test_distributed_groups.py`` run, and the same on one process."""

from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from hf_moe_ext.mup import trainer_optimizer
from support.distributed_training import make_trainer
from support.expert_parallel import load, trajectory, whole

NUM_STEPS, LR, DECAY = 20, 0.01, 0.1


def train(rank: int, world_size: int, folder: Path, out: Path, layout: dict[str, Any] | None) -> dict[str, Any]:
    """A plain Trainer with µP's groups; without a layout it wraps the model itself (DDP) or is the only process."""
    model = load(folder, layout)
    processes = 1 if layout is not None else world_size  # make_trainer knows of layouts, not of DDP
    trainer = make_trainer(
        model,
        out / str(layout),
        trainer_optimizer(model, AdamW, lr=LR, weight_decay=DECAY),
        max_steps=NUM_STEPS,
        **({"gradient_accumulation_steps": 4 // processes} if processes > 1 else {}),
    )
    trainer.train()
    groups = trainer.optimizer.param_groups
    return {
        "trajectory": trajectory(trainer),
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "settings": [{k: v for k, v in group.items() if k != "params"} for group in groups],
        "meshes": [{p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]} for group in groups],
    }
