"""Where an image's sidecar is: beside it or in a tree like its own, under either of the two names in use."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..media_files import IMAGE_SUFFIXES, RAW_SUFFIXES, VIDEO_SUFFIXES, MediaFile
from .change import SidecarError
from .whole_files import check_writable

NAMES = ("full", "stem")


@dataclass(frozen=True)
class Place:
    """
    Args:
        path: the sidecar.
        begin_from: another file whose content the sidecar starts with, if it is not there yet.
        note: what is to be said of the choice.
    """

    path: str
    begin_from: str | None = None
    note: str | None = None


@dataclass
class SidecarPlaces:
    """
    Args:
        output: folder of a tree like the images'; beside the images if not given.
        names: "full" (`photo.jpg.xmp`: darktable, digiKam, Immich) or "stem" (`photo.xmp`: Lightroom).
    """

    output: str | None = None
    names: str = "full"
    _owners: dict[str, str] = field(default_factory=dict)
    _writable: set[str] = field(default_factory=set)
    _stems: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def of(self, file: MediaFile, suffix: str, names: str, either: bool = False) -> Place:
        """The place of an image's sidecar.

        Args:
            suffix: with its dot.
            names: as above.
            either: an existing sidecar under the other name is used, unless it may belong to another file.

        Raises:
            SidecarError: another image would have the same sidecar.
        """
        beside = place = self._choose(file.path, file.path, suffix, names, either)
        if self.output is not None:
            base = os.path.join(self.output, os.path.relpath(file.path, file.root or os.path.dirname(file.path)))
            place = self._choose(file.path, base, suffix, names, either)
            if not os.path.lexists(place.path) and os.path.lexists(beside.path):
                place = Place(place.path, begin_from=beside.path, note=place.note)
        name = os.path.basename(place.path)
        if os.path.splitext(name)[0] == Path(file.path).stem and (twins := self._twins(file.path, raw=False)):
            raise SidecarError(
                f"{file.path}: its sidecar {name} would be that of {twins[0]} too; rename one of the two"
            )
        image = os.path.realpath(file.path)
        owner = self._owners.setdefault(os.path.realpath(place.path), image)
        if owner != image:
            raise SidecarError(
                f"{file.path}: {place.path} is the sidecar of {owner} already; tag them into two folders"
            )
        return place

    def check_writable(self, place: Place):
        """
        Raises:
            SidecarError: there is no right to write this sidecar.
        """
        folder = os.path.dirname(os.path.realpath(place.path))
        if folder not in self._writable:
            check_writable(folder)
            self._writable.add(folder)

    def _choose(self, image: str, base: str, suffix: str, names: str, either: bool) -> Place:
        paths = {"full": base + suffix, "stem": os.path.splitext(base)[0] + suffix}
        wanted, other = paths[names], paths["stem" if names == "full" else "full"]
        if not either:
            return Place(wanted)
        for path in (wanted, wanted[: -len(suffix)] + suffix.upper()):
            if os.path.lexists(path):
                return Place(path)
        for path in (other, other[: -len(suffix)] + suffix.upper()):
            if os.path.lexists(path):
                if names == "full" and self._twins(image, raw=True):
                    return Place(wanted, note=f"{suffix} files without the image's own suffix are another file's too")
                return Place(path, note=f"existing {suffix} files under the other name are used")
        return Place(wanted)

    def _twins(self, path: str, raw: bool) -> list[str]:
        """Other images and videos (and raw files) in the folder that differ from `path` by their suffix only."""
        folder, name = os.path.split(path)
        if folder not in self._stems:
            stems = self._stems[folder] = {}
            for other in sorted(os.listdir(folder or ".")):
                stem, suffix = os.path.splitext(other)
                if suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES | RAW_SUFFIXES:
                    stems.setdefault(stem.casefold(), []).append(other)
        same = self._stems[folder].get(os.path.splitext(name)[0].casefold(), ())
        return [o for o in same if o != name and (raw or os.path.splitext(o)[1].lower() not in RAW_SUFFIXES)]
