"""What the processor reads of a file: raw files by their preview, and animated images as videos."""

from typing import Any

from dataset_scripts.media_suffixes import RAW_SUFFIXES

from .media_files import MediaFile, suffix_of
from .raw_files import read_preview

ANIMATED_SUFFIXES = (".apng", ".avif", ".png", ".webp")


def is_seen_as_video(file: MediaFile) -> bool:
    """Return whether several frames of a file are read: of a video or an animated image."""
    from .without_torch.image_formats import is_animated

    return file.is_video or (suffix_of(file.path) in ANIMATED_SUFFIXES and is_animated(file.path))


def image_input(image: Any) -> Any:
    """Return an image as the processor reads it: the preview of a raw file, other images as they are.

    Args:
        image: The path of an image file, or anything else that the processor reads.

    Raises:
        ValueError: The raw file is damaged, or has no preview.
        ImportError: rawpy is not installed.
    """
    is_raw = isinstance(image, str) and suffix_of(image) in RAW_SUFFIXES
    return {"bytes": read_preview(image), "path": image} if is_raw else image
