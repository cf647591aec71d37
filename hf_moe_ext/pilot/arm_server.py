"""One process that has imported everything and forks an arm whenever it is told to: an arm starts at once and is alone.

    python -m hf_moe_ext.pilot.arm_server

Reads a line of JSON per order, `{"start": id, "spec": path, "result": path, "log": path}` or `{"kill": id}`, and writes one per
event, `{"ended": id, "code": code}`. When its input ends, so does it, with all its arms: a pilot that was killed leaves
nothing behind. It runs no tensor itself, so that what it forks has no threads and no device to share.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WAIT_SECONDS = 0.1
HEAVY = (
    "datasets", "evaluate", "torch", "transformers.trainer", "transformers.models.auto.modeling_auto", "peft",
    "hf_moe_ext.pilot.attachment", "hf_moe_ext.pilot.measures", "hf_moe_ext.pilot.training", "hf_moe_ext.pilot.rows",
)  # fmt: skip


def main() -> int:
    """Serve until the input ends."""
    import importlib

    for name in HEAVY:
        importlib.import_module(name)
    arms: dict[int, str] = {}
    waiting = b""
    try:
        while True:
            ready, _, _ = select.select([0], [], [], WAIT_SECONDS)
            if ready:
                read = os.read(0, 65536)
                if not read:
                    return 0
                *orders, waiting = (waiting + read).split(b"\n")
                for order in orders:
                    _obey(json.loads(order), arms)
            _tell_ended(arms)
    finally:
        for pid in arms:
            os.kill(pid, signal.SIGKILL)


def _obey(order: dict[str, Any], arms: dict[int, str]) -> None:
    if "kill" in order:
        for pid, name in arms.items():
            if name == order["kill"]:
                os.kill(pid, signal.SIGKILL)
        return
    pid = os.fork()
    if pid == 0:
        os._exit(_be_arm(order))
    arms[pid] = order["start"]


def _be_arm(order: dict[str, Any]) -> int:
    """In the new process: from here on it is an arm, whose output goes to its log."""
    from hf_moe_ext.pilot.arm import serve_arm

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    try:
        return serve_arm(Path(order["spec"]), Path(order["result"]), os.getppid())
    except BaseException:  # whatever it is, it must not unwind into the server's own loop
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _tell_ended(arms: dict[int, str]) -> None:
    while arms:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        os.write(1, json.dumps({"ended": arms.pop(pid), "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


class ArmServer:
    """The pilot's end of it.

    Args:
        threads: Of an arm.
        log: Gets what the server itself has to say.
    """

    def __init__(self, threads: int, log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.log = log
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hf_moe_ext.pilot.arm_server"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the pilot alone, which ends its arms
            )
        self._read = b""

    def tell(self, **order: Any) -> None:
        """Send an order.

        Raises:
            RuntimeError: The server has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"the process that starts the arms has ended; see {self.log}") from error

    def events(self) -> list[dict[str, Any]]:
        """What has ended since the last call; waits a moment for something to happen.

        Raises:
            RuntimeError: The server has ended.
        """
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_SECONDS)
        if not ready:
            return []
        read = os.read(self.process.stdout.fileno(), 65536)
        if not read:
            raise RuntimeError(f"the process that starts the arms has ended; see {self.log}")
        *lines, self._read = (self._read + read).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End it and all its arms, and wait until they are gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # still importing: it has no arms yet
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
