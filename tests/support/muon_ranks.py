"""Muon and AdamW on a model that FSDP2 has split, for ``support.ranks.run_ranks``."""

import copy
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.optim import Muon

from hf_moe_ext.mup import trainer_optimizer
from hf_moe_ext.mup.widening import widen
from support import zoo
from support.latent_models import make_config

STEPS = 4


def train_split(rank: int, world_size: int) -> dict[str, Any]:
    """Losses of a few steps, whole and split; and of the first step of a query projection what differs, relative to it.

    All of it, and within the space of the gradient's directions that are not noise.
    """
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_config(
        widen(make_config("olmoe_ext", "full", mup="mup", mup_base_hidden_size=32), 64)
    )
    split = copy.deepcopy(whole)
    for layer in split.model.layers:
        fully_shard(layer)
    fully_shard(split)
    name = "model.layers.0.self_attn.q_proj.weight"
    start = whole.get_parameter(name).detach().clone()
    results = {"whole": [], "split": [], "start": start}
    for key, model in (("whole", whole), ("split", split)):
        make, keywords = trainer_optimizer(model, Muon, lr=0.02, adam_lr=3e-3)
        optimizer = make()(model, **keywords)
        ids = torch.randint(3, zoo.VOCAB_SIZE, (8, 24), generator=torch.Generator().manual_seed(5))
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            weight = model.get_parameter(name)
            if step == 0 and key == "whole":
                results["gradient"] = weight.grad.clone()
            optimizer.step()
            if step == 0:
                moved = weight.detach()
                results[f"{key} moved"] = (moved.full_tensor() if key == "split" else moved.clone()) - start
            results[key].append(loss.item())
    return results
