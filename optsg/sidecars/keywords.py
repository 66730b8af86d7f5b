"""Reads the user's keywords from images and their XMP sidecars."""

from collections.abc import Iterable

from ..media_files import MediaFile
from .embedded import EmbeddedMetadata
from .files import read_file
from .locations import SidecarLocator
from .reconciliation import tag_key
from .writer import SidecarError
from .xmp_packet import NEW_PACKET, XmpPacket
from .xmp_sidecar import SUFFIX, read_user_keywords


def read_keywords(
    file: MediaFile, locator: SidecarLocator, embedded: EmbeddedMetadata
) -> tuple[list[str], str | None]:
    """Return the user's keywords for an image or a video, from its XMP sidecar and from the file itself.

    Tags that `optsg tag --write` added are left out, also where another program copied them into the file.

    Args:
        file: The image or video.
        locator: Finds the sidecar.
        embedded: The metadata in the file.

    Returns:
        The keywords in order of occurrence, without duplicates, and why those in the file cannot be read; `None` if
        they can.

    Raises:
        SidecarError: The sidecar cannot be read.
    """
    keywords, ours = _read_sidecar(file, locator)
    own, problem = _read_embedded(embedded)
    return unique_keywords([*keywords, *(keyword for keyword in own if tag_key(keyword) not in ours)]), problem


def _read_sidecar(file: MediaFile, locator: SidecarLocator) -> tuple[list[str], set[str]]:
    """Return the keywords of a sidecar, and the keys of this program's own tags."""
    if (path := locator.find(file.path, SUFFIX)) is None:
        return [], set()
    try:
        return read_user_keywords(XmpPacket(read_file(path) or NEW_PACKET))
    except ValueError as error:
        raise SidecarError(f"{path} cannot be read: {error}") from error


def _read_embedded(embedded: EmbeddedMetadata) -> tuple[list[str], str | None]:
    problem = embedded.error
    try:
        if problem is None:
            return (read_user_keywords(XmpPacket(embedded.packet))[0] if embedded.packet else []), None
    except ValueError as error:  # a list of keywords with a structure of its own
        problem = str(error)
    return [], f"the keywords inside the file cannot be read: {problem}"


def unique_keywords(keywords: Iterable[str]) -> list[str]:
    """Return the keywords in order, without blanks and duplicates. The first spelling is kept."""
    spelling: dict[str, str] = {}
    for keyword in keywords:
        keyword = " ".join(keyword.split())
        if keyword:
            spelling.setdefault(tag_key(keyword), keyword)
    return list(spelling.values())
