"""Arms as processes: every candidate trains, what crashes is told, and nothing outlives the pilot."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_moe_ext.pilot import rows, stages
from hf_moe_ext.pilot.candidates import TABLE
from hf_moe_ext.pilot.pool import ProcessPool, read_result
from hf_moe_ext.pilot.ray_pool import RayPool
from hf_moe_ext.pilot.run import run_pilot
from hf_moe_ext.pilot.subject import load_tokenizer


def _settings(model: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": str(model), "folder": str(folder), "batch_size": 8, "max_length": 16, "dtype": "float32", "threads": 1,
        "metric": None, "metric_rows": 8, "max_new_tokens": 4,
    }  # fmt: skip


@pytest.fixture
def folder(request_of, moe_dir: Path, tmp_path: Path) -> Path:
    """A pilot's folder with its rows."""
    rows.prepare_rows(request_of(), load_tokenizer(str(moe_dir)), tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_candidate_of_the_table_trains(folder: Path, moe_dir: Path) -> None:
    candidates = [c for c in TABLE if c.needs != "dense" and c.name != "base"]
    specs = [stages.make_spec(_settings(moe_dir, folder), c, 1e-3, 0, 3, "trial") for c in candidates]
    pool = ProcessPool(folder, 2, 1, 600.0)
    try:
        results = {r["spec"]["candidate"]["name"]: r for r in pool.run(specs, lambda _: None).values()}
    finally:
        pool.close()
    assert {name: r.get("reason") for name, r in results.items() if r["status"] != "done"} == {}
    trained = {name: r["deterministic"]["parameters"]["trainable"] for name, r in results.items()}
    assert all(count > 0 for count in trained.values())
    assert trained["perft-r"] - trained["perft-r-frozen-router"] == 2 * 4 * 32  # layers x routers [4, 32]
    assert trained["perft-e-selected"] < trained["perft-e"]
    assert trained["full"] == results["full"]["deterministic"]["parameters"]["model"]
    assert len({r["deterministic"]["tokens"] for r in results.values()}) == 1


def test_a_crash_and_a_hang_are_failures_of_that_arm(folder: Path, moe_dir: Path) -> None:
    settings = _settings(moe_dir, folder)
    missing = stages.make_spec({**settings, "model": str(folder / "nowhere")}, TABLE[0], None, 0, 0, "trial")
    endless = stages.make_spec(settings, TABLE[2], 1e-3, 0, 100_000, "trial")
    pool = ProcessPool(folder, 2, 1, 25.0)
    try:
        results = pool.run([missing, endless], lambda _: None)
    finally:
        pool.close()
    assert "nowhere" in results[missing["id"]]["reason"]
    assert results[endless["id"]]["reason"] == "its process ended with code -9: it took longer than 25 s"
    known = ProcessPool(folder, 2, 1, 25.0)  # a failure is a result as well: it is not tried again
    assert known.run([missing, endless], lambda _: None) == results
    assert known.server is None


def test_an_arm_ended_by_a_limit_of_its_own_may_be_tried_again(folder: Path, moe_dir: Path) -> None:
    endless = stages.make_spec(_settings(moe_dir, folder), TABLE[2], 1e-3, 0, 100_000, "trial")
    pool = ProcessPool(folder, 1, 1, 600.0)
    try:
        results = pool.run([endless], lambda _: None, {endless["id"]: 2.0})
    finally:
        pool.close()
    assert results[endless["id"]]["reason"] == "its process ended with code -9: it took longer than 2 s"
    assert read_result(folder, endless) is None


def _arms_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _start(request, output: Path) -> subprocess.Popen:
    words = [
        "pilot",
        "--model",
        request.model,
        "--data",
        request.data,
        "-o",
        str(output),
        "--processes",
        "2",
        "--threads",
        "1",
    ]
    words += [
        "--steps",
        "64",
        "--seeds",
        "2",
        "--max-length",
        "16",
        "--learning-rates",
        "0.01",
        "--budget-minutes",
        "60",
    ]
    words += [word for name in request.candidates for word in ("--candidates", name)]
    return subprocess.Popen(
        [sys.executable, "-m", "hf_moe_ext.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _wait_for(condition, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def _finished(output: Path) -> set[Path]:
    return {path for path in (output / "arms").glob("*.json") if not path.name.endswith(".spec.json")}


@pytest.mark.slow
def test_killed_and_gone_on_with(request_of, planted_pilot: dict[str, Any], tmp_path: Path) -> None:
    """After kill -9 no arm is left, finished ones are not run again, and the result is that of an undisturbed pilot."""
    output = tmp_path / "pilot"
    process = _start(request_of(), output)
    _wait_for(lambda: len(_finished(output)) >= 4)
    arms = _arms_of(process)
    assert arms
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _wait_for(lambda: not any(arm.is_running() and arm.status() != psutil.STATUS_ZOMBIE for arm in arms), 30)
    before = {path: path.stat().st_mtime_ns for path in _finished(output)}
    told = run_pilot(request_of(), output)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert told["ran"]["resumed"]
    for mine, undisturbed in zip(told["arms"], planted_pilot["arms"], strict=True):
        assert {k: mine[k] for k in told["deterministic_columns"]} == {
            k: undisturbed[k] for k in told["deterministic_columns"]
        }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_stopped_cleanly(request_of, tmp_path: Path, kind: signal.Signals) -> None:
    output = tmp_path / "pilot"
    process = _start(request_of(), output)
    _wait_for(lambda: _finished(output))
    arms = _arms_of(process)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on with it" in errors
    assert not any(psutil.pid_exists(arm.pid) and arm.is_running() for arm in arms)
    assert _finished(output)
    assert not list(output.glob("**/*.partial"))


def test_ray_is_asked_for_and_not_there(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="--ray-address auto needs Ray, which is not installed: pip install ray"):
            RayPool(tmp_path, "auto", 1, 10.0)
    else:
        pytest.skip("Ray is installed here; the refusal cannot be shown")


def test_no_server_is_left_behind(folder: Path, moe_dir: Path) -> None:
    pool = ProcessPool(folder, 1, 1, 600.0)
    spec = stages.make_spec(_settings(moe_dir, folder), TABLE[0], None, 0, 0, "trial")
    result = pool.run([spec], lambda _: None)[spec["id"]]
    assert result["status"] == "done"
    assert result["deterministic"]["parameters"]["trainable"] == 0
    assert pool.server is not None
    pid = pool.server.process.pid
    assert os.getpid() == psutil.Process(pid).ppid()
    pool.close()
    assert not psutil.pid_exists(pid)
