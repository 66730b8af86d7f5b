"""Folders without a metadata file: captions, class folders, and what is refused."""

import pytest
from PIL import Image

from dataset_scripts import load_tagging_dataset


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("one.png", "sub/two.png"):
        draw(tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["A.PARQUET", "b.Tar"])
def test_data_files_with_a_suffix_in_capitals_are_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name}: only files with the suffix {name[1:].lower()} in lower case"):
        load_tagging_dataset(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_names_of_folders_are_tags(tmp_path, caplog, streaming):
    left_out = ("val/.hidden/4.png", "__MACOSX/x/5.png", "Train/cat/@eaDir/1.png/THUMB.png")
    for name in ("Train/cat/1.png", "Train/big dog /2.png", "val/cat/3.png", *left_out):
        draw(tmp_path / name)
    (tmp_path / "Train/cat/6.NEF").write_bytes(b"raw")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x.parquet").write_text("hidden")
    found = load_tagging_dataset(tmp_path, streaming=streaming)
    rows = {split: [(row["id"], row["tags"], row["title"]) for row in own] for split, own in found.items()}
    assert rows == {
        "train": [("Train/big dog /2.png", ["big dog"], ""), ("Train/cat/1.png", ["cat"], "")],
        "validation": [("val/cat/3.png", ["cat"], "")],
    }
    assert "the names of the folders are the tags: big dog, cat" in caplog.text
    assert "raw files are not read (1); export them as JPEG" in caplog.text


def test_captions_are_tags(folder, caplog):
    (folder / "one.TXT").write_text("\ufeffred, a small square,red, :|\n", encoding="utf-8")
    rows = load_tagging_dataset(folder, split="train")
    assert dict(zip(rows["id"], rows["tags"])) == {"one.png": ["red", "a small square", ":|"], "sub/two.png": []}
    assert "1 file has no caption and therefore no tags. The names of folders are not used" in caplog.text
    assert "such as one.txt" in caplog.text and "split at" not in caplog.text and rows[0]["image"].size == (8, 8)
    (folder / "sub/two.txt").write_text("blue\nsquare, ;)\n")
    assert load_tagging_dataset(folder, split="train")["tags"][1] == ["blue", "square", ";)"]
    assert "split at" not in caplog.text
    for content, message in ((b"\xff", "not readable as UTF-8"), (b"x" * 2**21, "larger than 1,048,576 bytes")):
        (folder / "one.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"one.txt: {message}"):
            load_tagging_dataset(folder)


def test_the_separator_of_captions_is_found_and_reported(folder, caplog):
    (folder / "one.txt").write_text("red;thing;white, bright\n")
    (folder / "sub/two.txt").write_text("red; blue;\n")
    assert load_tagging_dataset(folder, split="train")["tags"] == [
        ["red", "thing", "white, bright"],
        ["red", "blue"],
    ]
    assert "tags are split at ';'; if it is part of a tag, separate the tags with ','" in caplog.text
    # One tag in each line: a face is not a separator.
    (folder / "one.txt").write_text("red\n;)\n")
    (folder / "sub/two.txt").write_text("red\nblue\n")
    assert load_tagging_dataset(folder, split="train")["tags"] == [["red", ";)"], ["red", "blue"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "contains no images, no videos, no Parquet files and none of metadata.jsonl"),
        (["1.png", "cat/2.png"], "1.png is in no folder that names its tag. .*Or write its tags to 1.txt"),
        (["train/1.png", "train/2.png"], "train/1.png is in no folder that names its tag"),
        (["train/cat/a/1.png", "train/dog/2.png"], "train/cat/a/1.png is in nested folders"),
        (["images/1.png", "images/2.png"], "all files are in folders named 'images'"),
        (
            ["train/cat/1.png", "car/2.png"],
            r"has folders of splits \(train\), and files outside them, such as car/2.png",
        ),
        (["train/cat/1.png", "val/cat/2.png", "validation/dog/3.png"], "are the validation split"),
        (["cat/1.png", "dog/2.png", "dog/metadata.csv"], "dog/metadata.csv is too deep"),
        (["cat/1.png", "cat/1.txt", "dog/2.png"], "no caption contains a tag, such as .*1.txt"),
    ],
)
def test_folders_whose_tags_are_not_clear_are_refused(tmp_path, names, message):
    for name in names:
        if name.endswith(".png"):
            draw(tmp_path / name)
        else:
            (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message):
        load_tagging_dataset(tmp_path)


@pytest.mark.parametrize("name", ["cat/1.png", "cat/2.txt"])
def test_links_out_of_a_plain_folder_are_refused(tmp_path, name):
    draw(tmp_path / "data/cat/2.png")
    draw(tmp_path / "data/dog/3.png")
    draw(tmp_path / "secret.png")
    (tmp_path / "data" / name).symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=f"{name} leads out of"):
        load_tagging_dataset(tmp_path / "data")
    (tmp_path / "data/cat/4.png").symlink_to(tmp_path / "missing.png")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(ValueError, match="4.png is not a file"):
        load_tagging_dataset(tmp_path / "data")
