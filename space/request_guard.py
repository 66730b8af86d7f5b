"""Checks every request before Gradio sees it.

Gradio refuses files outside its upload folder. It also downloads public addresses that a client names instead of a
file, and forwards others at `/file=http…`. This Space needs neither.
"""

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

from limits import Limits
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADDRESS = re.compile(r"/(?:file|proxy)[=/]\s*[a-z][a-z0-9+.-]*:|/proxy=", re.IGNORECASE)
# Gradio serves these routes; this Space does not use them.
UNUSED = ("/process_recording", "/component_server", "/vibe-")
MIN_FREE_MEGABYTES = 500
# Headers that say where the body of a request ends.
FRAMING = (b"content-length", b"transfer-encoding")


class _Refusal(Exception):
    """A request is refused while its body is received.

    Args:
        status: Status of the answer.
        reason: Shown to the client.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Body:
    """Receives the body of a request, whose size and time are limited.

    Args:
        receive: Receives the next message.
        size: Maximum number of bytes.
        seconds: Maximum time until the body is complete.
    """

    def __init__(self, receive: Receive, size: int, seconds: float):
        self._receive, self.size, self.seconds = receive, size, seconds
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.received, self.is_complete = 0, False
        self.refusal: _Refusal | None = None

    async def receive(self) -> Message:
        """Receive the next message.

        Raises:
            _Refusal: The body is too long or takes too long.
        """
        if self.is_complete:
            return await self._receive()
        try:
            remaining = self.deadline - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(self._receive(), max(remaining, 0))
        except asyncio.TimeoutError:
            raise self._refuse(408, f"The request was not complete after {self.seconds} seconds.") from None
        self.received += len(message.get("body", b""))
        if self.received > self.size:
            raise self._refuse(413, f"The request has more than {self.size} bytes.")
        self.is_complete = not message.get("more_body", False)
        return message

    def _refuse(self, status: int, reason: str) -> _Refusal:
        # The application may turn the exception into another one.
        self.refusal = _Refusal(status, reason)
        return self.refusal


class RequestGuard:
    """ASGI middleware that refuses large requests and requests for files that were not uploaded.

    Args:
        app: The application that gets the accepted requests.
        limits: The limits of this Space.
        upload_folder: The only folder whose files a request may name.
    """

    def __init__(self, app: ASGIApp, limits: Limits, upload_folder: str):
        self.app, self.limits = app, limits
        self.upload_folder = Path(upload_folder).resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with an error, or forward it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if ADDRESS.search(path) or any(unused in path for unused in UNUSED):
            return await _refuse(send, 403, "This Space does not fetch files from other addresses.")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        values = {name: [value for key, value in scope["headers"] if key == name] for name in FRAMING}
        if values[b"transfer-encoding"] and values[b"content-length"]:
            # RFC 9112, section 6.3: a proxy may have seen another end of this request.
            return await _refuse(send, 400, "A request must not have both Content-Length and Transfer-Encoding.")
        if len(set(values[b"content-length"])) != 1 or not values[b"content-length"][0].isdigit():
            return await _refuse(send, 411, "A request with a body needs a Content-Length header.")
        length, upload = int(values[b"content-length"][0]), path.rstrip("/").endswith("/upload")
        limits = self.limits
        limit = limits.upload_megabytes * 10**6 if upload else limits.request_kilobytes * 1000
        if length > limit:
            return await _refuse(send, 413, f"The request has {length} bytes; the limit is {limit} bytes.")
        if upload and shutil.disk_usage(self.upload_folder).free < MIN_FREE_MEGABYTES * 10**6 + length:
            return await _refuse(send, 507, "The server's disk is full. Try again in a few minutes.")
        body = _Body(receive, length, limits.upload_seconds if upload else limits.request_seconds)
        started = False

        async def send_recorded(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await (self.app if upload else self._forward_checked)(scope, body.receive, send_recorded)
        except Exception:
            if body.refusal is None:
                raise
            if not started:
                await _refuse(send, body.refusal.status, body.refusal.reason)

    async def _forward_checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request without the addresses in its JSON body, or refuse it."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            content = json.loads(body) if body else None
        except (ValueError, RecursionError):
            return await _refuse(send, 400, "The request body is not JSON.")
        if (name := self._find_foreign_file(content)) is not None:
            reason = f"{name[:200]!r} was not uploaded to this Space. Upload the file itself."
            return await _refuse(send, 403, reason)
        try:
            body = json.dumps(content, allow_nan=False).encode() if content is not None else bytes(body)
        except ValueError:
            return await _refuse(send, 400, "The request body contains NaN or inf, which JSON does not have.")
        length = (b"content-length", str(len(body)).encode())
        scope = scope | {"headers": [h for h in scope["headers"] if h[0] != b"content-length"] + [length]}
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    def _find_foreign_file(self, content: object) -> str | None:
        """Return a file that the request names and nobody uploaded, and delete the addresses of uploaded files."""
        stack = [content]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                if isinstance(path := value.get("path"), str):
                    if not self._is_uploaded(path):
                        return path
                    # Gradio would download the address although the file is here.
                    value.pop("url", None)
                elif "path" in value or isinstance(value.get("url"), str):
                    return str(value.get("path") or value.get("url"))
                stack += value.values()
            elif isinstance(value, list):
                stack += value
        return None

    def _is_uploaded(self, path: str) -> bool:
        if "\0" in path or not os.path.isabs(path):
            return False
        resolved = Path(os.path.realpath(path))
        return self.upload_folder in resolved.parents and resolved.is_file()


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason, "detail": reason}, allow_nan=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # The rest of the request is not read.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
