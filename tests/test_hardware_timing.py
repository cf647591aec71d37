"""``hf-moe measure-hardware`` and ``hf-moe calibrate`` on the machine that runs the tests; no time is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.hardware_timing import measure_hardware
from hf_moe_ext.scaling.hardware import find_hardware, list_hardware

COMMAND = [sys.executable, "-m", "hf_moe_ext.cli", "measure-hardware", "--small", "--device", "cpu"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_row_that_the_cost_model_reads(tmp_path: Path) -> None:
    row = measure_hardware("mine", device="cpu", size="small", output=tmp_path / "own.toml")
    assert find_hardware("mine", tmp_path / "own.toml") == row
    assert row.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert row.intra_node_bytes_per_s is None
    assert row.grouped_flops_per_s is not None
    assert math.isfinite(row.grouped_flops_per_s)
    assert torch.__version__ in row.source


def test_ranks_of_torchrun_time_their_all_to_all(tmp_path: Path) -> None:
    """Two processes; one row, with the link within the node."""
    path = tmp_path / "two.toml"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "hf_moe_ext.cli"]
    command = [sys.executable, *launcher, *COMMAND[3:], "--name", "two", "--output", str(path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('["two"]') == 1
    row = list_hardware(path)["two"]
    assert row.devices_per_node == 2
    assert row.intra_node_bytes_per_s is not None
    assert row.intra_node_bytes_per_s > 0
    assert row.inter_node_bytes_per_s is None


def test_command_prints_the_row(tmp_path: Path) -> None:
    code, text, _ = run("measure-hardware", "--name", "x", "--small", "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(text)["name"] == "x"
    broken = tmp_path / "broken.toml"
    broken.write_text("[")
    code, _, error = run("measure-hardware", "--name", "x", "--small", "--device", "cpu", "--output", str(broken))
    assert code == 2
    assert "hf-moe measure-hardware: " in error
    assert "is not TOML" in error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("a bug"), AttributeError("a bug")])
def test_only_a_missing_kernel_is_no_number(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What else goes wrong in a grouped product is told."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", fail)
    with pytest.raises(type(error), match=str(error)):
        measure_hardware("x", device="cpu", size="small")
    error = NotImplementedError("no kernel on this device")
    assert measure_hardware("x", device="cpu", size="small").grouped_flops_per_s is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_such_device() -> None:
    with pytest.raises(ValueError, match="device must be cpu, or cuda on a machine that has it, got 'cuda'"):
        measure_hardware("x", device="cuda", size="small")


def test_no_such_dtype() -> None:
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
        measure_hardware("x", device="cpu", dtype="int8", size="small")


def test_calibrate_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"train_steps_per_second": 0.25}]}))
    options = ["--config", str(tmp_path), "--num-sequences", "4", "--sequence-length", "4096"]
    code, text, _ = run("calibrate", str(tmp_path), "--hardware", "H100-SXM", *options)
    result = json.loads(text)
    assert code == 0
    assert result["step"]["total"] == pytest.approx(4, rel=1e-9)
    assert result["efficiency"]["grouped"] == pytest.approx(result["efficiency"]["gemm"] * 0.8)
    for change, words in (
        (["--hardware", "H1"], "hardware 'H1' is not known; known: "),
        (["--hardware", "H100-SXM", "--expert", "3", "--data", "3"], "expert must divide num_experts=64, got 3"),
        (["--hardware", "H100-SXM", "--hardware-file", str(tmp_path / "none")], "none"),
    ):
        code, _, error = run("calibrate", str(tmp_path), *change, *options)
        assert code == 2
        assert error.startswith("hf-moe calibrate: ")
        assert words in error
