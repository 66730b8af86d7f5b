"""Tests of what the Space does with requests before Gradio sees them, and with uploads of killed processes."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

SPACE = Path(__file__).resolve().parent.parent / "space"
sys.path[:0] = [str(SPACE), str(SPACE.parent / "benchmarks")]

import client_budget  # noqa: E402
import space_load  # noqa: E402
import upload_folder  # noqa: E402
from client_budget import ReadingBudget, client_address  # noqa: E402
from limits import InputError, Limits  # noqa: E402
from request_guard import RequestGuard  # noqa: E402
from upload_folder import UploadFolder  # noqa: E402


class Recorder:
    """An application that records the bodies of its requests."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        message = await receive()
        headers = dict(scope["headers"])
        assert scope["method"] == "GET" or int(headers[b"content-length"]) == len(message["body"])
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def guard(tmp_path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "own.png").write_bytes(b"image")
    (uploads / "link.png").symlink_to("/etc/passwd")
    return RequestGuard(Recorder(), Limits(request_kilobytes=10, upload_megabytes=1), str(uploads))


def ask(guard, path="/gradio_api/queue/join", body=None, headers=None, method="POST", pieces=None) -> tuple[int, str]:
    """Sends a request in pieces and returns the status and body of the answer."""
    content = json.dumps(body).encode() if body is not None else b""
    headers = [(b"content-length", str(len(content)).encode())] if headers is None else headers
    pieces, sent = iter([content[:7], content[7:]] if pieces is None else pieces), []
    following = [next(pieces, b"")]

    async def receive():
        piece = following.pop()
        if piece is None:
            await asyncio.sleep(60)
        following.append(next(pieces, b""))
        return {"type": "http.request", "body": piece, "more_body": bool(following[0]) or following[0] is None}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{uploads}/../../../../../../etc/passwd",
        "{uploads}/link.png",
        "{uploads}",
        "own.png",
        "https://example.org/image.png",
        "file:///etc/passwd",
        "concat:{uploads}/own.png",
        "{uploads}/own.png\0",
        "",
    ],
)
def test_a_request_for_a_file_that_was_not_uploaded_is_refused(guard, path):
    path = path.format(uploads=guard.upload_folder)
    for data in ([FILE | {"path": path}], [[{"deep": {"path": path}}]], [FILE | {"path": path, "is_stream": True}]):
        status, answer = ask(guard, body={"data": data})
        assert status == 403 and "was not uploaded to this Space" in json.loads(answer)["error"]
    assert guard.app.bodies == []


@pytest.mark.parametrize("file", [{"url": "http://169.254.169.254/"}, {"path": None, "url": "http://10.0.0.1/"}])
def test_a_request_for_an_address_is_refused(guard, file):
    assert ask(guard, body={"data": [FILE | file]})[0] == 403
    assert guard.app.bodies == []


def test_an_upload_is_forwarded_without_its_address(guard):
    file = FILE | {
        "path": str(guard.upload_folder / "own.png"),
        "url": "http://169.254.169.254/",
        "orig_name": "é.png",
    }
    assert ask(guard, body={"data": [file, "a title with a \"path\": '/etc/passwd'", 0.5, None]})[0] == 200
    [body] = guard.app.bodies
    del file["url"]
    assert json.loads(body) == {"data": [file, "a title with a \"path\": '/etc/passwd'", 0.5, None]}


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://example.org/",
        "/gradio_api/file=HTTPS://example.org/",
        "/gradio_api/file/http://example.org/",
        "/gradio_api/proxy=http://example.org/",
        "/proxy=/etc/passwd",
        "/gradio_api/process_recording",
        "/gradio_api/component_server",
    ],
)
def test_routes_that_fetch_addresses_are_refused(guard, path):
    assert ask(guard, path, method="GET")[0] == ask(guard, path)[0] == 403
    assert guard.app.bodies == []


