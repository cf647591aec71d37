"""A small Hub on loopback: the calls that the real `huggingface_hub` client makes, and the ways a Hub can fail.

    with local_hub(tmp_path) as hub:
        hub.fail(503, times=2, path="/commit/")
        done = subprocess.run([...], env=hub.environment())
        hub.repositories["tester/name"].list_files()

`HF_ENDPOINT` and `HF_HUB_OFFLINE` are read when `huggingface_hub` is imported, so clients run in processes of their own.
Large files go through LFS (one PUT, or parts above `part_bytes`) to a second port, as the real Hub's go to another host;
Xet is not offered. A commit is whole or absent.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from support.hub_calls import HubHandler
from support.hub_http import StorageHandler
from support.hub_repositories import Objects, Repository

MIB = 2**20


@dataclass
class Failure:
    """A way to fail, for the next `times` requests it fits."""

    status: int | None  # None drops the connection
    times: float
    method: str | None
    path: str
    headers: Mapping[str, str]
    after: bool  # the request takes effect, its answer is lost


@dataclass
class LocalHub:
    """State of the server, and its switches.

    Attributes:
        endpoint: For `HF_ENDPOINT` or `HfApi(endpoint=...)`.
        token: May write under `user` and `organizations`.
        read_token: May only read.
        repositories: By id.
        requests: Method and path of every request, in order.
        tokens_at_storage: How many requests to the storage port carried a token (none should).
        part_bytes: Large files above this size go up in parts.
        spoiled: Paths whose content the Hub lists as another than it got.
        lfs_bytes: Files from this size are large; weights always are.
    """

    folder: Path
    token: str = "hf_localWriteTokenOfTheTests0123456789"
    read_token: str = "hf_localReadTokenOfTheTests0123456789"
    user: str = "tester"
    organizations: tuple[str, ...] = ("our-team",)
    part_bytes: int = 5 * MIB
    lfs_bytes: int = 10 * MIB
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens_at_storage: int = 0
    failures: list[Failure] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    errors: list[Exception] = field(default_factory=list)
    endpoint: str = ""
    storage_endpoint: str = ""

    def __post_init__(self) -> None:
        self.objects = Objects(self.folder / "objects")
        self.lock = threading.RLock()

    def fail(
        self,
        status: int,
        times: float = 1,
        path: str = "",
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next requests whose path contains `path` with an error (`times=math.inf`: all of them)."""
        self.failures.append(Failure(status, times, method, path, headers or {}, after=False))

    def drop(self, times: float = 1, path: str = "", method: str | None = None, after: bool = False) -> None:
        """Cut the connection in the middle of the request's body; with `after`, before its answer."""
        self.failures.append(Failure(None, times, method, path, {}, after))

    def heal(self) -> None:
        """End all failures."""
        self.failures.clear()

    def take_failure(self, method: str, path: str, after: bool) -> Failure | None:
        """The failure that hits this request, counted down."""
        with self.lock:
            for failure in self.failures:
                fits = failure.path in path and failure.method in (None, method) and failure.after == after
                if fits and failure.times > 0:
                    failure.times -= 1
                    return failure
        return None

    def environment(self, token: str | None = "") -> dict[str, str]:
        """Environment of a client process: this Hub, a home of its own, no Xet; `token=None` gives it no token."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_OFFLINE"))
        }
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = token or self.token
        return environment


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """Serve a Hub from `folder` on two free ports of loopback until the block ends."""
    hub = LocalHub(folder / "hub")
    servers = []
    for handler in (HubHandler, StorageHandler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        server.daemon_threads = True
        servers.append(server)
    hub.endpoint, hub.storage_endpoint = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
    if hub.errors:
        raise ExceptionGroup("the local Hub failed by itself", hub.errors)
