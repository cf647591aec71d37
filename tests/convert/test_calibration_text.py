"""Rows to fit on and rows to measure on never share a passage."""

from pathlib import Path

import pytest
import torch

from hf_moe_ext.convert.calibration_text import check_ids, draw_rows, read_passages, read_whole, split_source, take_rows
from support.words import build_tokenizer


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"w{i + 3} " * 10)
    (tmp_path / "other.bin").write_text("w95")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.py").write_text("w94")
    fit, measure, origin = read_passages(tmp_path)
    assert (len(fit), len(measure), origin) == (18, 2, str(tmp_path))
    assert not set(fit) & set(measure)
    assert {p.split()[0] for p in fit + measure} == {f"w{i + 3}" for i in range(20)}


def test_a_file_is_split_by_position(tmp_path: Path) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("0123456789abcdef")
    assert read_passages(short)[:2] == (["0123456789abcd"], ["ef"])
    long.write_text("".join(f"{i:07d}\n" for i in range(20_000)))
    fit, measure, _ = read_passages(long)
    assert "".join(fit + measure) == long.read_text()
    assert len(measure) == 1


def test_the_default_is_the_standard_library() -> None:
    fit, measure, origin = read_passages(None)
    assert origin == "Python standard library"
    assert len(fit) > 6 * len(measure) > 100
    assert not set(fit) & set(measure)


def test_rows_depend_on_the_seed_and_on_nothing_else() -> None:
    tokenizer = build_tokenizer()
    passages = [f"w{i} " * 7 for i in range(30, 67)]
    rows = draw_rows(passages, tokenizer, num_tokens=100, length=16, seed=0)
    assert rows.shape == (6, 16)
    assert torch.equal(rows, draw_rows(passages, tokenizer, num_tokens=100, length=16, seed=0))
    assert not torch.equal(rows, draw_rows(passages, tokenizer, num_tokens=100, length=16, seed=1))
    assert (rows.flatten()[::8] == 1).all()  # w1, its first special token, between the passages
    with pytest.raises(ValueError, match=r"gives 8 tokens .* less than one row of 16"):
        draw_rows(passages[:1], tokenizer, num_tokens=100, length=16, seed=0)


def test_ids_are_checked_and_split() -> None:
    ids = torch.arange(64).view(16, 4)
    fit, measure, origin = split_source(ids)
    assert (len(fit), len(measure), origin) == (14, 2, "token ids")
    assert torch.equal(torch.cat([fit, measure]), ids)  # type: ignore[list-item]
    assert read_whole(ids)[0] is ids
    assert torch.equal(check_ids(ids.int(), 64), ids)
    assert check_ids(ids.int(), 64).dtype == torch.int64
    assert len(take_rows(ids, num_tokens=10, seed=0)) == 2
    assert len(take_rows(ids, num_tokens=1, seed=0)) == 1
    assert not torch.equal(take_rows(ids, 40, 0), take_rows(ids, 40, 1))
    for bad, words in (
        (ids.float(), "integers"),
        (ids.flatten(), "integers"),
        (ids[:0], "integers"),
        (ids - 1, "from 0 to 63; got -1 to 62"),
    ):
        with pytest.raises(ValueError, match=words):
            check_ids(bad, 64)
    with pytest.raises(ValueError, match="from 0 to 62; got 0 to 63"):
        check_ids(ids, 63)
    with pytest.raises(ValueError, match="at least 2 rows"):
        split_source(ids[:1])


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a text file nor a folder"):
        read_passages(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds 0 files"):
        read_passages(tmp_path)


def test_a_tokenizer_that_knows_no_text_is_refused() -> None:
    class Deaf:
        bos_token_id = eos_token_id = 1

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(ValueError, match="makes 0 different tokens of the whole text: its files are missing"):
        draw_rows(["text"] * 64, Deaf(), num_tokens=32, length=8, seed=0)


def test_a_folder_of_one_file_serves_where_nothing_is_held_out(tmp_path) -> None:
    (tmp_path / "only.txt").write_text("one file")
    assert read_whole(tmp_path) == (["one file"], str(tmp_path))
    with pytest.raises(ValueError, match="holds 1 files"):
        split_source(tmp_path)
