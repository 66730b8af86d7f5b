"""Reads the metadata of PNG and JPEG XL files without their pixels, which may need much memory."""

import io
import struct
import zlib
from typing import BinaryIO

PNG_START, JXL_START = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x0cJXL "
PNG_TEXTS = (b"iTXt", b"tEXt", b"zTXt")
# The texts with XMP and EXIF data, as Pillow finds them.
PNG_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
JXL_METADATA = (b"xml ", b"Exif", b"brob")
MAX_METADATA_BYTES = 64_000_000


def png_without_pixels(file: BinaryIO) -> io.BytesIO:
    """Return a PNG of one pixel with the XMP and the EXIF data of another, which may come after its pixels.

    Args:
        file: The PNG, at its start.

    Raises:
        ValueError: There is too much metadata.
    """
    chunks, size = [], 0
    file.seek(len(PNG_START))
    while len(header := file.read(8)) == 8 and header[4:] != b"IEND":
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        start = file.read(min(length, max(map(len, PNG_KEYWORDS)))) if kind in PNG_TEXTS else b""
        remaining = length - len(start) + 4  # with the checksum
        if kind == b"eXIf" or start.startswith(PNG_KEYWORDS):
            size += length
            _check_size(size)
            chunks.append(header + start + file.read(remaining))
        else:
            file.seek(remaining, io.SEEK_CUR)
    pixel = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    end = _png_chunk(b"IDAT", zlib.compress(bytes(2))) + _png_chunk(b"IEND", b"")
    return io.BytesIO(PNG_START + pixel + b"".join(chunks) + end)


def read_jxl_boxes(file: BinaryIO) -> dict[bytes, bytes]:
    """Return the metadata boxes of a JPEG XL file by type: "xml ", "Exif" and "brob" (compressed).

    Args:
        file: The image, at its start. Without a container, it has no boxes.

    Raises:
        ValueError: There is too much metadata, or a box is damaged.
    """
    boxes: dict[bytes, bytes] = {}
    if file.read(len(JXL_START)) != JXL_START:
        return boxes
    file.seek(0)
    while len(header := file.read(8)) == 8:
        start, length, kind = 8, int.from_bytes(header[:4], "big"), header[4:]
        if length == 1:
            start, length = 16, int.from_bytes(file.read(8), "big")
        if 0 < length < start:
            raise ValueError(f"a box has the length {length}")
        # A box of length 0 extends to the end of the file.
        remaining = length - start if length else MAX_METADATA_BYTES + 1
        if kind in JXL_METADATA:
            _check_size(remaining if length else 0)
            boxes[kind] = file.read(remaining)
            _check_size(len(boxes[kind]))
        elif length:
            file.seek(remaining, io.SEEK_CUR)
        if length == 0:
            break
    return boxes


def _check_size(size: int) -> None:
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"the metadata has more than {MAX_METADATA_BYTES // 10**6} MB")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
