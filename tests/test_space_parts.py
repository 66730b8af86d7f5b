"""Tests of the parts of the Space that need neither a server nor a browser."""

import ast
import csv
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import safetensors
import torch
import yaml
from PIL import Image

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.generation_optsg import OPTSGGenerateOutput

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "space"
sys.path.insert(0, str(SPACE))

import markup  # noqa: E402
from file_reading import FileReader, detect_kind, read_answer, write_answer  # noqa: E402
from folder_table import split_metadata, tag_files, to_csv  # noqa: E402
from limits import InputError, Limits  # noqa: E402
from loading import load_model, load_processor  # noqa: E402
from tagging import TaggedFile, Tagger  # noqa: E402

SCRIPT = "<script>window.hit=1</script><img src=x onerror=hit=1>"


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that it does not hold."""
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


# Reading files


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
    Image.new("LA", (10500, 10500)).save(folder / "wide.png")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


@pytest.mark.parametrize(
    "name, reason",
    [
        ("bomb.png", "exceeds the limit of 40 million pixels"),
        ("empty.png", "is empty"),
        ("text.txt", "is neither an image nor a video"),
        ("page.html", "is neither an image nor a video"),
        ("drawing.svg", "is neither an image nor a video"),
        ("print.eps", "is neither an image nor a video"),
        ("list.m3u8", "is neither an image nor a video"),
        ("list.txt", "is neither an image nor a video"),
        ("long.mp4", "exceeds the limit of 120 seconds or 100 frames"),
        ("many.mp4", "exceeds the limit of 120 seconds or 100 frames"),
    ],
)
def test_files_are_refused_before_they_are_decoded(strange_files, name, reason):
    with pytest.raises(InputError, match=reason) as refused:
        detect_kind(str(strange_files / name), "what I call it", Limits(video_frames=100))
    assert str(refused.value).startswith("what I call it ") and str(strange_files) not in str(refused.value)


def test_large_files_and_videos_are_refused(strange_files):
    path = str(strange_files / "many.mp4")
    assert (
        detect_kind(path, "video", Limits())
        == detect_kind(str(strange_files / "moving.gif"), "gif", Limits())
        == "video"
    )
    with pytest.raises(InputError, match="video has . MB; the limit is 0 MB"):
        detect_kind(path, "video", Limits(file_megabytes=0))
    with pytest.raises(InputError, match="frames of video exceed the limit of 0 million pixels"):
        detect_kind(path, "video", Limits(image_megapixels=0))
    with pytest.raises(InputError, match="exceed the limit of 0 billion pixels"):
        detect_kind(path, "video", Limits(video_gigapixels=0))


@pytest.fixture(scope="module")
def reader(tiny_checkpoint):
    reader = FileReader(str(tiny_checkpoint), Limits(read_megabytes=400))
    reader.wait_until_ready()
    yield reader
    reader.stop()


def test_the_reader_returns_the_arrays_of_the_processor(reader, tiny_checkpoint):
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    path = str(ROOT / "examples/images/bird.png")
    kind, arrays = reader.read(path, "b.png", "a red square")
    expected = processor(images=[path], titles=["a red square"])
    assert kind == "image" and arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], value) for name, value in expected.items())
    path = str(ROOT / "examples/images/ship-wheel.mp4")
    kind, arrays = reader.read(path, "c.mp4")
    assert kind == "video" and np.array_equal(arrays["pixel_values"], processor(videos=[path])["pixel_values"])


def test_answers_of_the_reader_are_parsed_as_data():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "mask": np.array([[True, False]])}
    file = io.BytesIO()
    write_answer(file, {"kind": "image"}, arrays)
    header, found = read_answer(io.BytesIO(file.getvalue()))
    assert header["kind"] == "image" and all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert "pickle" not in (SPACE / "file_reading.py").read_text()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"{}\n",
        b"[]\n",
        b'{"bytes": true}\n',
        b'{"bytes": -1}\n',
        b'{"bytes": 1000000000000}\n',
        b'{"bytes": 100}\nshort',
        b'{"bytes": 8}\n\xff\xff\xff\xff\xff\xff\xff\xff',
        b"[" * 90_000 + b"\n",
        b"x" * 200_000,
        pickle.dumps(("image", {})) + b"\n",
    ],
)
def test_other_answers_of_the_reader_are_refused(answer):
    with pytest.raises((ValueError, safetensors.SafetensorError)):
        read_answer(io.BytesIO(answer))


def test_the_reader_restarts_after_a_file_that_ended_it(reader, strange_files, monkeypatch):
    with pytest.raises(InputError, match="mine.png") as refused:
        reader.read(str(strange_files / "damaged.png"), "mine.png")
    assert str(strange_files) not in str(refused.value)
    with pytest.raises(InputError, match="big.png"):
        reader.read(str(strange_files / "wide.png"), "big.png")
    before = reader.process.pid
    monkeypatch.setattr(reader, "limits", Limits(read_seconds=0))
    os.kill(before, signal.SIGSTOP)  # otherwise it may be faster
    with pytest.raises(InputError, match="slow.mp4 could not be read within 0 seconds"):
        reader.read(str(strange_files / "many.mp4"), "slow.mp4", client="slow")
    assert reader.budget.used["slow"][0][1] > 0.5, "the client pays for the restart"
    monkeypatch.undo()
    assert reader.read(str(strange_files / "many.mp4"), "again.mp4")[0] == "video"
    assert reader.process.pid != before


# Tags and slots


@pytest.fixture(scope="module")
def tagger(tiny_checkpoint, reader):
    tagger = Tagger.__new__(Tagger)
    tagger.name, tagger.limits, tagger.reader, tagger.book = "tiny", Limits(), reader, None
    tagger.processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    tagger.model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint).eval()
    return tagger


@pytest.mark.parametrize(
    "threshold, expected",
    [
        (0.4, {"a dog": 0.4, "": 0.4}),
        ({"image+title": 0.2, "image": 0.3}, {"a dog": 0.2, "": 0.3}),
        ({"image+title": 0.2}, {"a dog": 0.2, "": 0.2}),
        ({"parallel": {"image+title": 0.2}, "sequential": 0.9}, {"a dog": 0.2, "": 0.2}),
        ({"sequential": 0.9}, {"a dog": 0.0, "": 0.0}),
        (None, {"a dog": 0.0, "": 0.0}),
    ],
)
def test_the_fitted_threshold_is_read_as_by_generate(threshold, expected):
    tagger = object.__new__(Tagger)
    tagger.book, tagger.model = None, SimpleNamespace(generation_config=SimpleNamespace(threshold=threshold))
    assert {title: tagger.fitted_threshold("parallel", title) for title in expected} == expected


def test_the_model_is_prepared_for_inference(tiny_checkpoint):
    tagger = Tagger(str(tiny_checkpoint), Limits())
    tagger.reader.stop()
    assert not tagger.model.lm_head.weight.is_contiguous()


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_the_tags_are_those_of_generate(tagger, decoding):
    path = str(ROOT / "examples/images/ship-wheel.mp4")
    tagged = tagger.tag(path, "video.mp4", "a red square", decoding)
    inputs = tagger.processor(videos=[path], titles=["a red square"])
    [expected] = tagger.processor.batch_decode(tagger.model.generate(**inputs, decoding=decoding, threshold=0.0))
    assert [(row["tag"], row["score"]) for row in tagged.tags_above(0)] == [
        (row["tag"], row["score"]) for row in expected
    ]
    assert tagged.tags_above(expected[0]["score"]) == tagged.tags[:1] and tagged.tags_above(1.0) == []
    assert all(row["mark"] == tagger.mark(row["tag"]) for row in tagged.tags)


def test_a_file_tagged_by_image_words_has_its_own_default_threshold(tagger, monkeypatch):
    generate, words = tagger.model.generate, {"tagged_by": ["image words"]}
    changed = lambda **inputs: OPTSGGenerateOutput(**generate(**inputs, pad_bias=-5.0) | words)  # noqa: E731
    for name, value in {"generate": changed, "num_word_tags": 2, "min_word_tag_probability": 0.0}.items():
        monkeypatch.setattr(tagger.model, name, value, raising=False)
    path = str(ROOT / "examples/images/bird.png")
    tagged = tagger.tag(path, "b.png")
    assert len(tagged.tags) > 2 and tagged.tags_above(tagged.default_threshold) == tagged.tags[:2]
    [row] = tag_files(tagger, [(path, "b.png")], "parallel", None, False, Limits())
    assert row["tags"] == tagged.tags[:2]


def test_marks_follow_the_number_of_training_examples(tagger):
    tagger.processor.label_vocabulary |= {"often": 25, "seldom": 24}
    assert [tagger.mark(tag) for tag in ("often", "seldom", "never")] == ["common", "rare", "novel"]


def test_the_attention_of_each_slot_adds_up_to_one(tagger):
    tagged = tagger.tag(str(ROOT / "examples/images/ship-wheel.mp4"), "c.mp4", "a red e-mail")
    assert tagged.frames.shape == (4, 32, 32, 3) and len(tagged.slots) == 4
    for slot in tagged.slots:
        assert slot.patches.shape == (4, 2, 2)
        assert [word for word, _ in slot.words] == ["[CLS]", "a", "red", "e", "-", "mail", "[SEP]"]
        words = sum(weight for _, weight in slot.words)
        assert slot.frames + words == pytest.approx(1, abs=1e-5)
        # The tower's [CLS] gets the rest.
        assert 0 < slot.patches.sum() < slot.frames


def test_the_frames_are_those_the_model_sees(tagger):
    pixels = tagger.processor(images=[Image.new("RGB", (40, 32), (200, 30, 90))])["pixel_values"][0]
    assert np.array_equal(tagger._frames(torch.as_tensor(pixels)), np.full((1, 32, 32, 3), (200, 30, 90)))


@pytest.mark.parametrize(
    "decoding, threshold", [("both", 0.5), ("parallel", 2), ("parallel", "0.5"), ("parallel", True), ("parallel", [])]
)
def test_invalid_settings_are_refused(tagger, decoding, threshold):
    with pytest.raises(InputError, match="expected"):
        tagger.check_settings(decoding, threshold)
    with pytest.raises(InputError, match="The title has 501 characters"):
        tagger.tag(str(ROOT / "examples/images/bird.png"), "b.png", "x" * 501)


# Many files


def test_metadata_gives_titles_and_opens_no_files(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,title\n../../etc/passwd,a password\n/a/b/bird.png,a bird\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bus.png", "title": "a bus"}\n[1]\n')
    (tmp_path / "passwd").write_text("x")
    files = [(str(path), path.name) for path in sorted(tmp_path.iterdir())]
    others, titles, problems = split_metadata(files)
    assert others == [(str(tmp_path / "passwd"), "passwd")]
    assert titles == {"passwd": "a password", "bird.png": "a bird"}
    assert problems == ["metadata.jsonl was ignored: line 2 is not a JSON object."]


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"\xff\xfe", b'{"file_name": "a.png", "title": "' + b"x" * 10, b"1" * 5000, b"\0" * 10, b"[]\n"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_files_next_to_damaged_metadata_are_tagged(tagger, tmp_path, content, suffix):
    (tmp_path / f"metadata{suffix}").write_bytes(content)
    files = [(str(tmp_path / f"metadata{suffix}"), f"metadata{suffix}"), (str(tmp_path / "metadata.csv.gone"), "no")]
    files.append((str(ROOT / "examples/images/bird.png"), "bird.png"))
    files.append((str(tmp_path / "gone/metadata.csv"), "metadata.csv"))
    rows = list(tag_files(tagger, files, "parallel", 0.0, True, Limits()))
    assert all(row["error"] for row in rows if row["file"] != "bird.png")
    assert next(row for row in rows if row["file"] == "bird.png")["tags"]


def test_half_a_surrogate_pair_in_a_title_is_replaced(tagger, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bird.png", "title": "a \\ud800 bird"}')
    files = [
        (str(tmp_path / "metadata.jsonl"), "metadata.jsonl"),
        (str(ROOT / "examples/images/bird.png"), "bird.png"),
    ]
    [row] = tag_files(tagger, files, "parallel", 0.0, True, Limits())
    assert row["tags"] and row["title"] == "a ? bird"


def test_titles_of_json_lines_may_have_any_character(tagger, tmp_path):
    path, title = tmp_path / "metadata.jsonl", "one\u2028two\u2029three\x85four"
    names = ["a.png", unicodedata.normalize("NFD", "é.png"), "ü.png"]
    rows = [{"file_name": name, "title": title} for name in names]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    files = [
        (str(tmp_path / "gone.png"), unicodedata.normalize(form, name)) for name in names for form in ("NFC", "NFD")
    ]
    rows = list(tag_files(tagger, [(str(path), path.name), *files], "parallel", 0.0, False, Limits()))
    assert [row["title"] for row in rows] == [title] * len(files)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "a.png", "title": 3}], "row 1 needs a file_name and a title"),
        (
            [{"file_name": "x/a.png", "title": "one"}, {"file_name": "y/a.png", "title": "two"}],
            "two titles for files named a.png",
        ),
    ],
)
def test_unusable_metadata_is_reported(tmp_path, rows, message):
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    _, titles, (problem,) = split_metadata([(str(path), path.name)])
    assert not titles and message in problem


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed.")
@pytest.mark.parametrize(("last", "is_added"), [(65534, False), (65535, False), (65535, True), (70000, False)])
def test_the_browser_refuses_more_tokens_than_characters(tmp_path, last, is_added):
    shutil.copy(SPACE / "browser/tagger.js", tmp_path / "tagger.mjs")
    vocabulary = {"a": 0} if is_added else {"a": 0, "b": last}
    added = [{"id": last, "special": True}] if is_added else []
    tokenizer = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}, allow_nan=False)
    program = f'import {{ TagDecoder }} from "./tagger.mjs"; console.log(new TagDecoder({tokenizer}).decode([0]));'
    (tmp_path / "test.mjs").write_text(program, encoding="utf-8")
    done = subprocess.run(["node", "test.mjs"], cwd=tmp_path, capture_output=True, text=True)
    if last < 65535:
        assert done.stdout == "a\n", done.stderr
    else:
        assert f"The tag tokenizer has {last + 1} tokens; this page supports up to 65535" in done.stderr


def test_metadata_without_files_is_refused(tagger, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,title\na.png,a\n")
    with pytest.raises(InputError, match="There is only metadata"):
        list(tag_files(tagger, [(str(tmp_path / "metadata.csv"), "metadata.csv")], "parallel", 0.3, True, Limits()))


def test_each_file_gets_one_row_and_csv_escapes_formulas(tagger, strange_files):
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
    with pytest.raises(InputError, match="There are 3 files; the limit is 2"):
        list(tag_files(tagger, files, "parallel", 0.0, True, Limits(files=2)))


# HTML


def test_titles_names_and_tags_are_escaped(tagger):
    slot = tagger.tag(str(ROOT / "examples/images/bird.png"), "b.png", "a").slots[0]
    slot.candidates, slot.words = [(SCRIPT, 0.9)], [(SCRIPT, 0.5)]
    row = {"tag": SCRIPT, "score": 0.9, "mark": "novel", "train_count": 0, "slot": 0}
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    tagged = TaggedFile(SCRIPT, SCRIPT, "video", "parallel", [row], 0.5, [slot], frames)
    shown = [markup.tag_list(tagged, 0.5), markup.slot_cards(tagged, 0.5), markup.error_message(SCRIPT)]
    shown += [markup.tag_list(tagged, 0.95, SCRIPT)]
    shown += [markup.preview("/tmp/" + SCRIPT + '"', SCRIPT + '"', kind) for kind in ("image", "video")]
    shown.append(markup.file_table([{"file": SCRIPT, "title": SCRIPT, "tags": [row], "error": None}], 1))
    shown.append(markup.file_table([{"file": SCRIPT, "title": SCRIPT, "tags": [], "error": SCRIPT}], 1))
    for html in shown:
        assert "<script" not in html and "<img src=x" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("title, advice", [("", "Enter a title"), ("bird", "Change the title")])
def test_a_file_without_tags_comes_with_advice(title, advice):
    row = {"tag": "bird", "score": 0.1, "mark": "rare", "train_count": 1, "slot": 0}
    for rows, lower in ([row], True), ([], False):
        tagged = TaggedFile("b.png", title, "image", "parallel", rows, 0.5, [], np.zeros((1, 8, 8, 3), np.uint8))
        html = markup.tag_list(tagged, 0.5, "icons")
        assert advice in html and "this model knows icons" in html
        assert ("Lower the threshold" in html) == lower


# The model and the folder


LOAD = """
import sys

