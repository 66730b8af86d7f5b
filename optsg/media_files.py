"""Finds the images and videos of a command line, and their titles."""

import fnmatch
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dataset_scripts.media_suffixes import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    RAW_SUFFIXES,
    VIDEO_SUFFIXES,
    is_left_out,
)

from .metadata_files import FileMetadata, read_metadata
from .raw_files import INSTALL, can_read_raw
from .terminal import plural

MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
SIDECAR_SUFFIXES = (".optsg.json", ".xmp", ".txt")
OWN_PREFIX = ".optsg-"  # for records and partial files of this program
MAX_MISSING_SHOWN = 3
TRANSPORT_STREAM_START = b"\x47"
TYPESCRIPT_SUFFIXES = (".ts", ".mts")


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
    names: list[str],
    title: str | None = None,
    title_from_name: bool = False,
    read_tags: bool = False,
    read_raw: bool = False,
    skip: Iterable[str] = (),
) -> MediaFiles:
    """Find images and videos among files, and recursively in folders.

    A file with a video suffix is a video, and any other file is an image. In a folder, files without an image or video
    suffix are skipped, and so are raw files with an image of the same name, and folders of thumbnails and deleted
    files. Titles are read from a `metadata.jsonl`, `.csv` or `.parquet` in the folder, see [`read_metadata`].

    Args:
        names: Paths of files and folders.
        title: Title of the files on the command line.
        title_from_name: Use file names as titles, with spaces instead of `-` and `_`, even if there is metadata.
        read_tags: Also read the column `tags` of the metadata: a list, or text with tags separated by `|`.
        read_raw: Also find raw files. If the library for them is not installed, they are failures.
        skip: Patterns of names, or of paths in a folder, that are left out of folders.
    """
    found = MediaFiles()
    for name in names:
        if os.path.isdir(name):
            _FolderSearch(name, found, title_from_name, read_tags, read_raw, tuple(skip)).run()
        elif os.path.isfile(name) and suffix_of(name) in RAW_SUFFIXES and not (read_raw and can_read_raw()):
            reason = INSTALL if read_raw else "use the JPEG next to it, or export one"
            found.failures.append((name, f"it is a raw file; {reason}"))
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

    def __init__(
        self,
        folder: str,
        found: MediaFiles,
        title_from_name: bool,
        read_tags: bool,
        read_raw: bool,
        skip: tuple[str, ...],
    ):
        self.folder, self.found = folder, found
        self.title_from_name, self.read_tags, self.read_raw, self.skip = title_from_name, read_tags, read_raw, skip
        self.media: list[str] = []
        self.others: list[str] = []
        self.raw_alone: list[str] = []
        self.metadata: dict[str, FileMetadata] = {}
        self.skipped = Counter()

    def run(self) -> None:
        for parent, folders, names in os.walk(self.folder, onerror=self._add_unreadable_folder):
            self.skipped["hidden"] += sum(
                name.startswith(".") and not name.startswith(OWN_PREFIX) for name in folders + names
            )
            self.skipped["linked folder"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and self._is_kept(parent, name))
            names = sorted(
                name for name in names if not name.startswith(".") and self._is_skipped(parent, name) is None
            )
            stems = {_stem(name) for name in names if suffix_of(name) in IMAGE_SUFFIXES}
            for name in names:
                path = os.path.join(parent, name)
                if self.read_raw and suffix_of(name) in RAW_SUFFIXES and _stem(name) not in stems:
                    (self.media if can_read_raw() else self.raw_alone).append(path)
                else:
                    self._add_file(path)
        self.found.files += [self._media_file(path) for path in self.media]
        if self.raw_alone:
            self.found.failures.append((self.folder, f"{plural(len(self.raw_alone), 'raw file')} skipped; {INSTALL}"))
        elif not self.media:
            self.found.failures.append((self.folder, "the folder contains no images or videos"))
        self._report_skipped()
        self._report_missing()

    def _is_kept(self, parent: str, name: str) -> bool:
        if is_left_out(name):
            self.skipped["folders of thumbnails or deleted files"] += 1
            return False
        return self._is_skipped(parent, name) is None

    def _add_unreadable_folder(self, error: OSError) -> None:
        self.found.failures.append((str(error.filename), error.strerror))

    def _add_file(self, path: str) -> None:
        is_metadata = os.path.basename(path).lower() in METADATA_NAMES
        if is_metadata and os.path.exists(path) and not os.path.isfile(path):
            self.found.failures.append((path, "not a regular file"))
        elif is_metadata:
            if self.read_tags or not self.title_from_name:
                self._add_metadata(path)
        elif suffix_of(path) not in MEDIA_SUFFIXES or _is_source_code(path):
            self.others.append(path)
        elif os.path.isfile(path):
            self.media.append(path)
        else:
            self.found.failures.append((path, "not a file, or a broken link"))

    def _add_metadata(self, path: str) -> None:
        rows, messages, failure = read_metadata(path, self.read_tags)
        self.metadata |= {_key(os.path.join(os.path.dirname(path), name)): row for name, row in rows.items()}
        self.found.messages += [f"{path}: {message}" for message in messages]
        if failure:
            self.found.failures.append((path, failure))

    def _media_file(self, path: str) -> MediaFile:
        row = self.metadata.get(_key(path), FileMetadata())
        title = _title_from_name(path) if self.title_from_name else row.title
        return MediaFile(path, title, _is_video(path), root=self.folder, tags=row.tags)

    def _report_skipped(self) -> None:
        raw = {path for path in self.others + self.raw_alone if suffix_of(path) in RAW_SUFFIXES}
        # A sidecar is named after its image, with or without the image's suffix.
        owners = {name for path in self.media + sorted(raw) for name in (path, os.path.splitext(path)[0])}
        sidecars = {path for path in self.others if _sidecar_owner(path) in owners}
        self.skipped.update(
            suffix_of(path) or "without suffix" for path in self.others if path not in raw and path not in sidecars
        )
        if passed_over := len(raw) - len(self.raw_alone):
            self._add_message(f"skipped {plural(passed_over, 'raw file')}; a JPEG next to a raw file is tagged")
        if sidecars:
            self._add_message(f"found {plural(len(sidecars), 'sidecar')}")
        if total := self.skipped.total():
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common() if count)
            self._add_message(f"skipped {plural(total, 'other file')} ({kinds})")

    def _report_missing(self) -> None:
        present = {_key(path) for path in self.media}
        if missing := [path for path in self.metadata if path not in present and not os.path.exists(path)]:
            shown = ", ".join(missing[:MAX_MISSING_SHOWN]) + (", …" if len(missing) > MAX_MISSING_SHOWN else "")
            self._add_message(f"{plural(len(missing), 'file')} in the metadata not found: {shown}")

    def _is_skipped(self, parent: str, name: str) -> str | None:
        """Return the pattern of `--skip` that leaves out a file or a folder, and count it."""
        path = os.path.relpath(os.path.join(parent, name), self.folder).replace(os.sep, "/")
        pattern = next((p for p in self.skip if _matches(name, p) or _matches(path, p)), None)
        if pattern is not None:
            self.skipped[f"that match {pattern}"] += 1
        return pattern

    def _add_message(self, text: str) -> None:
        self.found.messages.append(f"{self.folder}: {text}")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(_normalized(name).casefold(), _normalized(pattern).casefold())


def _normalized(text: str) -> str:
    """Return text in the form in which most systems store names; macOS decomposes accented letters."""
    return unicodedata.normalize("NFC", text)


def _key(path: str) -> str:
    return _normalized(os.path.normpath(path))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].casefold()


def _is_source_code(path: str) -> bool:
    """Return whether a `.ts` or `.mts` file is TypeScript instead of a video."""
    if suffix_of(path) not in TYPESCRIPT_SUFFIXES or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            # Some cameras write a timestamp of four bytes first.
            return TRANSPORT_STREAM_START not in (file.read(1), file.read(4)[3:])
    except OSError:
        return False


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
