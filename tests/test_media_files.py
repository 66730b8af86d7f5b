"""Which files of a command line are tagged, with which titles, and how skipped files are reported."""

import os
import re
import unicodedata
from pathlib import Path

import pytest

from optsg import media_files
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


@pytest.mark.parametrize("is_capital", [False, True])
@pytest.mark.parametrize("name", [*METADATA, "metadata.parquet"])
def test_metadata_gives_the_titles_of_a_folder(images, name, is_capital):
    (images / "sub").mkdir()
    os.rename(images / "blue.png", images / "sub" / "blue.png")
    write_metadata(images, name)
    if is_capital:
        (images / name).rename(images / name.upper())
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


def titles(folder, **settings):
    found = find_media_files([str(folder)], **settings)
    return {Path(file.path).stem: file.title for file in found.files if file.title}, found


@pytest.mark.parametrize(
    ("content", "expected", "message"),
    [
        ("file_name,text\nred.png,rot\n", {"red": "rot"}, "titles are read from the column text"),
        ("file_name,caption,tags\nred.png,rot,a\n", {"red": "rot"}, "column caption"),
        ("file_name, title, tags\nred.png, rot, a|b\n", {"red": "rot"}, None),
        ('\ufefffile_name, title\nred.png, "rot, hell"\n', {"red": "rot, hell"}, None),
        ("file_name;title\nred.png;rot, hell\n", {"red": "rot, hell"}, "separated by ;"),
        ("file_name\ttitle\r\nred.png\trot\r\n", {"red": "rot"}, "separated by tabs"),
        ('"file_name","title"\n"red.png","rot\nund hell"\n', {"red": "rot\nund hell"}, None),
        ("file_name,description,title\nred.png,lang,\nblue.png,lang,blau\n", {"red": "lang", "blue": "blau"}, None),
    ],
)
def test_titles_of_usual_tables_are_read(images, content, expected, message):
    (images / "metadata.csv").write_text(content, encoding="utf-8")
    read, found = titles(images)
    assert read == expected and found.failures == []
    assert [message in one for one in found.messages] == ([True] if message else [])


def test_titles_in_other_encodings_are_read_and_reported(images):
    title = "Ein schöner Tag in München, mit Käse und Brötchen über den Dächern"
    content = "file_name,title\n" + "".join(f'{colour}.png,"{title}"\n' for colour in COLOURS)
    (images / "metadata.csv").write_bytes(content.encode("cp1252"))
    read, found = titles(images)
    assert set(read.values()) == {title} and found.failures == []
    assert "not UTF-8 and was read as" in found.messages[0]
    (images / "metadata.csv").write_bytes(content.encode("utf-16"))
    assert titles(images)[0] == read


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('file_name,title\nred.png,"rot\nblue.png,blau\n', "row 1: .*quotation mark"),
        ('file_name,title\ngreen.png,"gruen"\nred.png,"rot" und\nblue.png,blau\n', "row 2: .*quotation mark"),
        ("file_name,title\nred.png,rot, hell\n", "row 1: it has 3 cells and the header 2"),
    ],
)
def test_an_unbalanced_quotation_mark_is_reported(images, content, reason):
    (images / "metadata.csv").write_text(content)
    read, found = titles(images)
    assert re.search(reason, found.failures[0][1])
    assert set(read) <= {"green"}


def test_rows_with_too_few_cells_are_reported(images):
    (images / "metadata.csv").write_text("file_name,title\nred.png\nblue.png,blau\ngreen.png\n")
    read, found = titles(images)
    assert read["blue"] == "blau" and found.failures == []
    assert found.messages[0].endswith("2 rows have fewer cells than the header, such as row 1")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_with_decomposed_letters_match(images, kind):
    (images / unicodedata.normalize("NFD", "Käse.png")).write_bytes(b"")
    name = unicodedata.normalize("NFC", "Käse.png")
    row = f'{{"file_name": "{name}", "title": "t"}}' if kind == "jsonl" else f"file_name,title\n{name},t\n"
    (images / f"metadata.{kind}").write_text(row, encoding="utf-8")
    read, found = titles(images)
    assert list(read.values()) == ["t"] and found.messages == []


def test_thumbnails_and_deleted_files_are_left_out(images):
    names = ["@eaDir/red.png", "#recycle", "$RECYCLE.BIN", "Fotos.photoslibrary/originals", "Lightroom.lrdata", "kept"]
    for name in names:
        (images / name).mkdir(parents=True)
        (images / name / "copy.png").write_bytes(b"")
    found = find_media_files([str(images)])
    inside = [os.path.relpath(file.path, images) for file in found.files if "copy" in file.path]
    assert inside == [os.path.join("kept", "copy.png")]
    assert "5 folders of thumbnails or deleted files" in found.messages[0]
    # A folder that is asked for by name is searched.
    assert len(find_media_files([str(images / "#recycle")]).files) == 1


@pytest.mark.parametrize("pattern", ["*een.png", "GREEN.png", "green.*"])
def test_skip_leaves_out_files_and_folders(images, pattern):
    (images / "Scans/old").mkdir(parents=True)
    for name in ("Scans/a.png", "Scans/old/b.png"):
        (images / name).write_bytes(b"")
    found = find_media_files([str(images)], skip=[pattern, "Scans/old"])
    assert [Path(file.path).name for file in found.files] == [
        "blue.png",
        "orange.png",
        "purple.png",
        "red.png",
        "a.png",
    ]
    assert f"1 that match {pattern}" in found.messages[0] and "1 that match Scans/old" in found.messages[0]


def test_raw_files_without_an_image_are_found(images, monkeypatch):
    for name in ("red.NEF", "alone.cr2", "sub/other.dng"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"")
    monkeypatch.setattr(media_files, "can_read_raw", lambda: True)
    found = find_media_files([str(images)], read_raw=True)
    names = [Path(file.path).name for file in found.files]
    assert names == ["alone.cr2", *(f"{colour}.png" for colour in sorted(COLOURS)), "other.dng"]
    assert found.failures == [] and "skipped 1 raw file; a JPEG next to" in found.messages[0]
    monkeypatch.setattr(media_files, "can_read_raw", lambda: False)
    found = find_media_files([str(images), str(images / "alone.cr2")], read_raw=True)
    reasons = ['2 raw files skipped; to read raw files: pip install "optsg[raw]"']
    reasons += ['it is a raw file; to read raw files: pip install "optsg[raw]"']
    assert [reason for _, reason in found.failures] == reasons and len(found.files) == len(COLOURS)


def test_source_code_is_not_a_transport_stream(images):
    (images / "index.ts").write_text("export const x = 1;")
    (images / "module.mts").write_text("export const x = 1;")
    (images / "video.ts").write_bytes(b"\x47" + bytes(187))
    (images / "00001.m2ts").write_bytes(bytes(4) + b"\x47")
    found = find_media_files([str(images)])
    assert [Path(file.path).name for file in found.files if file.is_video] == ["00001.m2ts", "video.ts"]
    assert "1 .ts" in found.messages[0] and "1 .mts" in found.messages[0]
