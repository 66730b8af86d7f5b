"""Checks every request before Gradio sees it.

Gradio refuses files outside its upload folder. It also downloads public addresses that a client names instead of a
file, and forwards others at `/file=http…`. This Space needs neither.
"""

import json
import os
import re
import shutil
from pathlib import Path

from limits import Limits
from starlette.types import ASGIApp, Receive, Scope, Send

ADDRESS = re.compile(r"/(?:file|proxy)[=/]\s*[a-z][a-z0-9+.-]*:|/proxy=", re.IGNORECASE)
# Gradio serves these routes; this Space does not use them.
UNUSED = ("/process_recording", "/component_server", "/vibe-")
MIN_FREE_MEGABYTES = 500


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
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "A request with a body needs a Content-Length header.")
        upload = path.rstrip("/").endswith("/upload")
        limit = self.limits.upload_megabytes * 10**6 if upload else self.limits.request_kilobytes * 1000
        if int(length) > limit:
            return await _refuse(send, 413, f"The request has {int(length)} bytes; the limit is {limit} bytes.")
        if not upload:
            return await self._forward_checked(scope, receive, send)
        if shutil.disk_usage(self.upload_folder).free < MIN_FREE_MEGABYTES * 10**6 + int(length):
            return await _refuse(send, 507, "The server's disk is full. Try again in a few minutes.")
        await self.app(scope, receive, send)

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

        async def replay() -> dict:
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
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
