"""Which files of a command line are tagged, with which titles, and how skipped files are reported."""

import os
from pathlib import Path

import pytest

from optsg.media_files import find_media_files

COLOURS = ("red", "green", "blue", "orange", "purple")
METADATA = {
    "metadata.jsonl": '{"file_name": "red.png", "title": "rot"}\n{"file_name": "sub/blue.png", "title": "蓝色"}\n',
    "metadata.csv": 'file_name,title,tags\nred.png,rot,"a|b"\nsub/blue.png,蓝色,\n',
}


@pytest.fixture
def images(tmp_path):
    """A folder of five files named like images; their content does not matter here."""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(b"")
    return folder


def write_metadata(folder, name):
    if name == "metadata.parquet":
        import pyarrow
        import pyarrow.parquet

        columns = {"file_name": ["red.png", "sub/blue.png"], "title": ["rot", "蓝色"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    else:
        (folder / name).write_text(METADATA[name], encoding="utf-8")


@pytest.mark.parametrize("name", [*METADATA, "metadata.parquet"])
def test_metadata_gives_the_titles_of_a_folder(images, name):
    (images / "sub").mkdir()
    os.rename(images / "blue.png", images / "sub" / "blue.png")
    write_metadata(images, name)
    found = find_media_files([str(images)])
    titles = {Path(file.path).name: file.title for file in found.files}
    assert titles == {"red.png": "rot", "blue.png": "蓝色", "green.png": None, "orange.png": None, "purple.png": None}
    assert (found.failures, found.messages) == ([], [])
    from_names = find_media_files([str(images)], title_from_name=True)
    assert {file.title for file in from_names.files} == set(COLOURS)


def test_unusable_metadata_rows_are_counted_and_the_others_used(images):
    rows = ['{"file_name": "red.png", "title": "rot"}', "{", "[]", '{"file_name": "blue.png", "title": 3}']
    (images / "metadata.jsonl").write_text("\n".join(rows))
    found = find_media_files([str(images)])
    [(path, reason)] = found.failures
    assert path == str(images / "metadata.jsonl")
    assert reason.startswith("row 2:") and "2 more" in reason
    assert {file.title for file in found.files} == {"rot", None}


def test_files_in_the_metadata_that_do_not_exist_are_reported(images):
    write_metadata(images, "metadata.jsonl")
    [message] = find_media_files([str(images)]).messages
    assert "1 file in the metadata not found" in message and "blue.png" in message


def test_folders_are_searched_recursively_and_other_files_counted(images):
    deep = images / "sub" / "deep"
    deep.mkdir(parents=True)
    for path, new in (("red.png", deep / "RED.PNG"), ("blue.png", images / "sub" / "blue.gif")):
        os.rename(images / path, new)
    for name in ("a.txt", "b.txt", "c.json", "README", ".hidden.png"):
        (images / name).write_bytes(b"")
    os.symlink(images, deep / "loop")
    os.symlink(images / "nothing", images / "broken.png")
    found = find_media_files([str(images)])
    assert [(os.path.relpath(file.path, images), file.is_video) for file in found.files] == [
        ("green.png", False),
        ("orange.png", False),
        ("purple.png", False),
        (os.path.join("sub", "blue.gif"), True),
        (os.path.join("sub", "deep", "RED.PNG"), False),
    ]
    assert found.failures == [(str(images / "broken.png"), "not a file, or a broken link")]
    [message] = found.messages
    assert "skipped 6 other files" in message
    for count in ("2 .txt", "1 .json", "1 without suffix", "1 hidden", "1 linked folder"):
        assert count in message


def test_printed_lists_are_not_split_into_tags(images):
    (images / "metadata.csv").write_text("file_name,tags\nred.png,\"['x', 'y']\"\n")
    found = find_media_files([str(images)], read_tags=True)
    [(_, reason)] = found.failures
    assert "tags are a printed list" in reason and not any(file.tags for file in found.files)
