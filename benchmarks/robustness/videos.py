"""Damaged, odd and hostile videos."""

import functools
import io
import random
import struct
from collections.abc import Callable

import av
import numpy as np

from .byte_damage import BYTE_DAMAGES
from .images import File, draw, encode, gif_bomb

# Suffix, container, codec and pixel format of the valid videos that are damaged.
ENCODINGS = (
    ("mp4", "mp4", "libx264", "yuv420p"),
    ("mp4", "mp4", "mpeg4", "yuv420p"),
    ("mov", "mov", "qtrle", "rgb24"),
    ("mkv", "matroska", "libx264", "yuv420p"),
    ("webm", "webm", "libvpx", "yuv420p"),
    ("avi", "avi", "mpeg4", "yuv420p"),
    ("avi", "avi", "mjpeg", "yuvj420p"),
    ("mpg", "mpeg", "mpeg1video", "yuv420p"),
    ("mpg", "mpegts", "mpeg2video", "yuv420p"),
    ("flv", "flv", "flv", "yuv420p"),
    ("wmv", "asf", "wmv2", "yuv420p"),
    ("3gp", "3gp", "h263", "yuv420p"),
)
# The only sizes that H.263 knows are these and larger ones.
WIDTH, HEIGHT = 176, 144
# Without random identifiers and times.
REPEATABLE = {"fflags": "+bitexact"}
PALETTE = "colours from a palette"


@functools.cache
def video(container: str, codec: str, pixel_format: str, num_frames: int = 8) -> bytes:
    """Encode a short video."""
    buffer, rng = io.BytesIO(), random.Random(0)
    with av.open(buffer, "w", format=container, options=REPEATABLE) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        for _ in range(num_frames):
            output.mux(stream.encode(av.VideoFrame.from_image(draw(rng, WIDTH, HEIGHT))))
        output.mux(stream.encode())
    return buffer.getvalue()


def damaged_bytes(rng: random.Random) -> File:
    """Damage a valid video of any container."""
    suffix, *encoding = rng.choice(ENCODINGS)
    return f".{suffix}", rng.choice(list(BYTE_DAMAGES.values()))(video(*encoding), rng)


def wrong_suffix(rng: random.Random) -> File:
    """Give a valid video the suffix of another container."""
    return "." + rng.choice(("mp4", "avi", "mkv", "webm")), video(*rng.choice(ENCODINGS)[1:])


def other_content(rng: random.Random) -> File:
    """Give playlists, text and images the suffix of a video."""
    contents = [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n",
        b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml version='1.0'?><MPD></MPD>",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        b"1\n00:00:00,000 --> 00:00:09,000\nsubtitle\n",
        b"plain text\n" * 200,
        bytes(4096),
        encode(draw(rng), "PNG"),
        encode(draw(rng), "JPEG"),
        gif_bomb(rng.choice((16000, 65535)), rng.choice((1, 60))),
        b"RIFF\xff\xff\xff\xffAVI LIST",
        b"\x1aE\xdf\xa3" + rng.randbytes(60),
        b"FLV\x01\x05\0\0\0\x09" + rng.randbytes(60),
    ]
    return "." + rng.choice(("mp4", "avi", "mkv", "mov", "mpg", "gif")), rng.choice(contents)


def mp4_boxes(rng: random.Random) -> File:
    """Give boxes of an MP4 wrong sizes, or remove, repeat and move them."""
    data = bytearray(video("mp4", "libx264", "yuv420p"))
    name = rng.choice((b"moov", b"trak", b"mdia", b"stbl", b"stsd", b"stts", b"stsz", b"stco", b"mdat", b"avcC"))
    start = data.index(name) - 4
    size = struct.unpack_from(">I", data, start)[0]
    kind = rng.randrange(5)
    if kind == 0:
        data[start : start + 4] = struct.pack(">I", rng.choice((0, 1, 4, size // 2, 2 * size, 2**31, 2**32 - 1)))
    elif kind == 1:
        data[start : start + size] = b""
    elif kind == 2:
        data[start:start] = data[start : start + size] * rng.randint(1, 50)
    elif kind == 3:
        data[start + 4 : start + 8] = rng.choice((b"free", b"skip", b"uuid", b"moov"))
    else:
        # Counts of tables follow the version of the box.
        data[start + 12 : start + 16] = struct.pack(">I", rng.choice((0, 2**16, 2**31 - 1, 2**32 - 1)))
    return ".mp4", bytes(data)


def huge_size(rng: random.Random) -> File:
    """Announce huge frames."""
    side = rng.choice((8192, 16000, 32000, 65535))
    if rng.random() < 0.5:
        data = bytearray(video("avi", *rng.choice((("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p")))))
        start = data.index(b"strf") + 12
        data[start : start + 8] = struct.pack("<ii", side, side)
        # The main header has the size, too.
        start = data.index(b"avih") + 40
        data[start : start + 8] = struct.pack("<II", side, side)
        return ".avi", bytes(data)
    data = bytearray(video("mov", "qtrle", "rgb24"))
    start = data.index(b"rle ") + 28
    data[start : start + 4] = struct.pack(">HH", side, side)
    return ".mov", bytes(data)


def long_duration(rng: random.Random) -> File:
    """Encode many frames of one colour, or announce a frame rate far from the usual."""
    if rng.random() < 0.5:
        return ".mp4", video("mp4", "libx264", "yuv420p", rng.choice((1, 2, 600)))
    data = bytearray(video("mp4", "libx264", "yuv420p"))
    start = data.index(b"stts") + 8
    data[start : start + 12] = struct.pack(">III", 1, 8, rng.choice((0, 1, 2**31 - 1, 2**32 - 1)))
    return ".mp4", bytes(data)


def palette_levels(rng: random.Random) -> tuple[str, list[int]]:
    """Choose the suffix and the grey levels of the frames of [`palette`]."""
    return rng.choice((".avi", ".mov")), sorted(rng.sample(range(8, 248), 8))


def palette(rng: random.Random) -> File:
    """Encode frames of one grey level each, with 8-bit colours from a palette."""
    suffix, levels = palette_levels(rng)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix[1:], options=REPEATABLE) as output:
        stream = output.add_stream("rawvideo" if suffix == ".avi" else "smc", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "pal8"
        for level in levels:
            frame = av.VideoFrame(64, 64, "pal8")
            palette = np.zeros((256, 4), np.uint8)
            palette[:, :3], palette[:, 3] = np.arange(256)[:, None], 255
            frame.planes[0].update(np.full((64, frame.planes[0].line_size), level, np.uint8).tobytes())
            frame.planes[1].update(palette.tobytes())
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return suffix, buffer.getvalue()


DAMAGES: dict[str, Callable[[random.Random], File]] = {
    "damaged bytes": damaged_bytes,
    "wrong suffix": wrong_suffix,
    "other content": other_content,
    "damaged boxes": mp4_boxes,
    "huge frames": huge_size,
    "long or odd duration": long_duration,
    PALETTE: palette,
}
READABLE = {"wrong suffix", PALETTE}
WEIGHTS = {"damaged bytes": 6, "damaged boxes": 3}
