"""Ranks on one machine with a slow link between them: a network namespace per rank, joined by a bridge.

    rank namespace:  a veth with a token bucket (`tc ... tbf`) on what it sends
    hub namespace:   the other end of every veth, on one bridge

Every namespace is unnamed and lives in a process that the kernel ends with us (PR_SET_PDEATHSIG), however we end; a
namespace goes when its last process goes, and its devices with it. So nothing is left behind, also after a kill -9.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "veth0"
_PR_SET_PDEATHSIG = 1
_TOOLS = ("ip", "tc", "unshare", "nsenter")


def find_obstacle() -> str | None:
    """Why no rate-limited namespaces can be made here; None if they can."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces are Linux's, and this is {sys.platform}"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (packages iproute2, util-linux)"
    rule = "ip link add veth0 type veth peer name veth1 && tc qdisc add dev veth0 root tbf rate 1mbit burst 64kb latency 1s"
    tried = subprocess.run(["unshare", "--net", "sh", "-c", rule], capture_output=True, text=True, check=False)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        return f"a namespace with a rate-limited veth cannot be made (are you root?): {reason}"
    return None


@dataclass(frozen=True)
class Lab:
    """Namespaces of the ranks, by the process that holds each."""

    holders: tuple[int, ...]

    def enter(self, rank: int) -> list[str]:
        """Words before a command that put it into the rank's namespace."""
        return ["nsenter", "--target", str(self.holders[rank]), "--net"]

    def address(self, rank: int) -> str:
        """The rank's address."""
        return f"10.99.0.{rank + 1}"

    def limit(self, rate_bytes_per_s: float) -> None:
        """Let every rank send so many bytes per second; replaces an earlier limit."""
        # A long queue: a dropped packet would measure TCP's recovery. The bucket has to hold the largest segment.
        bucket = ["rate", f"{int(rate_bytes_per_s * 8)}bit", "burst", "256kb", "latency", "20s"]
        for rank in range(len(self.holders)):
            _run([*self.enter(rank), "tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *bucket])


@contextmanager
def make_lab(num_ranks: int) -> Iterator[Lab]:
    """The namespaces of some ranks, joined and not limited yet; gone afterwards.

    Raises:
        RuntimeError: a command failed.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(num_ranks + 1):
            # `cat` on a pipe of ours says when the namespace is there, and ends with the pipe too.
            command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
            holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=end_with_parent()
            )
            holders.append(holder)
            assert holder.stdout is not None
            if not holder.stdout.readline():
                raise RuntimeError("unshare --net failed; its message is above")
        hub, *ranks = (holder.pid for holder in holders)
        lab = Lab(tuple(ranks))
        inside = ["nsenter", "--target", str(hub), "--net"]
        _run([*inside, "ip", "link", "add", "hub0", "type", "bridge"])
        _run([*inside, "ip", "link", "set", "hub0", "up"])
        for rank, pid in enumerate(ranks):
            port = f"port{rank}"
            peer = ["peer", "name", INTERFACE, "netns", str(pid)]
            _run([*inside, "ip", "link", "add", port, "type", "veth", *peer])
            _run([*inside, "ip", "link", "set", port, "master", "hub0", "up"])
            _run([*lab.enter(rank), "ip", "address", "add", f"{lab.address(rank)}/24", "dev", INTERFACE])
            for device in (INTERFACE, "lo"):
                _run([*lab.enter(rank), "ip", "link", "set", device, "up"])
        yield lab
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            for pipe in (holder.stdin, holder.stdout):
                assert pipe is not None
                pipe.close()


def count_sent_bytes() -> int | None:
    """Bytes the interface of this process's namespace has sent so far; None outside a lab."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        if line.strip().startswith(f"{INTERFACE}:"):
            return int(line.split(":")[1].split()[8])
    return None


def end_with_parent() -> Callable[[], None]:
    """What a child calls before it runs, to be killed when this process dies. Start it from the main thread, not another."""
    parent = os.getpid()

    def prepare() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it has died already

    return prepare


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
