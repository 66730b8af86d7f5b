"""Tables (`tags.csv` and `tags.parquet`): one row per image or video. Rows of earlier runs with other files stay.

Tags are first appended to a journal next to the table. The table is written from it at the end of the run, so that it
is always complete and a stopped run can continue.
"""

import csv
import hashlib
import io
import os
from pathlib import Path

from ..media_files import OWN_PREFIX, MediaFile
from ..terminal import plural
from .embedded import EmbeddedMetadata
from .files import check_writable, lock_folder, read_file, replace_file
from .journal import Journal, is_list_of
from .writer import Change, Fingerprint, SidecarError, TagWriter

COLUMNS = ("file", "title", "tags", "scores", "novel", "error")
SEPARATOR = "|"  # the same as in the metadata.csv of a tagging dataset
SCORE_DIGITS = 4
MAX_CELL = 2**31 - 1  # characters; the limit of the library is 131,072
_TABLE = "\0table"  # no file can have this name
# Spreadsheets run a cell that starts with one of these as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def escape_formula(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would run as a formula.

    Example:

        >>> from optsg.sidecars.table_file import escape_formula
        >>> escape_formula("=1+1")
        "'=1+1"
    """
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


class TableWriter(TagWriter):
    """Collects the tags of all files and writes them as one table.

    Args:
        path: Path of the table; its suffix gives the format. The journal is in the same folder.
        fingerprint: See `make_writer`.
        dry_run: Write nothing.

    Raises:
        SidecarError: The table exists and is not as this program wrote it, or cannot be read.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, dry_run: bool):
        self.path, self.fingerprint, self.dry_run = path, fingerprint, dry_run
        self.is_csv = path.suffix == ".csv"
        self.rows: dict[str, dict] = {}
        check_writable(str(path.parent))
        self.journal = Journal(str(path.with_name(f"{OWN_PREFIX}{path.name}.jsonl")), _is_valid)
        table = read_file(str(path))
        if table is not None and _digest(table) not in self.journal.get(_TABLE).get("digests", []):
            raise SidecarError(f"{path} was changed or written by another program; move it, or use another --output")
        self._read_rows(table)  # raises any error before files are tagged
        # The key of each path in the table. Earlier versions did not record the paths.
        self.keys = {self._cell(entry["file"]): key for key, entry in self.journal.entries.items() if "file" in entry}

    def is_done(self, file: MediaFile) -> bool:
        """See `TagWriter.is_done`; the row of a file that is done comes from the journal."""
        entry = self._entry(file)
        done = entry.get("fingerprint") == self.fingerprint(file)
        if done:
            shown = self._add_row(file.path, entry.get("title") or file.title, entry["tags"])
            if entry.get("file") != shown:
                self._record(file, {**entry, "file": shown}, durable=False)
        return done

    def write(
        self, file: MediaFile, tags: list[dict], title: str | None = None, embedded: EmbeddedMetadata | None = None
    ) -> Change:
        """See `TagWriter.write`; the tags go into the journal until the table is written."""
        if self.is_csv and (invalid := [tag["tag"] for tag in tags if SEPARATOR in tag["tag"]]):
            raise SidecarError(f"{file.path}: {self.path} cannot hold the tag {invalid[0]!r}; use --write parquet")
        before = [tag["tag"] for tag in self._entry(file).get("tags", [])]
        after = [tag["tag"] for tag in tags]
        tags = [{**tag, "score": round(tag["score"], SCORE_DIGITS)} for tag in tags]
        shown = self._shown(file.path)
        self._record(file, {"fingerprint": self.fingerprint(file), "tags": tags, "title": title, "file": shown})
        self._add_row(file.path, title or file.title, tags)
        added = [tag for tag in after if tag not in before]
        removed = [tag for tag in before if tag not in after]
        return Change(str(self.path), added, removed, written=True)

    def add_failure(self, path: str, title: str | None, reason: str) -> None:
        """Add the row of a file that has no tags."""
        self._add_row(path, title, [], reason)

    def finish(self, files: list[str]) -> list[str]:
        """Write the table if it has changed: rows of earlier runs, then those of `files` in this order."""
        keys = dict.fromkeys([*map(self._key, files), *self.rows])
        rows = [self.rows[key] for key in keys if key in self.rows]
        rows = _to_csv_rows(rows) if self.is_csv else _to_parquet_rows(rows)
        before = read_file(str(self.path))
        earlier_rows = [
            row
            for row in self._read_rows(before)
            if (self.keys.get(row["file"]) or self._key(row["file"])) not in self.rows
        ]
        data = (_to_csv if self.is_csv else _to_parquet)(earlier_rows + rows)
        if self.dry_run or data == before:
            return []
        with lock_folder(str(self.path.parent)):
            digests = [*self.journal.get(_TABLE).get("digests", []), _digest(data)]
            # Before the table: a run that is killed in between must still recognise its own table.
            self.journal.add(_TABLE, {"digests": digests[-2:]})
            replace_file(str(self.path), data)
        kept = ""
        if earlier_rows:
            kept = f", {len(earlier_rows):,} of them of earlier runs with other files; to drop these, delete the table"
        return [f"{self.path}: {plural(len(earlier_rows) + len(rows), 'row')}{kept}"]

    def _read_rows(self, table: bytes | None) -> list[dict]:
        """Return the rows of a table of this program; cells of CSV are text."""
        if table is None:
            return []
        try:
            return _from_csv(table) if self.is_csv else _from_parquet(table)
        except Exception as error:  # pyarrow raises errors of many types
            raise SidecarError(f"{self.path} cannot be read: {error}; move it, or use another --output") from error

    def _add_row(self, path: str, title: str | None, tags: list[dict], error: str | None = None) -> str:
        """Add the row of a file, and return the path that the table shows."""
        key, shown = self._key(path), self._shown(path)
        lists = ([tag[part] for tag in tags] for part in ("tag", "score", "novel"))
        self.rows[key] = dict(zip(COLUMNS, (shown, title, *lists, error)))
        self.keys[self._cell(shown)] = key
        return shown

    def _entry(self, file: MediaFile) -> dict:
        """Return the entry of a file in the journal. Those of earlier versions have the path as their name."""
        entry = self.journal.get(self._key(file.path)) or self.journal.get(file.path)
        return entry if "file" not in entry or entry["name"] == self._key(file.path) else {}

    def _record(self, file: MediaFile, entry: dict, durable: bool = True) -> None:
        if not self.dry_run:
            with lock_folder(str(self.path.parent)):
                self.journal.add(self._key(file.path), entry | {"name": self._key(file.path)}, durable)

    def _key(self, path: str) -> str:
        """Return the path from the folder of the table, or else the absolute path: the same from any folder."""
        folder, name = os.path.split(path)
        absolute = os.path.join(os.path.realpath(folder), name)
        try:
            return os.path.relpath(absolute, os.path.realpath(self.path.parent))
        except ValueError:  # another drive of Windows
            return absolute

    def _shown(self, path: str) -> str:
        """Return the path as it is on the command line, or the absolute path if the table has another file there."""
        key = self._key(path)
        if key in self.rows:
            return self.rows[key]["file"]
        return path if self.keys.get(self._cell(path), key) == key else os.path.abspath(path)

    def _cell(self, path: str) -> str:
        return escape_formula(_to_unicode(path)) if self.is_csv else _to_unicode(path)


