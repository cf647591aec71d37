"""How `hub_server.py` reads requests, fails as the test wants, and answers; and its storage port."""

import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from support.hub_server import LocalHub


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        # As on the real Hub, whose client tells its errors apart by these headers.
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class Handler(BaseHTTPRequestHandler):
    """Requests read whole, failures applied, answers as JSON."""

    hub: ClassVar["LocalHub"]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    calls: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def handle_request(self) -> None:
        """Answer one request."""
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.url.path))
        failure = self.hub.take_failure(self.command, self.path, after=False)
        if failure and failure.status is None:
            self.rfile.read1(max(1, self._content_length() // 2))
            self._cut()
            return
        self.body = self._read_body()
        if failure and failure.status is not None:
            self.answer(failure.status, {"error": "as the test wants"}, dict(failure.headers))
            return
        try:
            status, body, headers = self._call()
        except Refusal as refusal:
            status, body, headers = refusal.status, refusal.body, refusal.headers
        except Exception as error:  # the server's own mistake: `local_hub` raises it at its end
            self.hub.errors.append(error)
            status, body, headers = 500, {"error": repr(error)}, {}
        if self.hub.take_failure(self.command, self.path, after=True):
            self._cut()
            return
        self.answer(status, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _call(self) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, name in self.calls:
            found = re.fullmatch(pattern, self.url.path)
            if found and self.command in method.split():
                with self.hub.lock:
                    return getattr(self, name)(
                        **{key: unquote(value) for key, value in found.groupdict().items() if value}
                    )
        raise Refusal(404, f"This Hub knows no call {self.command} {self.url.path}")

    def answer(self, status: int, body: Any, headers: dict[str, str]) -> None:
        """Send bytes as they are and anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the test's stderr."""

    def _content_length(self) -> int:
        return int(self.headers.get("Content-Length", 0))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(self._content_length())
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _cut(self) -> None:
        # With a linger time of zero the peer sees a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class StorageHandler(Handler):
    """The storage host: signed addresses, no tokens."""

    calls = (
        ("PUT", r"/(?P<sha256>\w{64})/(?P<part>\d+)", "put_part"),
        ("GET HEAD", r"/(?P<sha256>\w{64})", "get_object"),
    )

    def _call(self) -> tuple[int, Any, dict[str, str]]:
        self.hub.tokens_at_storage += "Authorization" in self.headers
        return super()._call()

    def put_part(self, sha256: str, part: str) -> tuple[int, Any, dict[str, str]]:
        """A part of a large file, or the whole as part 0."""
        self.hub.objects.put_part(sha256, int(part), self.body)
        if part == "0" and not self.hub.objects.join_parts(sha256, [0]):
            raise Refusal(400, "content does not have the promised hash")
        return 200, {}, {"ETag": f'"part-{part}"'}

    def get_object(self, sha256: str) -> tuple[int, Any, dict[str, str]]:
        """A large file, or the rest of it."""
        content = self.hub.objects.path(sha256).read_bytes()
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{sha256}"'}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers
