"""Reads the photograph that a camera stores in a raw file for viewers."""

import importlib.util
import io

INSTALL = 'to read raw files: pip install "optsg[raw]"'


def can_read_raw() -> bool:
    """Return whether the library for raw files is installed."""
    return importlib.util.find_spec("rawpy") is not None


def read_preview(path: str) -> bytes:
    """Return the preview in a raw file as the bytes of an image file, with the orientation in its EXIF data.

    Raises:
        ValueError: The file is damaged, or has no preview.
        ImportError: rawpy is not installed.
    """
    try:
        import rawpy
    except ImportError as error:
        raise ImportError(f"{path} is a raw file; {INSTALL}") from error
    from PIL import Image

    try:
        # LibRaw must not see a name that it interprets.
        with open(path, "rb") as file, rawpy.imread(file) as raw:
            preview = raw.extract_thumb()
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError) as error:
        raise ValueError(f"{path} has no preview that can be read; export a JPEG") from error
    except rawpy.LibRawError as error:
        raise ValueError(f"{path} is not a raw file that can be read: {error}") from error
    if preview.format == rawpy.ThumbFormat.JPEG:
        return preview.data
    # LibRaw has turned these upright.
    buffer = io.BytesIO()
    Image.fromarray(preview.data).save(buffer, "BMP")
    return buffer.getvalue()
