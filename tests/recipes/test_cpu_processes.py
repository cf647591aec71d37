"""Finding out how many processes accelerate was asked for."""

import pytest

from cpu_processes import find_missing_processes, read_num_processes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("accelerate launch --cpu --num_processes 2 finetune.py --r 4", 2),
        ("accelerate launch --num-processes=3 finetune.py", 3),
        ("accelerate launch finetune.py", None),
        ("accelerate launch --num_processes", None),
        ("accelerate launch --num_processes many", None),
    ],
)
def test_read_num_processes(line: str, expected: int | None) -> None:
    assert read_num_processes(line.split()) == expected


def test_nothing_is_missing_without_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_CPU", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_missing_processes() == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "1")
    assert find_missing_processes() == 0
