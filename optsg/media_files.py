"""Finds the images and videos of a command line, and their titles."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset_scripts.media_suffixes import IMAGE_SUFFIXES, METADATA_NAMES, VIDEO_SUFFIXES
from dataset_scripts.tag_separators import describe_separator, find_printed_list, find_separator, split_tags

from .terminal import plural

MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
# Pillow reads some of these as TIFF files and returns the thumbnail that they contain.
RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 "
    ".srf .srw .x3f".split()
)
SIDECAR_SUFFIXES = (".optsg.json", ".xmp", ".txt")
OWN_PREFIX = ".optsg-"  # for records and partial files of this program
MAX_MISSING_SHOWN = 3


@dataclass(frozen=True)
class MediaFile:
    """An image or a video to tag.

    Args:
        path: Path of the file.
        title: Its title, if it has one.
        is_video: Whether it is a video rather than an image.
        root: The folder on the command line that contains the file. Empty for a file on the command line.
        tags: Its tags in the metadata, if they were read.
    """

    path: str
    title: str | None
    is_video: bool
    root: str = ""
    tags: tuple[str, ...] = ()


@dataclass
class MediaFiles:
    """The files of a command line.

    Args:
        files: Images and videos in the order of the command line. The files of a folder are sorted by name and come
            before those of its sub-folders.
        failures: `(path, reason)` of all requested files and folders that cannot be used.
        messages: Messages about skipped files.
    """

    files: list[MediaFile] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


def find_media_files(
    names: list[str], title: str | None = None, title_from_name: bool = False, read_tags: bool = False
) -> MediaFiles:
    """Find images and videos among files, and recursively in folders.

    A file with a video suffix is a video, and any other file is an image. Raw files are rejected. In a folder, files
    without an image or video suffix are skipped. Titles are read from a `metadata.jsonl`, `.csv` or `.parquet` in the
    folder, with the columns `file_name` and `title`.

    Args:
        names: Paths of files and folders.
        title: Title of the files on the command line.
        title_from_name: Use file names as titles, with spaces instead of `-` and `_`, even if there is metadata.
        read_tags: Also read the column `tags` of the metadata: a list, or text with tags separated by `|`.
    """
    found = MediaFiles()
    for name in names:
        if os.path.isdir(name):
            _FolderSearch(name, found, title_from_name, read_tags).run()
        elif os.path.isfile(name) and suffix_of(name) in RAW_SUFFIXES:
            found.failures.append((name, "raw files are not supported; tag the JPEG next to it, or export one"))
        elif os.path.isfile(name):
            found.files.append(MediaFile(name, _title_from_name(name) if title_from_name else title, _is_video(name)))
        else:
            found.failures.append((name, "not a file" if os.path.exists(name) else "no such file or folder"))
    return found


def suffix_of(path: str) -> str:
    """Return the last suffix of a path in lower case, with its dot."""
    return Path(path).suffix.lower()


class _FolderSearch:
    """Searches a folder recursively and adds what it finds to `found`."""

    def __init__(self, folder: str, found: MediaFiles, title_from_name: bool, read_tags: bool):
        self.folder, self.found = folder, found
        self.title_from_name, self.read_tags = title_from_name, read_tags
        self.media: list[str] = []
        self.others: list[str] = []
        self.metadata: dict[str, tuple[str | None, tuple[str, ...]]] = {}
        self.skipped = Counter()

    def run(self) -> None:
        for parent, folders, names in os.walk(self.folder, onerror=self._add_unreadable_folder):
            self.skipped["hidden"] += sum(
                name.startswith(".") and not name.startswith(OWN_PREFIX) for name in folders + names
            )
            self.skipped["linked folder"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                self._add_file(os.path.join(parent, name))
        self.found.files += [self._media_file(path) for path in self.media]
        if not self.media:
            self.found.failures.append((self.folder, "the folder contains no images or videos"))
        self._report_skipped()
        self._report_missing()

    def _add_unreadable_folder(self, error: OSError) -> None:
        self.found.failures.append((str(error.filename), error.strerror))

    def _add_file(self, path: str) -> None:
        if os.path.basename(path) in METADATA_NAMES and os.path.exists(path) and not os.path.isfile(path):
            self.found.failures.append((path, "not a regular file"))
        elif os.path.basename(path) in METADATA_NAMES:
            if self.read_tags or not self.title_from_name:
                self.metadata.update(_read_metadata(path, self.found, self.read_tags))
        elif suffix_of(path) not in MEDIA_SUFFIXES:
            self.others.append(path)
        elif os.path.isfile(path):
            self.media.append(path)
        else:
            self.found.failures.append((path, "not a file, or a broken link"))

    def _media_file(self, path: str) -> MediaFile:
        title, tags = self.metadata.get(os.path.normpath(path), (None, ()))
        title = _title_from_name(path) if self.title_from_name else title
        return MediaFile(path, title, _is_video(path), root=self.folder, tags=tags)

    def _report_skipped(self) -> None:
        raw = {path for path in self.others if suffix_of(path) in RAW_SUFFIXES}
        # A sidecar is named after its image, with or without the image's suffix.
        owners = {name for path in self.media + sorted(raw) for name in (path, os.path.splitext(path)[0])}
        sidecars = {path for path in self.others if _sidecar_owner(path) in owners}
        self.skipped.update(
            suffix_of(path) or "without suffix" for path in self.others if path not in raw and path not in sidecars
        )
        if raw:
            self._add_message(f"skipped {plural(len(raw), 'raw file')}; a JPEG next to a raw file is tagged")
        if sidecars:
            self._add_message(f"found {plural(len(sidecars), 'sidecar')}")
        if total := self.skipped.total():
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common() if count)
            self._add_message(f"skipped {plural(total, 'other file')} ({kinds})")

    def _report_missing(self) -> None:
        if missing := [path for path in self.metadata if not os.path.exists(path)]:
            shown = ", ".join(missing[:MAX_MISSING_SHOWN]) + (", …" if len(missing) > MAX_MISSING_SHOWN else "")
            self._add_message(f"{plural(len(missing), 'file')} in the metadata not found: {shown}")

    def _add_message(self, text: str) -> None:
        self.found.messages.append(f"{self.folder}: {text}")


def _read_metadata(metadata: str, found: MediaFiles, read_tags: bool) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """Read titles and tags by path. All invalid rows together are one failure, which shows one of them."""
    read, rows, unusable = [], {}, []
    try:
        for number, row in _rows(metadata):
            try:
                read.append((number, _check_row(row)))
            except ValueError as error:
                unusable.append(f"row {number}: {error}")
    except (OSError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        unusable.append(f"the rest cannot be read: {error}")
    cells = [row.get("tags") for _, row in read]
    separator = find_separator(cells)
    if read_tags and (message := describe_separator(separator, cells)):
        found.messages.append(f"{metadata}: {message}")
    for number, row in read:
        try:
            path = os.path.normpath(os.path.join(os.path.dirname(metadata), row["file_name"]))
            rows[path] = (row.get("title") or None, _read_tags(row.get("tags"), separator) if read_tags else ())
        except ValueError as error:
            unusable.append(f"row {number}: {error}")
    if unusable:
        more = f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""
        found.failures.append((metadata, unusable[0] + more))
    return rows


def _rows(metadata: str) -> Iterator[tuple[int, dict | str]]:
    if metadata.endswith(".parquet"):
        import pyarrow.parquet

        # Other columns may hold values that Python cannot, such as dates in nanoseconds.
        with pyarrow.parquet.ParquetFile(metadata) as file:
            columns = [name for name in ("file_name", "title", "tags") if name in file.schema_arrow.names]
            yield from enumerate(file.read(columns).to_pylist(), start=1)
        return
    with open(metadata, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file) if metadata.endswith(".csv") else (line for line in file if line.strip())
        yield from enumerate(rows, start=1)


def _check_row(row: dict | str) -> dict:
    if isinstance(row, str):
        row = json.loads(row)
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected "file_name" and "title"')
    title = row.get("title")
    if not isinstance(title, str | None):
        raise ValueError(f'"title" must be text, got {title!r}')
    return row


def _read_tags(tags: list[str] | str | None, separator: str) -> tuple[str, ...]:
    if message := find_printed_list(tags):
        raise ValueError(message)
    tags = split_tags(tags or "", separator) if isinstance(tags, str | None) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f'"tags" must be a list of strings or text separated by | or ; or a comma, got {tags!r}')
    return tuple(stripped for tag in tags if (stripped := tag.strip()))


def _sidecar_owner(path: str) -> str | None:
    """Return the file that a sidecar belongs to, with or without its suffix; `None` for other names."""
    suffix = next((suffix for suffix in SIDECAR_SUFFIXES if path.lower().endswith(suffix)), None)
    return path[: -len(suffix)] if suffix else None


def _is_video(path: str) -> bool:
    return suffix_of(path) in VIDEO_SUFFIXES


def _title_from_name(path: str) -> str | None:
    # Bytes of a file name that are not valid Unicode are dropped.
    name = os.fsencode(Path(path).stem).decode("utf-8", "ignore")
    return " ".join(name.replace("-", " ").replace("_", " ").split()) or None
