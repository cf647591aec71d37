"""Models whose experts share a base: deltas as after training, and what ranks run with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_moe_ext.ders.experts import DersExperts
from support import expert_parallel as work
from support import zoo
from support.latent_models import DERS_BLOCKS, FAMILIES

every_model = pytest.mark.parametrize("family", FAMILIES)
every_block = pytest.mark.parametrize("block", DERS_BLOCKS)
IDS = torch.arange(3, 25).reshape(2, 11)


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor | None]:
    """Of the loss on ``IDS``, by name."""
    model.zero_grad()
    model(**inputs, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill_deltas(model: nn.Module, seed: int = 3) -> Any:
    """Deltas and biases as after training: every expert another one."""
    generator = torch.Generator().manual_seed(seed)
    for experts in (module for module in model.modules() if isinstance(module, DersExperts)):
        for name, tensor in [*experts.named_parameters(), *experts.named_buffers()]:
            if name.endswith("_codes"):
                tensor.random_(0, 256, generator=generator)
            elif name.endswith(("_B", "_values", "_scales", "_bias")):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def save(folder: Path, family: str, block: str, routing: str = "spread", **changes: Any) -> Path:
    """A model with such deltas in float64, in a folder of its own below ``folder``."""
    path = folder / f"{family}-{block}-{routing}"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = fill_deltas(AutoModelForCausalLM.from_config(work.make_config(family, block, **changes)))
            zoo.spread_routers(model)
            for weight in zoo.routers(model):
                work._close_experts(weight, work.ROUTINGS[routing])
        model.to(torch.float64).save_pretrained(path)
    return path


def replicated_steps(rank: int, world_size: int, folders: Sequence[Path]) -> list[Any]:
    """Logits of this rank's batches and all gradients under ``DistributedDataParallel``, which waits for every parameter."""
    logging.disable_progress_bar()
    results = []
    for folder in folders:
        model = work.load(folder).train()
        wrapped = DistributedDataParallel(model)
        found = {}
        for number, ids in dict(list(enumerate(work.batches()))[rank::world_size]).items():
            logits = wrapped(input_ids=ids).logits
            ((logits * work.coefficients(ids, logits.dtype)).sum() * world_size).backward()
            found[number] = logits.detach()
        results.append({"logits": found, "gradients": work.gradients(model)})
    return results
