"""The Space's parts that need neither Gradio nor a browser: what it refuses, what it reads, how it shows text."""

import ast
import asyncio
import csv
import io
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "space"
sys.path.insert(0, str(SPACE))

import markup  # noqa: E402
from file_reading import FileReader, kind_of  # noqa: E402
from folder_table import split_metadata, tag_files, to_csv  # noqa: E402
from limits import Limits, Refused  # noqa: E402
from request_guard import RequestGuard  # noqa: E402
from tagging import Tagged, Tagger  # noqa: E402
from upload_folder import UploadFolder  # noqa: E402

SCRIPT = "<script>window.hit=1</script><img src=x onerror=hit=1>"


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to have so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_video(path, frames: int, size: int = 32, rate: int = 1) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = size
        image = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8))
        for _ in range(frames):
            container.mux(stream.encode(image))
        container.mux(stream.encode())


# What a request may name


class Recorder:
    """An application that keeps what comes through to it."""

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


def ask(guard, path="/gradio_api/queue/join", body=None, headers=None, method="POST") -> tuple[int, str]:
    """Status and body of the answer; the request's body arrives in pieces."""
    content = json.dumps(body).encode() if body is not None else b""
    headers = [(b"content-length", str(len(content)).encode())] if headers is None else headers
    pieces = [content[:7], content[7:]]
    sent = []

    async def receive():
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

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
def test_no_file_is_named_that_was_not_uploaded(guard, path):
    path = path.format(uploads=guard.upload_folder)
    for data in ([FILE | {"path": path}], [[{"deep": {"path": path}}]], [FILE | {"path": path, "is_stream": True}]):
        status, answer = ask(guard, body={"data": data})
        assert status == 403 and "was not sent to this Space" in json.loads(answer)["error"]
    assert guard.app.bodies == []


@pytest.mark.parametrize("file", [{"url": "http://169.254.169.254/"}, {"path": None, "url": "http://10.0.0.1/"}])
def test_no_address_stands_for_a_file(guard, file):
    assert ask(guard, body={"data": [FILE | file]})[0] == 403
    assert guard.app.bodies == []


def test_an_upload_comes_through_without_the_address_beside_it(guard):
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
def test_nothing_is_passed_on_from_other_addresses(guard, path):
    assert ask(guard, path, method="GET")[0] == ask(guard, path)[0] == 403
    assert guard.app.bodies == []


def test_requests_have_a_size(guard):
    assert ask(guard, body={"data": ["x" * 10_000]})[0] == 413
    assert ask(guard, headers=[(b"transfer-encoding", b"chunked")], body={})[0] == 411
    assert ask(guard, "/gradio_api/upload", headers=[(b"content-length", b"1000001")])[0] == 413
    status, answer = ask(guard, headers=[(b"content-length", b"1")])
    assert status == 200 and ask(guard, method="GET", path="/gradio_api/file=/tmp/x.png", headers=[])[0] == 200
    deep = b"[" * 9000
    scope = [(b"content-length", str(len(deep)).encode())]
    assert len(deep) < 10_000 and ask(guard, body=None, headers=scope)[0] == 200


def test_what_breaks_off_is_swept_away(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    uploads = UploadFolder(keep_seconds=0.2, every_seconds=0.1)
    try:
        file = Path(uploads.path, "hash", "tmpabc")
        file.parent.mkdir()
        file.write_bytes(b"half")
        deadline = time.monotonic() + 5
        while file.parent.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not file.parent.exists() and Path(uploads.path).is_dir()
    finally:
        uploads.remove()
    assert not Path(uploads.path).exists()


# Files of strangers


@pytest.fixture(scope="module")
def strange_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strange")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "damaged.png").write_bytes((ROOT / "examples/images/bird.png").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "text.txt").write_text("only text\n")
    (folder / "page.html").write_text(SCRIPT)
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>')
    (folder / "print.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    (folder / "list.txt").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    write_video(folder / "long.mp4", 130)
    write_video(folder / "many.mp4", 120, rate=60)
    Image.new("LA", (6000, 6000)).save(folder / "wide.png")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


@pytest.mark.parametrize(
    "name, reason",
    [
        ("bomb.png", "has more than 40 million pixels"),
        ("empty.png", "is empty"),
        ("text.txt", "is neither an image nor a video"),
        ("page.html", "is neither an image nor a video"),
        ("drawing.svg", "is neither an image nor a video"),
        ("print.eps", "is neither an image nor a video"),
        ("list.m3u8", "is neither an image nor a video"),
        ("list.txt", "is neither an image nor a video"),
        ("long.mp4", "is a video of more than 120 seconds or 100 frames"),
        ("many.mp4", "is a video of more than 120 seconds or 100 frames"),
    ],
)
def test_headers_and_packets_are_looked_at_before_pixels(strange_files, name, reason):
    with pytest.raises(Refused, match=reason) as refused:
        kind_of(str(strange_files / name), "what I call it", Limits(video_frames=100))
    assert str(refused.value).startswith("what I call it ") and str(strange_files) not in str(refused.value)


def test_files_and_videos_have_a_size(strange_files):
    path = str(strange_files / "many.mp4")
    assert kind_of(path, "video", Limits()) == kind_of(str(strange_files / "moving.gif"), "gif", Limits()) == "video"
    with pytest.raises(Refused, match="video has . MB; at most 0 MB"):
        kind_of(path, "video", Limits(file_megabytes=0))
    with pytest.raises(Refused, match="frames of more than 0 million pixels"):
        kind_of(path, "video", Limits(image_megapixels=0))
    with pytest.raises(Refused, match="more than 0 billion pixels"):
        kind_of(path, "video", Limits(video_gigapixels=0))


@pytest.fixture(scope="module")
def reader(tiny_checkpoint):
    reader = FileReader(str(tiny_checkpoint), Limits(read_megabytes=400))
    reader.wait()
    yield reader
    reader.stop()


def test_a_file_is_read_apart_as_the_processor_reads_it(reader, tiny_checkpoint):
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    path = str(ROOT / "examples/images/bird.png")
    kind, arrays = reader.read(path, "b.png", "a red square")
    expected = processor(images=[path], titles=["a red square"])
    assert kind == "image" and arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], value) for name, value in expected.items())
    path = str(ROOT / "examples/images/ship-wheel.mp4")
    kind, arrays = reader.read(path, "c.mp4")
    assert kind == "video" and np.array_equal(arrays["pixel_values"], processor(videos=[path])["pixel_values"])


