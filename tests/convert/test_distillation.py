"""Distillation by the plain Trainer: what it minimises, what it trains, what it wins back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_moe_ext.convert import to_dcca
from hf_moe_ext.convert.distillation import (
    DistillationSettings,
    distillation_loss,
    measure_perplexity,
    relative_output_loss,
)


def test_loss_is_the_mean_divergence_per_token() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    naive = sum(float((p[i, j] * (p[i, j] / q[i, j]).log()).sum()) for i in range(2) for j in range(3)) / 6
    assert float(distillation_loss(student, teacher)) == pytest.approx(naive, rel=1e-5)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_output_loss_is_relative_to_each_block() -> None:
    ones = torch.ones(2, 3)
    assert float(relative_output_loss([ones * 2, ones * 10], [ones, ones * 20])) == pytest.approx(1 + 0.25)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": -1}, "num_steps must be an integer of at least 0; got -1"),
        ({"num_steps": 1.5}, "num_steps must be an integer"),
        ({"batch_rows": 0}, "batch_rows must be an integer of at least 1; got 0"),
        ({"learning_rate": 0.0}, r"learning_rate must be above 0; got 0\.0"),
        ({"output_loss_coef": -0.1}, r"output_loss_coef must be at least 0; got -0\.1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_done(
    source: Path, train_rows: Tensor, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        to_dcca(source, tmp_path / "out", train_rows[:16], distillation=DistillationSettings(**settings))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train_router", [False, True])
def test_only_the_converted_layers_train(source: Path, train_rows: Tensor, tmp_path: Path, train_router: bool) -> None:
    rows, chosen = train_rows[:64], {"latent_size": 8, "layers": [1]}
    to_dcca(source, tmp_path / "before", rows, **chosen)  # type: ignore[arg-type]
    steps = DistillationSettings(4, learning_rate=1e-3, output_loss_coef=0.1, train_router=train_router)
    report = to_dcca(source, tmp_path / "after", rows, distillation=steps, **chosen)  # type: ignore[arg-type]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = ["descend.weight", "ascend.weight", "experts.gate_up_proj", "experts.down_proj"]
    assert changed == {f"model.layers.1.mlp.{n}" for n in [*trained, *(["gate.weight"] if train_router else [])]}
    assert len(report.distillation_losses) == 4
    assert sorted(p.name for p in (tmp_path / "after").iterdir()) == sorted(
        p.name for p in (tmp_path / "before").iterdir()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert measure_perplexity(model, rows[56:]) == pytest.approx(report.perplexity_distilled, rel=1e-5)


@pytest.mark.slow
def test_distillation_recovers_half_of_the_gap(
    source: Path, train_rows: Tensor, held_out_rows: Tensor, tmp_path: Path
) -> None:
    steps = DistillationSettings(300, learning_rate=3e-3, batch_rows=16)
    report = to_dcca(source, tmp_path / "out", train_rows, held_out=held_out_rows, latent_size=8, distillation=steps)
    assert report.perplexity_source < report.perplexity_distilled < report.perplexity_converted  # type: ignore[operator]
    assert report.recovered_fraction is not None
    assert report.recovered_fraction > 0.5
