"""Two network namespaces joined by a veth pair, for tests that read what really went over a wire."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Joined:
    """Names of the namespaces, of the interface in each and their addresses."""

    namespaces: tuple[str, str]
    interfaces: tuple[str, str]
    addresses: tuple[str, str] = ("10.231.0.1", "10.231.0.2")

    def command(self, side: int, *command: str) -> list[str]:
        """A command that runs in one of them."""
        return ["ip", "netns", "exec", self.namespaces[side], *command]


@contextmanager
def joined_namespaces() -> Iterator[Joined]:
    """Make them, and remove them whatever happens; skips the test with the reason where that is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("needs the `ip` command (iproute2) to make network namespaces")
    tag = f"{os.getpid() % 100000}"
    joined = Joined((f"moeext{tag}a", f"moeext{tag}b"), (f"mxa{tag}", f"mxb{tag}"))
    try:
        try:
            for name in joined.namespaces:
                _run("ip", "netns", "add", name)
            left, right = joined.interfaces
            _run("ip", "link", "add", left, "netns", joined.namespaces[0], "type", "veth", "peer", "name", right,
                 "netns", joined.namespaces[1])  # fmt: skip
            for side in (0, 1):
                for command in (
                    ("ip", "address", "add", f"{joined.addresses[side]}/24", "dev", joined.interfaces[side]),
                    ("ip", "link", "set", joined.interfaces[side], "up"),
                    ("ip", "link", "set", "lo", "up"),
                ):
                    _run(*joined.command(side, *command))
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()
            pytest.skip(f"may not make network namespaces here: {said}")
        yield joined
    finally:
        for name in joined.namespaces:  # takes the interfaces with it
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