def _is_valid(entry: dict) -> bool:
    """Return whether an entry of the journal has the form that this program gives it."""
    if entry["name"] == _TABLE:
        return is_list_of(str, entry["digests"])
    if not isinstance(entry.get("title"), str | None) or not isinstance(entry.get("file", ""), str):
        return False
    types = {"tag": str, "score": (int, float), "novel": bool}
    return is_list_of(dict, entry["tags"]) and all(
        isinstance(tag[name], kind) for tag in entry["tags"] for name, kind in types.items()
    )


def _to_csv_rows(rows: list[dict]) -> list[dict]:
    """Return rows with text in all cells."""
    texts = []
    for row in rows:
        scores = [f"{score:.6g}" for score in row["scores"]]
        novel = [str(int(mark)) for mark in row["novel"]]
        lists = (SEPARATOR.join(values) for values in (row["tags"], scores, novel))
        cells = (row["file"], row["title"] or "", *lists, row["error"] or "")
        texts.append(dict(zip(COLUMNS, map(escape_formula, map(_to_unicode, cells)))))
    return texts


def _to_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    # Tables of earlier versions of this program have no apostrophes.
    table.writerows({name: escape_formula(cell) for name, cell in row.items()} for row in rows)
    return text.getvalue().encode("utf-8-sig")  # Excel recognises UTF-8 by the byte-order mark


def _from_csv(table: bytes) -> list[dict]:
    csv.field_size_limit(MAX_CELL)
    return list(csv.DictReader(io.StringIO(table.decode("utf-8-sig"), newline="")))


def _from_parquet(table: bytes) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    # Threads of the library that are still alive at the exit of a short run would abort it.
    with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(table)) as file:
        return file.read(use_threads=False).to_pylist()


def _to_parquet_rows(rows: list[dict]) -> list[dict]:
    return [row | {column: _to_unicode(row[column]) for column in ("file", "title", "error")} for row in rows]


def _to_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    text, lists = pyarrow.string(), pyarrow.list_
    types = (text, text, lists(text), lists(pyarrow.float64()), lists(pyarrow.bool_()), text)
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(zip(COLUMNS, types))))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _to_unicode(text: str | None) -> str | None:
    """Escape bytes of a file name that are not valid Unicode."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
