"""Compression of upcycled experts: what it reads, how close the result is, what it refuses, nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM

from hf_moe_ext.convert import compress
from hf_moe_ext.convert.streaming_reader import StreamingReader
from support.killed import kill_while_writing
from support.upcycled import COMMON, MOES, save_dense, save_pair, token_ids, upcycle_by_hand

STOCK = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
LOSSLESS = {"encode": "quantize", "bits": 16}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=token_ids()).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", MOES)
@pytest.mark.parametrize("original", [True, False])
def test_whole_deltas_give_the_logits_back(tmp_path: Path, family: str, original: bool) -> None:
    """From one matrix per expert and from stacks, in many shards."""
    _, moe = save_pair(tmp_path, family)
    moe.save_pretrained(tmp_path / "shards", max_shard_size="20KB", save_original_format=original)
    report = compress(tmp_path / "shards", tmp_path / "out", parent=tmp_path / "dense", **LOSSLESS)
    found = load(tmp_path / "out")
    assert type(found).__name__ == STOCK[family].__name__.replace("ForCausalLM", "ExtForCausalLM")
    torch.testing.assert_close(logits(found), logits(moe), rtol=0, atol=5e-6)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert max(row.output_error for row in report.matrices if row.output_error is not None) < 1e-7
    assert len(report.matrices) == 6


def test_ext_source_of_standard_blocks(tmp_path: Path) -> None:
    from hf_moe_ext.models import MixtralExtConfig, MixtralExtForCausalLM

    _, moe = save_pair(tmp_path)
    settings = {k: v for k, v in moe.config.to_dict().items() if k != "model_type"}
    ext = MixtralExtForCausalLM(MixtralExtConfig(**settings)).eval()
    ext.load_state_dict(moe.state_dict())
    ext.save_pretrained(tmp_path / "ext")
    compress(tmp_path / "ext", tmp_path / "out", parent=tmp_path / "dense", **LOSSLESS)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(moe), rtol=0, atol=5e-6)
    compress(tmp_path / "ext", tmp_path / "stock", parent=tmp_path / "dense", export="stock", **LOSSLESS)
    assert type(load(tmp_path / "stock")) is MixtralForCausalLM


@pytest.mark.parametrize(
    ("keys", "bound"),
    [
        ({"encode": "random_drop", "drop_rate": 0.5}, 0.06),
        ({"encode": "random_drop", "drop_rate": 0.5, "bits": 8}, 0.06),
        ({"encode": "magnitude_drop", "drop_rate": 0.5}, 0.02),
        ({"encode": "magnitude_drop", "drop_rate": 0.5, "bits": 4}, 0.02),
        ({"encode": "svd", "rank": 16}, 0.03),
        ({"encode": "quantize", "bits": 4}, 0.01),
        ({"encode": "quantize", "bits": 1, "group_size": 16}, 0.04),
    ],
    ids=str,
)
def test_every_encoding_opens_and_is_as_near_as_reported(tmp_path: Path, keys: dict[str, Any], bound: float) -> None:
    """The written base and deltas, decoded from the model that was opened, have the reported error."""
    _, moe = save_pair(tmp_path)
    report = compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", seed=3, **keys)
    found = load(tmp_path / "out")
    assert 0 < relative(logits(found), logits(moe)) < 3 * bound
    for row in report.matrices:
        assert row.output_error is not None
        assert 0 < row.output_error < bound
        experts, source = found.model.layers[row.layer].mlp.experts, moe.model.layers[row.layer].mlp.experts
        errors = []
        for number in range(4):
            base = experts.down_proj if row.matrix == "down" else experts.gate_up_proj.chunk(2)[row.matrix == "up"]
            wanted = source.down_proj[number]
            if row.matrix != "down":
                wanted = source.gate_up_proj[number].chunk(2)[row.matrix == "up"]
            rebuilt = base + experts.deltas(row.matrix).delta(number).decode()
            errors.append(((rebuilt - wanted).norm() / wanted.norm()) ** 2)
        # The tests' norms have a gain of 1, so that outputs are as the matrices are.
        assert row.output_error == pytest.approx(float(torch.stack(errors).mean().sqrt().detach()), rel=1e-3)
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["matrices"] == report.as_dict()["matrices"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_else_keeps_its_bytes_and_bytes_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    save_pair(tmp_path, dtype=dtype)
    report = compress(
        tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", drop_rate=0.7, max_shard_bytes=10**9
    )
    before, after = load_file(tmp_path / "moe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    others = {name for name in before if ".experts." not in name}
    for name in others:
        kept = after[name.replace("block_sparse_moe", "mlp")]
        assert kept.dtype == before[name].dtype
        assert torch.equal(kept.view(torch.uint8), before[name].view(torch.uint8))
    assert len(after) == len(others) + 2 * (2 + 3 * 2)
    experts = sum(tensor.numel() * tensor.element_size() for name, tensor in after.items() if ".experts." in name)
    assert sum(row.bytes_after for row in report.matrices) == experts
    assert report.file_bytes_before == (tmp_path / "moe/model.safetensors").stat().st_size
    assert report.file_bytes_after == (tmp_path / "out/model.safetensors").stat().st_size <= report.predicted_file_bytes
    dense = load_file(tmp_path / "dense/model.safetensors")
    assert torch.equal(after["model.layers.1.mlp.experts.down_proj"], dense["model.layers.1.mlp.down_proj.weight"])
    # With p = 0.7 four experts take a base and 4 * 0.3 of them, and 32 bytes of seed each.
    assert report.matrices[0].bytes_after == 48 * 32 * dtype.itemsize + 4 * (round(48 * 32 * 0.3) * dtype.itemsize + 32)


def test_deltas_are_formed_in_float32(tmp_path: Path) -> None:
    """A parent in float32 under experts in bfloat16: the base is rounded first, and the deltas make up for it."""
    dense, _ = save_pair(tmp_path, dtype=torch.bfloat16)
    dense.float().save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    dense.save_pretrained(tmp_path / "dense")
    report = compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", **LOSSLESS)
    # Rounding deltas of 3 % to bfloat16 errs by 0.2 % of them.
    assert max(row.output_error or 1 for row in report.matrices) < 1e-4


def test_measures_are_those_of_the_weights(tmp_path: Path) -> None:
    dense, moe = save_pair(tmp_path, scale=0.05)
    report = compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense", drop_rate=0.8)
    row = next(row for row in report.matrices if (row.layer, row.matrix) == (1, "up"))
    base = dense.model.layers[1].mlp.up_proj.weight
    experts = [matrix.chunk(2)[1] for matrix in moe.model.layers[1].mlp.experts.gate_up_proj]
    cosines = [float(torch.cosine_similarity(e.flatten(), base.flatten(), dim=0)) for e in experts]
    assert row.least_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert row.relative_norm == pytest.approx(0.05, rel=1e-3)
    pairs = [float((a - b).norm()) for i, a in enumerate(experts) for b in experts[i + 1 :]]
    norm = sum(float(e.norm()) for e in experts) / 4
    assert row.distance_before == pytest.approx(sum(pairs) / 6 / norm, rel=1e-5)
    # A random drop: sqrt(p / (1 - p)) times the relative size of the delta, before; near it after.
    assert row.predicted_error == pytest.approx(2 * 0.05, rel=0.01)
    assert row.output_error == pytest.approx(2 * 0.05, rel=0.1)
    assert row.distance_after == pytest.approx(0.05 * (2 * 5) ** 0.5, rel=0.15)


def test_export_stock_is_the_compressed_model(tmp_path: Path) -> None:
    save_pair(tmp_path)
    keys = {"parent": tmp_path / "dense", "drop_rate": 0.5}
    compress(tmp_path / "moe", tmp_path / "ders", **keys)
    compress(tmp_path / "moe", tmp_path / "stock", export="stock", **keys)
    stock = load(tmp_path / "stock")
    assert type(stock) is MixtralForCausalLM
    assert "ders" not in (tmp_path / "stock/config.json").read_text()
    torch.testing.assert_close(logits(stock), logits(load(tmp_path / "ders")), rtol=0, atol=5e-6)
    assert set(StreamingReader(tmp_path / "stock").names) == set(StreamingReader(tmp_path / "moe").names)


@pytest.mark.parametrize("base", ["mean", "least_squares"])
def test_no_parent_warns_with_numbers(tmp_path: Path, base: Any) -> None:
    _, moe = save_pair(tmp_path, scale=0.1)
    report = compress(tmp_path / "moe", tmp_path / "out", base=base, encode="svd", rank=8)
    assert f"base={base!r} is no dense parent" in report.warnings[0]
    assert f"{min(row.least_cosine for row in report.matrices):.4f}" in report.warnings[0]
    experts = torch.stack([matrix.chunk(2)[0] for matrix in moe.model.layers[0].mlp.experts.gate_up_proj])
    found = load(tmp_path / "out").model.layers[0].mlp.experts.gate_up_proj.chunk(2)[0]
    near_mean = float((found - experts.mean(0)).norm() / experts.mean(0).norm())
    assert (near_mean < 1e-6) is (base == "mean")
    if base == "least_squares":
        assert len(report.base_errors) == 6
        assert all(0 < ratio < 1 for ratio in report.base_errors.values())
        mean = compress(tmp_path / "moe", tmp_path / "mean", base="mean", encode="svd", rank=8)
        for ours, theirs in zip(report.matrices, mean.matrices, strict=True):
            assert (ours.output_error or 9) < (theirs.output_error or 0)


def test_refuses_experts_that_share_no_base(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    moe = upcycle_by_hand(dense)
    torch.manual_seed(9)
    with torch.no_grad():  # one expert of one layer is drawn anew, as Drop-Upcycling does in part
        moe.model.layers[1].mlp.experts.down_proj[2].normal_(std=0.15)
    moe.save_pretrained(tmp_path / "moe")
    keys = {"parent": tmp_path / "dense", **LOSSLESS}
    words = (
        r"layer 1, down of expert 2 has cosine -?0\.0\d+ to the parent's matrix .*below min_cosine=0.9, as have 1 of 6"
    )
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", **keys)
    with pytest.raises(ValueError, match=r"the experts' mean .* A MoE trained from scratch does not fit"):
        compress(tmp_path / "moe", tmp_path / "out", base="mean", **LOSSLESS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    report = compress(tmp_path / "moe", tmp_path / "out", force=True, **keys)
    assert "layer 1, down of expert 2" in report.warnings[0]
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(moe), rtol=0, atol=5e-6)


def test_unrelated_experts_are_refused_with_any_base(tmp_path: Path) -> None:
    """Two unrelated experts have a cosine of 0.71 to their mean, the most that unrelated ones can have."""
    model_class, config_class, own = MOES["mixtral"]
    torch.manual_seed(0)
    model_class(config_class(**{**COMMON, **own, "num_local_experts": 2})).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"cosine 0\.[67]\d+ to the experts' mean"):
        compress(tmp_path / "moe", tmp_path / "out", base="mean")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": 64}, "has hidden_size=64, the MoE needs 32"),
        ({"vocab_size": 97}, "has vocab_size=97, the MoE needs 96"),
        ({"intermediate_size": 64}, "has intermediate_size=64, the MoE needs 48"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers=3, the MoE needs 2"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu', the MoE needs 'silu'"),
        ({"mlp_bias": True}, "has mlp_bias=True"),
    ],
    ids=str,
)
def test_another_parent_is_refused_by_what_differs(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    save_pair(tmp_path)
    save_dense(tmp_path / "other", **keys)
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_parent_of_another_architecture_or_training(tmp_path: Path) -> None:
    save_pair(tmp_path)
    save_dense(tmp_path / "qwen", "qwen3_moe")
    with pytest.raises(ValueError, match="model_type 'qwen3'; experts of mixtral come from llama or mistral"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "qwen")
    other = save_dense(tmp_path / "other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.15)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"below min_cosine=0.9, as have 6 of 6 matrices"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "other")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"base": "median"}, "base must be one of parent, mean, least_squares, got 'median'"),
        ({"base": "parent", "parent": None}, "base='parent' needs parent"),
        ({"base": "mean"}, "base='mean' does not use a parent"),
        ({"base": "least_squares", "parent": None}, "its expected error is least at the mean"),
        ({"drop_rate": 1.5}, "drop_rate must lie strictly between 0 and 1"),
        ({"encode": "svd", "rank": 33}, "rank must be at least 1 and at most 32"),
        ({"target_bytes": 10**6, "max_error": 0.1}, "give one of them"),
        ({"target_bytes": 10**6, "drop_rate": 0.5}, "leave drop_rate=0.5 out"),
        ({"max_error": -1}, "max_error must be a positive number, got -1"),
        ({"min_cosine": 2}, "min_cosine must be from -1 to 1, got 2"),
        ({"export": "gguf"}, "export must be 'stock' or None, got 'gguf'"),
        ({"export": "stock", "target_bytes": 10**6}, "leave target_bytes out"),
        ({"max_loss": 0.1}, "max_loss=0.1 needs calibration"),
        ({"calibration": "no/such.txt"}, "is no JSONL, text file or folder of texts"),
    ],
    ids=str,
)
def test_bad_requests(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    save_pair(tmp_path)
    with pytest.raises(ValueError, match=words):
        compress(tmp_path / "moe", tmp_path / "out", **{"parent": tmp_path / "dense", **keys})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


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


def test_only_what_changed_is_encoded_otherwise(tmp_path: Path) -> None:
    """Compressing an updated MoE again gives the other experts the same bytes."""
    _, moe = save_pair(tmp_path)
    keys = {"parent": tmp_path / "dense", "drop_rate": 0.6, "max_shard_bytes": 10**9}
    compress(tmp_path / "moe", tmp_path / "before", **keys)
    with torch.no_grad():
        moe.model.layers[0].mlp.experts.down_proj[1] += 0.001
    moe.save_pretrained(tmp_path / "moe")
    compress(tmp_path / "moe", tmp_path / "after", **keys)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.mlp.experts.delta_down_values"]
    values = [state[changed[0]] for state in (before, after)]
    assert [i for i in range(4) if not torch.equal(values[0][i], values[1][i])] == [1]


def test_truncated_and_missing_shards(tmp_path: Path) -> None:
    save_pair(tmp_path, shard="40KB")
    shard = sorted((tmp_path / "moe").glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) - 100])
    with pytest.raises(ValueError, match=shard.name):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is missing"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_killed_while_writing_then_again(tmp_path: Path) -> None:
    save_pair(tmp_path)
    code = (
        "import sys, time\n"
        "from hf_moe_ext.convert import checkpoint, compress\n"
        "flush = checkpoint.CheckpointWriter._flush\n"
        "def slow(self):\n    flush(self)\n    time.sleep(1)\n"
        "checkpoint.CheckpointWriter._flush = slow\n"
        "compress(sys.argv[1] + '/moe', sys.argv[1] + '/out', parent=sys.argv[1] + '/dense', max_shard_bytes=4000)\n"
    )
    kill_while_writing(tmp_path, code, tmp_path)
    assert not (tmp_path / "out").exists()
    compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")
    load(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        compress(tmp_path / "moe", tmp_path / "out", parent=tmp_path / "dense")


def test_other_families_and_blocks_are_refused(tmp_path: Path) -> None:
    save_pair(tmp_path)
    with pytest.raises(ValueError, match=r"compress takes mixtral, mixtral_ext, .* has model_type 'llama'"):
        compress(tmp_path / "dense", tmp_path / "out", base="mean")
    compress(tmp_path / "moe", tmp_path / "once", parent=tmp_path / "dense")
    with pytest.raises(ValueError, match="moe_block='ders' already"):
        compress(tmp_path / "once", tmp_path / "out", parent=tmp_path / "dense")
    config = json.loads((tmp_path / "moe/config.json").read_text())
    shutil.copytree(tmp_path / "moe", tmp_path / "more")
    (tmp_path / "more/config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    with pytest.raises(ValueError, match="has no gate of expert 4; the checkpoint is incomplete"):
        compress(tmp_path / "more", tmp_path / "out", parent=tmp_path / "dense")


def test_streaming_reader_reads_what_the_mapped_one_does(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16, shard="40KB")
    reader = StreamingReader(tmp_path / "moe")
    wanted = {k: v for path in (tmp_path / "moe").glob("*.safetensors") for k, v in load_file(path).items()}
    assert set(reader.names) == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read_rows(name, 1, 3), tensor[1:3])
