"""Delta folders: only what changed, both ways to the byte, a wrong base refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.convert import compress
from hf_moe_ext.convert.delta_apply import apply_delta, diff_checkpoints, revert_delta
from hf_moe_ext.convert.delta_encoding import Encoding
from hf_moe_ext.convert.delta_files import pack_xor, unpack_xor
from support.upcycled import save_pair


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A bfloat16 MoE in shards, and it after training of one expert of one layer and of the last norm."""
    _, moe = save_pair(tmp_path, dtype=torch.bfloat16, shard="20KB")
    with torch.no_grad():
        experts = moe.model.layers[1].mlp.experts
        experts.gate_up_proj[2] *= 1.01
        experts.down_proj[2] *= 1.01
        moe.model.norm.weight += 0.5
    moe.config.router_aux_loss_coef = 0.02
    moe.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    (tmp_path / "new/extra.txt").write_text("more")
    return tmp_path / "moe", tmp_path / "new"


def test_both_ways_to_the_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    before = file_hashes(base)
    report = diff_checkpoints(base, new, tmp_path / "delta")
    prefix = "model.layers.1.block_sparse_moe.experts.2."
    assert sorted(report.changes) == ["model.layers.1." + x for x in
                                      (f"block_sparse_moe.experts.2.w{i}.weight" for i in (1, 2, 3))] + ["model.norm.weight"]  # fmt: skip
    assert all(name.startswith(prefix) or name == "model.norm.weight" for name in report.changes)
    assert report.lossless
    applied = apply_delta(base, tmp_path / "delta", tmp_path / "applied")
    assert applied.changes == report.changes
    assert file_hashes(tmp_path / "applied") == file_hashes(new)
    assert file_hashes(base) == before
    revert_delta(tmp_path / "applied", tmp_path / "delta", tmp_path / "reverted")
    assert file_hashes(tmp_path / "reverted") == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "applied")


def test_other_shards_give_equal_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    AutoModelForCausalLM.from_pretrained(new).save_pretrained(tmp_path / "whole")
    diff_checkpoints(base, tmp_path / "whole", tmp_path / "delta")
    revert_delta(tmp_path / "whole", tmp_path / "delta", tmp_path / "reverted")
    assert [p.name for p in (tmp_path / "reverted").glob("*.safetensors")] == ["model.safetensors"]
    found, wanted = state(tmp_path / "reverted"), state(base)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n].view(torch.uint8), wanted[n].view(torch.uint8)) for n in wanted)


def test_shared_base_checkpoints_store_the_expert_that_changed(tmp_path: Path) -> None:
    """An update of one expert of one layer: nothing of the others is in the delta."""
    _, moe = save_pair(tmp_path)
    compress(tmp_path / "moe", tmp_path / "before", parent=tmp_path / "dense", drop_rate=0.6)
    with torch.no_grad():
        moe.model.layers[0].mlp.experts.down_proj[1] += 0.001
    moe.save_pretrained(tmp_path / "moe")
    compress(tmp_path / "moe", tmp_path / "after", parent=tmp_path / "dense", drop_rate=0.6)
    report = diff_checkpoints(tmp_path / "before", tmp_path / "after", tmp_path / "delta")
    assert report.changes == ["model.layers.0.mlp.experts.delta_down_values[1]"]
    assert list(load_file(tmp_path / "delta/delta.safetensors")) == report.changes
    assert report.delta_bytes < 0.05 * report.checkpoint_bytes
    apply_delta(tmp_path / "before", tmp_path / "delta", tmp_path / "applied")
    found, wanted = state(tmp_path / "applied"), state(tmp_path / "after")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    revert_delta(tmp_path / "applied", tmp_path / "delta", tmp_path / "reverted")
    assert file_hashes(tmp_path / "reverted") == file_hashes(tmp_path / "before")


def test_codes_are_never_coded_again(tmp_path: Path) -> None:
    """With an encoding too, deltas of a shared base are stored bit for bit."""
    _, moe = save_pair(tmp_path)
    keys = {"parent": tmp_path / "dense", "encode": "svd", "rank": 4}
    compress(tmp_path / "moe", tmp_path / "before", **keys)
    with torch.no_grad():
        moe.model.layers[0].mlp.experts.down_proj[1] *= 1.01
    moe.save_pretrained(tmp_path / "moe")
    compress(tmp_path / "moe", tmp_path / "after", **keys)
    encoding = Encoding("quantize", bits=4)
    report = diff_checkpoints(tmp_path / "before", tmp_path / "after", tmp_path / "delta", encoding=encoding)
    assert sorted(report.changes) == [f"model.layers.0.mlp.experts.delta_down_{part}[1]" for part in "AB"]
    assert report.lossless


def test_with_loss_of_stacked_and_single_matrices(tmp_path: Path) -> None:
    _, moe = save_pair(tmp_path)
    with torch.no_grad():
        for layer in moe.model.layers:
            layer.mlp.experts.down_proj[3] += 0.02 * torch.randn_like(layer.mlp.experts.down_proj[3])
    for original in (True, False):
        base, new = tmp_path / f"base{original}", tmp_path / f"new{original}"
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(base, save_original_format=original)
        moe.save_pretrained(new, save_original_format=original)
        delta, output = tmp_path / f"delta{original}", tmp_path / f"out{original}"
        report = diff_checkpoints(base, new, delta, encoding=Encoding("quantize", bits=4, group_size=16))
        assert len(report.changes) == 2
        assert not report.lossless
        apply_delta(base, delta, output)
        found, wanted, old = state(output), state(new), state(base)
        for name in wanted:
            error, change = (found[name] - wanted[name]).norm(), (old[name] - wanted[name]).norm()
            assert error < 0.15 * change if change else error == 0
        with pytest.raises(ValueError, match="encoded with loss, so it does not lead back"):
            revert_delta(output, delta, tmp_path / "reverted")