def test_a_file_that_ends_its_reader_ends_nothing_else(reader, strange_files):
    with pytest.raises(Refused, match="mine.png is not an image that can be read") as refused:
        reader.read(str(strange_files / "damaged.png"), "mine.png")
    assert str(strange_files) not in str(refused.value)
    with pytest.raises(Refused, match="big.png"):
        reader.read(str(strange_files / "wide.png"), "big.png")
    before = reader.process.pid
    reader.limits = Limits(read_seconds=0)
    with pytest.raises(Refused, match="slow.mp4 took more than 0 seconds"):
        reader.read(str(strange_files / "many.mp4"), "slow.mp4")
    reader.limits = Limits()
    assert reader.read(str(strange_files / "many.mp4"), "again.mp4")[0] == "video"
    assert reader.process.pid != before


# Tags and where prompts looked


@pytest.fixture(scope="module")
def tagger(tiny_checkpoint, reader):
    tagger = Tagger.__new__(Tagger)
    tagger.name, tagger.limits, tagger.reader = "tiny", Limits(), reader
    tagger.processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    tagger.model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint).eval()
    return tagger


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_tags_are_those_of_generate(tagger, decoding):
    path = str(ROOT / "examples/images/ship-wheel.mp4")
    tagged = tagger.tag(path, "video.mp4", "a red square", decoding)
    inputs = tagger.processor(videos=[path], titles=["a red square"])
    [expected] = tagger.processor.batch_decode(tagger.model.generate(**inputs, decoding=decoding, threshold=0.0))
    assert [(row["tag"], row["score"]) for row in tagged.at(0)] == [(row["tag"], row["score"]) for row in expected]
    assert tagged.at(expected[0]["score"]) == tagged.tags[:1] and tagged.at(1.0) == []
    assert all(row["mark"] == tagger.mark(row["tag"]) for row in tagged.tags)


def test_marks_are_the_benchmarks(tagger):
    tagger.processor.label_vocabulary |= {"often": 25, "seldom": 24}
    assert [tagger.mark(tag) for tag in ("often", "seldom", "never")] == ["common", "rare", "novel"]


def test_each_slots_attention_adds_up_over_patches_and_words(tagger):
    tagged = tagger.tag(str(ROOT / "examples/images/ship-wheel.mp4"), "c.mp4", "a red e-mail")
    assert tagged.frames.shape == (4, 32, 32, 3) and len(tagged.slots) == 4
    for slot in tagged.slots:
        assert slot.patches.shape == (4, 2, 2)
        assert [word for word, _ in slot.words] == ["[CLS]", "a", "red", "e", "-", "mail", "[SEP]"]
        words = sum(share for _, share in slot.words)
        assert slot.frames + words == pytest.approx(1, abs=1e-5)
        # The rest is for the tower's [CLS].
        assert 0 < slot.patches.sum() < slot.frames


def test_frames_are_shown_as_the_model_sees_them(tagger):
    pixels = tagger.processor(images=[Image.new("RGB", (40, 32), (200, 30, 90))])["pixel_values"][0]
    assert np.array_equal(tagger._frames(torch.as_tensor(pixels)), np.full((1, 32, 32, 3), (200, 30, 90)))


@pytest.mark.parametrize(
    "decoding, threshold", [("both", 0.5), ("parallel", 2), ("parallel", "0.5"), ("parallel", True), ("parallel", [])]
)
def test_settings_are_checked(tagger, decoding, threshold):
    with pytest.raises(Refused, match="expected"):
        tagger.settings(decoding, threshold)
    with pytest.raises(Refused, match="The title has 501 characters"):
        tagger.tag(str(ROOT / "examples/images/bird.png"), "b.png", "x" * 501)