def test_large_requests_and_nan_are_refused(guard):
    assert ask(guard, body={"data": [float("nan")]})[0] == 400
    assert ask(guard, body={"data": ["x" * 10_000]})[0] == 413
    assert ask(guard, headers=[(b"transfer-encoding", b"chunked")], body={})[0] == 411
    assert ask(guard, "/gradio_api/upload", headers=[(b"content-length", b"1000001")])[0] == 413
    status, answer = ask(guard, headers=[(b"content-length", b"1")])
    assert status == 200 and ask(guard, method="GET", path="/gradio_api/file=/tmp/x.png", headers=[])[0] == 200
    deep = b"[" * 9000
    scope = [(b"content-length", str(len(deep)).encode())]
    assert len(deep) < 10_000 and ask(guard, body=None, headers=scope)[0] == 200


class Reader(Recorder):
    """An application that reads whole bodies."""

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        self.bodies.append(body + message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


CHUNKED, TEN = (b"transfer-encoding", b"chunked"), (b"content-length", b"10")


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/upload/"])
@pytest.mark.parametrize(
    "headers, status",
    [([TEN, CHUNKED], 400), ([CHUNKED, TEN], 400), ([CHUNKED], 411), ([TEN, (b"content-length", b"12")], 411)],
)
def test_a_request_without_one_clear_end_is_refused(guard, path, headers, status):
    assert ask(guard, path, headers=headers, pieces=[b"x"])[0] == status and guard.app.bodies == []


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload"])
def test_the_bytes_of_a_body_are_counted(guard, path):
    guard.app, sent = Reader(), []
    endless = (sent.append(1) or b"12345" for _ in iter(int, 1))
    assert ask(guard, path, headers=[TEN], pieces=endless)[0] == 413
    assert len(sent) <= 4 and guard.app.bodies == []


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload"])
def test_a_body_that_never_ends_is_refused(guard, path):
    guard.app, guard.limits = Reader(), Limits(request_seconds=0.2, upload_seconds=0.2)
    assert ask(guard, path, headers=[TEN], pieces=[b"1", None])[0] == 408 and guard.app.bodies == []


@pytest.mark.parametrize("name", [name for name in space_load.ATTACKS if "byte by byte" not in name])
def test_a_server_survives_requests_without_end(tmp_path, name):
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(RequestGuard(Reader(), Limits(), str(tmp_path)), port=0, log_level="critical", http="h11")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        found = space_load.attack(f"http://127.0.0.1:{port}/", name)
        assert found["status"] in (400, 411, None) and found["sent_bytes"] < 20_000_000 and found["seconds"] < 20
    finally:
        server.should_exit = True
        thread.join(10)


def test_one_client_cannot_occupy_the_reader(monkeypatch):
    now = [0.0]
    budget = ReadingBudget(Limits(client_seconds=10, client_period=60), clock=lambda: now[0])
    for _ in range(2):
        budget.check("one")
        with budget.measured("one"):
            now[0] += 6
    with pytest.raises(InputError, match="more than 10 seconds to read within 60 seconds"):
        budget.check("one")
    budget.check("another")
    monkeypatch.setattr(client_budget, "MAX_CLIENTS", 1)
    with pytest.raises(InputError, match="Too many visitors"):
        budget.check("another")
    now[0] += 61
    budget.check("one")
    assert budget.used == {}


@pytest.mark.parametrize(
    "host, forwarded, expected",
    [
        ("198.51.100.7", None, "198.51.100.7"),
        ("10.0.0.2", None, "10.0.0.2"),
        ("10.0.0.2", "8.8.8.8", "8.8.8.8"),
        ("10.0.0.2", "1.1.1.1, 8.8.8.8, 10.0.0.9", "8.8.8.8"),
        ("9.9.9.9", "8.8.8.8", "9.9.9.9"),
        ("10.0.0.2", "nonsense", "10.0.0.2"),
        ("10.0.0.2", "1.1.1.1, 8.8.8.8:5678", "8.8.8.8"),
        ("10.0.0.2", "1.1.1.1, [2606:4700::1]:5678", "2606:4700::/64"),
        ("10.0.0.2", "1.1.1.1, [2606:4700::1]", "2606:4700::/64"),
        ("10.0.0.2", "1.1.1.1, unknown", "10.0.0.2"),
        ("10.0.0.2", "1.1.1.1, unknown, 10.0.0.9", "10.0.0.2"),
        ("2606:4700::1", None, "2606:4700::/64"),
        ("::ffff:8.8.8.8", None, "8.8.8.8"),
        ("::ffff:10.0.0.2", "1.1.1.1, ::ffff:9.9.9.9", "9.9.9.9"),
        (None, None, ""),
        (None, "1.1.1.1, 8.8.8.8", "8.8.8.8"),
    ],
)
def test_the_address_of_a_client_is_that_the_nearest_proxy_saw(host, forwarded, expected):
    assert client_address(host, {} if forwarded is None else {"x-forwarded-for": forwarded}) == expected


ABANDON = """
import os, sys
sys.path.insert(0, sys.argv[1])
from upload_folder import UploadFolder
print(UploadFolder(keep_seconds=60).path, flush=True)
sys.stdin.read()
"""


def test_uploads_of_a_killed_process_are_deleted_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("kept")
    (tmp_path / "optsg-space-link").symlink_to(tmp_path / "other")
    (tmp_path / "optsg-space-other").mkdir()
    command = [sys.executable, "-c", ABANDON, str(SPACE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        folder = Path(process.stdout.readline().strip())
        (folder / "upload.png").write_bytes(b"image")
        UploadFolder(keep_seconds=60).remove()
        assert (folder / "upload.png").exists(), "its process still runs"
        process.kill()
    UploadFolder(keep_seconds=60).remove()
    assert folder.parent == tmp_path and not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optsg-space-link", "optsg-space-other", "other"]
    assert (tmp_path / "other/mine.txt").read_text() == "kept"


def test_folders_of_processes_killed_before_the_lock_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, age in (("old", 3700), ("new", 60)):
        (tmp_path / f"optsg-space-{name}").mkdir()
        os.utime(tmp_path / f"optsg-space-{name}", (time.time() - age,) * 2)
    upload_folder.remove_abandoned_folders()
    assert [path.name for path in tmp_path.iterdir()] == ["optsg-space-new"]


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_start_survives_another_one_that_takes_its_folder_for_abandoned(tmp_path, monkeypatch, when):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    lock, taken = upload_folder._lock, []

    def take(path):
        if taken:
            return lock(path)
        taken.append(path)
        if when == "before":
            shutil.rmtree(path.parent)
        elif when == "during":
            taken.append(lock(path))
        descriptor = lock(path)
        shutil.rmtree(path.parent)
        return descriptor

    monkeypatch.setattr(upload_folder, "_lock", take)
    uploads = UploadFolder(keep_seconds=60)
    assert Path(uploads.path) != taken[0].parent and Path(uploads.path, ".lock").exists()
    uploads.remove()


def test_interrupted_uploads_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    uploads = UploadFolder(keep_seconds=0.2, sweep_seconds=0.1)
    try:
        file = Path(uploads.path, "hash", "tmpabc")
        file.parent.mkdir()
        file.write_bytes(b"half")
        deadline = time.monotonic() + 30
        while file.parent.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not file.parent.exists() and Path(uploads.path).is_dir()
    finally:
        uploads.remove()
    assert not Path(uploads.path).exists()


def test_the_measured_space_lost_no_request_and_kept_its_memory():
    found = json.loads((SPACE.parent / "results/space_load.json").read_text())
    assert found["concurrent_requests"] == 250 and found["lost"] == 0 and len(found["rounds"]) == 3
    assert all(1700 < one["megabytes"] < 1850 and 150 < one["seconds"] < 300 for one in found["rounds"])
    assert found["attacks"].keys() == space_load.ATTACKS.keys() and found["seconds_from_sigterm_to_end"] < 2
    for attack in found["attacks"].values():
        assert attack["more_megabytes"] < 20 and attack["tagged_meanwhile"]
        assert set(attack["statuses"]) <= {"400", "408", "411", "None"}
