"""The bootstrap interval, the pictures, and the card."""

import json

import numpy as np
import pytest

from hf_moe_ext.row_losses import RowLosses
from reporting import compare_losses, draw_load_map, draw_loss_curve, write_metrics, write_results


def _losses(generator: np.random.Generator, rows: int, shift: float) -> tuple[RowLosses, RowLosses]:
    tokens = generator.integers(5, 30, rows).astype(float)
    before = tokens * generator.gamma(4, 1, rows)
    after = before + tokens * generator.normal(shift, 1.0, rows)
    return RowLosses(before, tokens), RowLosses(after, tokens)


def test_interval_covers_the_true_change_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        result = compare_losses(*_losses(generator, 80, -0.3), resamples=300, seed=trial)
        hits += result["low"] <= -0.3 <= result["high"]
    # 95% nominal; three standard deviations of 200 trials are 4.6 points, and 80 rows cost a little coverage
    assert 0.89 <= hits / 200 <= 0.99


def test_pairing_makes_the_interval_narrow() -> None:
    tokens = np.full(50, 10.0)
    before = RowLosses(np.linspace(10, 100, 50), tokens)
    after = RowLosses(before.nats - 2.0, tokens)
    result = compare_losses(before, after)
    assert result["difference"] == pytest.approx(-0.2)
    assert (result["low"], result["high"]) == pytest.approx((-0.2, -0.2))


def test_different_tokens_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        compare_losses(RowLosses(np.ones(3), np.ones(3)), RowLosses(np.ones(3), np.full(3, 2.0)))


def test_pictures_are_written(tmp_path) -> None:
    draw_loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2}], 3.0, 1.0, tmp_path / "a.png")
    draw_load_map({"layers.0.mlp.experts": [0.2, 0.8], "layers.1.mlp.experts": [0.5, 0.5]}, tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def _metrics(**loss: float) -> dict:
    return {
        "command": "recipes/finetune.py --x 1",
        "loss": {"before": 3.0, "after": 2.0, "difference": -1.0, "low": -1.2, "high": -0.8, "rows": 7} | loss,
        "samples": [{"prompt": "a | b", "reference": "c", "before": "d", "after": None}],
    }


def test_results_go_into_a_card_that_keeps_what_was_written(tmp_path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    for _ in range(2):
        shown = write_results(_metrics(), tmp_path, "metrics.json")
    text = (tmp_path / "README.md").read_text()
    assert text.count("[-1.2000, -0.8000]") == shown.count("[-1.2000, -0.8000]") == 1
    assert "recipes/finetune.py --x 1" in text
    assert "license: mit" in text
    assert text.endswith("My own words.\n")
    assert "a \\| b" in text


def test_a_run_that_diverged_keeps_its_metrics_and_gets_no_card(tmp_path) -> None:
    assert "loss.after is nan" in write_results(_metrics(after=float("nan")), tmp_path, "metrics.json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_are_plain_json(tmp_path) -> None:
    write_metrics({"a": np.float64(1.5), "b": [np.int64(2)], "c": {"d": "é"}}, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.5, "b": [2], "c": {"d": "é"}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
