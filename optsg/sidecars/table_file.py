"""Tables (`tags.csv` and `tags.parquet`): one file per run, with one row per image or video.

Tags are first appended to a journal next to the table. The table is written from it at the end of the run, so that it
is always complete and a stopped run can continue.
"""

import csv
import hashlib
import io
from pathlib import Path

from ..media_files import OWN_PREFIX, MediaFile
from ..terminal import plural
from .files import check_writable, lock_folder, read_file, replace_file
from .journal import Journal
from .writer import Change, Fingerprint, SidecarError, TagWriter

COLUMNS = ("file", "title", "tags", "scores", "novel", "error")
SEPARATOR = "|"  # the same as in the metadata.csv of a tagging dataset
SCORE_DIGITS = 4
_TABLE = "\0table"  # no file can have this name


class TableWriter(TagWriter):
    """Collects the tags of all files and writes them as one table.

    Args:
        path: Path of the table; its suffix gives the format. The journal is in the same folder.
        fingerprint: See `make_writer`.
        dry_run: Write nothing.

    Raises:
        SidecarError: The table exists and is not as this program wrote it.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, dry_run: bool):
        self.path, self.fingerprint, self.dry_run = path, fingerprint, dry_run
        self.is_csv = path.suffix == ".csv"
        self.rows: dict[str, dict] = {}
        check_writable(str(path.parent))
        self.journal = Journal(str(path.with_name(f"{OWN_PREFIX}{path.name}.jsonl")))
        table = read_file(str(path))
        if table is not None and _digest(table) not in self.journal.get(_TABLE).get("digests", []):
            raise SidecarError(f"{path} was changed or written by another program; move it, or use another --output")

    def is_done(self, file: MediaFile) -> bool:
        """See `TagWriter.is_done`; the row of a file that is done comes from the journal."""
        entry = self.journal.get(file.path)
        done = entry.get("fingerprint") == self.fingerprint(file)
        if done:
            self._add_row(file, entry["tags"])
        return done

    def write(self, file: MediaFile, tags: list[dict]) -> Change:
        """See `TagWriter.write`; the tags go into the journal until the table is written."""
        if self.is_csv and (invalid := [tag["tag"] for tag in tags if SEPARATOR in tag["tag"]]):
            raise SidecarError(f"{file.path}: {self.path} cannot hold the tag {invalid[0]!r}; use --write parquet")
        before = [tag["tag"] for tag in self.journal.get(file.path).get("tags", [])]
        after = [tag["tag"] for tag in tags]
        tags = [{**tag, "score": round(tag["score"], SCORE_DIGITS)} for tag in tags]
        if not self.dry_run:
            with lock_folder(str(self.path.parent)):
                self.journal.add(file.path, {"fingerprint": self.fingerprint(file), "tags": tags})
        self._add_row(file, tags)
        added = [tag for tag in after if tag not in before]
        removed = [tag for tag in before if tag not in after]
        return Change(str(self.path), added, removed, written=True)

    def add_failure(self, path: str, title: str | None, reason: str) -> None:
        """Add the row of a file that has no tags."""
        self.rows[path] = dict(zip(COLUMNS, (path, title, [], [], [], reason)))

    def finish(self, files: list[str]) -> list[str]:
        """Write the table if it has changed, with rows in the order of `files`."""
        rows = [self.rows[path] for path in dict.fromkeys([*files, *self.rows]) if path in self.rows]
        data = _to_csv(rows) if self.is_csv else _to_parquet(rows)
        if self.dry_run or data == read_file(str(self.path)):
            return []
        with lock_folder(str(self.path.parent)):
            earlier = self.journal.get(_TABLE)
            digests = [*earlier.get("digests", []), _digest(data)]
            # Before the table: a run that is killed in between must still recognise its own table.
            self.journal.add(_TABLE, {"digests": digests[-2:], "files": list(self.rows)})
            replace_file(str(self.path), data)
        messages = [f"{self.path}: {plural(len(self.rows), 'row')}"]
        if dropped := len(set(earlier.get("files", [])) - self.rows.keys()):
            messages.append(
                f"{self.path}: dropped {plural(dropped, 'row')} of an earlier run with other files; to keep all rows, "
                "name all folders in one command"
            )
        return messages

    def _add_row(self, file: MediaFile, tags: list[dict]) -> None:
        lists = ([tag[part] for tag in tags] for part in ("tag", "score", "novel"))
        self.rows[file.path] = dict(zip(COLUMNS, (file.path, file.title, *lists, None)))


def _to_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in rows:
        scores = [f"{score:.6g}" for score in row["scores"]]
        novel = [str(int(mark)) for mark in row["novel"]]
        lists = [SEPARATOR.join(values) for values in (row["tags"], scores, novel)]
        table.writerow([row["file"], row["title"], *lists, row["error"]])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _to_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    text, lists = pyarrow.string(), pyarrow.list_
    types = (text, text, lists(text), lists(pyarrow.float64()), lists(pyarrow.bool_()), text)
    rows = [row | {column: _to_unicode(row[column]) for column in ("file", "title", "error")} for row in rows]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(zip(COLUMNS, types))))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _to_unicode(text: str | None) -> str | None:
    """Escapes bytes of a file name that are not valid Unicode, which Parquet cannot hold."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
