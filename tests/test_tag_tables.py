"""`optsg tag --write csv` and `parquet`: rows, errors, and what is left of earlier runs."""

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from sidecar_tools import TagCommand, make_photos


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def tag(tmp_path, monkeypatch, capsys):
    return TagCommand(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_has_a_row_for_every_file(tag, photos, kind, tmp_path):
    (photos / "gone.png").symlink_to("nowhere")
    options = ["--write", kind, "--output", tmp_path]
    assert tag(*options, photos)[0] == 1
    table = tmp_path / f"tags.{kind}"
    if kind == "csv":
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["tags"].split("|") == ["dog", "novel"] and rows[0]["novel"] == "0|1"
    else:
        rows = pyarrow.parquet.read_table(table).to_pylist()
        assert rows[0]["tags"] == ["dog", "novel"] and rows[0]["novel"] == [False, True]
    assert [Path(row["file"]).name for row in rows] == ["a.jpg", "b.jpg", "c.jpg", "gone.png"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]
    table.write_bytes(b"the user's own table")
    with pytest.raises(SystemExit):
        tag(*options, photos)
    assert table.read_bytes() == b"the user's own table"


def rows_of(table: Path) -> dict[str, str]:
    with table.open(encoding="utf-8", newline="") as file:
        return {Path(row["file"]).name: row["error"] or row["tags"] for row in csv.DictReader(file)}


def test_a_refused_caption_does_not_keep_tags_out_of_the_table(tag, photos, tmp_path):
    # The two images would share a caption.
    (photos / "a.png").write_bytes(b"a.png")
    options = ["--write", "csv", "--write", "txt", "--output", tmp_path / "out", photos]
    for _ in range(2):
        status, _, error = tag(*options)
        assert status == 1 and "would also be the sidecar of a.png" in error
        assert rows_of(tmp_path / "out/tags.csv") == {
            name: "dog|novel" for name in ("a.jpg", "a.png", "b.jpg", "c.jpg")
        }


def test_each_file_is_one_line_of_json_even_if_a_format_refuses_it(tag, photos, tmp_path):
    (photos / "a.png").write_bytes(b"a.png")
    options = ["--json", "--write", "csv", "--write", "txt", "--output", tmp_path / "out", photos]
    lines = [json.loads(line) for line in tag(*options)[1].splitlines()]
    assert sorted(Path(line["file"]).name for line in lines) == ["a.jpg", "a.png", "b.jpg", "c.jpg"]
    assert all(line["tags"] for line in lines)
    lines = {Path(line["file"]).name: line for line in map(json.loads, tag(*options)[1].splitlines())}
    assert lines["b.jpg"]["done"] and lines["c.jpg"]["done"] and "not all files of --write" in lines["a.jpg"]["error"]


def test_dropped_rows_of_an_earlier_run_are_reported(tag, photos, tmp_path):
    options = ["--write", "csv", "--output", tmp_path]
    tag(*options, photos / "a.jpg", photos / "b.jpg")
    _, _, error = tag(*options, photos / "sub")
    assert "dropped 2 rows of an earlier run with other files" in error
    assert list(rows_of(tmp_path / "tags.csv")) == ["c.jpg"]