# Many files


def test_metadata_gives_titles_and_opens_nothing(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,title\n../../etc/passwd,a password\n/a/b/bird.png,a bird\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bus.png", "title": "a bus"}\n[1]\n')
    (tmp_path / "passwd").write_text("x")
    files = [(str(path), path.name) for path in sorted(tmp_path.iterdir())]
    others, titles, problems = split_metadata(files)
    assert others == [(str(tmp_path / "passwd"), "passwd")]
    assert titles == {"passwd": "a password", "bird.png": "a bird"}
    assert problems == ["metadata.jsonl was left out: line 2 is no JSON object."]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"file_name": "a.png", "title": 3}], "row 1 has not both"),
        ([{"file_name": "x/a.png", "title": "one"}, {"file_name": "y/a.png", "title": "two"}], "two titles for files"),
    ],
)
def test_titles_that_are_none_or_ambiguous_are_said(tmp_path, rows, said):
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    _, titles, (problem,) = split_metadata([(str(path), path.name)])
    assert not titles and said in problem


def test_metadata_alone_is_nothing_to_tag(tagger, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,title\na.png,a\n")
    with pytest.raises(Refused, match="beside the metadata"):
        list(tag_files(tagger, [(str(tmp_path / "metadata.csv"), "metadata.csv")], "parallel", 0.3, True, Limits()))


def test_a_row_a_file_whatever_it_is(tagger, strange_files):
    files = [(str(ROOT / "examples/images" / name), name) for name in ("bird.png", "ship-wheel.mp4")]
    files.insert(1, (str(strange_files / "text.txt"), "=cmd.txt"))
    rows = list(tag_files(tagger, files, "parallel", 0.0, True, Limits()))
    assert [row["file"] for row in rows] == ["bird.png", "=cmd.txt", "ship-wheel.mp4"]
    assert [row["title"] for row in rows] == ["bird", "=cmd", "ship wheel"]
    assert rows[1]["tags"] == [] and "neither an image nor a video" in rows[1]["error"]
    lines = list(csv.DictReader(io.StringIO(to_csv(rows), newline="")))
    assert [line["tag"] for line in lines if line["file"] == "bird.png"] == [row["tag"] for row in rows[0]["tags"]]
    [refused] = [line for line in lines if line["error"]]
    assert refused["file"] == "'=cmd.txt" and refused["title"] == "'=cmd" and refused["tag"] == ""
    with pytest.raises(Refused, match="There are 3 files; at most 2"):
        list(tag_files(tagger, files, "parallel", 0.0, True, Limits(files=2)))


# What is shown


def test_titles_names_and_tags_are_text(tagger):
    slot = tagger.tag(str(ROOT / "examples/images/bird.png"), "b.png", "a").slots[0]
    slot.num_candidates, slot.words = [(SCRIPT, 0.9)], [(SCRIPT, 0.5)]
    row = {"tag": SCRIPT, "score": 0.9, "mark": "novel", "train_count": 0, "slot": 0}
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    tagged = Tagged(SCRIPT, SCRIPT, "video", "parallel", [row], [slot], frames)
    shown = [markup.tags(tagged, 0.5), markup.slots(tagged, 0.5), markup.message(SCRIPT), markup.tags(tagged, 0.95)]
    shown += [markup.preview("/tmp/" + SCRIPT + '"', SCRIPT + '"', kind) for kind in ("image", "video")]
    shown.append(markup.table([{"file": SCRIPT, "title": SCRIPT, "tags": [row], "error": None}], 1))
    shown.append(markup.table([{"file": SCRIPT, "title": SCRIPT, "tags": [], "error": SCRIPT}], 1))
    for html in shown:
        assert "<script" not in html and "<img src=x" not in html and "&lt;script&gt;" in html


# The folder


def test_the_space_needs_nothing_of_this_package():
    imported = set()
    for file in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    own = {file.stem for file in SPACE.glob("*.py")}
    required = {line.split(">")[0].split("=")[0].strip() for line in (SPACE / "requirements.txt").open()}
    names = {"PIL": "pillow", "starlette": "gradio"}
    assert {names.get(name, name) for name in imported - own - set(sys.stdlib_module_names)} <= required


def test_its_examples_are_those_of_the_repository():
    for file in (SPACE / "examples").iterdir():
        assert file.read_bytes() == (ROOT / "examples/images" / file.name).read_bytes()
    assert len(list((SPACE / "examples").iterdir())) == 8


def test_its_metadata_are_the_hubs():
    _, block, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(block)
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert metadata["license"] == "apache-2.0" and len(metadata["short_description"]) <= 60
    version = tuple(map(int, metadata["sdk_version"].split(".")))
    assert (6, 31) <= version < (7,), "as in requirements.txt"
    for name in metadata["models"]:
        assert f"`{name}` is where the weights are to be published; there is nothing under that name yet" in text
