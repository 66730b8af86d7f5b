"""Reads titles and tags of files from a `metadata.jsonl`, `metadata.csv` or `metadata.parquet`."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset_scripts.metadata_text import TITLE_COLUMNS, check_unicode, decode_text, open_csv
from dataset_scripts.tag_separators import describe_separator, find_printed_list, find_separator, split_tags

USED_COLUMNS = ("file_name", *TITLE_COLUMNS, "tags")
# A small Parquet file may hold many millions of empty rows.
MAX_UNUSABLE_ROWS = 10_000


@dataclass(frozen=True)
class FileMetadata:
    """The title and the tags of an image or a video in a metadata file.

    Args:
        title: Its title.
        tags: Its tags, if they were read.
    """

    title: str | None = None
    tags: tuple[str, ...] = ()


def read_metadata(path: str, read_tags: bool = False) -> tuple[dict[str, FileMetadata], list[str], str | None]:
    """Read a metadata file with the column `file_name` and a title in one of `TITLE_COLUMNS`.

    Spaces around column names and after delimiters are ignored. A CSV file may have `;` or tabs as delimiters. Text in
    another encoding than UTF-8 is detected.

    Args:
        path: Path of the metadata file.
        read_tags: Also read the column `tags`.

    Returns:
        The rows by `file_name`, messages about how the file was read, and one failure for all rows that cannot be
        used, which shows one of them; `None` without such rows.
    """
    read, rows, unusable, messages = [], {}, _Unusable(), []
    try:
        for number, row in _rows(path, messages):
            try:
                read.append((number, _check_row(row)))
            except ValueError as error:
                unusable.add(f"row {number}: {error}")
                if not read and unusable.number == MAX_UNUSABLE_ROWS:
                    unusable.first += f"; after {MAX_UNUSABLE_ROWS:,} such rows, the rest is not read"
                    break
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        unusable.add(f"the rest cannot be read: {error}")
    cells = [row.get("tags") for _, row in read]
    separator = find_separator(cells)
    if read_tags and (message := describe_separator(separator, cells)):
        messages.append(message)
    for number, row in read:
        try:
            tags = _read_tags(row.get("tags"), separator) if read_tags else ()
            rows[row["file_name"]] = FileMetadata(_title(row), tags)
        except ValueError as error:
            unusable.add(f"row {number}: {error}")
    used = {name for _, row in read for name in TITLE_COLUMNS if row.get(name)}
    if used and "title" not in used:
        messages.append(f"titles are read from the column {next(name for name in TITLE_COLUMNS if name in used)}")
    return rows, messages, unusable.text()


@dataclass
class _Unusable:
    """The rows that cannot be used: their number, and why the first one cannot."""

    number: int = 0
    first: str = ""

    def add(self, reason: str) -> None:
        self.first = self.first or reason
        self.number += 1

    def text(self) -> str | None:
        return f"{self.first} (and {self.number - 1} more)" if self.number > 1 else self.first or None


def _rows(path: str, messages: list[str]) -> Iterator[tuple[int, dict | str | ValueError]]:
    """Yield each row with its number: a dictionary, a line of JSON, or why a row of CSV cannot be used."""
    if path.lower().endswith(".parquet"):
        from dataset_scripts.parquet_rows import read_parquet_rows

        yield from enumerate(read_parquet_rows(path, lambda name: name.strip() in USED_COLUMNS), start=1)
        return
    text = decode_text(Path(path).read_bytes(), messages)
    if path.lower().endswith(".csv"):
        yield from _csv_rows(text, messages)
    else:
        yield from enumerate((line for line in text.split("\n") if line.strip()), start=1)


def _csv_rows(text: str, messages: list[str]) -> Iterator[tuple[int, dict | ValueError]]:
    names, rows = open_csv(text, ("file_name",), messages)
    number, short = 0, []
    try:
        for cells in rows:
            if not cells:
                continue
            number += 1
            if len(cells) < len(names):
                short.append(number)
            if len(cells) > len(names):
                # A title with a comma and without quotes would lose its end.
                reason = f"it has {len(cells)} cells and the header {len(names)}; put texts with commas in quotes"
                yield number, ValueError(reason)
            else:
                yield number, dict(zip(names, cells))
    except csv.Error as error:
        raise ValueError(f"row {number + 1}: {error}; is a quotation mark missing?") from error
    if short:
        messages.append(f"{len(short)} rows have fewer cells than the header, such as row {short[0]}")


def _check_row(row: dict | str | ValueError) -> dict:
    if isinstance(row, ValueError):
        raise row
    if isinstance(row, str):
        row = json.loads(row)
    if isinstance(row, dict):
        row = {str(name).strip(): value for name, value in row.items()}
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected "file_name" and "title"')
    for name in ("file_name", *TITLE_COLUMNS):
        if not isinstance(text := row.get(name), str | None):
            raise ValueError(f'"{name}" must be text, got {text!r}')
        check_unicode(text or "")
    return row


def _title(row: dict) -> str | None:
    return next((title for name in TITLE_COLUMNS if (title := (row.get(name) or "").strip())), None)


def _read_tags(tags: list[str] | str | None, separator: str) -> tuple[str, ...]:
    if message := find_printed_list(tags):
        raise ValueError(message)
    tags = split_tags(tags or "", separator) if isinstance(tags, str | None) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f'"tags" must be a list of strings or text separated by | or ; or a comma, got {tags!r}')
    return tuple(stripped for tag in tags if (stripped := tag.strip()))
