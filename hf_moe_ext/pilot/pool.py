"""Arms as processes: so many at a time, finished ones kept, all of them ended with the pilot."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hf_moe_ext.pilot.arm import FAILED, NO_SPACE_CODE
from hf_moe_ext.pilot.folder import ARMS, NoSpaceError, read_json, write_json

POLL_SECONDS = 0.1
LOG_LINES = 3

Spec = dict[str, Any]
Result = dict[str, Any]


class Pool(Protocol):
    """Something that runs arms."""

    def run(self, specs: Sequence[Spec], on_done: Callable[[Result], None]) -> dict[str, Result]:
        """Results by arm; those that are on disk already are not run again."""
        ...


def read_result(folder: Path, spec: Spec) -> Result | None:
    """The result of an arm that was run before with just these settings."""
    result = read_json(folder / ARMS / f"{spec['id']}.json")
    return result if result is not None and result["spec"] == spec else None


class ProcessPool:
    """Arms as processes of this machine.

    Args:
        folder: Of the pilot.
        processes: At a time.
        threads: Of one arm.
        limit_s: An arm that takes longer is ended and has failed.
    """

    def __init__(self, folder: Path, processes: int, threads: int, limit_s: float) -> None:
        self.folder, self.processes, self.threads, self.limit_s = folder, processes, threads, limit_s

    def run(self, specs: Sequence[Spec], on_done: Callable[[Result], None]) -> dict[str, Result]:
        """Run the arms, several at a time.

        Raises:
            NoSpaceError: The disk is full; arms that were finished are kept.
        """
        results: dict[str, Result] = {}
        waiting = []
        for spec in specs:
            known = read_result(self.folder, spec)
            if known is None:
                waiting.append(spec)
            else:
                results[spec["id"]] = known
                on_done(known)
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    running.append(_Running(self.folder, waiting.pop(0), self.threads))
                for arm in [arm for arm in running if arm.has_ended(self.limit_s)]:
                    running.remove(arm)
                    results[arm.spec["id"]] = result = arm.result()
                    on_done(result)
                time.sleep(POLL_SECONDS)
        finally:  # also on Ctrl-C and SIGTERM
            for arm in running:
                arm.end()
        return results


class _Running:
    """One arm under way."""

    def __init__(self, folder: Path, spec: Spec, threads: int) -> None:
        arms = folder / ARMS
        self.spec, self.path, self.log = spec, arms / f"{spec['id']}.json", arms / f"{spec['id']}.log"
        self.began, self.too_slow = time.monotonic(), False
        spec_path = arms / f"{spec['id']}.spec.json"
        write_json(spec_path, spec)
        self.path.unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hf_moe_ext.pilot.arm", str(spec_path), str(self.path), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the pilot alone, which ends its arms
            )

    def has_ended(self, limit_s: float) -> bool:
        """Whether it has; one that takes too long is ended."""
        if self.process.poll() is None and time.monotonic() - self.began > limit_s:
            self.too_slow = True
            self.end()
        return self.process.poll() is not None

    def end(self) -> None:
        """Kill it and wait until it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def result(self) -> Result:
        """What it wrote; a failure, written here, where it wrote nothing.

        Raises:
            NoSpaceError: It found the disk full.
        """
        if self.process.returncode == NO_SPACE_CODE:
            raise NoSpaceError(NO_SPACE_CODE, self._last_lines())
        result: Result | None = read_json(self.path)
        if result is None:
            why = "it took longer than the whole budget" if self.too_slow else self._last_lines() or "it wrote nothing"
            reason = f"its process ended with code {self.process.returncode}: {why}"
            result = {"spec": self.spec, "status": FAILED, "reason": reason}
            write_json(self.path, result)
        return result

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return " ".join(line.strip() for line in [line for line in lines if line.strip()][-LOG_LINES:])[:400]
