"""`load_tagging_dataset` loads folders, Parquet files and Hub datasets with the same columns."""

import csv
import io
import json
import logging
import os
import shutil
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, Video
from PIL import Image as PILImage

from dataset_scripts import load_tagging_dataset
from optsg.media_files import find_media_files

datasets.disable_progress_bars()

ROWS = [
    {"file_name": "one.png", "title": "First, of two", "tags": ["red", "warm colour"]},
    {"file_name": "sub/two.png", "title": "第二张", "tags": ["创意美食"]},
]


def draw(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8), colour).save(path)


def write_metadata(folder, rows, kind="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows({**row, "tags": "|".join(row["tags"])} for row in rows)


@pytest.fixture
def folder(tmp_path):
    """Two images, without metadata."""
    draw(tmp_path / "data/one.png", "red")
    draw(tmp_path / "data/sub/two.png", "blue")
    return tmp_path / "data"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_metadata_format_gives_a_train_split(folder, kind):
    write_metadata(folder, ROWS, kind)
    dataset = load_tagging_dataset(folder)
    assert list(dataset) == ["train"]
    rows = dataset["train"]
    assert rows.features == {
        "id": Value("string"),
        "image": Image(),
        "title": Value("string"),
        "tags": List(Value("string")),
    }
    assert rows["id"] == ["one.png", "sub/two.png"]
    assert rows["title"] == ["First, of two", "第二张"]
    assert rows["tags"] == [["red", "warm colour"], ["创意美食"]]
    assert [image.getpixel((0, 0)) for image in rows["image"]] == [(255, 0, 0), (0, 0, 255)]


def test_split_folders_are_splits(folder):
    for split in ("test", "train", "val"):
        draw(folder / split / f"{split}.png")
        write_metadata(folder / split, [{"file_name": f"{split}.png", "title": split, "tags": []}])
    dataset = load_tagging_dataset(str(folder))
    assert {split: rows["title"] for split, rows in dataset.items()} == {
        "train": ["train"],
        "validation": ["val"],
        "test": ["test"],
    }


def test_videos_stay_undecoded(tmp_path):
    (tmp_path / "video.mp4").write_bytes(b"anything")
    write_metadata(tmp_path, [{"file_name": "video.mp4"}])
    rows = load_tagging_dataset(tmp_path, split="train")
    assert rows.features["video"] == Video(decode=False) and "image" not in rows.features
    assert rows[0] == {
        "id": "video.mp4",
        "video": {"bytes": None, "path": str(tmp_path / "video.mp4")},
        "title": "",
        "tags": [],
    }


def test_images_and_videos_together_leave_the_other_column_empty(folder):
    (folder / "video.webm").write_bytes(b"anything")
    write_metadata(folder, [{"file_name": "one.png"}, {"file_name": "video.webm"}])
    first, second = load_tagging_dataset(folder, split="train")
    assert first["image"].size == (8, 8) and first["video"] is None
    assert second["image"] is None and second["video"]["path"].endswith("video.webm")


def test_ids_in_the_metadata_are_used(folder):
    write_metadata(folder, [{"id": 7, "file_name": "one.png"}, {"id": "x", "file_name": "sub/two.png"}])
    assert load_tagging_dataset(folder, split="train")["id"] == ["7", "x"]


def test_unclean_tags_unused_columns_and_unlisted_files_are_reported(folder, caplog):
    write_metadata(folder, [{"file_name": "one.png", "tags": [" red", "red ", "", "Red"], "author": "me"}])
    with caplog.at_level(logging.WARNING):
        rows = load_tagging_dataset(folder, split="train")
    assert rows["tags"] == [["red", "Red"]]
    assert "left out 2 empty or repeated tags" in caplog.text
    assert "columns not used: author" in caplog.text
    assert "left out 1 images or videos that no metadata file names" in caplog.text and "two.png" in caplog.text


def test_changed_metadata_is_read_again(folder, tmp_path):
    write_metadata(folder, ROWS)
    load_tagging_dataset(folder, cache_dir=tmp_path / "cache")
    before = os.stat(folder / "metadata.jsonl")
    write_metadata(folder, [{**ROWS[0], "title": "First, of 2!!"}, ROWS[1]])
    os.utime(folder / "metadata.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    draw(folder / "one.png", "green")
    row = load_tagging_dataset(folder, split="train", cache_dir=tmp_path / "cache")[0]
    assert row["title"] == "First, of 2!!"
    assert row["image"].getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize(
    ("split", "ids"), [("train[:1]", ["one.png"]), ("train[1:]+train[:50%]", ["sub/two.png", "one.png"])]
)
def test_parts_of_a_split_can_be_selected(folder, split, ids):
    write_metadata(folder, ROWS)
    assert load_tagging_dataset(folder, split=split)["id"] == ids


def test_a_folder_can_be_streamed(folder):
    write_metadata(folder, ROWS)
    streams = load_tagging_dataset(folder, streaming=True)
    assert [row["id"] for row in streams["train"]] == ["one.png", "sub/two.png"]
    assert next(iter(load_tagging_dataset(folder, split="train", streaming=True)))["image"].size == (8, 8)


@pytest.mark.parametrize(
    "file_name", ["../outside.png", "sub/../../outside.png", "/etc/outside.png", "link.png", "away/outside.png"]
)
def test_a_file_name_cannot_lead_out_of_the_folder(folder, tmp_path, file_name):
    draw(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "away").symlink_to(tmp_path)
    write_metadata(folder, [{"file_name": "one.png"}, {"file_name": file_name}])
    with pytest.raises(ValueError, match=rf"line 2: '{file_name}' leads out of"):
        load_tagging_dataset(folder)


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "link.png").symlink_to(folder / "one.png")
    write_metadata(folder, [{"file_name": "link.png"}])
    assert load_tagging_dataset(folder, split="train")["id"] == ["link.png"]


def test_missing_files_are_named_and_counted(folder):
    write_metadata(folder, [*ROWS, *({"file_name": f"gone{n}.png"} for n in range(1200))])
    with pytest.raises(
        FileNotFoundError, match=r"1,200 files that do not exist: 'gone0.png', 'gone1.png', 'gone2.png', …"
    ):
        load_tagging_dataset(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "one.png"}\n{"file_name": ', "line 2: not JSON"),
        ("metadata.jsonl", '["one.png"]', 'line 1: expected a row with "file_name"'),
        ("metadata.jsonl", '{"title": "x"}', 'line 1: expected a row with "file_name"'),
        (
            "metadata.jsonl",
            '{"file_name": "one.png", "tags": 5}',
            "line 1: tags must be text or a list of",
        ),
        ("metadata.jsonl", '{"file_name": "one.png", "tags": [1]}', "line 1: tags must be text or a list of texts"),
        ("metadata.jsonl", '{"file_name": "one.png", "title": 5}', "line 1: title must be text, got 5"),
        (
            "metadata.jsonl",
            '{"file_name": "one.png"}\n{"file_name": "one.png"}',
            "line 2: an earlier row has the id 'one.png'",
        ),
        ("metadata.jsonl", '{"file_name": "notes.txt"}', "'notes.txt' has the suffix of neither"),
        ("metadata.jsonl", '{"file_name": "a\\u0000.png"}', "leads out of"),
        ("metadata.jsonl", "\n", "has no rows"),
        ("metadata.csv", "file_name,tags\none.png,\"['red', 'blue']\"\n", "line 2: tags are a printed list"),
        ("metadata.csv", "file_name,title\none.png,a,b\n", "line 2: more cells than the header's 2 columns"),
        ("metadata.csv", 'file_name,title\none.png,"open\n', "not csv"),
        ("metadata.csv", b"file_name\n\xff\x00.png\n", "not UTF-8"),
        ("metadata.parquet", "no parquet", "not a Parquet file"),
    ],
)
def test_damaged_metadata_is_named_with_the_line(folder, name, content, message):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        load_tagging_dataset(folder)
    assert name in str(error.value) and message in str(error.value)