sys.modules["modeling_optsg"] = None  # The package looks as if it were not installed.
sys.path.insert(0, sys.argv[1])
from loading import load_model, load_processor

for load in (load_model, load_processor):
    print(type(load(sys.argv[2])).__module__)
"""


@pytest.mark.slow
def test_a_pushed_model_loads_without_the_package(tiny_checkpoint, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(SPACE), str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert len(modules) == 2 and all(module.startswith("transformers_modules") for module in modules)


def test_a_folder_without_code_needs_the_package(monkeypatch):
    folder = str(ROOT / "checkpoints/optsg-icon-small")
    assert isinstance(load_processor(folder), OPTSGProcessor)
    monkeypatch.setitem(sys.modules, "modeling_optsg", None)
    for load in (load_model, load_processor):
        with pytest.raises(ImportError, match="optsg-icon-small holds no code"):
            load(folder)


def test_the_space_imports_only_its_requirements():
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


def test_the_examples_are_those_of_the_repository():
    for file in (SPACE / "examples").iterdir():
        assert file.read_bytes() == (ROOT / "examples/images" / file.name).read_bytes()
    assert len(list((SPACE / "examples").iterdir())) == 9


def test_the_readme_metadata_is_valid_for_the_hub():
    _, block, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(block)
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert metadata["license"] == "apache-2.0" and len(metadata["short_description"]) <= 60
    version = tuple(map(int, metadata["sdk_version"].split(".")))
    assert (6, 31) <= version < (7,), "as in requirements.txt"
    for name in metadata["models"]:
        # The weights are not published yet, and the page says so.
        assert re.search(rf"`{name}`.*\bnot\b", text.replace("\n", " "))
