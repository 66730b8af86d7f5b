"""HTTP on loopback, and what can be made to go wrong with it."""

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
    """What goes wrong with requests.

    Args:
        request: pattern of `"METHOD path"`.
        times: how many requests it happens to; all by default.
        status: they are answered with it.
        drop_after: the connection is closed after so many bytes of the body that is sent, or that is answered if
            none is sent.
        alter: a bit of the body that is sent is changed on the way.
        lose_answer: what is asked for is done, but the connection is closed before that is said.
        action: called first; for what happens elsewhere meanwhile.
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
    content: bytes | Path = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | headers)


def route(method: str, pattern: str) -> Callable:
    """Marks a method of a [`Handler`] as what answers such requests; the pattern's groups become its arguments."""

    def mark(function: Callable) -> Callable:
        function.route = (method, re.compile(pattern))
        return function

    return mark


class Dropped(Exception):
    """The connection is to be closed without another word."""


class Listener(socketserver.ThreadingTCPServer):
    """Answers on a free port of 127.0.0.1, each connection in a thread, until it is closed.

    Args:
        handler: a [`Handler`].
        state: what its handlers share.
        faults: what is to go wrong.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type["Handler"], state: Any, faults: list[Fault]):
        super().__init__(("127.0.0.1", 0), handler)
        self.state, self.faults = state, faults
        # "METHOD path" of all that was asked for, in order, and of what has no answer here.
        self.requests: list[str] = []
        self.unknown: list[str] = []
        # What went wrong here that was not meant to.
        self.errors: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join(10)

    def handle_error(self, request, client_address) -> None:
        # Clients may go away whenever they like.
        if not isinstance(sys.exc_info()[1], OSError):
            self.errors.append(traceback.format_exc())

    def note(self, asked: str) -> Fault | None:
        """Keeps a request in `requests` and takes the fault that is to happen to it."""
        with self.state.lock:
            self.requests.append(asked)
            fault = next((fault for fault in self.faults if fault.times > 0 and re.search(fault.request, asked)), None)
            if fault:
                fault.times -= 1
            return fault


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets faults happen to it, finds its route, answers."""

    protocol_version = "HTTP/1.1"
    # Nagle's algorithm would hold a body back until its headers are acknowledged.
    disable_nagle_algorithm = True
    timeout = 20

    def log_message(self, *args) -> None:
        pass

    @property
    def state(self) -> Any:
        return self.server.state

    def answer_any(self) -> None:
        self.url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(self.url.query).items()}
        self.fault = self.server.note(f"{self.command} {self.url.path}")
        self.received = 0
        self.pieces = self._pieces()
        try:
            if self.fault and self.fault.action:
                self.fault.action()
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "This happened on purpose")
            answer = self._routed()
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            answer = as_json({"error": refusal.message}, refusal.status, **headers)
        except Dropped:
            return self._drop()
        try:
            # What nobody wanted to read is in the way of the next request.
            for _ in self.pieces:
                pass
            if self.fault and self.fault.lose_answer:
                raise Dropped
            self._send(answer)
        except Dropped:
            self._drop()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_any

    def body(self) -> bytes:
        return b"".join(self.pieces)

    def _routed(self) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for name in dir(type(self)):
            function = getattr(type(self), name)
            wanted, pattern = getattr(function, "route", (None, None))
            if wanted == method and (found := pattern.fullmatch(self.url.path)):
                groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return function(self, **groups)
        self.server.unknown.append(f"{self.command} {self.path}")
        raise Refusal(404, "There is no such page")

    def _pieces(self) -> Iterator[bytes]:
        fault = self.fault or Fault("")
        for piece in self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self._counted():
            if fault.alter and not self.received:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            self.received += len(piece)
            if fault.drop_after is not None and self.received > fault.drop_after:
                raise Dropped
            if self.received > LARGEST_BODY:
                raise Refusal(413, "The body is too large")
            yield piece

    def _counted(self) -> Iterator[bytes]:
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
        if answer.status == 200 and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
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
        # Of an upload reset, not closed in order: a cable that is pulled says no goodbye. A download that is reset the
        # client gives up; one that ends too soon it takes up again.
        if self.received:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
