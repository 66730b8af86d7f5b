"""Reads images from files, bytes and arrays."""

import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    from pillow_heif import register_heif_opener
except ImportError:
    _CAN_READ_HEIC = False
else:
    register_heif_opener()
    _CAN_READ_HEIC = True

# Brands of HEIC files, the photographs of many phones, after the length of the first box and "ftyp".
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_url(source: str) -> bool:
    """Return whether `source` is a URL and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", source) is not None


def unwrap_file(source: Any, name: str) -> tuple[Any, str]:
    """Unwrap an undecoded file of `datasets`.

    Args:
        source: `{"bytes": …, "path": …}`, or anything else, which is returned unchanged.
        name: Name of the file in error messages, if it has no path.

    Returns:
        The bytes or the path of the file, and its name.

    Raises:
        ValueError: There are neither bytes nor a path.
    """
    if isinstance(source, Mapping):
        path, source = source.get("path"), source.get("bytes") or source.get("path")
        if source is None:
            raise ValueError(f"{name} has neither 'bytes' nor 'path'")
        return source, path or name
    return source, os.fspath(source) if isinstance(source, (str, os.PathLike)) else name


def read_image(source: Any, name: str) -> Image.Image:
    """Read and decode an image.

    Args:
        source: A path, the bytes of a file, `{"bytes": …, "path": …}`, a PIL image, or a `uint8` array
            `[height, width, channels]`, `[channels, height, width]` or `[height, width]` with 1, 3 or 4 channels. If
            an array fits both layouts, the last axis is used as channels.
        name: Name of the image in error messages, if it has no path.

    Returns:
        The image in RGB, turned upright according to its EXIF data, with transparent pixels blended with white.

    Raises:
        ValueError: The image is missing, damaged, too large, a URL, or not an image.
    """
    source, name = unwrap_file(source, name)
    if isinstance(source, str) and is_url(source):
        raise ValueError(f"{name} is a remote address, which is not downloaded; give a file or its bytes")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                return _to_rgb(Image.open(file))
        if isinstance(source, bytes):
            return _to_rgb(Image.open(io.BytesIO(source)))
        return _to_rgb(_from_array(source))
    except UnidentifiedImageError as error:
        if not _CAN_READ_HEIC and _is_heic(source):
            raise ValueError(f'{name} is a HEIC image; to read it: pip install "optsg[heic]"') from error
        raise ValueError(f"{name} is not an image that can be read") from error
    except Exception as error:  # Pillow's plugins raise every kind of exception on damaged files.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} is not an image that can be read: {reason}") from error


def _is_heic(source: str | os.PathLike | bytes) -> bool:
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read(12)
    return source[4:8] == b"ftyp" and source[8:12] in HEIC_BRANDS


def _from_array(array: Any) -> Image.Image:
    if not hasattr(array, "__array__"):
        raise ValueError(f"expected a path, bytes, a PIL image or an array, got {type(array).__name__}")
    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise ValueError(f"the array holds {array.dtype}, expected uint8 with values from 0 to 255")
    shape = list(array.shape)
    if array.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)):
        raise ValueError(f"the array has shape {shape}, expected [height, width] and 1, 3 or 4 channels")
    if 0 in array.shape:
        raise ValueError(f"the array has shape {shape} and no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} × {image.height}, no pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; convert it to 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow saturates values above 255 instead of scaling them.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels range from {values.min()} to {values.max()}, beyond 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
