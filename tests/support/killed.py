"""A conversion killed in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def kill_while_writing(folder: Path, code: str, *arguments: object) -> None:
    """Run code in a process of its own and kill it (-9) as soon as it writes a shard into a temporary folder below this one."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    deadline = time.monotonic() + 300
    while not list(folder.glob(".building-*/*.part")):  # it is writing
        assert process.poll() is None, "it ended before anything was written"
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
