"""Reading tensor by tensor, writing shards of bounded size, and folders that appear whole or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_moe_ext.convert.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointReader,
    CheckpointWriter,
    check_target,
    copy_side_files,
    write_folder,
)


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.arange(6.0).view(2, 3),
        "b.weight": torch.ones(4, 5, dtype=torch.bfloat16),
        "c.weight": torch.arange(3),
        "d.weight": torch.arange(12.0).view(3, 4).T,  # not contiguous
    }


def write(folder: Path, max_shard_bytes: int) -> None:
    with CheckpointWriter(folder, max_shard_bytes) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(10**9, 1), (100, 2), (1, 4)])
def test_shards_hold_what_was_written(tmp_path: Path, max_shard_bytes: int, files: int) -> None:
    write(tmp_path, max_shard_bytes)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*(p.name for p in shards), *([INDEX_FILE] if files > 1 else [])]
    )
    reader = CheckpointReader(tmp_path)
    assert sorted(reader.names) == sorted(tensors())
    for name, tensor in tensors().items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        read = reader.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    assert "e.weight" not in reader
    with pytest.raises(KeyError, match=r"holds no tensor 'e\.weight'"):
        reader.read("e.weight")
    if files > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors().values())
        assert shards[0].name == f"model-00001-of-{files:05d}.safetensors"


def test_shards_stay_below_their_size(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 1000) as writer:
        for i in range(20):
            writer.write(f"{i}", torch.zeros(80))
        assert writer.num_parameters == 1600
    reader = CheckpointReader(tmp_path)
    sizes: dict[str, int] = {}
    for name, file in json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"].items():
        sizes[file] = sizes.get(file, 0) + reader.read(name).numel() * 4
    assert set(sizes.values()) <= {960, 640}
    assert max(sizes.values()) <= 1000


def test_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1; got 0"):
        CheckpointWriter(tmp_path, 0)
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.write("a", torch.zeros(1))
        writer.write("b", torch.zeros(1))
        for name in ("a", "b"):
            with pytest.raises(ValueError, match="was written twice"):
                writer.write(name, torch.zeros(1))


def test_reader_refuses_what_is_not_a_whole_safetensors_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no weights"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"found pytorch_model\.bin\. Pickled weights are never read"):
        CheckpointReader(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        CheckpointReader(tmp_path)
    for broken in ("{}", "{"):
        (tmp_path / INDEX_FILE).write_text(broken)
        with pytest.raises(ValueError, match=f"{INDEX_FILE} is no index of a checkpoint"):
            CheckpointReader(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names one\.safetensors, which is missing"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="lists 'b' and 0 more that no shard holds"):
        CheckpointReader(tmp_path)


def write_half(final: Path, overwrite: bool = False) -> None:
    """Fails in between."""
    with write_folder(final, overwrite) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError("in between")


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="in between"):
        write_half(final)
    assert list(final.parent.iterdir()) == []
    with write_folder(final) as staging:
        (staging / "config.json").write_text("1")
        assert not final.exists()
    assert (final / "config.json").read_text() == "1"
    with pytest.raises(FileExistsError, match="exists; name a new folder"), write_folder(final):
        pytest.fail("must not start")
    with pytest.raises(RuntimeError, match="in between"):
        write_half(final, overwrite=True)
    assert (final / "config.json").read_text() == "1"
    with write_folder(final, overwrite=True) as staging:
        (staging / "two").write_text("2")
    assert [p.name for p in final.iterdir()] == ["two"]
    assert [p.name for p in final.parent.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"), write_folder(tmp_path / "file", overwrite=True):
        pytest.fail("must not start")


def test_only_a_models_folder_is_replaced_and_never_what_is_read_or_stood_in(tmp_path, monkeypatch):
    model = tmp_path / "runs" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for target in (model, model.parent):
        with pytest.raises(FileExistsError, match="is or holds the model that is read"):
            check_target(target, overwrite=True, keep=model)
    with pytest.raises(FileExistsError, match="is no model's folder"):
        check_target(model.parent, overwrite=True)
    monkeypatch.chdir(model)
    with pytest.raises(FileExistsError, match="is or holds the current folder"):
        check_target(Path(), overwrite=True)
    monkeypatch.chdir(tmp_path)
    check_target(model, overwrite=True)


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "out"
    opened = write_folder(final)
    opened.__enter__()
    final.mkdir()
    (final / "theirs").write_text("")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        opened.__exit__(None, None, None)
    assert [p.name for p in final.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch\n"
        "from hf_moe_ext.convert.checkpoint import CheckpointWriter, write_folder\n"
        "with write_folder(sys.argv[1]) as staging, CheckpointWriter(staging, 1) as writer:\n"
        "    writer.write('a', torch.zeros(4)); writer.write('b', torch.zeros(4))\n"
        "    print('written', flush=True); time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    with write_folder(tmp_path / "out") as staging:  # and the next run is not in its way
        write(staging, 1)
    assert len(CheckpointReader(tmp_path / "out").names) == 4


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    for name in [*names, "config.json", "model.safetensors", "pytorch_model.bin", "README.md"]:
        (source / name).write_text(name)
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("x")
    assert sorted(copy_side_files(source, target)) == sorted([*names, templates.name])
    assert sorted(p.name for p in target.iterdir()) == sorted([*names, templates.name])
    assert (target / templates.name / "tool_use.jinja").read_text() == "x"
