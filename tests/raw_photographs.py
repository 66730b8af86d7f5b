"""Makes raw files as cameras write them."""

import io
import struct

import numpy as np


def ifd(entries, start):
    """Returns a directory of a TIFF file that is placed at `start`."""
    body, values = b"", b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            position = start + 2 + 12 * len(entries) + 4 + len(values)
            values += value
            value = struct.pack("<I", position)
        body += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return struct.pack("<H", len(entries)) + body + bytes(4) + values


def shorts(*values):
    return struct.pack(f"<{len(values)}H", *values)


def longs(*values):
    return struct.pack(f"<{len(values)}I", *values)


def raw_file(preview, orientation):
    """Returns a DNG file of grey sensor values with a JPEG preview."""
    buffer = io.BytesIO()
    preview.save(buffer, "JPEG", quality=95)
    jpeg, width, height = buffer.getvalue(), 64, 48
    sensor = np.full((height, width), 2000, dtype="<u2").tobytes()
    sensor_start, jpeg_start, second = 8192, 8192 + len(sensor), 2048
    one = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    first = [
        (254, 4, 1, longs(1)),
        (256, 4, 1, longs(preview.width)),
        (257, 4, 1, longs(preview.height)),
        (258, 3, 3, shorts(8, 8, 8) + bytes(2)),
        (259, 3, 1, shorts(7)),
        (262, 3, 1, shorts(6)),
        (271, 2, 4, b"Cam\0"),
        (272, 2, 4, b"Cam\0"),
        (273, 4, 1, longs(jpeg_start)),
        (274, 3, 1, shorts(orientation)),
        (277, 3, 1, shorts(3)),
        (278, 4, 1, longs(preview.height)),
        (279, 4, 1, longs(len(jpeg))),
        (330, 4, 1, longs(second)),
        (50706, 1, 4, bytes([1, 4, 0, 0])),
        (50708, 2, 4, b"Cam\0"),
        (50721, 10, 9, b"".join(longs(value, 1) for value in one)),
        (50728, 5, 3, longs(1, 1, 1, 1, 1, 1)),
        (50778, 3, 1, shorts(21)),
    ]
    sub = [
        (254, 4, 1, longs(0)),
        (256, 4, 1, longs(width)),
        (257, 4, 1, longs(height)),
        (258, 3, 1, shorts(16)),
        (259, 3, 1, shorts(1)),
        (262, 3, 1, shorts(32803)),
        (273, 4, 1, longs(sensor_start)),
        (277, 3, 1, shorts(1)),
        (278, 4, 1, longs(height)),
        (279, 4, 1, longs(len(sensor))),
        (33421, 3, 2, shorts(2, 2)),
        (33422, 1, 4, bytes([0, 1, 1, 2])),
    ]
    header = (b"II*\0" + longs(8) + ifd(first, 8)).ljust(second, b"\0")
    return (header + ifd(sub, second)).ljust(sensor_start, b"\0") + sensor + jpeg