def test_a_csv_from_a_spreadsheet_is_read(folder):
    (folder / "metadata.csv").write_bytes("\ufefffile_name,tags\r\none.png, red | blue |\r\nsub/two.png,\r\n".encode())
    rows = load_tagging_dataset(folder, split="train")
    assert rows["tags"] == [["red", "blue"], []]
    assert rows["title"] == ["", ""]


@pytest.mark.parametrize(
    "cell, tags, reported",
    [
        ("sea, sky,boat", ["sea", "sky", "boat"], "','"),
        ("sea; salt, pepper", ["sea", "salt, pepper"], "';'"),
        ("sea|salt, pepper; a", ["sea", "salt, pepper; a"], None),
        ("sea", ["sea"], None),
    ],
)
def test_the_separator_of_csv_tags_is_detected_and_reported(folder, caplog, cell, tags, reported):
    (folder / "metadata.csv").write_text(f'file_name,tags\none.png,"{cell}"\nsub/two.png,one\n')
    assert load_tagging_dataset(folder, split="train")["tags"] == [tags, ["one"]]
    assert ("split at" in caplog.text) == (reported is not None) and (reported or "") in caplog.text
    # `optsg index` reads the same tags.
    found = find_media_files([str(folder)], read_tags=True)
    assert {tuple(file.tags) for file in found.files} >= {tuple(tags), ("one",)}
    assert any("split at" in message for message in found.messages) == (reported is not None)


