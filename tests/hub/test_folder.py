"""What is refused before anything is sent: no Hub is there at all."""

import re
from pathlib import Path

import pytest

from hf_moe_ext.hub import FolderError, HubError, push


def test_a_dry_run_lists_and_asks_nobody(adapter: Path) -> None:
    report = push(adapter, "me/mine", dry_run=True)
    assert [file["path"] for file in report.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
    ]
    assert "Would push 3 files" in report.as_text()
    assert not (adapter / "README.md").exists()


def test_checkpoints_go_only_when_asked(adapter: Path) -> None:
    report = push(adapter, "me/mine", dry_run=True, include_checkpoints=True)
    assert "checkpoint-2/optimizer.pt" in [file["path"] for file in report.files]
    assert report.left_out == ["training_args.bin"]
    assert push(adapter, "me/mine", dry_run=True, exclude=["metrics*"]).left_out[1] == "metrics.json"


def test_offline_is_told_as_such(adapter: Path) -> None:
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(adapter, "me/mine", token="hf_x")


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut_off(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _no_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"not at all")


def _shard_missing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def _token_inside(folder: Path) -> None:
    (folder / "notes.txt").write_text("hf_" + "a" * 34)


def _no_model(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_only_pickle, "only pickles .adapter_model.bin, training_args.bin."),
        (_cut_off, "must be .* bytes long"),
        (_no_header, "header cannot be read"),
        (_shard_missing, "model-00001-of-00002.safetensors, which is not there"),
        (_token_inside, "notes.txt holds what looks like a token"),
        (_no_model, "neither adapter_config.json nor config.json"),
    ],
)
def test_a_folder_that_may_not_go(adapter: Path, spoil, words: str) -> None:
    spoil(adapter)
    before = sorted(adapter.rglob("*"))
    with pytest.raises(FolderError, match=words) as caught:
        push(adapter, "me/mine", token="hf_x")
    assert "aaaa" not in str(caught.value)
    assert sorted(adapter.rglob("*")) == before


def test_a_card_that_the_hub_would_refuse_is_refused_here(adapter: Path) -> None:
    (adapter / "README.md").write_text("---\nbase_model: /somewhere/base\n---\nMine.\n")
    with pytest.raises(ValueError, match="no id of the Hub") as caught:
        push(adapter, "me/mine", token="hf_x")
    assert re.search(r"hf-moe card", str(caught.value))
