"""Finds the images and videos a command line names, and their titles."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset_scripts.media_suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES

# Files of cameras' own kinds: Pillow takes some for TIFF and gives the thumbnail in them.
RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 "
    ".srf .srw .x3f".split()
)
SIDECAR_SUFFIXES = (".optsg.json", ".xmp", ".txt")
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})


@dataclass(frozen=True)
class MediaFile:
    """
    Args:
        root: the folder that was named and in which the file was found; empty for a file that was named itself.
    """

    path: str
    title: str | None
    is_video: bool
    root: str = ""


@dataclass
class MediaFiles:
    """
    Args:
        files: what can be tagged, in the order given; a folder's sorted by name, its own before its sub-folders'.
        failures: `(path, reason)` of what was asked for and cannot be used.
        notes: sentences that say what was left out and why.
    """

    files: list[MediaFile] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_media_files(names: list[str], title: str | None = None, title_from_name: bool = False) -> MediaFiles:
    """Images and videos among `names` and, for folders, everywhere below them.

    A file that is named is taken, as a video if its suffix says so and else as an image, unless it is a raw file:
    these are left alone. In a folder the suffix decides, and a `metadata.jsonl`, `.csv` or `.parquet` with the columns
    `file_name` and `title` gives the titles.

    Args:
        names: paths of files and folders.
        title: title of every file that is named.
        title_from_name: titles are the files' names with `-` and `_` as spaces, whatever metadata says.
    """
    found = MediaFiles()
    for name in names:
        if os.path.isdir(name):
            _search_folder(name, found, title_from_name)
        elif os.path.isfile(name) and _suffix(name) in RAW_SUFFIXES:
            found.failures.append((name, "a raw file, which is not read here; tag the JPEG beside it, or export one"))
        elif os.path.isfile(name):
            found.files.append(MediaFile(name, _name_as_title(name) if title_from_name else title, _is_video(name)))
        else:
            found.failures.append((name, "not a file" if os.path.exists(name) else "no such file or folder"))
    return found


def _search_folder(folder: str, found: MediaFiles, title_from_name: bool):
    files, others, skipped = [], [], Counter()
    titles: dict[str, str | None] = {}

    def unreadable(error: OSError):
        found.failures.append((str(error.filename), error.strerror))

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        skipped["hidden"] += sum(name.startswith(".") and not _is_own(name) for name in folders + names)
        skipped["linked folder"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path, suffix = os.path.join(parent, name), _suffix(name)
            if name in METADATA_NAMES:
                if not title_from_name:
                    titles.update(_read_titles(path, found))
            elif suffix not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                others.append(path)
            elif os.path.isfile(path):
                files.append(path)
            else:
                found.failures.append((path, "not a file, or a link to nothing"))

    found.files += [
        MediaFile(
            path,
            _name_as_title(path) if title_from_name else titles.get(os.path.normpath(path)),
            _is_video(path),
            root=folder,
        )
        for path in files
    ]
    raw = [path for path in others if _suffix(path) in RAW_SUFFIXES]
    described = {name for path in files + raw for name in (path, os.path.splitext(path)[0])}
    sidecars = sum(_described(path) in described for path in others)
    skipped.update(
        _suffix(path) or "no suffix" for path in others if path not in set(raw) and _described(path) not in described
    )
    if raw:
        found.notes.append(
            f"{folder}: {len(raw)} raw files are left alone; of a raw file and its JPEG the JPEG is tagged"
        )
    if sidecars:
        found.notes.append(f"{folder}: {sidecars} sidecars are beside these files")
    if not files:
        found.failures.append((folder, "no image or video in this folder"))
    if skipped.total():
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common() if count)
        found.notes.append(f"{folder}: skipped, as not images or videos to tag: {kinds}")
    if missing := [path for path in titles if not os.path.exists(path)]:
        examples = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        found.notes.append(f"{folder}: metadata names {len(missing)} files that are not there: {examples}")


def _read_titles(metadata: str, found: MediaFiles) -> dict[str, str | None]:
    """Titles by path; rows that cannot be used are counted in one failure that shows the first of them."""
    titles, unusable = {}, []
    try:
        for number, row in _rows(metadata):
            try:
                path, title = _path_and_title(row)
                titles[os.path.normpath(os.path.join(os.path.dirname(metadata), path))] = title
            except ValueError as error:
                unusable.append(f"row {number}: {error}")
    except (OSError, ValueError, csv.Error) as error:
        unusable.append(f"not read to its end: {error}")
    if unusable:
        more = f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""
        found.failures.append((metadata, unusable[0] + more))
    return titles


def _rows(metadata: str) -> Iterator[tuple[int, dict | str]]:
    if metadata.endswith(".parquet"):
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(metadata).to_pylist(), start=1)
        return
    with open(metadata, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file) if metadata.endswith(".csv") else (line for line in file if line.strip())
        yield from enumerate(rows, start=1)


def _path_and_title(row: dict | str) -> tuple[str, str | None]:
    if isinstance(row, str):
        row = json.loads(row)
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('expected "file_name" and "title"')
    title = row.get("title")
    if not isinstance(title, str | None):
        raise ValueError(f'"title" must be text, got {title!r}')
    return row["file_name"], title or None


def _described(path: str) -> str | None:
    """What `path` would be a sidecar of, with or without a suffix; `None` if it is not named like a sidecar."""
    suffix = next((suffix for suffix in SIDECAR_SUFFIXES if path.lower().endswith(suffix)), None)
    return path[: -len(suffix)] if suffix else None


def _is_own(name: str) -> bool:
    """Whether a hidden file is this program's record or unfinished file."""
    return name.startswith(".optsg-")


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _is_video(path: str) -> bool:
    return _suffix(path) in VIDEO_SUFFIXES


def _name_as_title(path: str) -> str | None:
    # What of a name is not Unicode says nothing.
    name = os.fsencode(Path(path).stem).decode("utf-8", "ignore")
    return " ".join(name.replace("-", " ").replace("_", " ").split()) or None
