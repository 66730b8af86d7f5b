"""The title or the caption that a person wrote into an image."""

from .sidecars.embedded import EmbeddedMetadata

# Cameras write these into every photograph.
NOT_TITLES = ("olympus digital camera", "konica minolta digital camera", "minolta digital camera", "sony dsc", "dcim")


def find_title(metadata: EmbeddedMetadata) -> str | None:
    """Return the title of an image in its XMP, IPTC or EXIF data, or else its caption; `None` without them.

    Args:
        metadata: The metadata of the image.
    """
    titles = (" ".join(text.split()) for text in metadata.texts)
    return next((title for title in titles if title and title.casefold() not in NOT_TITLES), None)
