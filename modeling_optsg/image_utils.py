"""Pictures from files, bytes and arrays, as upright RGB on white."""

import io
import os
import re
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def is_url(source: str) -> bool:
    """Whether `source` names something to download rather than a file on disk."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", source) is not None


def unwrap_file(source, name: str):
    """Unwraps what `datasets` gives for an undecoded file, and names a file by its path where it has one."""
    if isinstance(source, Mapping):
        path, source = source.get("path"), source.get("bytes") or source.get("path")
        if source is None:
            raise ValueError(f"{name} has neither 'bytes' nor 'path'")
        return source, path or name
    return source, os.fspath(source) if isinstance(source, (str, os.PathLike)) else name


def read_picture(source, name: str) -> Image.Image:
    """Reads a picture, decoding all of it.

    Args:
        source: a path, the bytes of a file, `{"bytes": …, "path": …}`, a PIL picture, or a `uint8` array
            `[height, width, channels]`, `[channels, height, width]` or `[height, width]` with 1, 3 or 4 channels (the
            last axis is the channels where both could be).
        name: what to call the picture in errors, if it has no path.

    Returns:
        The picture in RGB, turned upright as its EXIF data says, on white where it is transparent.

    Raises:
        ValueError: naming the picture, if it cannot be read: missing, damaged, too large, not a picture, or a remote
            address.
    """
    source, name = unwrap_file(source, name)
    if isinstance(source, str) and is_url(source):
        raise ValueError(f"{name} is a remote address; nothing is downloaded here, give a file or its bytes")
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
        raise ValueError(f"{name} is not a picture that can be read (clips go in videos)") from error
    except Exception as error:  # Pillow's plugins raise every kind of exception on damaged files.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} is not a picture that can be read: {reason}") from error


def _from_array(array) -> Image.Image:
    if not hasattr(array, "__array__"):
        raise ValueError(f"expected a path, bytes, a PIL picture or an array, got {type(array).__name__}")
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
        raise ValueError(f"the array has shape {shape}, no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"its size is {picture.width} × {picture.height}, no pixels")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; convert it to 8 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # Pillow would clip instead of scale.
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels range from {values.min()} to {values.max()}, beyond 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
