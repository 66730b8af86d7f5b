"""`load_tagging_dataset` reads tar files in the WebDataset format."""

import io
import json
import tarfile

import datasets
import pytest
from datasets import Image, Video
from PIL import Image as PILImage

from dataset_scripts import load_tagging_dataset
from modeling_optsg.training import OPTSGTrainingArguments
from modeling_optsg.training.data import load_streams

datasets.disable_progress_bars()

MODES = ["map", "stream", "texts"]


def image_bytes(colour, file_format):
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(file, file_format)
    return file.getvalue()


def write_archive(path, examples):
    """Writes examples as {key: {suffix: bytes, text or JSON data}}."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in examples.items():
            for suffix, content in files.items():
                content = content if isinstance(content, bytes | str) else json.dumps(content)
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def load(tmp_path):
    def load(mode="map", **options):
        options |= {"streaming": mode != "map", "texts_only": mode == "texts", "cache_dir": tmp_path / "cache"}
        return load_tagging_dataset(tmp_path / "data", **options)

    return load


@pytest.mark.parametrize("mode", MODES)
def test_archives_of_several_formats_are_read(tmp_path, load, mode, caplog):
    jpeg = {"jpg": image_bytes("blue", "JPEG"), "json": {"title": "a", "tags": ["x", " y", "x"], "width": 8}}
    webp = {"webp": image_bytes("red", "WEBP"), "json": {"tags": None, "height": "?"}}
    write_archive(tmp_path / "data/train-0000.tar", {"1": jpeg, "2": webp})
    # The same keys in another archive, and a format that the first examples do not have.
    write_archive(tmp_path / "data/train-0001.tar", {"1": {**jpeg}, "2": {"PNG": image_bytes("lime", "PNG")}})
    write_archive(tmp_path / "data/test-0000.tar", {"9": {"json": {"title": "only text", "tags": ["x"]}}})
    splits = load(mode)
    rows = list(splits["train"])
    ids = ["train-0000/1", "train-0000/2", "train-0001/1", "train-0001/2"]
    assert [(row["id"], row["title"], row["tags"]) for row in rows] == [
        (ids[0], "a", ["x", "y"]),
        (ids[1], "", []),
        (ids[2], "a", ["x", "y"]),
        (ids[3], "", []),
    ]
    (test,) = splits["test"]
    assert (test["id"], test["title"], test["tags"]) == ("test-0000/9", "only text", ["x"])
    assert "titles are read from json.title, tags from json.tags" in caplog.text
    if mode != "texts":
        assert splits["train"].features["image"] == Image() and "video" not in splits["train"].features
        blue, red, _, green = (row["image"].convert("RGB").getpixel((0, 0)) for row in rows)
        assert blue[2] > 200 and red[0] > 200 and green == (0, 255, 0)
        assert test.get("image") is None
    else:
        assert rows[0].keys() == {"id", "title", "tags"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "files, options, title, tags",
    [
        ({"txt": "red, warm colour\nsea,"}, {}, "", ["red", "warm colour", "sea"]),
        ({"txt": "salt, pepper; sea"}, {"tag_separator": ";"}, "", ["salt, pepper", "sea"]),
        ({"cls": "3", "json": {"title": "a"}}, {}, "a", ["3"]),
        ({"txt": "b", "cls": "3", "json": {"title": "a", "tags": "x; y"}}, {}, "a", ["x", "y"]),
        ({"txt": "b, c", "json": {"caption": "A sea."}}, {}, "A sea.", ["b", "c"]),
        ({"json": {"caption": "b, c"}}, {}, "", ["b", "c"]),
        ({"txt": "a", "json": {"k": {"w": ["x"]}}}, {"title_column": "txt", "tags_column": "json.k.w"}, "a", ["x"]),
        ({"caption.txt": "a", "tags.txt": "x,y"}, {"title_column": "caption.txt", "tags_column": "tags.txt"}, "a", 2),
    ],
)
def test_titles_and_tags_are_found(tmp_path, load, mode, files, options, title, tags):
    write_archive(tmp_path / "data/a.tar", {"1": {"png": image_bytes("red", "PNG"), **files}})
    (row,) = load(mode, split="train", **options)
    assert (row["title"], row["tags"]) == (title, tags if tags != 2 else ["x", "y"])


@pytest.mark.parametrize("streaming", [False, True])
def test_videos_are_read(tmp_path, load, streaming):
    files = {"mp4": b"anything", "jpg": image_bytes("red", "JPEG"), "txt": "a"}
    write_archive(tmp_path / "data/a.tar", {"1": files, "2": files | {"mp4": b"other"}})
    rows = load("stream" if streaming else "map", split="train", video_column="mp4")
    assert rows.features["video"] == Video(decode=False) and "image" not in rows.features
    assert [row["video"]["bytes"] for row in rows] == [b"anything", b"other"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "files, options, message",
    [
        (
            {"json": {"title": "a"}},
            {"image_column": "jpg"},
            "no 'jpg', which image_column names; they have json, .*title",
        ),
        ({"json": {"title": "a"}}, {"tags_column": "json.nope"}, "no 'json.nope', which tags_column names"),
        ({"txt": "a"}, {}, "the first examples have no image, video or title; they have txt"),
        ({"json": {"title": 5}}, {}, "json.title of a/1 is 5; expected text"),
        ({"json": {"title": "a", "tags": [1]}}, {}, r"json.tags of a/1 is \[1\]; expected text or a list"),
        ({"json": {"title": "a", "tags": "['x']"}}, {}, "json.tags of a/1: tags are a printed list"),
        ({"json": "{"}, {}, "Expecting property name"),
    ],
)
def test_unsuitable_archives_are_refused(tmp_path, load, mode, files, options, message):
    write_archive(tmp_path / "data/a.tar", {"1": files})
    with pytest.raises(ValueError, match=message):
        list(load(mode, split="train", **options))


def test_a_stream_refuses_videos_that_come_late(tmp_path, load):
    image = {"png": image_bytes("red", "PNG"), "txt": "a"}
    write_archive(tmp_path / "data/a.tar", {**dict.fromkeys(map(str, range(100)), image), "100": {"mp4": b"x"}})
    assert load(split="train")[100]["video"]["bytes"] == b"x"
    with pytest.raises(ValueError, match="a/100 has a video, and the first 100 examples have none"):
        list(load("stream", split="train"))


def test_a_folder_of_images_may_contain_an_archive(tmp_path, load):
    write_archive(tmp_path / "data/backup.tar", {"1": {"txt": "a"}})
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir()
        (tmp_path / f"data/{name}/1.png").write_bytes(image_bytes("red", "PNG"))
    assert load()["train"]["tags"] == [["cat"], ["dog"]]


def test_training_can_stream_archives(tmp_path):
    for index in range(4):
        examples = {f"{number}": {"png": image_bytes("red", "PNG"), "txt": f"t{number}"} for number in range(5)}
        write_archive(tmp_path / f"data/train-{index:04}.tar", examples)
    args = OPTSGTrainingArguments(
        str(tmp_path / "run"),
        dataset=str(tmp_path / "data"),
        dataset_dir=str(tmp_path / "cache"),
        validation_ratio=0.3,
    )
    shards, train, validation = load_streams(args)
    assert len(shards) == 4 and len(train) + len(validation) == 20
    assert {row["id"] for shard in shards for row in shard} == set(train["id"])
    assert validation[0]["image"]["bytes"] == image_bytes("red", "PNG")
