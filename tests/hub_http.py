"""A local HTTP server whose requests can be made to fail."""

import json
import re
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import Refusal

PIECE = 2**16
LARGEST_BODY = 2**30


@dataclass
class Fault:
    """A failure that happens to matching requests.

    Args:
        request: pattern of `"METHOD path"`.
        times: number of requests that fail; all by default.
        status: the HTTP status of the answer.
        drop_after: the connection is closed after this number of bytes of the request's body, or of the answer if the
            request has no body.
        alter: whether one bit of the request's body is changed.
        lose_answer: whether the connection is closed after the request was served, before the answer.
        action: called first, to change something during the request.
    """

    request: str
    times: float = float("inf")
    status: int | None = None
    drop_after: int | None = None
    alter: bool = False
    lose_answer: bool = False
    action: Callable[[], object] | None = None


@dataclass
class Answer:
    """An HTTP answer."""

    content: bytes | Path = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    """Return an answer with a JSON body."""
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | headers)


def route(method: str, pattern: str) -> Callable:
    """Mark a method of a [`Handler`] as the one for such requests; the pattern's groups become its arguments."""

    def mark(function: Callable) -> Callable:
        function.route = (method, re.compile(pattern))
        return function

    return mark


class Dropped(Exception):
    """The connection is to be closed without an answer."""


class Listener(socketserver.ThreadingTCPServer):
    """A server on a free port of 127.0.0.1, with one thread per connection.

    Args:
        handler: a [`Handler`].
        state: shared by the handlers.
        faults: failures of requests.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type["Handler"], state: Any, faults: list[Fault]):
        super().__init__(("127.0.0.1", 0), handler)
        self.state, self.faults = state, faults
        # "METHOD path" of all requests in order, and of those that no route matches.
        self.requests: list[str] = []
        self.unknown: list[str] = []
        # Tracebacks of unintended errors.
        self.errors: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop answering."""
        self.shutdown()
        self.server_close()
        self.thread.join(10)

    def handle_error(self, request, client_address) -> None:
        # Clients may disconnect at any time.
        if not isinstance(sys.exc_info()[1], OSError):
            self.errors.append(traceback.format_exc())

    def record(self, request: str) -> Fault | None:
        """Add a request to `requests` and return the fault that happens to it."""
        with self.state.lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.request, request)), None)
            if fault:
                fault.times -= 1
            return fault


class Handler(BaseHTTPRequestHandler):
    """Answers requests by the methods that `route` marks, with the faults of the listener."""

    protocol_version = "HTTP/1.1"
    # Nagle's algorithm would delay a body until its headers are acknowledged.
    disable_nagle_algorithm = True
    timeout = 20

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    @property
    def state(self) -> Any:
        """The state that all handlers share."""
        return self.server.state

    def serve_request(self) -> None:
        """Answer the current request."""
        self.url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(self.url.query).items()}
        self.fault = self.server.record(f"{self.command} {self.url.path}")
        self.received = 0
        self.pieces = self._pieces()
        try:
            if self.fault and self.fault.action:
                self.fault.action()
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "Injected fault")
            answer = self._routed()
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            answer = as_json({"error": refusal.message}, refusal.status, **headers)
        except Dropped:
            return self._drop()
        try:
            # Unread bytes of the body would be taken for the next request.
            for _ in self.pieces:
                pass
            if self.fault and self.fault.lose_answer:
                raise Dropped
            self._send(answer)
        except Dropped:
            self._drop()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve_request

    def body(self) -> bytes:
        """Read the request's body."""
        return b"".join(self.pieces)

    def _routed(self) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for name in dir(type(self)):
            function = getattr(type(self), name)
            route_method, pattern = getattr(function, "route", (None, None))
            if route_method == method and (found := pattern.fullmatch(self.url.path)):
                groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return function(self, **groups)
        self.server.unknown.append(f"{self.command} {self.path}")
        raise Refusal(404, "Not found")

    def _pieces(self) -> Iterator[bytes]:
        fault = self.fault or Fault("")
        for piece in self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self._sized():
            if fault.alter and not self.received:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            self.received += len(piece)
            if fault.drop_after is not None and self.received > fault.drop_after:
                raise Dropped
            if self.received > LARGEST_BODY:
                raise Refusal(413, "The body is too large")
            yield piece

    def _sized(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            if not (piece := self.rfile.read(min(left, PIECE))):
                raise Dropped
            left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: Answer) -> None:
        content = answer.content.read_bytes() if isinstance(answer.content, Path) else answer.content
        size = len(content)
        if answer.status == 200 and (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(span[1]), min(int(span[2] or size), size - 1)
            answer.status = 206 if first <= last else 416
            answer.headers["Content-Range"] = f"bytes {first}-{last}/{size}" if first <= last else f"bytes */{size}"
            content = content[first : last + 1]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.drop_after is not None and not self.received:
            self.wfile.write(content[: self.fault.drop_after])
            raise Dropped
        self.wfile.write(content)

    def _drop(self) -> None:
        # An upload is reset instead of closed in order, as by a broken network. A download is closed in order, because
        # the client retries a download that ends too early, but not one that is reset.
        if self.received:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
