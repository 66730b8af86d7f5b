"""`optsg tag --write csv` and `parquet`: rows, errors, and what is left of earlier runs."""

import codecs
import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from sidecar_tools import TagCommand, make_photos

from optsg.sidecars.table_file import escape_formula


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
        with table.open(encoding="utf-8-sig", newline="") as file:
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
    with table.open(encoding="utf-8-sig", newline="") as file:
        return {Path(row["file"]).name: row["error"] or row["tags"] for row in csv.DictReader(file)}


def test_a_refused_caption_does_not_keep_tags_out_of_the_table(tag, photos, tmp_path):
    (tmp_path / "out/a.txt").mkdir(parents=True)
    options = ["--write", "csv", "--write", "txt", "--output", tmp_path / "out", photos]
    for _ in range(2):
        status, _, error = tag(*options)
        assert status == 1 and "out/a.txt" in error
        assert rows_of(tmp_path / "out/tags.csv") == {name: "dog|novel" for name in ("a.jpg", "b.jpg", "c.jpg")}


def test_each_file_is_one_line_of_json_even_if_a_format_refuses_it(tag, photos, tmp_path):
    (tmp_path / "out/a.txt").mkdir(parents=True)
    options = ["--json", "--write", "csv", "--write", "txt", "--output", tmp_path / "out", photos]
    lines = [json.loads(line) for line in tag(*options)[1].splitlines()]
    assert sorted(Path(line["file"]).name for line in lines) == ["a.jpg", "b.jpg", "c.jpg"]
    assert all(line["tags"] for line in lines)
    lines = {Path(line["file"]).name: line for line in map(json.loads, tag(*options)[1].splitlines())}
    assert lines["b.jpg"]["done"] and lines["c.jpg"]["done"] and "not all files of --write" in lines["a.jpg"]["error"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_of_an_earlier_run_with_other_files_stay(tag, photos, tmp_path, kind):
    options = ["--write", kind, "--output", tmp_path]
    (photos / "b.jpg").rename(photos / "sub/b.jpg")
    (photos / "gone.png").symlink_to("nowhere")
    tag(*options, photos)
    table = tmp_path / f"tags.{kind}"
    before = table.read_bytes()
    tag.predicted = {"*": ["cat"]}
    _, _, error = tag(*options, "--redo", photos / "sub")
    assert f"{table}: 4 rows, 2 of them of earlier runs with other files" in error
    if kind == "csv":
        found = rows_of(table)
    else:
        found = {
            Path(r["file"]).name: r["error"] or r["tags"][0] for r in pyarrow.parquet.read_table(table).to_pylist()
        }
        found["a.jpg"] += "|novel"
    assert list(found) == ["a.jpg", "gone.png", "b.jpg", "c.jpg"]
    assert (found.pop("gone.png") != "", found) == (True, {"a.jpg": "dog|novel", "b.jpg": "cat", "c.jpg": "cat"})
    tag.predicted = {"*": ["dog", "novel"]}
    assert tag(*options, "--redo", photos)[0] == 1 and table.read_bytes() == before


FORMULAS = ["=1+1", "+1", "-1", "@SUM(1)", "\tx", "\rx", "a=1", "'=1", ""]


def test_spreadsheets_run_no_cell_as_a_formula(tag, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "space")
    import folder_table

    assert [escape_formula(text) for text in FORMULAS] == [folder_table._escape_formula(text) for text in FORMULAS]
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    Path("=cmd.jpg").write_bytes(b"")
    tag.predicted = {"*": ["@SUM(1)", "=1"]}
    tag("--write", "csv", "--title", "+1", "=cmd.jpg")
    data = Path("tags.csv").read_bytes()
    assert data.startswith(codecs.BOM_UTF8)
    [row] = csv.DictReader(data.decode("utf-8-sig").splitlines())
    assert (row["file"], row["title"], row["tags"]) == ("'=cmd.jpg", "'+1", "'@SUM(1)|=1")
    tag("--write", "csv", "--title", "+1", "=cmd.jpg")
    assert Path("tags.csv").read_bytes() == data


def test_a_file_has_one_row_under_any_path(tag, photos, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jpg").write_bytes(b"another image")
    table, options = tmp_path / "out/tags.csv", ["--write", "csv", "--output", tmp_path / "out"]

    def paths(*words):
        assert tag(*options, *words)[0] == 0
        with table.open(encoding="utf-8-sig", newline="") as file:
            return [row["file"] for row in csv.DictReader(file)]

    monkeypatch.chdir(photos)
    assert paths("./a.jpg", "a.jpg") == ["./a.jpg"]
    assert paths("a.jpg") == ["a.jpg"]
    # The same path from another folder is another file.
    monkeypatch.chdir(tmp_path / "other")
    for _ in range(2):
        assert paths("a.jpg") == ["a.jpg", str(tmp_path / "other/a.jpg")]
    monkeypatch.chdir(tmp_path)
    assert paths("photos/a.jpg") == [str(tmp_path / "other/a.jpg"), "photos/a.jpg"]
    assert "1 file already tagged" in tag(*options, "other/a.jpg")[2]


def test_the_journal_of_an_earlier_version_is_resumed(tag, photos, tmp_path):
    options = ["--write", "csv", "--output", tmp_path, photos]
    tag(*options)
    table, journal = (tmp_path / "tags.csv").read_bytes(), tmp_path / ".optsg-tags.csv.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries:
        if shown := entry.pop("file", None):
            entry["name"] = shown
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert "3 files already tagged" in tag(*options)[2]
    assert (tmp_path / "tags.csv").read_bytes() == table
