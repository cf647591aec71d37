"""Optimizer groups: every number of every role, what the Trainer makes of them, and what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainingArguments

from hf_moe_ext.mup import param_groups, trainer_optimizer
from hf_moe_ext.mup.roles import assign_roles
from support import trainers
from support.latent_models import BLOCKS, FAMILIES, make_model

MUP = {"mup": "mup", "mup_base_hidden_size": 8}
LR, DECAY, EPS = 0.01, 0.1, 1e-8


def settings_by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", ["multiplier", "folded"])
def test_each_parameter_is_in_one_group_with_its_roles_numbers(family, block, form):
    model = make_model(family, block, mup_form=form, **MUP)
    groups = param_groups(model, LR, DECAY, EPS)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found = settings_by_name(model, groups)
    for name, role in assign_roles(model).items():
        lr, decay, eps = role.update_factors("adam")
        spared = role.axes.fan_in is None
        assert found[name] == {"lr": LR * lr, "weight_decay": 0.0 if spared else DECAY * decay, "eps": EPS * eps,
                               "lr_factor": lr}, name  # fmt: skip
    assert groups[0]["lr"] == LR  # what the Trainer logs
    settings = [tuple(v for k, v in group.items() if k != "params") for group in groups]
    assert len(set(settings)) == len(settings)


def test_the_literal_numbers_of_one_model():
    model = make_model("mixtral_ext", "standard", **MUP)
    found = settings_by_name(model, param_groups(model, 0.01, 0.1, 1e-8))
    rows = {
        "model.embed_tokens.weight": (0.01, 0.1, 2.5e-9),
        "model.layers.0.self_attn.q_proj.weight": (0.0025, 0.4, 2.5e-9),
        "model.layers.0.mlp.experts.gate_up_proj": (0.0025, 0.4, 2.5e-9),
        "model.layers.0.mlp.experts.down_proj": (0.0025, 0.4, 2.5e-9),
        "model.layers.0.mlp.gate.weight": (0.01, 0.1, 2.5e-9),
        "model.norm.weight": (0.01, 0.0, 2.5e-9),
        "lm_head.weight": (0.01, 0.1, 2.5e-9),
    }
    assert {name: tuple(found[name][k] for k in ("lr", "weight_decay", "eps")) for name in rows} == rows
    folded = make_model("mixtral_ext", "standard", mup_form="folded", **MUP)
    found = settings_by_name(folded, param_groups(folded, 0.01, 0.1, 1e-8))
    for name in ("model.layers.0.mlp.gate.weight", "lm_head.weight"):
        assert [found[name][k] for k in ("lr", "weight_decay", "eps")] == [0.0025, 0.4, 1e-8]
    sgd = settings_by_name(model, param_groups(model, 0.01, rule="sgd"))
    assert sgd["model.embed_tokens.weight"] == {"lr": 0.04, "weight_decay": 0.0, "lr_factor": 4.0}
    assert sgd["model.layers.0.mlp.experts.down_proj"]["lr"] == 0.01


def test_weight_decay_coupled_and_spared():
    model = make_model("mixtral_ext", "full", **MUP)
    coupled = settings_by_name(model, param_groups(model, LR, DECAY, independent_weight_decay=False))
    assert {s["weight_decay"] for s in coupled.values()} == {0.0, DECAY}
    spared = settings_by_name(model, param_groups(model, LR, DECAY, decay_embeddings=False, decay_routers=False))
    free = {name.split(".")[-2] for name, s in spared.items() if s["weight_decay"] == 0.0}
    assert free == {"embed_tokens", "gate", "norm", "input_layernorm", "post_attention_layernorm", "latent_norm"}


def test_order_hangs_on_the_model_alone():
    first, second = (param_groups(make_model("olmoe_ext", "mixed", seed=seed, **MUP), LR) for seed in (0, 1))
    assert [[p.shape for p in g["params"]] for g in first] == [[p.shape for p in g["params"]] for g in second]


def test_only_what_trains_is_taken():
    model = make_model("olmoe_ext", "standard", **MUP)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this model requires a gradient"):
        param_groups(model, LR)
    model.model.layers[0].mlp.requires_grad_(True)
    assert len(settings_by_name(model, param_groups(model, LR))) == 3


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"lr": -1.0}, "lr must be a number of at least 0; got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0; got nan"),
        ({"rule": "adamw"}, "rule must be one of 'adam', 'sgd'; got 'adamw'"),
    ],
)
def test_bad_numbers_are_refused(change, rule):
    with pytest.raises(ValueError, match=rule):
        param_groups(make_model("olmoe_ext", "standard", **MUP), **{"lr": LR} | change)


# --- with the Trainer ------------------------------------------------------------------------------------------------


def make_trainer(
    folder, model, schedule="constant", optimizer_class=AdamW, schedule_kwargs=None, optimizer=None, **changes
):
    settings = {"learning_rate": LR, "weight_decay": DECAY, "max_steps": 6, "warmup_steps": 2,
                "lr_scheduler_type": schedule, "lr_scheduler_kwargs": schedule_kwargs}  # fmt: skip
    args = TrainingArguments(**trainers.arguments(folder, **settings, **changes))
    rows = Dataset.from_dict({"input_ids": trainers.rows(36)})
    chosen = trainer_optimizer(model, optimizer_class, args=args) if optimizer is None else optimizer
    return Trainer(model, args, train_dataset=rows, data_collator=trainers.collate, optimizer_cls_and_kwargs=chosen)


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("linear", None),
        ("cosine", None),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": 0.1}),
        ("cosine_with_min_lr", {"min_lr": LR / 10}),
    ],
)
@pytest.mark.parametrize("optimizer_class", [AdamW, SGD])
def test_schedules_keep_the_ratios_and_the_base_rate_is_logged(schedule, kwargs, optimizer_class, tmp_path):
    model = make_model("mixtral_ext", "full", **MUP)
    trainer = make_trainer(tmp_path, model, schedule, optimizer_class, kwargs)
    seen = []

    class Watch(trainers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
            seen.append(([g["lr"] for g in optimizer.param_groups], [g["lr_factor"] for g in optimizer.param_groups]))

    trainer.add_callback(Watch())
    trainer.train()
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert len(seen) == 6
    assert len({rates[0] for rates, _ in seen}) > 2  # a schedule that moved
    for rates, factors in seen:
        for rate, factor in zip(rates, factors, strict=True):
            assert rate == pytest.approx(rates[0] / factors[0] * factor, rel=1e-12)
    assert max(logged) <= LR * max(factors)
    if optimizer_class is AdamW:
        assert max(logged) == pytest.approx(LR)
        assert trainer.optimizer.defaults["lr"] == LR


def test_settings_of_the_training_arguments_count():
    model = make_model("olmoe_ext", "standard", **MUP)
    args = TrainingArguments(
        "unused", learning_rate=0.3, weight_decay=0.2, adam_epsilon=1e-6, adam_beta2=0.95, use_cpu=True
    )
    factory, kwargs = trainer_optimizer(model, args=args)
    optimizer = factory()(model, **kwargs)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2, 0.8}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6 / 4}
    factory, kwargs = trainer_optimizer(model, args=args, lr=0.1, weight_decay=0.0, betas=(0.8, 0.9))
    optimizer = factory()(model, **kwargs)
    assert (optimizer.defaults["betas"], optimizer.param_groups[0]["lr"]) == ((0.8, 0.9), 0.1)


def test_a_second_optimizer_has_the_groups_too(tmp_path):
    trainer = make_trainer(tmp_path, make_model("mixtral_ext", "standard", **MUP))
    first = trainer.create_optimizer()
    trainer.optimizer = None
    second = trainer.create_optimizer()
    assert second is not first
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (first, second)]
    assert settings[0] == settings[1]


def test_models_made_by_model_init_train(tmp_path):
    model = make_model("mixtral_ext", "standard", **MUP)
    reference = make_trainer(tmp_path / "a", model).train().training_loss
    args = TrainingArguments(**trainers.arguments(
        tmp_path / "b", learning_rate=LR, weight_decay=DECAY, max_steps=6, warmup_steps=2, lr_scheduler_type="constant"
    ))  # fmt: skip
    trainer = Trainer(
        model_init=lambda: make_model("mixtral_ext", "standard", **MUP),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": trainers.rows(36)}),
        data_collator=trainers.collate,
        optimizer_cls_and_kwargs=trainer_optimizer(model, args=args),
    )
    assert trainer.train().training_loss == pytest.approx(reference, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_resumed_ends_as_one_that_is_not(family, tmp_path):
    whole = make_trainer(tmp_path / "whole", make_model(family, "mixed", **MUP), "linear")
    whole.train()
    saved = make_trainer(
        tmp_path / "cut", make_model(family, "mixed", **MUP), "linear", save_strategy="steps", save_steps=3
    )
    saved.train()
    resumed = make_trainer(tmp_path / "cut", make_model(family, "mixed", seed=9, **MUP), "linear")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert len(resumed.optimizer.param_groups) == len(whole.optimizer.param_groups)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=1e-6)
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in t.optimizer.param_groups] for t in (whole, resumed)
    ]
    assert groups[0] == groups[1]


def test_a_copy_has_the_same_groups():
    model = make_model("olmoe_ext", "full", **MUP)
    twin = copy.deepcopy(model)
    assert settings_by_name(twin, param_groups(twin, LR)) == settings_by_name(model, param_groups(model, LR))


@pytest.mark.parametrize(
    ("schedule", "kwargs"), [("greedy", None), ("reduce_lr_on_plateau", {"min_lr": 1e-5}), ("greedy", {"min_lr": 1e-4})]
)
def test_schedules_with_an_absolute_floor_are_refused(schedule, kwargs, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    with pytest.raises(ValueError, match=rf"lr_scheduler_type='{schedule}' holds every group above min_lr.*cosine"):
        make_trainer(tmp_path, make_model("mixtral_ext", "standard", **MUP), schedule, AdamW, kwargs, **changes)


def test_optimizers_that_are_not_known_are_refused():
    model = make_model("mixtral_ext", "standard", **MUP)
    with pytest.raises(ValueError, match=r"Adadelta is none of AdamW.*write rule='adam'"):
        trainer_optimizer(model, torch.optim.Adadelta, lr=LR)
    with pytest.raises(ValueError, match="give lr, or args"):
        trainer_optimizer(model)
    factory, kwargs = trainer_optimizer(model, torch.optim.Adamax, lr=LR, rule="adam")
    assert {group["lr"] for group in factory()(model, **kwargs).param_groups} == {LR, LR / 4}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_decay_inside_the_gradient_is_refused(optimizer):
    model = make_model("mixtral_ext", "standard", **MUP)
    with pytest.raises(ValueError, match=rf"{optimizer.__name__} adds weight_decay=0.1 to the gradient.*write AdamW"):
        trainer_optimizer(model, optimizer, lr=LR, weight_decay=DECAY)
    for settings in ({}, {"weight_decay": DECAY, "decoupled_weight_decay": True}):
        factory, kwargs = trainer_optimizer(model, optimizer, lr=LR, **settings)
        assert {group["lr"] for group in factory()(model, **kwargs).param_groups} == {LR, LR / 4}


def test_what_the_optimizer_does_not_take_is_refused_before_training():
    model = make_model("mixtral_ext", "standard", **MUP)
    with pytest.raises(TypeError, match="nonsense"):
        trainer_optimizer(model, lr=LR, nonsense=3)
    args = TrainingArguments("unused", use_cpu=True)
    factory, kwargs = trainer_optimizer(model, torch.optim.RMSprop, args=args, rule="adam")  # it has no betas
    assert factory()(model, **kwargs).param_groups[0]["lr"] == args.learning_rate