def test_a_damaged_code_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With loss nothing else tells: any bits are a code of something."""
    base, new = pair
    diff_checkpoints(base, new, tmp_path / "delta", encoding=Encoding("svd", rank=2))
    path = tmp_path / "delta/delta.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match=r"has another hash than delta\.json says"):
        apply_delta(base, tmp_path / "delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_within_the_output_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    diff_checkpoints(base, new, new / "delta")
    with pytest.raises(FileExistsError, match="is or holds"):
        apply_delta(base, new / "delta", new, overwrite=True)
    assert (new / "delta/delta.json").is_file()


def test_a_wrong_base_is_refused_by_hash(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    diff_checkpoints(base, new, tmp_path / "delta")
    with pytest.raises(ValueError, match=r"is not the base of delta .* has another hash; nothing was written"):
        apply_delta(new, tmp_path / "delta", tmp_path / "out")
    with pytest.raises(ValueError, match="is not the new checkpoint of delta"):
        revert_delta(base, tmp_path / "delta", tmp_path / "out")
    # Not only where the delta changes something.
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"embed_tokens.weight has another hash"):
        apply_delta(tmp_path / "other", tmp_path / "delta", tmp_path / "out")
    # The same bytes in another shape are another tensor.
    shutil.copytree(base, tmp_path / "turned")
    for path in (tmp_path / "turned").glob("*.safetensors"):
        tensors = load_file(path)
        turned = {n: t.view(t.shape[::-1]) if "embed_tokens" in n else t for n, t in tensors.items()}
        save_file(turned, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens.weight has another hash"):
        apply_delta(tmp_path / "turned", tmp_path / "delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_and_damaged_deltas(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    with pytest.raises(ValueError, match="a delta needs two checkpoints of one model"):
        diff_checkpoints(base, tmp_path / "dense", tmp_path / "delta")
    save_pair(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"torch.bfloat16 in .* and .* of torch.float32 in"):
        diff_checkpoints(base, tmp_path / "wide/moe", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    diff_checkpoints(base, new, tmp_path / "delta")
    with pytest.raises(FileExistsError):
        diff_checkpoints(base, new, tmp_path / "delta")
    description = tmp_path / "delta/delta.json"
    content = json.loads(description.read_text())
    for changed, words in (
        ({"format_version": 2}, "version 2, this release reads hf_moe_ext.delta version 1"),
        ({"format": "other"}, "is of format 'other'"),
        ({"changes": [{"name": "x"}]}, "delta.json is damaged"),
        ({"surprise": 1}, "delta.json is damaged"),
        ({"new_hashes": {**content["new_hashes"], "model.norm.weight": "0"}}, "norm.weight did not come out as it was"),
        ({"new_files": ["../config.json"]}, r"names '../config.json', which is no file of a checkpoint folder"),
    ):
        description.write_text(json.dumps({**content, **changed}))
        with pytest.raises(ValueError, match=words):
            apply_delta(base, tmp_path / "delta", tmp_path / "out")
    description.write_text(json.dumps(content))
    tensors = tmp_path / "delta/delta.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        apply_delta(base, tmp_path / "delta", tmp_path / "out")
    tensors.write_bytes(whole[:-3] + bytes([whole[-3] ^ 255]) + whole[-2:])
    with pytest.raises(ValueError, match="damaged"):
        apply_delta(base, tmp_path / "delta", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="give a folder that `hf-moe delta diff` wrote"):
        apply_delta(base, new, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_exclusive_or_leads_both_ways(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(0, 200, (7, 9), generator=generator).to(dtype) for _ in range(2))
    packed = pack_xor(left, right)
    assert torch.equal(unpack_xor(packed, left), right)
    assert torch.equal(unpack_xor(packed, right), left)
    with pytest.raises(ValueError, match="the tensor has"):
        unpack_xor(packed, left[:3])


def test_not_a_number_and_minus_zero_come_back() -> None:
    left = torch.tensor([float("nan"), -0.0, 1.0])
    right = torch.tensor([1.0, 0.0, float("-inf")])
    found = unpack_xor(pack_xor(left, right), right)
    assert torch.equal(found.view(torch.int32), left.view(torch.int32))


def test_small_updates_of_bfloat16_pack() -> None:
    left = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = pack_xor(left, (left.float() * 1.01).bfloat16())
    assert packed.numel() < 0.6 * left.numel() * 2


def test_commands(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["delta", *map(str, arguments)])

    found = run("diff", base, new, "-o", tmp_path / "delta", "--json")
    assert found.exit_code == 0, found.stderr
    assert len(json.loads(found.stdout)["changes"]) == 4
    assert "written to" in run("apply", base, tmp_path / "delta", "-o", tmp_path / "applied").stdout
    assert run("revert", tmp_path / "applied", tmp_path / "delta", "-o", tmp_path / "reverted").exit_code == 0
    assert file_hashes(tmp_path / "reverted") == file_hashes(base)
    found = run("diff", base, new, "-o", tmp_path / "lossy", "--encode", "svd", "--rank", "4")
    assert "with loss" in found.stdout
    refused = run("apply", new, tmp_path / "delta", "-o", tmp_path / "x")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("hf-moe delta apply: ")
    assert refused.stdout == ""
