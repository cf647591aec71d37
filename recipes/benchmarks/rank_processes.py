"""Starts the ranks of a measurement as processes of their own, on loopback or in network namespaces."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from network_namespaces import INTERFACE, Lab, end_with_parent

WORKER = Path(__file__).resolve().parent / "dcca_rank.py"
RECIPES = WORKER.parent.parent


def run_job(job: dict[str, Any], num_ranks: int, lab: Lab | None = None, timeout_s: float = 1800) -> dict[str, Any]:
    """Run `dcca_rank.py` on some ranks, one thread each, and return what the first one measured.

    Args:
        job: What to measure; see `dcca_rank.py`.
        num_ranks: Processes.
        lab: Namespaces to put them in; None is loopback.
        timeout_s: Seconds for all of it.

    Raises:
        RuntimeError: a rank failed or it took too long; with the end of what the ranks said.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("job.json", "result.json")}
        paths["job.json"].write_text(json.dumps(job), encoding="utf-8")
        logs = [Path(folder, f"{rank}.log") for rank in range(num_ranks)]
        processes = []
        try:
            port = _free_port()
            for rank, log in enumerate(logs):
                words = [sys.executable, "-W", "ignore", str(WORKER), str(paths["job.json"]), str(paths["result.json"])]
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        [*(lab.enter(rank) if lab else []), *words],
                        env=_environment(rank, num_ranks, port, lab),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        preexec_fn=end_with_parent(),
                    )
                processes.append(process)
            _wait(processes, logs, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result: dict[str, Any] = json.loads(paths["result.json"].read_text(encoding="utf-8"))
        return result


def _environment(rank: int, num_ranks: int, port: int, lab: Lab | None) -> dict[str, str]:
    path = os.pathsep.join([str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": lab.address(0) if lab else "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": INTERFACE if lab else "lo",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }


def _wait(processes: list[subprocess.Popen[bytes]], logs: list[Path], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > end:
            what = f"rank {failed[0]} failed" if failed else f"not finished after {timeout_s:.0f} s"
            said = logs[failed[0] if failed else 0].read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{what}; its output ends with\n{said}")
        time.sleep(0.1)
    for rank, process in enumerate(processes):
        if process.returncode:
            said = logs[rank].read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"rank {rank} failed; its output ends with\n{said}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
