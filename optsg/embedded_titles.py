"""Reads the title or the caption that a person wrote into an image."""

from .sidecars.xmp_packet import XmpPacket

DUBLIN_CORE = "http://purl.org/dc/elements/1.1/"
# IPTC-IIM 4.2: object name, and caption.
IPTC_FIELDS = {"title": (2, 5), "description": (2, 120)}
# Cameras write these into every photograph.
NOT_TITLES = ("olympus digital camera", "konica minolta digital camera", "minolta digital camera", "sony dsc", "dcim")


def read_title(path: str) -> str | None:
    """Return the title of an image in its XMP or IPTC data, or else its caption; `None` without them.

    Args:
        path: Path of the image. Damaged metadata is ignored, and so is a file that is not an image.
    """
    from PIL import Image, IptcImagePlugin

    packet, records = None, {}
    try:
        with Image.open(path) as image:
            xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
            if xmp:
                packet = XmpPacket((xmp.encode() if isinstance(xmp, str) else xmp).rstrip(b"\0"))
            records = IptcImagePlugin.getiptcinfo(image) or {}
    except Exception:  # Pillow's plugins raise errors of many types; the file is reported when its pixels are read.
        pass
    for name, record in IPTC_FIELDS.items():
        texts = (packet.read_list(DUBLIN_CORE, name) if packet else None) or []
        values = records.get(record, [])
        texts += [_decode(value) for value in (values if isinstance(values, list) else [values])]
        for text in texts:
            text = " ".join(text.split())
            if text and text.casefold() not in NOT_TITLES:
                return text
    return None


def _decode(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")