def test_metadata_in_the_root_gives_the_splits_of_its_sub_folders(tmp_path, caplog):
    names = ["train/a.png", "val/b.png", "test/deep/c.png", "train/d.png"]
    for name in names:
        draw(tmp_path / name)
    write_metadata(tmp_path, [{"file_name": name, "tags": [name]} for name in names])
    found = load_tagging_dataset(tmp_path)
    expected = {
        "train": [["train/a.png"], ["train/d.png"]],
        "validation": [["val/b.png"]],
        "test": [["test/deep/c.png"]],
    }
    assert {split: rows["tags"][:] for split, rows in found.items()} == expected
    assert list(found) == list(expected)
    # `imagefolder` finds the same splits.
    other = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in other.items()} == {split: len(own) for split, own in expected.items()}
    # `Train/` is a split too, as in folders without metadata.
    draw(tmp_path / "other/Train/a.png")
    draw(tmp_path / "other/Test/b.png")
    write_metadata(tmp_path / "other", [{"file_name": "Train/a.png"}, {"file_name": "Test/b.png"}])
    assert load_tagging_dataset(tmp_path / "other").num_rows == {"train": 1, "test": 1}
    (tmp_path / "other/metadata.jsonl").unlink()
    write_metadata(tmp_path / "other/Train", [{"file_name": "a.png"}])
    write_metadata(tmp_path / "other/Test", [{"file_name": "b.png"}])
    assert load_tagging_dataset(tmp_path / "other").num_rows == {"train": 1, "test": 1}
    shutil.rmtree(tmp_path / "other")
    # A sub-folder that names no split, such as images of cars next to images of trains.
    draw(tmp_path / "car/e.png")
    write_metadata(tmp_path, [{"file_name": name} for name in [*names, "car/e.png"]])
    assert {split: len(rows) for split, rows in load_tagging_dataset(tmp_path).items()} == {"train": 5}
    assert "all examples are in the train split" in caplog.text
    draw(tmp_path / "validation/f.png")
    write_metadata(tmp_path, [{"file_name": name} for name in [*names, "validation/f.png"]])
    with pytest.raises(ValueError, match="are the same split"):
        load_tagging_dataset(tmp_path)


def test_two_metadata_files_are_refused(folder):
    write_metadata(folder, ROWS)
    write_metadata(folder, ROWS, "csv")
    with pytest.raises(ValueError, match="metadata.jsonl and metadata.csv; keep one"):
        load_tagging_dataset(folder)


def test_metadata_next_to_split_folders_is_refused(folder):
    write_metadata(folder, ROWS)
    draw(folder / "test/three.png")
    write_metadata(folder / "test", [{"file_name": "three.png"}])
    with pytest.raises(ValueError, match="contains metadata.jsonl and also test/"):
        load_tagging_dataset(folder)


def test_two_folders_of_one_split_are_refused(folder):
    for name in ("val", "validation"):
        draw(folder / name / "x.png")
        write_metadata(folder / name, [{"file_name": "x.png"}])
    with pytest.raises(ValueError, match="both the validation split"):
        load_tagging_dataset(folder)


