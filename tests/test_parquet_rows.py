"""Parquet files with metadata: little memory, and one kind of error."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_scripts import load_tagging_dataset, parquet_rows
from dataset_scripts.parquet_rows import read_parquet_rows
from optsg.metadata_files import MAX_UNUSABLE_ROWS, read_metadata


def test_rows_of_several_batches_and_of_chosen_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "BATCH_ROWS", 3)
    rows = [{"file_name": f"{number}.png", "tags": ["x"] * (number % 3)} for number in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    assert list(read_parquet_rows(tmp_path / "metadata.parquet")) == rows
    names = list(read_parquet_rows(tmp_path / "metadata.parquet", lambda name: name == "file_name"))
    assert names == [{"file_name": row["file_name"]} for row in rows]


@pytest.mark.parametrize(
    "column, message",
    [
        (pa.array([2**30], pa.int32()).cast(pa.date32()), "a value cannot be read"),
        (pa.array(["x" * 1000]), "the column extra has"),
    ],
)
def test_unreadable_values_and_long_columns_are_errors(tmp_path, monkeypatch, column, message):
    monkeypatch.setattr(parquet_rows, "MAX_COLUMN_BYTES", 900)
    path = tmp_path / "metadata.parquet"
    pq.write_table(pa.table({"file_name": ["a.png"], "extra": column}), path, use_dictionary=False)
    with pytest.raises(ValueError, match=message):
        list(read_parquet_rows(path))
    with pytest.raises(ValueError, match=f"metadata.parquet: {message}"):
        load_tagging_dataset(tmp_path)
    # The other columns are enough for titles.
    assert read_metadata(str(path))[0].keys() == {"a.png"}


def test_other_files_are_named(tmp_path):
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="it is not a Parquet file"):
        list(read_parquet_rows(tmp_path / "metadata.parquet"))


def test_millions_of_empty_rows_are_not_read(tmp_path):
    path = tmp_path / "metadata.parquet"
    pq.write_table(pa.table({"file_name": pa.nulls(10 * MAX_UNUSABLE_ROWS, pa.string())}), path)
    rows, _, failure = read_metadata(str(path))
    assert not rows and failure.endswith("the rest is not read (and 9999 more)")
    with pytest.raises(ValueError, match='row 1: expected a row with "file_name"'):
        load_tagging_dataset(tmp_path)


@pytest.mark.parametrize(
    "row", [{"file_name": "a.png", "title": "\ud800"}, {"file_name": "a.png", "tags": ["\udfff"]}]
)
def test_text_that_is_not_unicode_is_named(tmp_path, row):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: .* is not valid Unicode text"):
        load_tagging_dataset(tmp_path)
    if "title" in row:
        assert "not valid Unicode text" in read_metadata(str(tmp_path / "metadata.jsonl"))[2]


def test_a_folder_named_like_metadata_is_named(tmp_path):
    (tmp_path / "metadata.csv").mkdir()
    with pytest.raises(ValueError, match="metadata.csv is not a regular file"):
        load_tagging_dataset(tmp_path)
