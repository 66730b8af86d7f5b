"""Reads images from files, bytes and arrays, in bounded memory."""

import contextlib
import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from .image_formats import HEADER_BYTES, JXL_STARTS, jxl_size, missing_plugin

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"
# Ancillary chunks that change what is shown: transparency, and the orientation in EXIF or XMP data. The last is not
# compressed, so it cannot be too large.
PNG_SHOWN_CHUNKS = (b"tRNS", b"eXIf", b"iTXtXML:com.adobe.xmp\0\0")
# Pillow starts Ghostscript for EPS, and recognises the others without reading their pixels.
UNREAD_FORMATS = ("EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5")
# Limit of the memory for decoding an image. Larger images are rejected before they are decoded.
MAX_DECODED_BYTES = 800_000_000
# Images that need more are large.
LARGE_BYTES = 100_000_000
# Larger files are not repaired, because a repair holds the whole file in memory.
MAX_REPAIRED_BYTES = 100_000_000
# Limit of the time for decoding a JPEG, whose memory is bounded by reading it at reduced size.
MAX_JPEG_PIXELS = 500_000_000
BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# These decoders need several copies of the image.
DECODER_BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 12, "HEIF": 12, "JPEG2000": 20, "JXL": 12}
PIXELS_PER_STRIP = 1 << 20
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Large images and videos are decoded one at a time, whatever the number of threads.
large_file_lock = threading.Lock()


class _TooLargeError(ValueError):
    """An image exceeds a limit."""


def is_url(source: str) -> bool:
    """Return whether `source` is a URL and not a local path."""
    # One letter before the colon is a drive of Windows.
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:[^,]*,", source) is not None


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


def read_image(source: Any, name: str, min_side: int | None = None) -> Image.Image:
    """Read and decode an image.

    Memory is bounded: an image that needs too much of it is rejected before it is decoded. Like image viewers, this
    reads a JPEG without its end marker, and a PNG with damaged or very long texts.

    Args:
        source: A path, the bytes of a file, `{"bytes": …, "path": …}`, a PIL image, or a `uint8` array
            `[height, width, channels]`, `[channels, height, width]` or `[height, width]` with 1, 3 or 4 channels. If
            an array fits both layouts, the last axis is used as channels.
        name: Name of the image in error messages, if it has no path.
        min_side: Minimum length of the shorter side in pixels. A larger image is read at a fraction of its size, which
            is faster and needs less memory. Smaller images keep their size, as do all images by default.

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
            return _to_rgb(source, min_side)
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                return _read_file(file, min_side)
        if isinstance(source, bytes):
            return _read_file(io.BytesIO(source), min_side)
        return _to_rgb(_from_array(source), min_side)
    except UnidentifiedImageError as error:
        if plugin := missing_plugin(_header(source)):
            raise ValueError(f"{name} is {plugin}") from error
        raise ValueError(f"{name} is not an image that can be read") from error
    except Exception as error:  # Pillow's plugins raise every kind of exception on damaged files.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} is not an image that can be read: {reason}") from error


def _read_file(file: BinaryIO, min_side: int | None) -> Image.Image:
    """Decode a file; if that fails, decode the part of it that image viewers show."""
    try:
        return _decode(file, min_side)
    except _TooLargeError:
        raise
    except (OSError, SyntaxError, ValueError):
        file.seek(0)
        can_repair = file.read(len(PNG_START)).startswith((PNG_START, JPEG_START))
        if not can_repair or file.seek(0, os.SEEK_END) > MAX_REPAIRED_BYTES:
            raise
        file.seek(0)
        data = file.read()
        if data.startswith(PNG_START):
            return _decode(io.BytesIO(b"".join(_needed_png_chunks(data))), min_side)
        if data.startswith(JPEG_START):
            # Half of the end marker may be left.
            data = data.removesuffix(JPEG_END[:1])
            # If only the end marker is missing, the pixels do not depend on what follows the end of the file.
            padding = np.random.default_rng(0).integers(0, 255, 4096, dtype=np.uint8).tobytes()
            image, padded = (_decode(io.BytesIO(data + more + JPEG_END), min_side) for more in (b"", padding))
            if image == padded:
                return image
        raise


def _needed_png_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the parts of a PNG file without its texts and other chunks that do not change what is shown."""
    yield PNG_START
    start = len(PNG_START)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        is_shown = data.startswith(PNG_SHOWN_CHUNKS, start + 4) and _has_right_checksum(data[start:end])
        kind = data[start + 4 : start + 8]
        if not kind.isalpha():  # The rest is not PNG.
            return
        # The first letter of an ancillary chunk is in lower case.
        if is_shown or kind[:1].isupper():
            yield data[start:end]
        start = end


