"""Arms side by side: so many at a time, finished ones kept, all of them ended with the pilot."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from hf_moe_ext.pilot.arm import FAILED, NO_SPACE_CODE
from hf_moe_ext.pilot.arm_server import ArmServer
from hf_moe_ext.pilot.folder import ARMS, NoSpaceError, read_json, write_json

LOG_LINES = 3
NO_LIMITS: Mapping[str, float] = MappingProxyType({})

Spec = dict[str, Any]
Result = dict[str, Any]


class Pool(Protocol):
    """Something that runs arms."""

    def run(
        self, specs: Sequence[Spec], on_done: Callable[[Result], None], limits: Mapping[str, float] = NO_LIMITS
    ) -> dict[str, Result]:
        """Results by arm, in the order of the specs; those that are on disk already are not run again.

        An arm that takes longer than its own limit in seconds is ended and has failed, which is not kept: what had too little
        time once may have more another time.
        """
        ...

    def close(self) -> None:
        """End whatever runs."""
        ...


def read_result(folder: Path, spec: Spec) -> Result | None:
    """The result of an arm that was run before with just these settings."""
    result = read_json(folder / ARMS / f"{spec['id']}.json")
    # A tuple comes back from JSON as a list.
    return result if result is not None and result["spec"] == json.loads(json.dumps(spec)) else None


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
        self.arms = folder / ARMS
        self.server: ArmServer | None = None

    def run(
        self, specs: Sequence[Spec], on_done: Callable[[Result], None], limits: Mapping[str, float] = NO_LIMITS
    ) -> dict[str, Result]:
        """Run the arms, several at a time.

        Raises:
            NoSpaceError: The disk is full; arms that were finished are kept.
            RuntimeError: No arm can be started.
        """
        results: dict[str, Result] = {}
        waiting: list[Spec] = []
        for spec in specs:
            known = read_result(self.folder, spec)
            if known is None:
                waiting.append(spec)
            else:
                results[spec["id"]] = known
                on_done(known)
        running: dict[str, tuple[Spec, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.processes:
                spec = waiting.pop(0)
                self._start(spec)
                running[spec["id"]] = (spec, time.monotonic())
            assert self.server is not None
            for event in self.server.events():
                spec, began = running.pop(event["ended"])
                results[spec["id"]] = result = self._result(spec, event["code"], time.monotonic() - began, limits)
                on_done(result)
            for name, (_, began) in running.items():
                if time.monotonic() - began > min(self.limit_s, limits.get(name, self.limit_s)):
                    self.server.tell(kill=name)
        return {spec["id"]: results[spec["id"]] for spec in specs}

    def close(self) -> None:
        """End the arms that run, and what starts them."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def _start(self, spec: Spec) -> None:
        name = spec["id"]
        write_json(self.arms / f"{name}.spec.json", spec)
        (self.arms / f"{name}.json").unlink(missing_ok=True)
        if self.server is None:
            self.server = ArmServer(self.threads, self.arms / "server.log")
        paths = {"spec": f"{name}.spec.json", "result": f"{name}.json", "log": f"{name}.log"}
        self.server.tell(start=name, **{key: str(self.arms / file) for key, file in paths.items()})

    def _result(self, spec: Spec, code: int, seconds: float, limits: Mapping[str, float]) -> Result:
        """What an arm wrote; a failure, written here, where it wrote nothing.

        Raises:
            NoSpaceError: It found the disk full.
        """
        if code == NO_SPACE_CODE:
            raise NoSpaceError(NO_SPACE_CODE, self._last_lines(spec))
        path = self.arms / f"{spec['id']}.json"
        result: Result | None = read_json(path)
        if result is None:
            limit_s = min(self.limit_s, limits.get(spec["id"], self.limit_s))
            is_late = seconds > limit_s
            why = f"it took longer than {limit_s:.0f} s" if is_late else self._last_lines(spec)
            result = {"spec": spec, "status": FAILED, "reason": f"its process ended with code {code}: {why}"}
            if not is_late or limit_s == self.limit_s:
                write_json(path, result)
                result = read_json(path)  # as a pilot that goes on will read it
                assert result is not None
        return result

    def _last_lines(self, spec: Spec) -> str:
        text = (self.arms / f"{spec['id']}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        return " ".join(lines[-LOG_LINES:])[:400] or "it wrote nothing"
