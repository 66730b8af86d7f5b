"""The manifest of an export: which files it wrote, so that the next export deletes them and no others.

A folder with a manifest may come from anywhere. Names in it are therefore checked like any other input.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from .file_hash import file_sha256

logger = logging.getLogger(__name__)

MANIFEST = ".optsg-export.json"
FORMAT = 2
# The names that an export gives to its files, apart from the card and the notices.
_NAME = re.compile(
    r"[^/\\\0]+-\d{5,}-of-\d{5,}\.parquet|data/(?!\.{1,2}/)[^/\\\0]+/(metadata\.parquet|\d{5,}/\d{5,}\.[a-z0-9]+)"
)
# Texts, which people edit. An edited one is kept under another name.
TEXTS = ("README.md", "NOTICE")


@dataclass(frozen=True)
class Manifest:
    """The files of an export.

    Args:
        files: For each name, the SHA-256 of the contents that the file may have. While files are replaced, these are
            two: before and after.
    """

    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of_files(cls, folder: Path, names: Iterable[str]) -> "Manifest":
        """Make the manifest of files in a folder."""
        return cls({name: (_sha256(folder / name),) for name in names})

    @classmethod
    def of_earlier_export(cls, folder: Path) -> "Manifest":
        """Read and check the manifest of a folder. A new or empty folder has none.

        Raises:
            ValueError: The folder has other files and no manifest, or the manifest is damaged, or a file in it is not
                from an export, was changed since, or is reached through a link.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder")
        if not os.path.lexists(folder / MANIFEST):
            if folder.is_dir() and (others := sorted(folder.iterdir())):
                raise ValueError(
                    f"{folder} contains files that are not from an export, such as {others[0].name}; give a new folder"
                )
            return cls()
        manifest = cls.read(folder)
        for name, hashes in manifest.files.items():
            path = folder / name
            if os.path.lexists(path) and name not in TEXTS and _sha256(path) not in hashes:
                raise ValueError(f"{path} was changed after it was exported; move it, or give a new folder")
        return manifest

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder, and check its names.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or has a name that an export does not give, or a file or folder is a link.
        """
        path = folder / MANIFEST
        advice = "its files are not replaced or published; give a new folder"
        if path.is_symlink():
            raise ValueError(f"{path} is a link; {advice}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); {advice}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a list of exported files of this version; {advice}")
        files = content.get("files")
        if not isinstance(files, dict) or not all(map(_is_list_of_text, files.values())):
            raise ValueError(f"{path} has no files with their SHA-256; {advice}")
        for name in files:
            if name not in TEXTS and not _NAME.fullmatch(name):
                raise ValueError(f"{path} names {name!r}, which is not a file of an export; {advice}")
            parts = Path(name).parts
            for length in range(1, len(parts) + 1):
                if (part := folder.joinpath(*parts[:length])).is_symlink():
                    raise ValueError(f"{part} is a link; {advice}")
        return cls({name: tuple(hashes) for name, hashes in files.items()})

    def __or__(self, other: "Manifest") -> "Manifest":
        names = self.files.keys() | other.files.keys()
        return Manifest({name: (*self.files.get(name, ()), *other.files.get(name, ())) for name in sorted(names)})

    def save(self, folder: Path) -> None:
        """Write the manifest to a folder."""
        content = {"format": FORMAT, "files": {name: list(hashes) for name, hashes in self.files.items()}}
        partial = folder / f"{MANIFEST}.partial"
        # A link of that name would lead the text elsewhere.
        partial.unlink(missing_ok=True)
        partial.write_text(json.dumps(content, indent=0, allow_nan=False), encoding="utf-8")
        os.replace(partial, folder / MANIFEST)

    def check_free(self, folder: Path, names: Iterable[str]) -> None:
        """Check that new files replace only files of this manifest, and are not written through links.

        Raises:
            ValueError: They are not.
        """
        for name in names:
            parents = [folder / parent for parent in Path(name).parents if parent.parts]
            taken = [path for path in parents if path.is_symlink() or (path.exists() and not path.is_dir())]
            if name not in self.files and name not in TEXTS and os.path.lexists(folder / name):
                taken.append(folder / name)
            if taken:
                raise ValueError(f"{taken[0]} is not from an export; move it, or give a new folder")

    def delete_files(self, folder: Path) -> None:
        """Delete the files of a checked manifest and the folders that are empty then. Edited texts are renamed."""
        for name in (*TEXTS, *(name for name in self.files if name not in TEXTS)):
            path = folder / name
            if name in TEXTS and os.path.lexists(path) and _sha256(path) not in self.files.get(name, ()):
                kept = backup_path(path)
                logger.warning("%s was edited after it was exported; it is kept as %s", path, kept.name)
                os.replace(path, kept)
            path.unlink(missing_ok=True)
        parents = {parent for name in self.files for parent in Path(name).parents if parent.parts}
        for parent in sorted(parents, key=lambda path: -len(path.parts)):
            if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
                (folder / parent).rmdir()


def backup_path(path: Path) -> Path:
    """Return a name that is free for the edited version of a file: `.bak`, or else `.bak.1` and so on."""
    suffixes = chain([".bak"], (f".bak.{number}" for number in count(1)))
    paths = (path.with_name(path.name + suffix) for suffix in suffixes)
    return next(path for path in paths if not os.path.lexists(path))


def exported_files(folder: str | os.PathLike) -> list[str]:
    """Return the names of the files of the export in a folder.

    Raises:
        FileNotFoundError: The folder holds no export.
        ValueError: The manifest is damaged, or names a file that is not from an export.
    """
    return list(Manifest.read(Path(folder)).files)


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file, `None` for anything else."""
    return file_sha256(path) if path.is_file() else None