def _has_right_checksum(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _decode(file: BinaryIO, min_side: int | None) -> Image.Image:
    header = file.read(HEADER_BYTES)
    file.seek(0)
    if header.startswith(JXL_STARTS) and (size := jxl_size(header)):
        _check_memory(*size, DECODER_BYTES_PER_PIXEL["JXL"])
    if header.startswith(JPEG_START):
        # `Image.open` checks the size of the whole image, although a JPEG can be decoded at reduced size.
        image = JpegImagePlugin.JpegImageFile(file)
        whole_bytes = _progressive_bytes(image)
        if image.width * image.height > MAX_JPEG_PIXELS:
            raise _TooLargeError(
                f"it has {image.width:,} × {image.height:,} pixels, more than {MAX_JPEG_PIXELS:,}, the limit for JPEG "
                "images"
            )
        drafted = None if min_side is None else image.draft(None, (min_side, min_side))
        box = drafted and drafted[1]
    else:
        image = _open(file)
        box, whole_bytes = None, 0
    # A reduced image exists in RGB only in parts.
    grey = BYTES_PER_PIXEL.get(image.mode, 4) if _factor(image, min_side) > 1 else 4
    per_pixel = DECODER_BYTES_PER_PIXEL.get(image.format, grey)
    needed = _check_memory(*image.size, per_pixel, whole_bytes)
    with large_file_lock if needed > LARGE_BYTES else contextlib.nullcontext():
        return _to_rgb(image, min_side, box)


def _open(file: BinaryIO) -> Image.Image:
    """Open an image as `Image.open` does, but with no limit for its pixels: the limit is that of the memory."""
    Image.init()
    prefix = file.read(16)
    for name in Image.ID:
        opener, accepts = Image.OPEN[name]
        # The answer is a text if something is missing that the format needs.
        if name in UNREAD_FORMATS or (accepts and (not (answer := accepts(prefix)) or isinstance(answer, str))):
            continue
        file.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            return opener(file, "")
    raise UnidentifiedImageError("no format fits")


def _factor(image: Image.Image, min_side: int | None) -> int:
    return 1 if min_side is None else max(1, min(image.size) // min_side)


def _check_memory(width: int, height: int, bytes_per_pixel: int, more_bytes: int = 0) -> int:
    """Return the bytes that decoding needs."""
    needed = width * height * bytes_per_pixel + more_bytes
    if needed > MAX_DECODED_BYTES:
        raise _TooLargeError(
            f"it has {width:,} × {height:,} pixels and needs {needed / 1e6:,.0f} MB of memory, more than the limit of "
            f"{MAX_DECODED_BYTES / 1e6:,.0f} MB; save it at a smaller size"
        )
    return needed


def _progressive_bytes(image: JpegImagePlugin.JpegImageFile) -> int:
    """Return the memory for the coefficients of a progressive JPEG, which is needed at any reduced size."""
    if not image.info.get("progressive"):
        return 0
    samples = [horizontal * vertical for _, horizontal, vertical, _ in image.layer]
    return 2 * image.width * image.height * sum(samples) // max(samples)


def _header(source: str | os.PathLike | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:HEADER_BYTES]
    with open(source, "rb") as file:
        return file.read(HEADER_BYTES)


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


def _to_rgb(image: Image.Image, min_side: int | None, box: tuple[int, int, float, float] | None = None) -> Image.Image:
    """Return an image in RGB, upright and reduced; `box` is the part of it that is not padding."""
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} × {image.height}, no pixels")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; convert it to 8 bits")
    factor = _factor(image, min_side)
    # Pillow turns a TIFF upright when it loads the pixels, and removes the orientation.
    image.load()
    transposition = TRANSPOSITIONS.get(_orientation(image))
    width, height = image.size if box is None else box[2:]
    image = _flatten(image) if factor == 1 else _reduce(image, factor)
    box = (0, 0, width / factor, height / factor)
    if box[2:] != image.size:
        # The last column or row stands for fewer pixels than the others.
        image = image.resize(image.size, Image.Resampling.BILINEAR, box)
    # Only now, when the image is small.
    upright = image if transposition is None else image.transpose(transposition)
    # Otherwise, the orientation in the metadata would be applied again when the result is read.
    upright.info = {}
    return upright


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Damaged metadata: viewers show the image as it is stored.
        return None


def _reduce(image: Image.Image, factor: int) -> Image.Image:
    """Return an image at a fraction of its size, in RGB; only strips of it exist in RGB at its own size."""
    rows = factor * max(1, PIXELS_PER_STRIP // (factor * image.width))
    reduced = Image.new("RGB", tuple(-(-length // factor) for length in image.size))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        reduced.paste(_flatten(strip).reduce(factor), (0, top // factor))
    return reduced


def _flatten(image: Image.Image) -> Image.Image:
    """Return an image in RGB, with transparent pixels blended with white."""
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
