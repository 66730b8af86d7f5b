"""The title or the caption that a person wrote into an image."""

from .media_files import MediaFile
from .sidecars.embedded import DC, read_embedded
from .sidecars.xmp_packet import XmpPacket

# Cameras write these into every photograph.
NOT_TITLES = ("olympus digital camera", "konica minolta digital camera", "minolta digital camera", "sony dsc", "dcim")


def read_title(file: MediaFile) -> str | None:
    """Return the title of an image in its XMP, IPTC or EXIF data, or else its caption; `None` without them.

    Args:
        file: The image. Damaged metadata is ignored.
    """
    packet = read_embedded(file).packet
    if packet is None:
        return None
    texts = (text for name in ("title", "description") for text in XmpPacket(packet).read_list(DC, name) or [])
    titles = (" ".join(text.split()) for text in texts)
    return next((title for title in titles if title and title.casefold() not in NOT_TITLES), None)
