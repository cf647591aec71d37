"""One function on several processes: a gloo group on loopback, results by rank, and the errors of every rank.

    def work(rank, world_size, folder): ...      # at the top level of a module: the processes import it
    results = run_ranks(work, 2, folder)

Each rank is a fresh interpreter (spawned, so no state of the test leaks in) with one thread, the environment that
``accelerate`` and ``from_pretrained(distributed_config=...)`` read, and an initialised process group.
"""

import os
import pickle
import random
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


class RankError(AssertionError):
    """At least one rank failed; the message holds what each rank said."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` processes and return their results by rank.

    Args:
        function: at the top level of an importable module.
        world_size: number of processes.
        *args: what can be pickled.
        timeout: seconds for all of it; also of each collective, so that a rank left alone fails by itself.

    Raises:
        RankError: with the traceback of every rank that failed and the name of every rank that hung.
    """
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(world_size)
        with _environment_set(environment):
            processes = [
                context.Process(target=_main, args=(function, rank, world_size, args, folder, timeout), daemon=True)
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
        hung = _join(processes, timeout)
        outcomes = [_read(Path(folder, str(rank))) for rank in range(world_size)]
    problems = []
    for rank, (process, outcome) in enumerate(zip(processes, outcomes, strict=True)):
        if outcome is None:
            state = f"no result within {timeout:.0f} s" if rank in hung else f"died with exit code {process.exitcode}"
            problems.append(f"--- rank {rank}: {state}")
        elif not outcome[0]:
            problems.append(f"--- rank {rank}:\n{outcome[1]}")
    if problems:
        raise RankError(f"{len(problems)} of {world_size} ranks failed\n" + "\n".join(problems))
    return [outcome[1] for outcome in outcomes if outcome is not None]


def _main(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: str, timeout: float
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        import torch
        import torch.distributed as distributed

        torch.set_num_threads(1)
        warnings.simplefilter("error")  # as pytest has it
        # Each rank repeats a notice of the stack that no test is about.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        distributed.init_process_group(
            "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=min(timeout, 120))
        )
        torch.manual_seed(0)
        outcome = (True, function(rank, world_size, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    partial = Path(folder, f"{rank}.partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder, str(rank)))
    if not outcome[0]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for peers that wait for this rank
    with suppress(RuntimeError):  # a peer that failed has said so itself
        distributed.barrier()  # rank 0 keeps the store that the others may still need
        distributed.destroy_process_group()


def _environment(world_size: int) -> dict[str, str]:
    port = _choose_port()
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": path.rstrip(os.pathsep),
    }


def _choose_port() -> int:
    """A free port below those that the kernel gives to outgoing connections: nobody takes it before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class _environment_set:
    """Environment variables for the processes started inside."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = {key: os.environ.get(key) for key in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_: object) -> None:
        for key, value in self.before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _join(processes: list[Any], timeout: float) -> set[int]:
    """Wait for all; once one has failed the others get a few seconds to say so too. Ranks that had to be stopped."""
    from time import monotonic

    end = monotonic() + timeout
    while any(process.is_alive() for process in processes) and monotonic() < end:
        for process in processes:
            process.join(0.05)
        if any(process.exitcode not in (None, 0) for process in processes):
            end = min(end, monotonic() + 10.0)
            for process in processes:
                process.join(max(0.0, end - monotonic()))
            break
    hung = {rank for rank, process in enumerate(processes) if process.is_alive()}
    for rank in hung:
        processes[rank].kill()
        processes[rank].join()
    return hung


def _read(path: Path) -> tuple[bool, Any] | None:
    return pickle.loads(path.read_bytes()) if path.is_file() else None
