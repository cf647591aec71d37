"""Training a µP model with other learning rates is said, once, and nothing else is."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim import SGD, AdamW
from transformers import Adafactor, AutoModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_moe_ext.mup import param_groups, trainer_optimizer
from support import trainers
from support.latent_models import make_config, make_model

MUP = {"mup": "mup", "mup_base_hidden_size": 8}
IDS = torch.arange(3, 25).reshape(2, 11)


@pytest.fixture
def warnings(caplog):
    logging.get_logger("hf_moe_ext").propagate = True  # Transformers' own handler does not reach pytest
    return lambda: [record.message for record in caplog.records if record.name == "hf_moe_ext.mup.guard"]


def step(model, optimizer, count=3):
    for _ in range(count):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_stock_groups_are_warned_of_once_naming_the_fix(warnings):
    model = make_model("mixtral_ext", "full", **MUP)
    step(model, AdamW(model.parameters(), lr=0.01))
    (message,) = warnings()
    assert "gives the parameters of a µP model learning rates that are not µP's" in message
    assert "trainer_optimizer(model, args=args)" in message
    assert "with 0.04" in message


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
def test_groups_of_ours_are_not(optimizer, warnings):
    for settings in (MUP, {**MUP, "mup": "simplep", "mup_form": "folded"}, {}):
        model = make_model("olmoe_ext", "mixed", **settings)
        step(model, optimizer(param_groups(model, 0.01, rule="sgd" if optimizer is SGD else "adam"), lr=0.01))
    assert warnings() == []


def test_rules_of_another_optimizer_are(warnings):
    model = make_model("olmoe_ext", "standard", **MUP, mup_base_intermediate_size=6)  # else SGD's are Adam's times 4
    step(model, SGD(param_groups(model, 0.01), lr=0.01))
    assert len(warnings()) == 1


def test_models_without_mup_and_adapters_are_left_in_peace(warnings):
    stock = make_model("mixtral_ext", "standard")
    step(stock, AdamW(stock.parameters(), lr=0.01))
    tuned = get_peft_model(make_model("mixtral_ext", "standard", **MUP), LoraConfig(target_modules=["q_proj"]))
    step(tuned, AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.01))
    assert warnings() == []


def test_a_schedule_that_breaks_the_ratios_is_warned_of(warnings):
    model = make_model("mixtral_ext", "standard", **MUP)
    optimizer = AdamW(param_groups(model, 0.01), lr=0.01)
    step(model, optimizer)
    assert warnings() == []
    for group in optimizer.param_groups:
        group["lr"] = max(group["lr"], 0.005)  # an absolute floor
    step(model, optimizer)
    assert len(warnings()) == 1
    assert "changed the ratios between the learning rates of its groups" in warnings()[0]


def trainer(folder, model, **kwargs):
    args = TrainingArguments(**trainers.arguments(folder, max_steps=3, warmup_steps=2))
    rows = Dataset.from_dict({"input_ids": trainers.rows(18)})
    return Trainer(model, args, train_dataset=rows, data_collator=trainers.collate, **kwargs)


def test_a_plain_trainer_is_warned_of_also_the_second_time(warnings, tmp_path):
    plain = trainer(tmp_path, make_model("mixtral_ext", "standard", **MUP))
    plain.train()
    assert len(warnings()) == 1
    # Groups handed over as "params" are used up by the first optimizer; the second one gets the stock groups.
    model = make_model("mixtral_ext", "standard", **MUP)
    once = trainer(tmp_path, model, optimizer_cls_and_kwargs=(AdamW, {"params": param_groups(model, 0.01)}))
    once.train()
    assert len(warnings()) == 1
    once.optimizer = once.lr_scheduler = None
    once.train()
    assert len(warnings()) == 2


def test_a_trainer_with_our_factory_is_not(warnings, tmp_path):
    model = make_model("mixtral_ext", "standard", **MUP)
    ours = trainer(tmp_path, model, optimizer_cls_and_kwargs=trainer_optimizer(model, lr=0.01))
    ours.train()
    ours.optimizer = ours.lr_scheduler = None
    ours.train()
    assert warnings() == []


def test_optimizers_of_others_are_left_in_peace(warnings):
    model = make_model("mixtral_ext", "standard", **MUP)
    model.score = torch.nn.Linear(4, 4)  # what a head for classification adds: it has no role
    other = torch.nn.Linear(4, 4)
    for optimizer in (SGD([*other.parameters(), *model.score.parameters()], lr=0.1), Adafactor(other.parameters())):
        other(torch.ones(4)).sum().backward()
        optimizer.step()
    tuned = get_peft_model(
        make_model("mixtral_ext", "standard", **MUP), LoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    step(tuned, AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.01))
    assert warnings() == []


def test_copies_inner_models_and_later_groups_are_seen(warnings):
    twin = copy.deepcopy(make_model("mixtral_ext", "standard", **MUP))
    step(twin, AdamW(twin.parameters(), lr=0.01))
    assert len(warnings()) == 1
    inner = AutoModel.from_config(make_config("mixtral_ext", "standard", **MUP))
    inner(IDS).last_hidden_state.sum().backward()
    AdamW(inner.parameters(), lr=0.01).step()
    assert len(warnings()) == 2
    model = make_model("mixtral_ext", "standard", **MUP)
    optimizer = AdamW([model.lm_head.weight], lr=0.01)
    step(model, optimizer)
    assert len(warnings()) == 2
    optimizer.add_param_group({"params": list(model.model.layers.parameters())})
    step(model, optimizer)
    assert len(warnings()) == 3


def test_a_group_that_is_held_still_is_no_mistake(warnings):
    model = make_model("mixtral_ext", "standard", **MUP)
    groups = param_groups(model, 0.01)
    groups[1]["lr"] = 0.0
    step(model, AdamW(groups, lr=0.01))
    assert warnings() == []
