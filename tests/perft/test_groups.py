"""Optimizer groups: every trainable parameter in exactly one, and the Trainer takes them."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_moe_ext import PerftConfig, param_groups
from support import zoo
from support.perft import perft_r, trainable
from support.trainers import arguments, collate, rows


def names(model, group):
    identities = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in identities}


def test_each_parameter_is_in_one_group():
    model = perft_r(base_router="lora", modules_to_save=["norm"])
    groups = {group["name"]: group for group in param_groups(model, lr=1e-3, router_lr=5e-3, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "weights": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
        "routers": (5e-3, 0.0),
    }
    found = {name: names(model, group) for name, group in groups.items()}
    assert sum(map(len, found.values())) == len(trainable(model))
    assert all("router" in name for name in found["routers"])
    assert not any("router" in name for name in found["weights"] | found["no_decay"])
    assert any("perft_base_router_A" in name for name in found["routers"])
    assert all(name.endswith("norm.modules_to_save.default.weight") for name in found["no_decay"])


def test_the_trainer_takes_them(tmp_path):
    model = perft_r(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    groups = param_groups(model, lr=0.0, router_lr=1e-2)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, max_steps=2)),
        train_dataset=Dataset.from_dict({"input_ids": rows(12)}),
        data_collator=collate,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}),
    )
    trainer.train()
    moved = {name for name, p in trainable(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "perft_router" in name}


def test_nothing_to_train_and_nothing_to_route():
    base = zoo.build("olmoe").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this model requires a gradient"):
        param_groups(base, lr=1e-3)
    model = get_peft_model(base, PerftConfig(variant="S"))
    with pytest.warns(UserWarning, match="router_lr has no effect"):
        assert [g["name"] for g in param_groups(model, lr=1e-3, router_lr=1e-2)] == ["weights"]
    with pytest.raises(ValueError, match="lr must be a number of at least 0; got -1"):
        param_groups(model, lr=-1)
