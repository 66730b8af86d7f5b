"""Chooses the path of a file's sidecar: next to the file or in a tree like its own, under either of two names."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataset_scripts.media_suffixes import RAW_SUFFIXES

from ..media_files import MEDIA_SUFFIXES, MediaFile, suffix_of
from .files import check_writable
from .writer import SidecarError

NAMINGS = ("full", "stem")


@dataclass(frozen=True)
class SidecarLocation:
    """The path of a sidecar.

    Args:
        path: Path of the sidecar, which may not exist yet.
        template: Another sidecar of the same file; a sidecar that does not exist starts with its content.
        remark: A sentence about the choice of the path, for the report.
    """

    path: str
    template: str | None = None
    remark: str | None = None


@dataclass
class SidecarLocator:
    """Chooses the paths of sidecars and refuses to give two files the same one.

    Args:
        output: Folder of a tree like that of the images; sidecars are next to the images if omitted.
        naming: "full" (`photo.jpg.xmp`: darktable, digiKam, Immich) or "stem" (`photo.xmp`: Lightroom).
    """

    output: str | None = None
    naming: str = "full"
    _owners: dict[str, str] = field(default_factory=dict)
    _writable: set[str] = field(default_factory=set)
    _names_by_stem: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def locate(
        self, file: MediaFile, suffix: str, naming: str, either: bool = False, replaces_links: bool = False
    ) -> SidecarLocation:
        """Return the location of a file's sidecar.

        Args:
            file: The image or video.
            suffix: Suffix of the sidecar, with its dot.
            naming: "full" or "stem".
            either: Use an existing sidecar under the other name, unless it may belong to another file.
            replaces_links: The caller does not read or change what a link leads to.

        Raises:
            SidecarError: Another file would have the same sidecar, the sidecar is a link out of the folder, or the
                folder cannot be listed.
        """
        remark = None
        if naming == "stem" and self._twins(file.path, include_raw=False):
            # Such as the photograph and the video of a Live Photo.
            naming, either = "full", False
            remark = f"used the full names for {suffix} files of images and videos that share a stem"
        location = neighbour = self._choose(file.path, file.path, suffix, naming, either)
        if self.output is not None:
            base = os.path.join(self.output, os.path.relpath(file.path, file.root or os.path.dirname(file.path)))
            location = self._choose(file.path, base, suffix, naming, either)
            if not os.path.lexists(location.path) and os.path.lexists(neighbour.path):
                location = SidecarLocation(location.path, template=neighbour.path, remark=location.remark)
        self._check_unshared(file, location)
        for path in () if replaces_links else (location.path, location.template):
            if path is not None and os.path.islink(path) and not self.is_inside(file, path):
                raise SidecarError(f"{path} is a link out of the folder; replace it by a copy")
        return replace(location, remark=location.remark or remark)

    def find(self, path: str, suffix: str) -> str | None:
        """Return the sidecar of a file to read from, under either name, or `None` if there is none.

        A sidecar named after the stem of several images or videos belongs to none of them. A raw file and its JPEG
        share one.
        """
        names = {"full": path + suffix, "stem": os.path.splitext(path)[0] + suffix}
        if self._twins(path, include_raw=False):
            del names["stem"]
        found = {naming: existing for naming, name in names.items() if (existing := _existing(name, suffix))}
        return found.get(self.naming) or next(iter(found.values()), None)

    def is_inside(self, file: MediaFile, path: str) -> bool:
        """Whether a path, or what a link leads to, is inside the folder of the run or inside `output`."""
        roots = (file.root or os.path.dirname(file.path) or ".", self.output)
        return any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) for root in roots if root)

    def check_writable(self, location: SidecarLocation) -> None:
        """Check that a sidecar may be written.

        Raises:
            SidecarError: The permissions do not allow it.
        """
        folder = os.path.dirname(os.path.realpath(location.path))
        if folder not in self._writable:
            check_writable(folder)
            self._writable.add(folder)

    def _choose(self, file: str, base: str, suffix: str, naming: str, either: bool) -> SidecarLocation:
        paths = {"full": base + suffix, "stem": os.path.splitext(base)[0] + suffix}
        wanted, other = paths[naming], paths["stem" if naming == "full" else "full"]
        if not either:
            return SidecarLocation(wanted)
        if path := _existing(wanted, suffix):
            return SidecarLocation(path)
        if path := _existing(other, suffix):
            if naming == "full" and self._twins(file, include_raw=True):
                return SidecarLocation(wanted, remark=f"did not use {suffix} files that may belong to another file")
            return SidecarLocation(path, remark=f"used existing {suffix} files that follow the other --sidecar-names")
        return SidecarLocation(wanted)

    def _check_unshared(self, file: MediaFile, location: SidecarLocation) -> None:
        name = os.path.basename(location.path)
        if os.path.splitext(name)[0] == Path(file.path).stem and (twins := self._twins(file.path, include_raw=False)):
            raise SidecarError(f"{file.path}: {name} would also be the sidecar of {twins[0]}; rename one of the two")
        path = os.path.realpath(file.path)
        owner = self._owners.setdefault(os.path.realpath(location.path), path)
        if owner != path:
            raise SidecarError(
                f"{file.path}: {location.path} is already the sidecar of {owner}; use two --output folders"
            )

    def _twins(self, path: str, include_raw: bool) -> list[str]:
        """Names of other images and videos in the same folder that differ from `path` only in their suffix."""
        folder, name = os.path.split(path)
        if folder not in self._names_by_stem:
            try:
                names = sorted(os.listdir(folder or "."))
            except OSError as error:
                # Another file may have the same sidecar.
                raise SidecarError(f"{path}: {folder or '.'} cannot be listed: {error.strerror}") from error
            stems = self._names_by_stem[folder] = {}
            for other in names:
                if suffix_of(other) in MEDIA_SUFFIXES | RAW_SUFFIXES:
                    stems.setdefault(os.path.splitext(other)[0].casefold(), []).append(other)
        same = self._names_by_stem[folder].get(os.path.splitext(name)[0].casefold(), ())
        return [other for other in same if other != name and (include_raw or suffix_of(other) not in RAW_SUFFIXES)]


def _existing(path: str, suffix: str) -> str | None:
    """The path if it exists, with its suffix in lower or upper case."""
    candidates = (path, path[: -len(suffix)] + suffix.upper())
    return next((candidate for candidate in candidates if os.path.lexists(candidate)), None)
