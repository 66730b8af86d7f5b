"""`tags.csv` and `tags.parquet`: one file for the run, one row an image or video.

What is tagged goes into a journal beside it, file by file; the table is made of that when the run is through, so that
a run that was stopped goes on, and the table is always whole.
"""

import csv
import hashlib
import io
from pathlib import Path

from ..media_files import MediaFile
from .change import Change, SidecarError
from .journal import Journal
from .whole_files import check_writable, only_here, read_whole, write_whole

COLUMNS = ("file", "title", "tags", "scores", "novel", "error")
SEPARATOR = "|"  # as in the metadata.csv of a tagging dataset
_TABLE = "\0table"  # the name of no file


class TableFile:
    """Gathers each file's tags and writes them as one table.

    Args:
        path: of the table; its suffix says which kind. The journal is beside it.
        fingerprints: see `make_writer`.
        dry_run: write nothing.

    Raises:
        SidecarError: the table is there, and is not as this program left it.
    """

    def __init__(self, path: Path, fingerprints, dry_run: bool):
        self.kind = path.suffix[1:]
        self.path, self.fingerprints, self.dry_run = path, fingerprints, dry_run
        check_writable(str(path.parent))
        self.journal = Journal(str(path.with_name(f".optsg-{path.name}.jsonl")))
        self.rows: dict[str, dict] = {}
        self.left_out = 0
        present = read_whole(str(path))
        if present is not None and _digest(present) not in self.journal.get(_TABLE).get("made", []):
            raise SidecarError(f"{path} is not as this program left it, if it did; move it, or give another --output")

    def done(self, file: MediaFile) -> bool:
        """Whether the journal has this file's tags, made of this model and these settings."""
        entry = self.journal.get(file.path)
        found = entry.get("fingerprint") == self.fingerprints(file)
        if found:
            self._take(file, entry["tags"])
        return found

    def write(self, file: MediaFile, tags: list[dict]) -> Change:
        """Puts a file's tags on record.

        Raises:
            SidecarError: csv cannot hold one of the tags, or the journal cannot be written.
        """
        if self.kind == "csv" and (bad := [tag["tag"] for tag in tags if SEPARATOR in tag["tag"]]):
            raise SidecarError(f"{file.path}: {self.path} cannot hold the tag {bad[0]!r}; --write parquet can")
        before = [tag["tag"] for tag in self.journal.get(file.path).get("tags", [])]
        after = [tag["tag"] for tag in tags]
        tags = [{**tag, "score": round(tag["score"], 4)} for tag in tags]
        if not self.dry_run:
            with only_here(str(self.path.parent)):
                self.journal.add(file.path, {"fingerprint": self.fingerprints(file), "tags": tags})
        self._take(file, tags)
        added, removed = ([t for t in one if t not in other] for one, other in ((after, before), (before, after)))
        return Change(str(self.path), added, removed, written=True)

    def failed(self, path: str, title: str | None, reason: str):
        """Gives a file that has no tags its row."""
        self.rows[path] = dict(zip(COLUMNS, (path, title, [], [], [], reason)))

    def finish(self, files: list[str]) -> bool:
        """Writes the table, rows in the order of `files`, and says whether it has changed.

        Raises:
            SidecarError: it cannot be written.
        """
        rows = [self.rows[path] for path in dict.fromkeys([*files, *self.rows]) if path in self.rows]
        data = _csv(rows) if self.kind == "csv" else _parquet(rows)
        if self.dry_run or data == read_whole(str(self.path)):
            return False
        with only_here(str(self.path.parent)):
            # Before it is made: a run that is killed right after would else not know its own table.
            before = self.journal.get(_TABLE)
            made = [*before.get("made", []), _digest(data)]
            self.left_out = len(set(before.get("files", [])) - self.rows.keys())
            self.journal.add(_TABLE, {"made": made[-2:], "files": list(self.rows)})
            write_whole(str(self.path), data)
        return True

    def _take(self, file: MediaFile, tags: list[dict]):
        lists = ([tag[part] for tag in tags] for part in ("tag", "score", "novel"))
        self.rows[file.path] = dict(zip(COLUMNS, (file.path, file.title, *lists, None)))


def _csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in rows:
        scores = [f"{score:.6g}" for score in row["scores"]]
        novel = [str(int(mark)) for mark in row["novel"]]
        lists = [SEPARATOR.join(part) for part in (row["tags"], scores, novel)]
        table.writerow([row["file"], row["title"], *lists, row["error"]])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    text, lists = pyarrow.string(), pyarrow.list_
    types = (text, text, lists(text), lists(pyarrow.float64()), lists(pyarrow.bool_()), text)
    # Names of files that are not Unicode, with escapes for what Parquet's text cannot hold.
    rows = [row | {part: _unicode(row[part]) for part in ("file", "title", "error")} for row in rows]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(zip(COLUMNS, types))))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _unicode(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