def test_an_unknown_split_is_named_with_the_existing_ones(folder):
    write_metadata(folder, ROWS)
    with pytest.raises(ValueError, match=r"\['train'\].*'test'"):
        load_tagging_dataset(folder, split="test")


@pytest.mark.parametrize("name", ["icontagging", "no/such/folder", "../nowhere", ""])
def test_an_unknown_name_lists_what_is_accepted(name):
    with pytest.raises(FileNotFoundError, match="Accepted: icon_tagging, .*; a local folder .* on the Hub"):
        load_tagging_dataset(name)


def test_a_name_unknown_to_the_hub_lists_what_is_accepted(monkeypatch):
    def nothing_there(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", nothing_there)
    with pytest.raises(FileNotFoundError, match=r"(?s)org/nothing.*doesn't exist on the Hub.*Accepted: icon_tagging"):
        load_tagging_dataset("org/nothing")


def test_a_file_is_refused(folder):
    write_metadata(folder, ROWS)
    with pytest.raises(ValueError, match="is a file; give the folder"):
        load_tagging_dataset(folder / "metadata.jsonl")


def test_an_argument_that_a_folder_does_not_take_is_refused(folder):
    write_metadata(folder, ROWS)
    with pytest.raises(ValueError, match="revision"):
        load_tagging_dataset(folder, revision="main")


@pytest.fixture
def parquet_folder(folder, tmp_path):
    """The images of `folder`, in Parquet files."""
    names = [row["file_name"] for row in ROWS]
    images = [{"path": name, "bytes": (folder / name).read_bytes()} for name in names]
    columns = {name: [row[name] for row in ROWS] for name in ("title", "tags")}
    rows = Dataset.from_dict({"id": names, "image": images, **columns}).cast_column("image", Image())
    output = tmp_path / "parquet"
    output.mkdir()
    rows.to_parquet(str(output / "train-00000-of-00001.parquet"))
    rows.select([1]).to_parquet(str(output / "test-00000-of-00001.parquet"))
    return output


def test_a_folder_of_parquet_files_is_loaded(parquet_folder, tmp_path):
    dataset = load_tagging_dataset(parquet_folder, cache_dir=tmp_path / "cache")
    assert dataset.num_rows == {"train": 2, "test": 1}
    assert dataset["test"].features["tags"] == List(Value("string"))
    row = dataset["test"][0]
    assert (row["id"], row["title"], row["tags"]) == ("sub/two.png", "第二张", ["创意美食"])
    assert row["image"].getpixel((0, 0)) == (0, 0, 255)


def test_changed_parquet_is_not_served_from_the_cache(parquet_folder, tmp_path):
    load_tagging_dataset(parquet_folder, cache_dir=tmp_path / "cache")
    changed = Dataset.from_dict({"id": ["new"], "title": ["new"], "tags": [["new"]]})
    for path in parquet_folder.iterdir():
        changed.to_parquet(str(path))
    assert load_tagging_dataset(parquet_folder, split="test", cache_dir=tmp_path / "cache")["id"] == ["new"]


def test_parquet_can_be_streamed(parquet_folder, tmp_path):
    rows = list(load_tagging_dataset(parquet_folder, split="train", streaming=True))
    assert [row["id"] for row in rows] == ["one.png", "sub/two.png"]
    assert rows[1]["image"].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_without_ids_titles_or_tags_gets_them(tmp_path, streaming):
    plain = Dataset.from_dict({"title": ["one", None], "views": [1, 2]})
    (tmp_path / "data").mkdir()
    plain.to_parquet(str(tmp_path / "data/train.parquet"))
    rows = load_tagging_dataset(tmp_path / "data", split="train", streaming=streaming, cache_dir=tmp_path / "cache")
    assert list(rows) == [
        {"title": "one", "views": 1, "id": "0", "tags": []},
        {"title": "", "views": 2, "id": "1", "tags": []},
    ]
    assert rows.features["tags"] == List(Value("string"))


@pytest.mark.parametrize("mode", ["map", "stream", "texts"])
@pytest.mark.parametrize(
    ("column", "values", "feature", "tags"),
    [
        (
            "tags",
            [[1, 0], [], [-1, 2]],
            List(ClassLabel(names=["cat", "dog", "big bird"])),
            [["dog", "cat"], [], ["big bird"]],
        ),
        ("label", [1, -1, 0], ClassLabel(names=["cat", "dog"]), [["dog"], [], ["cat"]]),
        ("labels", [[1], [0, 1], [0]], List(ClassLabel(names=["cat", "dog"])), [["dog"], ["cat", "dog"], ["cat"]]),
    ],
)
def test_class_labels_become_tags(tmp_path, mode, column, values, feature, tags):
    (tmp_path / "data").mkdir()
    features = Features({"image": Image(), "title": Value("string"), column: feature})
    image = io.BytesIO()
    PILImage.new("RGB", (8, 8), "blue").save(image, "PNG")
    columns = {"image": [{"bytes": image.getvalue()}] * 3, "title": ["a", "b", "c"], column: values}
    Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "data/train.parquet"))
    options = {"streaming": mode != "map", "texts_only": mode == "texts", "cache_dir": tmp_path / "cache"}
    rows = load_tagging_dataset(tmp_path / "data", split="train", **options)
    found = list(rows)
    assert [row["tags"] for row in found] == tags and [row["title"] for row in found] == ["a", "b", "c"]
    assert column == "tags" or column not in found[0]
    assert mode == "texts" or found[0]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_columns_that_may_be_labels_are_reported(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    features = Features({"title": Value("string"), "kind": ClassLabel(names=["a"]), "label": Value("string")})
    rows = Dataset.from_dict({"title": ["x"], "kind": [0], "label": ["y"]}, features)
    rows.to_parquet(str(tmp_path / "data/train.parquet"))
    assert load_tagging_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")["train"]["tags"] == [[]]
    assert "so its examples have no tags. Not used: kind, label" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": ["x"], "tags": [1]}, "column tags is .*expected lists of text, text or class labels"),
        ({"title": ["x"], "tags": ["['red', 'blue']"]}, "tags are a printed list"),
        ({"image": [3], "tags": [["red"]]}, "column image is .*expected images"),
        ({"video": [[3]], "tags": [["red"]]}, "column video is .*expected videos or lists of images"),
        ({"title": ["x"], "tags": [[1]]}, "column tags is .*expected lists of text"),
        ({"title": [3], "tags": [["red"]]}, "column title is .*expected text"),
        ({"name": ["x"], "tags": [["red"]]}, r"columns \['name', 'tags'\]; expected"),
    ],
)
def test_parquet_with_unsuitable_columns_is_refused(tmp_path, columns, message):
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "data/train.parquet"))
    with pytest.raises(ValueError, match=message):
        load_tagging_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_hub_dataset_is_loaded_by_datasets(monkeypatch):
    asked = []

    def load_dataset(name, **kwargs):
        asked.append((name, kwargs))
        videos = [{"path": "a.mp4", "bytes": b"1"}]
        rows = Dataset.from_dict({"id": [3], "video": videos, "title": ["x"], "tags": [["y"]]})
        return DatasetDict(train=rows.cast_column("video", Video(decode=True)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def load_builder(name, **kwargs):
        asked.append((name, kwargs))
        return SimpleNamespace(
            repo_id="org/videos", config=SimpleNamespace(data_files={"train": ["hf://datasets/org/videos/a.mp4"]})
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    rows = load_tagging_dataset("org/videos", cache_dir="cache", revision="main")["train"]
    options = {"cache_dir": "cache", "revision": "main"}
    assert asked == [("org/videos", options), ("org/videos", {"split": None, "streaming": False, **options})]
    assert rows[0] == {"video": {"path": "a.mp4", "bytes": b"1"}, "title": "x", "tags": ["y"], "id": "3"}


def test_tags_from_parquet_are_cleaned(tmp_path, caplog):
    rows = {"title": ["a", "b"], "tags": [["x", None, " y", "x"], ["", "z"]]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with caplog.at_level(logging.WARNING):
        loaded = load_tagging_dataset(tmp_path / "data", split="train", cache_dir=tmp_path / "cache")
    assert loaded["tags"] == [["x", "y"], ["z"]] and "left out 3 empty or repeated tags" in caplog.text
    stream = load_tagging_dataset(tmp_path / "data", split="train", cache_dir=tmp_path / "cache", streaming=True)
    assert [row["tags"] for row in stream] == [["x", "y"], ["z"]]
