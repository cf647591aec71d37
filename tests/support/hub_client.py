"""The real `huggingface_hub` client in processes of its own, and what it left on the local Hub."""

import os
import subprocess
import sys
from pathlib import Path

from support.hub_server import LocalHub

ROOT = Path(__file__).resolve().parents[2]


def run(hub: LocalHub, *words: object, token: str | None = "", python: str | None = None, **environment: str):
    """`hf-moe WORDS`, or Python code, in a process of its own; no token may come out of it."""
    command = [sys.executable, *(["-c", python] if python else ["-m", "hf_moe_ext.cli"]), *map(str, words)]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        command, env=hub.environment(token) | paths | environment, capture_output=True, text=True, timeout=300
    )
    for secret in (hub.token, hub.read_token, token):
        assert not secret or secret not in done.stdout + done.stderr
    return done


PUSH_QUICKLY = """
import sys
from hf_moe_ext.hub import HubError, push
try:
    print(push(sys.argv[1], sys.argv[2], wait_seconds=0.01).commit)
except HubError as error:
    sys.exit(str(error))
"""


def files_of(hub: LocalHub, repo_id: str, revision: str = "main") -> list[str]:
    return [path for path in hub.repositories[repo_id].list_files(revision) if path != ".gitattributes"]


def content(hub: LocalHub, repo_id: str, path: str) -> bytes:
    return hub.objects.path(hub.repositories[repo_id].resolve("main").files[path].sha256).read_bytes()


def messages(hub: LocalHub, repo_id: str) -> list[str]:
    return [commit.message for commit in hub.repositories[repo_id].list_history()]
