"""What a request may not do, checked before Gradio sees it.

Gradio itself refuses files outside its upload folder. It also fetches public addresses that a client names in place of
a file, and passes others on at `/file=http…`; a Space that tags what it is sent needs neither.
"""

import json
import os
import re
import shutil
from pathlib import Path

from limits import Limits

ADDRESS = re.compile(r"/(?:file|proxy)[=/]\s*[a-z][a-z0-9+.-]*:|/proxy=", re.IGNORECASE)
# Of Gradio's own, and not used here.
UNUSED = ("/process_recording", "/component_server", "/vibe-")
FREE_MEGABYTES = 500


class RequestGuard:
    """ASGI middleware.

    Args:
        app: the application behind it.
        upload_folder: the only folder whose files a request may name.
    """

    def __init__(self, app, limits: Limits, upload_folder: str):
        self.app, self.limits = app, limits
        self.upload_folder = Path(upload_folder).resolve()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if ADDRESS.search(path) or any(unused in path for unused in UNUSED):
            return await _refuse(send, 403, "This Space fetches nothing from other addresses.")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "A request with a body must say its length.")
        upload = path.rstrip("/").endswith("/upload")
        most = self.limits.upload_megabytes * 10**6 if upload else self.limits.request_kilobytes * 1000
        if int(length) > most:
            return await _refuse(send, 413, f"The request has {int(length)} bytes; at most {most} are taken.")
        if upload:
            if shutil.disk_usage(self.upload_folder).free < FREE_MEGABYTES * 10**6 + int(length):
                return await _refuse(send, 507, "There is no room for more files now; try again in a few minutes.")
            return await self.app(scope, receive, send)
        await self._checked(scope, receive, send)

    async def _checked(self, scope, receive, send) -> None:
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
            return await _refuse(send, 400, "The request is not JSON.")
        if (name := self._foreign(content)) is not None:
            reason = f"{name[:200]!r} was not sent to this Space: send the file itself. No other is read by its name."
            return await _refuse(send, 403, reason)
        body = json.dumps(content).encode() if content is not None else bytes(body)
        length = (b"content-length", str(len(body)).encode())
        scope = scope | {"headers": [h for h in scope["headers"] if h[0] != b"content-length"] + [length]}
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay():
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    def _foreign(self, content) -> str | None:
        """A file that a request names and that was not uploaded. Addresses that stand beside a file are taken out:
        what was uploaded needs none."""
        stack = [content]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                if isinstance(path := value.get("path"), str):
                    if not self._uploaded(path):
                        return path
                    value.pop("url", None)
                elif "path" in value or isinstance(value.get("url"), str):
                    return str(value.get("path") or value.get("url"))
                stack += value.values()
            elif isinstance(value, list):
                stack += value
        return None

    def _uploaded(self, path: str) -> bool:
        if "\0" in path or not os.path.isabs(path):
            return False
        resolved = Path(os.path.realpath(path))
        return self.upload_folder in resolved.parents and resolved.is_file()


async def _refuse(send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason, "detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
