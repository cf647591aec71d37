"""Muon on the hidden matrices, AdamW on the rest: the spectral condition, one optimizer, training and going on with it."""

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, get_scheduler

from hf_moe_ext.mup import MuonWithAdamW, muon_groups, trainer_optimizer
from hf_moe_ext.mup.roles import assign_roles
from hf_moe_ext.mup.rules import HIDDEN
from hf_moe_ext.mup.spectral import adjustment
from hf_moe_ext.mup.widening import change, widen
from support import muon_ranks, zoo
from support.latent_models import make_config, make_model
from support.ranks import run_ranks

BOTH = ["original", "match_rms_adamw"]
MUP: dict[str, Any] = {"mup": "mup", "mup_base_hidden_size": 32}


def build(config: Any, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def factors(model: Any, adjust_lr_fn: str | None) -> dict[str, float]:
    """Parameter -> learning rate factor, of Muon's groups only."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_groups(model, 1.0, 1.0, adjust_lr_fn=adjust_lr_fn)
    return {names[id(p)]: group["lr"] for group in groups if group["rule"] == "muon" for p in group["params"]}


def sizes(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build(config).named_parameters()}


@pytest.mark.parametrize("adjust_lr_fn", BOTH)
@pytest.mark.parametrize("block", ["standard", "full"])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_factors_follow_the_shapes(adjust_lr_fn: str, block: str, width: int) -> None:
    """Base and wide model are both built: a step's spectral norm grows as sqrt(fan_out / fan_in), whatever torch adjusts."""
    base = make_config("olmoe_ext", block, **MUP)
    wide = widen(base, width)
    before, after = sizes(base), sizes(wide)
    with torch.device("meta"):
        found = factors(build(wide), adjust_lr_fn)
    assert {name.split(".")[-2] for name in found} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, factor in found.items():
        (a0, b0), (a, b) = before[name], after[name]
        moved = factor * adjustment(a, b, adjust_lr_fn) / adjustment(a0, b0, adjust_lr_fn)
        assert moved == pytest.approx(math.sqrt((a / b) / (a0 / b0)), rel=1e-12), name
    expected = 1.0 if adjust_lr_fn == "original" else (32 / width) ** 0.5
    assert found["model.layers.0.self_attn.k_proj.weight"] == pytest.approx(expected)


@pytest.mark.parametrize("adjust_lr_fn", BOTH)
def test_unequal_axes(adjust_lr_fn: str) -> None:
    """A shared expert whose matrices are wide in the base and tall in the model, so torch's adjustment changes its branch."""
    base = make_config("mixtral_ext", "full", **MUP | {"mup_base_intermediate_size": 48})
    wide = change(widen(base, 64), {"intermediate_size": 48 * 8, "moe_shared_expert_intermediate_size": 16 * 8})
    before, after = sizes(base), sizes(wide)
    gate = "model.layers.0.mlp.shared_expert.up_proj.weight"
    assert (before[gate], after[gate]) == ((16, 32), (128, 64))
    with torch.device("meta"):
        found = factors(build(wide), adjust_lr_fn)
    for name in (gate, gate.replace("up_proj", "down_proj")):
        (a0, b0), (a, b) = before[name], after[name]
        moved = found[name] * adjustment(a, b, adjust_lr_fn) / adjustment(a0, b0, adjust_lr_fn)
        assert moved == pytest.approx(math.sqrt((a / b) / (a0 / b0)), rel=1e-12)
    # By hand: wanted sqrt((128 / 64) / (16 / 32)) = 2; torch makes it sqrt(2) and 1, or 0.2 sqrt(128) and 0.2 sqrt(32).
    assert found[gate] == pytest.approx(2 / math.sqrt(2) if adjust_lr_fn == "original" else 2 / 2)


def batch(rows: int = 8) -> Tensor:
    return torch.randint(3, zoo.VOCAB_SIZE, (rows, 24), generator=torch.Generator().manual_seed(5))


def take_steps(model: Any, optimizer: Any, steps: int, scheduler: Any = None) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adjust_lr_fn", BOTH)
def test_real_steps_move_by_the_condition(adjust_lr_fn: str) -> None:
    """Spectral norm of three steps over sqrt(fan_out / fan_in): the same at every width, to what Newton-Schulz leaves."""
    moved: dict[int, dict[str, float]] = {}
    for width in (32, 64, 128, 256):
        model = build(widen(make_config("olmoe_ext", "standard", **MUP), width))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        make, keywords = trainer_optimizer(model, Muon, lr=0.05, adam_lr=1e-3, adjust_lr_fn=adjust_lr_fn)
        take_steps(model, make()(model, **keywords), 3)
        moved[width] = {}
        for name, p in model.named_parameters():
            if "_proj.weight" in name:
                size = torch.linalg.matrix_norm(p.detach() - start[name], 2).item()
                moved[width][name] = size / math.sqrt(p.shape[0] / p.shape[1])
    for name, size in moved[32].items():
        assert size > 0
        for width in (64, 128, 256):
            # Without the factor "match_rms_adamw" would give sqrt(8) = 2.8 at 256.
            assert moved[width][name] / size == pytest.approx(1, abs=0.3), (name, width)


def test_who_gets_what() -> None:
    model = make_model("mixtral_ext", "full", **MUP)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_groups(model, 0.02, 3e-3, 0.1)
    rules = {names[id(p)]: group["rule"] for group in groups for p in group["params"]}
    roles = assign_roles(model)
    assert rules.keys() == roles.keys()
    assert sum(len(group["params"]) for group in groups) == len(rules)
    for name, rule in rules.items():
        matrix = roles[name].role == HIDDEN and not name.endswith(("experts.up_proj", "experts.down_proj"))
        assert rule == ("muon" if matrix else "adam"), name
    muon = {name.split(".", 3)[-1] for name, rule in rules.items() if rule == "muon"}
    projections = {f"self_attn.{p}_proj.weight" for p in "qkvo"}
    assert muon == projections | {
        f"mlp.{n}.weight" for n in ("descend", "ascend", "shared_expert.up_proj", "shared_expert.down_proj")
    }


def test_a_latent_held_fixed_is_no_hidden_matrix() -> None:
    config = widen(make_config("olmoe_ext", "gated", **MUP), 64, hold_latent=True)
    with torch.device("meta"):
        found = factors(build(config), None)
    assert not [name for name in found if "descend" in name or "ascend" in name]


@pytest.mark.parametrize("adjust_lr_fn", BOTH)
def test_equals_muon_and_adamw_apart(adjust_lr_fn: str) -> None:
    """Bit for bit what torch's two optimizers do on the same groups."""
    config = widen(make_config("olmoe_ext", "standard", **MUP), 64)
    one, two = build(config), build(config)
    settings: dict[str, Any] = {"lr": 0.02, "adam_lr": 3e-3, "weight_decay": 0.1}
    make, keywords = trainer_optimizer(
        one, Muon, **settings, adjust_lr_fn=adjust_lr_fn, momentum=0.9, betas=(0.8, 0.95)
    )
    optimizer = make()(one, **keywords)
    assert isinstance(optimizer, MuonWithAdamW)
    groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adam": []}
    for group in muon_groups(two, **settings, adjust_lr_fn=adjust_lr_fn):
        groups[group.pop("rule")].append(group)
    apart = Muon(groups["muon"], momentum=0.9), AdamW(groups["adam"], betas=(0.8, 0.95))
    ours = take_steps(one, optimizer, 4)
    theirs = []
    for _ in range(4):
        two.zero_grad()
        loss = two(input_ids=batch(), labels=batch()).loss
        loss.backward()
        for each in apart:
            each.step()
        theirs.append(loss.item())
    assert ours == theirs
    assert ours[-1] < ours[0]
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_weight_decay_is_independent_of_the_width() -> None:
    for width in (32, 128):
        model = build(widen(make_config("olmoe_ext", "standard", **MUP), width))
        groups = muon_groups(model, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        shares = {round(group["lr"] * group["weight_decay"], 12) for group in groups if group["weight_decay"]}
        assert shares == {0.002}
    coupled = muon_groups(model, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", independent_weight_decay=False)
    assert {group["weight_decay"] for group in coupled} == {0.0, 0.1}


def test_state_goes_through_a_checkpoint_and_a_copy() -> None:
    model = build(widen(make_config("olmoe_ext", "standard", **MUP), 64))
    make, keywords = trainer_optimizer(model, Muon, lr=0.02, adam_lr=3e-3)
    optimizer = make()(model, **keywords)
    take_steps(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    again = make()(twin, **keywords)
    again.load_state_dict(state)
    assert take_steps(model, optimizer, 3) == take_steps(twin, again, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    pair = copy.deepcopy((model, optimizer))
    assert take_steps(*pair, 2) == take_steps(model, optimizer, 2)
    assert any("momentum_buffer" in entry for entry in state["state"].values())
    assert any("exp_avg_sq" in entry for entry in state["state"].values())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_is_called_once() -> None:
    model = build(make_config("olmoe_ext", "standard", **MUP))
    make, keywords = trainer_optimizer(model, Muon, lr=0.02, adam_lr=3e-3)
    calls = []

    def closure() -> Tensor:
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        calls.append(loss)
        return loss

    assert make()(model, **keywords).step(closure) is calls[0]
    assert len(calls) == 1


@pytest.mark.slow
def test_split_by_fsdp2() -> None:
    """Whole matrices are made orthogonal, not shards; equal only to what bfloat16, in which torch does that, leaves."""
    for found in run_ranks(muon_ranks.train_split, 2):
        assert found["split"] == pytest.approx(found["whole"], rel=5e-3)
        assert found["split"][0] == pytest.approx(found["whole"][0], abs=1e-6)
        assert found["split"][-1] < found["split"][0] - 1
        # Directions of which the gradient has next to nothing are rounding noise, blown up by torch's iteration.
        left, values, right = torch.linalg.svd(found["gradient"])
        strong = int((values > 0.1 * values[0]).sum())
        whole, split = (left[:, :strong].T @ found[f"{k} moved"] @ right[:strong].T for k in ("whole", "split"))
        assert strong > 3
        assert (split - whole).norm() < 0.05 * whole.norm()


class KeepRates(TrainerCallback):
    """Learning rates of all groups at every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def train(folder: Path, steps: int, resume: bool = False, schedule: str = "cosine", **changes: Any) -> Any:
    model = build(widen(make_config("olmoe_ext", "standard", **MUP), 64))
    rows: Any = [{"input_ids": row, "labels": row} for row in batch(40)]
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True, "seed": 0},
        **{"learning_rate": 0.02, "weight_decay": 0.1, "lr_scheduler_type": schedule, "report_to": "none"},
        **{"save_steps": 4, "save_strategy": "steps", "disable_tqdm": True, "dataloader_pin_memory": False},
        **{"logging_steps": 1, "warmup_steps": 2, **changes},
    )
    kept = KeepRates()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[kept],
        optimizer_cls_and_kwargs=trainer_optimizer(model, Muon, args=arguments, adam_lr=3e-3),
    )
    if steps < 8:
        trainer.add_callback(StopAt(steps))
    trainer.train(resume_from_checkpoint=resume or None)
    return model, trainer, kept


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_trainer_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    whole, trainer, kept = train(tmp_path / "whole", 8)
    train(tmp_path / "parts", 4)
    resumed, again, _ = train(tmp_path / "parts", 8, resume=True)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (trainer, again)]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert max(logged) == pytest.approx(0.02)  # of Muon, at the base's rate
    assert len(kept.rates) == 8
    start = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    for rates in kept.rates:
        shares = [rate / first for rate, first in zip(rates, start, strict=True)]
        assert shares == pytest.approx([shares[0]] * len(shares), rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup_stable_decay"])
def test_schedules_keep_the_ratios(schedule: str) -> None:
    model = build(widen(make_config("olmoe_ext", "standard", **MUP), 64))
    make, keywords = trainer_optimizer(model, Muon, lr=0.02, adam_lr=3e-3, adjust_lr_fn="match_rms_adamw")
    optimizer = make()(model, **keywords)
    extra = {"scheduler_specific_kwargs": {"num_decay_steps": 3}} if schedule == "warmup_stable_decay" else {}
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=8, **extra)
    assert isinstance(scheduler, LambdaLR)
    start = [group["initial_lr"] for group in optimizer.param_groups]
    assert len({round(rate, 9) for rate in start}) > 2
    seen = []
    for _ in range(7):
        take_steps(model, optimizer, 1, scheduler)
        shares = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, start, strict=True)]
        assert shares == pytest.approx([shares[0]] * len(shares), rel=1e-12)
        seen.append(shares[0])
    assert len(set(seen)) > 2


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_the_guard_is_silent_on_it(heard: pytest.LogCaptureFixture) -> None:
    for adjust_lr_fn in BOTH:
        model = build(widen(make_config("olmoe_ext", "full", **MUP), 64))
        make, keywords = trainer_optimizer(model, Muon, lr=0.02, adam_lr=3e-3, adjust_lr_fn=adjust_lr_fn)
        optimizer = make()(model, **keywords)
        take_steps(model, optimizer, 2, get_scheduler("cosine", optimizer, 1, 6))
    assert "µP" not in heard.text


def test_the_guard_sees_stock_rates(heard: pytest.LogCaptureFixture) -> None:
    """As torch's own docstring does it: matrices to one, the rest to the other."""
    model = build(widen(make_config("olmoe_ext", "standard", **MUP), 64))
    hidden = [p for name, p in model.named_parameters() if "_proj.weight" in name]
    rest = [p for name, p in model.named_parameters() if "_proj.weight" not in name]
    for part in (Muon(hidden, lr=0.02), AdamW(rest, lr=3e-3)):
        take_steps(model, part, 1)
    # All hidden matrices have one factor here, so what Muon does cannot be told from a smaller rate; AdamW's can.
    assert "AdamW gives the parameters of a µP model learning rates that are not µP's" in heard.text
    assert "Muon gives" not in heard.text
    heard.clear()
    take_steps(model, Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02), 1)
    assert "Muon trains model.embed_tokens.weight of a µP model, and Muon is for its hidden matrices only" in heard.text


def test_the_guard_sees_stock_muon_where_axes_differ(heard: pytest.LogCaptureFixture) -> None:
    base = make_config("mixtral_ext", "full", **MUP | {"mup_base_intermediate_size": 48})
    model = build(change(widen(base, 64), {"intermediate_size": 48 * 8, "moe_shared_expert_intermediate_size": 16 * 8}))
    roles = assign_roles(model)
    matrices = [p for name, p in model.named_parameters() if roles[name].role == HIDDEN and p.ndim == 2]
    take_steps(model, Muon(matrices, lr=0.02), 1)
    assert "Muon gives the parameters of a µP model learning rates that are not µP's" in heard.text


def test_the_guard_sees_a_schedule_of_one_group_only(heard: pytest.LogCaptureFixture) -> None:
    model = build(widen(make_config("olmoe_ext", "standard", **MUP), 64))
    make, keywords = trainer_optimizer(model, Muon, lr=0.02, adam_lr=3e-3)
    optimizer = make()(model, **keywords)
    take_steps(model, optimizer, 1)
    # Another ratio between the two optimizers is a choice, not a mistake.
    for group in optimizer.param_groups:
        group["lr"] *= 0.5 if group["rule"] == "muon" else 1
    take_steps(model, optimizer, 1)
    assert "µP" not in heard.text
    next(group for group in optimizer.param_groups if group["rule"] == "adam")["lr"] *= 2
    take_steps(model, optimizer, 1)
    assert "MuonWithAdamW: its schedule has changed the ratios" in heard.text
    assert heard.text.count("has changed the ratios") == 1  # the two inside it are not looked at again


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({}, ValueError, "give adam_lr too, or write adjust_lr_fn='match_rms_adamw'"),
        (
            {"adam_lr": 1e-3, "adjust_lr_fn": "rms"},
            ValueError,
            "adjust_lr_fn must be one of 'original', 'match_rms_adamw'",
        ),
        ({"adam_lr": -1.0}, ValueError, "adam_lr must be a number of at least 0; got -1.0"),
        ({"adam_lr": 1e-3, "rule": "sgd"}, ValueError, "Muon has a rule of its own, got rule='sgd'"),
        ({"adam_lr": 1e-3, "momentun": 0.9}, TypeError, "momentun"),
        ({"adam_lr": 1e-3, "momentum": -0.9}, ValueError, "momentum should be >= 0"),
    ],
)
def test_refusals(keywords: dict[str, Any], error: type[Exception], words: str) -> None:
    model = make_model("olmoe_ext", "standard", **MUP)
    with pytest.raises(error, match=words):
        trainer_optimizer(model, Muon, lr=0.02, **keywords)


def test_models_without_hidden_matrices() -> None:
    with pytest.raises(ValueError, match="no hidden matrix of this model requires a gradient"):
        trainer_optimizer(make_model("olmoe_ext", "standard"), Muon, lr=0.02, adam_lr=1e-3)
    adapter = get_peft_model(make_model("olmoe_ext", "standard", **MUP), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="nor is an adapter"):
        trainer_optimizer(adapter, Muon, lr=0.02, adam_lr=1e-3)
    with pytest.raises(ValueError, match="adam_lr is for Muon, got AdamW"):
        trainer_optimizer(make_model("olmoe_ext", "standard", **MUP), AdamW, lr=0.02, adam_lr=1e-3)


def test_groups_of_another_kind() -> None:
    matrix, stack = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="a group needs rule='muon' or rule='adam', got None"):
        MuonWithAdamW([{"params": [matrix]}], lr=0.1)
    with pytest.raises(ValueError, match=r"Muon takes matrices only, got a tensor of shape \(2, 2, 2\)"):
        MuonWithAdamW([{"params": [stack], "rule": "muon"}], lr=0.1)
    optimizer = MuonWithAdamW([{"params": [matrix], "rule": "muon"}], lr=0.1)
    optimizer.add_param_group({"params": [stack], "rule": "adam"})
    matrix.grad, stack.grad = torch.ones_like(matrix), torch.ones_like(stack)
    optimizer.step()
    assert matrix.abs().min() > 0
    assert stack.abs().min() > 0
