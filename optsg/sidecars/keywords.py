"""Reads the user's keywords from images and their XMP sidecars."""

from collections.abc import Iterable

from ..media_files import MediaFile
from .embedded import read_embedded
from .files import read_file
from .locations import SidecarLocator
from .reconciliation import tag_key
from .writer import SidecarError
from .xmp_packet import NEW_PACKET, XmpPacket
from .xmp_sidecar import SUFFIX, read_user_keywords


def read_keywords(file: MediaFile, locator: SidecarLocator) -> list[str]:
    """Return the user's keywords for an image or a video.

    They are read from the XMP sidecar, and for an image also from the XMP, IPTC and EXIF data in the file. Tags that
    `optsg tag --write` added are left out, also where another program copied them into the image.

    Args:
        file: The image or video.
        locator: Finds the sidecar.

    Returns:
        The keywords in order of occurrence, without duplicates.

    Raises:
        SidecarError: A sidecar cannot be read.
    """
    keywords, ours = _read_sidecar(file, locator)
    if not file.is_video:
        keywords += [keyword for keyword in _read_image(file) if tag_key(keyword) not in ours]
    return unique_keywords(keywords)


def _read_sidecar(file: MediaFile, locator: SidecarLocator) -> tuple[list[str], set[str]]:
    """Return the keywords of a sidecar, and the keys of this program's own tags."""
    if (path := locator.find(file.path, SUFFIX)) is None:
        return [], set()
    try:
        return read_user_keywords(XmpPacket(read_file(path) or NEW_PACKET))
    except ValueError as error:
        raise SidecarError(f"{path} cannot be read: {error}") from error


def _read_image(file: MediaFile) -> list[str]:
    packet = read_embedded(file).packet
    try:
        return read_user_keywords(XmpPacket(packet))[0] if packet else []
    except ValueError:
        return []  # a list of keywords with a structure of its own


def unique_keywords(keywords: Iterable[str]) -> list[str]:
    """Return the keywords in order, without blanks and duplicates. The first spelling is kept."""
    spelling: dict[str, str] = {}
    for keyword in keywords:
        keyword = " ".join(keyword.split())
        if keyword:
            spelling.setdefault(tag_key(keyword), keyword)
    return list(spelling.values())
