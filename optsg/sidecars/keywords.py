"""Reads the user's keywords from images and their XMP sidecars."""

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..media_files import MediaFile
from .files import read_file
from .locations import SidecarLocator
from .reconciliation import tag_key
from .writer import SidecarError
from .xmp_packet import NEW_PACKET, XmpPacket
from .xmp_sidecar import SUFFIX, read_user_keywords

if TYPE_CHECKING:
    from PIL import Image

# IPTC-IIM 4.2: dataset 2:25 contains the keywords, dataset 1:90 the character set.
IPTC_KEYWORDS, IPTC_CHARACTER_SET, IPTC_UTF8 = (2, 25), (1, 90), b"\x1b%G"
# Keywords from Windows Explorer: UTF-16, separated by semicolons.
EXIF_KEYWORDS = 0x9C9E


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
        keywords += [keyword for keyword in _read_image(file.path) if tag_key(keyword) not in ours]
    return unique_keywords(keywords)


def _read_sidecar(file: MediaFile, locator: SidecarLocator) -> tuple[list[str], set[str]]:
    """Return the keywords of a sidecar, and the keys of this program's own tags."""
    if (path := locator.find(file.path, SUFFIX)) is None:
        return [], set()
    try:
        return read_user_keywords(XmpPacket(read_file(path) or NEW_PACKET))
    except ValueError as error:
        raise SidecarError(f"{path} cannot be read: {error}") from error


def _read_image(path: str) -> list[str]:
    from PIL import Image

    keywords = []
    try:
        with Image.open(path) as image:
            packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
            if packet:
                packet = packet.encode() if isinstance(packet, str) else packet
                # Invalid XMP in an image is ignored.
                with contextlib.suppress(ValueError):
                    keywords += read_user_keywords(XmpPacket(packet.rstrip(b"\0")))[0]
            keywords += _read_iptc(image)
            windows = image.getexif().get(EXIF_KEYWORDS)
            if isinstance(windows, bytes):
                keywords += windows.decode("utf-16-le", "ignore").partition("\0")[0].split(";")
    except Exception:  # Pillow's plugins raise errors of many types
        return keywords  # if a sidecar has keywords, the image is reported when its pixels are read
    return keywords


def _read_iptc(image: "Image.Image") -> list[str]:
    from PIL import IptcImagePlugin

    try:
        records = IptcImagePlugin.getiptcinfo(image) or {}
    except (ValueError, SyntaxError, OSError, KeyError, TypeError):
        return []
    values = records.get(IPTC_KEYWORDS, [])
    values = values if isinstance(values, list) else [values]
    encodings = ("utf-8",) if records.get(IPTC_CHARACTER_SET) == IPTC_UTF8 else ("utf-8", "latin-1")
    return [_decode(value, encodings) for value in values]


def _decode(value: bytes, encodings: Iterable[str]) -> str:
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode(encoding)
    return value.decode("utf-8", "replace")


def unique_keywords(keywords: Iterable[str]) -> list[str]:
    """Return the keywords in order, without blanks and duplicates. The first spelling is kept."""
    spelling: dict[str, str] = {}
    for keyword in keywords:
        keyword = " ".join(keyword.split())
        if keyword:
            spelling.setdefault(tag_key(keyword), keyword)
    return list(spelling.values())
