"""Compression of upcycled experts: what it reads, how close the result is, what it refuses, nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM

from hf_moe_ext.convert import compress
from hf_moe_ext.convert.streaming_reader import StreamingReader
from support.upcycled import MOES, load, logits, relative, save_pair

STOCK = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
LOSSLESS = {"encode": "quantize", "bits": 16}


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


def test_every_delta_has_a_mask_of_its_own(tmp_path: Path) -> None:
    """Named by the seed that was asked for, layer, matrix and expert."""
    save_pair(tmp_path)
    found = {}
    for seed in (3, 4):
        compress(tmp_path / "moe", tmp_path / str(seed), parent=tmp_path / "dense", seed=seed, max_shard_bytes=10**9)
        found[seed] = load_file(tmp_path / str(seed) / "model.safetensors")
        for layer in range(2):
            for number, matrix in enumerate(("gate", "up", "down")):
                streams = found[seed][f"model.layers.{layer}.mlp.experts.delta_{matrix}_stream"]
                assert streams.tolist() == [[seed, layer, number, expert] for expert in range(4)]
    name = "model.layers.1.mlp.experts.delta_up_values"
    assert not torch.equal(found[3][name], found[4][name])


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
    base = dense.model.layers[1].mlp.up_proj.weight.detach()
    experts = [matrix.chunk(2)[1] for matrix in moe.model.layers[1].mlp.experts.gate_up_proj.detach()]
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


def test_errors_weigh_inputs_as_the_norm_gives_them(tmp_path: Path) -> None:
    """Gate and up read rows whose entry j has a mean square of the gain's; ``down`` is taken as it is."""
    _, moe = save_pair(tmp_path)
    gain = torch.linspace(0.1, 3, 32)
    with torch.no_grad():
        moe.model.layers[1].post_attention_layernorm.weight.copy_(gain)
    moe.save_pretrained(tmp_path / "moe")
    keys = {"parent": tmp_path / "dense", "encode": "svd", "rank": 8}
    dry = compress(tmp_path / "moe", tmp_path / "out", dry_run=True, **keys)
    done = compress(tmp_path / "moe", tmp_path / "out", export="stock", **keys)
    source, found = (model.model.layers[1].mlp.experts for model in (moe, load(tmp_path / "out")))
    for place, matrix in enumerate(("gate", "up", "down")):
        rows = [e.down_proj if matrix == "down" else e.gate_up_proj.chunk(2, 1)[place] for e in (source, found)]
        wanted, given = (each.detach() * (1 if matrix == "down" else gain) for each in rows)
        error = ((given - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))).square().mean().sqrt()
        for report, name in ((dry, "predicted_error"), (done, "output_error")):
            row = next(row for row in report.matrices if (row.layer, row.matrix) == (1, matrix))
            assert getattr(row, name) == pytest.approx(float(error), rel=1e-3)


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
    experts = torch.stack([matrix.chunk(2)[0] for matrix in moe.model.layers[0].mlp.experts.gate_up_proj.detach()])
    found = load(tmp_path / "out").model.layers[0].mlp.experts.gate_up_proj.detach().chunk(2)[0]
    near_mean = float((found - experts.mean(0)).norm() / experts.mean(0).norm())
    assert (near_mean < 1e-6) is (base == "mean")
    if base == "least_squares":
        assert len(report.base_errors) == 6
        assert all(0 < ratio < 1 for ratio in report.base_errors.values())
        mean = compress(tmp_path / "moe", tmp_path / "mean", base="mean", encode="svd", rank=8)
        for ours, theirs in zip(report.matrices, mean.matrices, strict=True):
            assert (ours.output_error or 9) < (theirs.output_error or 0)


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


def test_streaming_reader_reads_what_the_mapped_one_does(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16, shard="40KB")
    reader = StreamingReader(tmp_path / "moe")
    wanted = {k: v for path in (tmp_path / "moe").glob("*.safetensors") for k, v in load_file(path).items()}
    assert set(reader.names) == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read_rows(name, 1, 3), tensor[1:3])
