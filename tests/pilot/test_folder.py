"""Files that are whole or not there, and a disk that is full."""

from pathlib import Path

import pytest

from hf_moe_ext.pilot.folder import NoSpaceError, claim_folder, full_disk_told, read_json, write_json


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_half_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "b.json") is None


def test_a_full_disk_is_told_with_the_next_step(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here, which answers every write with 'no space left'")
    with pytest.raises(NoSpaceError, match=r"no space is left for .*give the same command"), full_disk_told(tmp_path):
        full.write_text("x")
    with pytest.raises(IsADirectoryError), full_disk_told(tmp_path):  # other errors stay what they are
        tmp_path.write_text("x")


def test_a_folder_is_claimed_once_and_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "pilot"
    assert claim_folder(folder, {"seed": 0, "rates": (1, 2)}) is False
    assert claim_folder(folder, {"seed": 0, "rates": (1, 2)}) is True
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        claim_folder(folder, {"seed": 1, "rates": (1, 2)})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        claim_folder(tmp_path / "file", {})
