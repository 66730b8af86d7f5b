"""The interface of all writers of `optsg tag --write`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from ..media_files import MediaFile
from .embedded import EmbeddedMetadata

# Returns a text that changes whenever the tags of a file may change (see `Fingerprinter`).
Fingerprint = Callable[[MediaFile], str]


class SidecarError(Exception):
    """A sidecar cannot be read or must not be written; the message names it and the reason."""


@dataclass
class Change:
    """How a file of tags changed, or would change in a dry run.

    Args:
        path: Path of the file of tags.
        added: Tags that were added.
        removed: Tags that were removed.
        written: Whether the file's bytes change.
        remarks: Sentences about what was left out; the report counts equal ones.
    """

    path: str
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    written: bool = False
    remarks: list[str] = field(default_factory=list)


class TagWriter(ABC):
    """Writes the tags of images and videos in one format."""

    @abstractmethod
    def is_done(self, file: MediaFile) -> bool:
        """Return whether the file's tags are recorded for this model, these settings and this content.

        Raises:
            SidecarError: The sidecar cannot be read or must not be written.
        """

    def needs_metadata(self, file: MediaFile) -> bool:
        """Return whether the file of tags starts with the metadata inside an image or a video."""
        return False

    @abstractmethod
    def write(
        self, file: MediaFile, tags: list[dict], title: str | None = None, embedded: EmbeddedMetadata | None = None
    ) -> Change:
        """Write the tags of a file.

        Args:
            file: The image or video.
            tags: `{"tag": str, "score": float, "novel": bool}`, the most probable first.
            title: The title that the tags were generated with. Default: that of `file`.
            embedded: The metadata inside the file, if it was already read.

        Raises:
            SidecarError: The sidecar cannot be read or must not be written; it is unchanged.
        """

    def add_failure(self, path: str, title: str | None, reason: str) -> None:  # noqa: B027 (only tables need it)
        """Record that a file has no tags.

        Args:
            path: Path of the file.
            title: Its title, if it has one.
            reason: Why it has no tags.
        """

    def finish(self, files: list[str]) -> list[str]:
        """Write what can only be written after the last file, and return sentences to report.

        Args:
            files: Paths of all files of the run, in order.

        Raises:
            SidecarError: Something cannot be written.
        """
        return []
