"""Rates of a compression: chosen within bytes or an error, predicted, and what costs more than it saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM

from hf_moe_ext.convert import compress
from support.upcycled import load, logits, relative, save_dense, save_pair, upcycle_by_hand

STOCK = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
LOSSLESS = {"encode": "quantize", "bits": 16}


def test_rates_that_cost_more_than_they_save_warn_with_the_break_even(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16)
    keys = {"parent": tmp_path / "dense", "dry_run": True}
    report = compress(tmp_path / "moe", tmp_path / "out", encode="magnitude_drop", drop_rate=0.7, **keys)
    assert "it pays with drop_rate above 0.75" in report.warnings[0]
    assert compress(tmp_path / "moe", tmp_path / "out", encode="magnitude_drop", drop_rate=0.8, **keys).warnings == []
    assert not (tmp_path / "out").exists()


def test_dry_run_predicts_what_is_written(tmp_path: Path) -> None:
    save_pair(tmp_path)
    for number, keys in enumerate(({"drop_rate": 0.5}, {"encode": "quantize"}, {"encode": "svd"})):
        dry = compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", dry_run=True, **keys)
        done = compress(tmp_path / "moe", tmp_path / f"out{number}", parent=tmp_path / "dense", **keys)
        assert not dry.written
        assert dry.predicted_file_bytes == done.predicted_file_bytes >= (done.file_bytes_after or 0)
        for ours, theirs in zip(dry.matrices, done.matrices, strict=True):
            assert ours.predicted_error == pytest.approx(theirs.output_error, rel=0.15)
            assert ours.bytes_after == theirs.bytes_after
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encode", ["random_drop", "magnitude_drop", "svd", "quantize"])
def test_target_bytes_is_met_and_gives_more_to_what_needs_more(tmp_path: Path, encode: Any) -> None:
    dense = save_dense(tmp_path / "dense")
    moe = upcycle_by_hand(dense, scale=0.02)
    with torch.no_grad():  # the second layer's experts went further
        other = upcycle_by_hand(dense, scale=0.2, seed=5)
        moe.model.layers[1].load_state_dict(other.model.layers[1].state_dict())
    moe.save_pretrained(tmp_path / "moe")
    keys: dict[str, Any] = {"parent": tmp_path / "dense", "encode": encode, "max_shard_bytes": 10**9}
    with pytest.raises(ValueError, match="the smallest achievable is") as caught:
        compress(tmp_path / "moe", tmp_path / "out", target_bytes=1000, **keys)
    least = int(str(caught.value).split("achievable is ")[1].split(";")[0].replace(",", ""))
    with pytest.raises(ValueError, match="cannot be met"):
        compress(tmp_path / "moe", tmp_path / "out", target_bytes=least - 1, dry_run=True, **keys)
    compress(tmp_path / "moe", tmp_path / "out", target_bytes=least, dry_run=True, **keys)
    target = round(least * 1.15)
    report = compress(tmp_path / "moe", tmp_path / "out", target_bytes=target, **keys)
    assert (report.file_bytes_after or 0) <= target
    sizes = [sum(row.bytes_after for row in report.matrices if row.layer == layer) for layer in (0, 1)]
    assert sizes[1] > sizes[0]
    config = load(tmp_path / "out").config
    name = {"svd": "ders_rank", "quantize": "ders_bits"}.get(encode, "ders_drop_rate")
    assert isinstance(getattr(config, name), list)
    assert relative(logits(load(tmp_path / "out")), logits(moe)) < 1


def test_max_error_is_kept_by_every_matrix(tmp_path: Path) -> None:
    save_pair(tmp_path, scale=0.1)
    keys: dict[str, Any] = {"parent": tmp_path / "dense", "encode": "quantize"}
    report = compress(tmp_path / "moe", tmp_path / "out", max_error=0.02, **keys)
    assert all((row.output_error or 1) <= 0.02 for row in report.matrices)
    assert {row.encoding for row in report.matrices} <= {"quantize bits=4", "quantize bits=8"}
    with pytest.raises(ValueError, match="max_error=1e-06 cannot be met: the least relative output error of layer"):
        compress(tmp_path / "moe", tmp_path / "o", parent=tmp_path / "dense", encode="random_drop", max_error=1e-6)
