"""The reasoning files and the generated arithmetic."""

import gzip
import json
import re
from pathlib import Path

import pytest

from built_in_data import build_built_in
from finetune_arguments import DataArguments, UserError
from quickstart.arithmetic import build_arithmetic_rows


def _operands(rows: list[dict[str, str]]) -> set[int]:
    return {int(number) for row in rows for number in re.findall(r"\d+", row["instruction"])}


def test_arithmetic_is_right_balanced_and_disjoint() -> None:
    sides = build_arithmetic_rows(400, 100)
    assert _operands(sides["train"]).isdisjoint(_operands(sides["test"]))
    for rows in sides.values():
        assert sum(row["answer"] == "true" for row in rows) == len(rows) / 2
        assert len({row["instruction"] for row in rows}) == len(rows)
        for row in rows:
            a, b = map(int, re.findall(r"\d+", row["instruction"]))
            truth = a > b if "greater" in row["instruction"] else (a + b) % 2 == 0
            assert row["output"] == f"the correct answer is {str(truth).lower()}"
    assert build_arithmetic_rows(400, 100) == sides


@pytest.fixture
def reasoning_dir(tmp_path: Path) -> Path:
    """Four small files; one test question also stands in train with other punctuation."""
    for stem in ("boolq", "ARC-Easy"):
        for side in ("train", "test"):
            rows = [
                {"instruction": f"is {stem} {i} {side}?", "output": "the correct answer is true", "answer": "true"}
                for i in range(3)
            ]
            if stem == "boolq":
                mark = "!" if side == "train" else "?"
                rows.append({"instruction": f"Known twice{mark}", "output": "a true", "answer": "true", "other": "x"})
            with gzip.open(tmp_path / f"{stem}_{side}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


def test_reasoning_reads_the_files_and_drops_known_questions(reasoning_dir: Path) -> None:
    sides = build_built_in(DataArguments(dataset_name="reasoning", data_dir=str(reasoning_dir)), None)
    groups = {side: [g for g in rows["group"] if g != "arithmetic"] for side, rows in sides.items()}
    assert groups == {"train": ["boolq"] * 3 + ["arc_easy"] * 3, "test": ["boolq"] * 4 + ["arc_easy"] * 3}
    assert "Known twice!" not in sides["train"]["instruction"][:]


def test_missing_and_broken_files_are_named(reasoning_dir: Path) -> None:
    arguments = DataArguments(dataset_name="reasoning", data_dir=str(reasoning_dir))
    (reasoning_dir / "ARC-Easy_test.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"ARC-Easy_test\.jsonl\.gz.*BadGzipFile"):
        build_built_in(arguments, None)
    (reasoning_dir / "ARC-Easy_test.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"must hold ARC-Easy_test\.jsonl\.gz"):
        build_built_in(arguments, None)
