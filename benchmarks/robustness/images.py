"""Damaged, odd and hostile images."""

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

from .byte_damage import BYTE_DAMAGES

# Suffix and Pillow's format of the valid images that are damaged.
FORMATS = {
    "jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM",
    "tga": "TGA", "ico": "ICO", "jp2": "JPEG2000", "avif": "AVIF",
}  # fmt: skip
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# (suffix, content)
File = tuple[str, bytes]


def draw(rng: random.Random, width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    """Draw a smooth image with some noise."""
    generator = np.random.default_rng(rng.getrandbits(32))
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width))[..., None]
    pixels = ramp + generator.integers(0, 16, (height, width, 3)) * generator.random(3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif_block(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """Build an EXIF block.

    Args:
        entries: (tag, type, count, four bytes of value or offset).
        order: Byte order as in `struct`.
    """
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, count) + value
    return b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + body + bytes(4)


def add_exif(jpeg: bytes, block: bytes) -> bytes:
    """Insert an EXIF block after the first marker of a JPEG."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def png_chunk(kind: bytes, data: bytes, valid: bool = True) -> bytes:
    """Build a chunk of a PNG, with a valid checksum or a wrong one."""
    checksum = zlib.crc32(kind + data) ^ (0 if valid else 1)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def insert_png_chunk(png: bytes, chunk: bytes) -> bytes:
    """Insert a chunk after the header of a PNG."""
    return png[:33] + chunk + png[33:]


def damaged_bytes(rng: random.Random) -> File:
    """Damage a valid image of any format."""
    suffix = rng.choice(list(FORMATS))
    damage = rng.choice(list(BYTE_DAMAGES.values()))
    return f".{suffix}", damage(encode(draw(rng), FORMATS[suffix]), rng)


def wrong_suffix(rng: random.Random) -> File:
    """Give a valid image the suffix of another format."""
    names = [name for name in FORMATS.values() if name != "TGA"]  # TGA has no signature.
    return rng.choice([".jpg", ".png", ".webp", ".tif", ".bmp"]), encode(draw(rng), rng.choice(names))


def other_content(rng: random.Random) -> File:
    """Give text, scripts, archives and rarely used formats the suffix of an image."""
    dds = b"DDS " + struct.pack("<7I", 124, 0x1007, *(rng.choice((16, 65535, 2**31 - 1)) for _ in range(2)), 0, 0, 0)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n" + rng.choice((b"{} loop\n", b"showpage\n%%EOF\n"))
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999"><rect width="9" height="9"/></svg>'
    fits = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80)
    fits += b"NAXIS   =                    2".ljust(80) + b"NAXIS1  =               999999".ljust(80)
    fits += b"NAXIS2  =               999999".ljust(80) + b"END".ljust(2480)
    psd = b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(64)
    contents = [
        dds + bytes(44) + struct.pack("<2I4s", 32, 4, b"DXT1") + bytes(64), eps, svg, fits, psd,
        b"#!/bin/sh\necho no\n", b"<html><body>404</body></html>", b"%PDF-1.4\n%%EOF", b"PK\x03\x04" + bytes(60),
        b"\0" * 4096, b"ftypheic", struct.pack(">I", 24) + b"ftypheic" + bytes(12), b"GIF89a", PNG_SIGNATURE,
        b"\xff\xd8\xff", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"#FIG 3.2", b"/* XPM */\nstatic char * x[] = {",
    ]  # fmt: skip
    return rng.choice([".jpg", ".png", ".heic", ".webp"]), rng.choice(contents)


def huge_size(rng: random.Random) -> File:
    """Announce a huge size in a small file."""
    side = rng.choice((12000, 16000, 20000, 32767, 65535))
    kind = rng.choice(("png", "png rows", "gif", "bmp", "ppm", "tga", "jpg", "tif", "webp"))
    if kind.startswith("png"):
        rows = zlib.compress(bytes(3 * side + 1) * rng.choice((1, 50)), 9) if "rows" in kind else b"x"
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return ".png", PNG_SIGNATURE + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    if kind == "gif":
        return ".gif", gif_bomb(side, frames=rng.choice((1, 2, 40)))
    if kind == "bmp":
        return ".bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, side, side, 1, 24, 0, 0, 1, 1, 0, 0)
    if kind == "ppm":
        return ".ppm", b"P6 %d %d 255\n" % (side, side) + bytes(99)
    if kind == "tga":
        # Run-length packets fill the image from few bytes.
        return ".tga", struct.pack("<BBB5xHHHHBB", 0, 0, 10, 0, 0, side, side, 24, 32) + b"\xff\0\0\0" * 5000
    data = bytearray(encode(draw(rng), {"jpg": "JPEG", "tif": "TIFF", "webp": "WEBP"}[kind]))
    if kind == "jpg":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", side, side)
    elif kind == "tif":
        for tag in (256, 257):
            start = data.index(struct.pack("<H", tag), 8) + 2
            data[start : start + 10] = struct.pack("<HII", 4, 1, side)
    else:
        header = b"VP8X" + struct.pack("<II", 10, 2) + (side - 1).to_bytes(3, "little") * 2
        data = b"RIFF" + struct.pack("<I", len(data)) + b"WEBP" + header + data[12:]
    return f".{kind}", bytes(data)


def gif_bomb(side: int, frames: int = 1) -> bytes:
    """Build a GIF with a large canvas and small frames."""
    frame = b"\x21\xf9\x04\x08\x01\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02L\x01\0"
    header = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return header + frame * frames + b";"


def filled_size(rng: random.Random) -> File:
    """Save a large image of one colour, which has few bytes."""
    side = rng.choice((9000, 13000))
    mode, options = rng.choice((("1", {}), ("L", {}), ("P", {"transparency": 0})))
    if rng.random() < 0.4:
        return ".jpg", encode(Image.new("L", (side, side)), "JPEG", quality=10)
    return ".png", encode(Image.new(mode, (side, side)), "PNG", compress_level=1, **options)


def long_and_thin(rng: random.Random) -> File:
    """Save an image of one row or one column."""
    size = (rng.choice((30000, 65000)), 1)
    return rng.choice((".png", ".jpg")), encode(Image.new("RGB", size if rng.random() < 0.5 else size[::-1]), "PNG")


def odd_exif(rng: random.Random) -> File:
    """Add entries to the EXIF data that viewers ignore, next to an orientation."""
    order = rng.choice("<>")
    entries = [(0x0112, 3, 1, struct.pack(f"{order}HH", rng.randint(1, 8), 0))]
    for _ in range(rng.randint(1, 3)):
        tag = rng.choice((0x0102, 0x011A, 0x011B, 0x8769, 0x8825, 0x0211, 0x0213, 0x9C9B, 0xA005, 0x927C, 0x0132))
        count = rng.choice((0, 1, 1, 2, 3, 5, 2**31 - 1))
        entries.append((tag, rng.choice((*range(1, 13), 7, 0, 99)), count, rng.randbytes(4)))
    return ".jpg", add_exif(encode(draw(rng), "JPEG"), exif_block(sorted(entries), order))


def odd_orientation(rng: random.Random) -> File:
    """Write an orientation of the wrong type or out of range."""
    value = rng.choice((0, 9, 255, 65535))
    kind = rng.choice((1, 2, 3, 4, 5, 7, 9, 11, 12))
    entry = (0x0112, kind, rng.choice((0, 1, 2, 4)), struct.pack("<I", value))
    return ".jpg", add_exif(encode(draw(rng), "JPEG"), exif_block([entry]))


def damaged_metadata(rng: random.Random) -> File:
    """Damage what is not pixels: EXIF, ICC profile, XMP, and text chunks."""
    kind, noise = rng.randrange(6), rng.randbytes(rng.randint(0, 400))
    if kind == 0:
        return ".jpg", encode(draw(rng), "JPEG", icc_profile=noise or b"x")
    if kind == 1:
        return ".jpg", add_exif(encode(draw(rng), "JPEG"), b"Exif\0\0" + noise)
    if kind == 2:
        return ".jpg", add_exif(encode(draw(rng), "JPEG"), b"http://ns.adobe.com/xap/1.0/\0" + noise)
    if kind == 3:
        return ".png", insert_png_chunk(encode(draw(rng), "PNG"), png_chunk(b"eXIf", noise))
    if kind == 4:
        text = PngImagePlugin.PngInfo()
        text.add_text("Raw profile type exif", "\nexif\n      99\nzz" + noise.hex())
        return ".png", encode(draw(rng), "PNG", pnginfo=text)
    return ".tif", encode(draw(rng), "TIFF", icc_profile=noise or b"x", description=noise.hex())


def large_text(rng: random.Random) -> File:
    """Put much text into a PNG, compressed or not."""
    zeros = bytes(rng.choice((2, 20, 70)) * 2**20)
    if rng.random() < 0.5:
        chunk = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(zeros, 9))
    else:
        chunk = png_chunk(b"tEXt", b"Comment\0" + b"x" * (2 * 2**20))
    return ".png", insert_png_chunk(encode(draw(rng), "PNG"), chunk)


def missing_end(rng: random.Random) -> File:
    """Leave out the end marker of a JPEG, or the last chunk of a PNG."""
    if rng.random() < 0.5:
        return ".jpg", encode(draw(rng), "JPEG")[: -rng.choice((1, 2))]
    return ".png", encode(draw(rng), "PNG")[:-12]


def ancillary_checksum(rng: random.Random) -> File:
    """Give a chunk that is not needed for the pixels a wrong checksum."""
    kind, data = rng.choice(((b"tIME", bytes(7)), (b"tEXt", b"Comment\0x"), (b"pHYs", bytes(9)), (b"gAMA", bytes(4))))
    return ".png", insert_png_chunk(encode(draw(rng), "PNG"), png_chunk(kind, data, valid=False))


def rare_mode(rng: random.Random) -> File:
    """Save valid images in modes and with options that few programs write."""
    kind, image = rng.randrange(10), draw(rng)
    if kind < 3:
        mode = rng.choice(("CMYK", "L", "1", "LA", "RGBA", "P", "I;16", "PA"))
        converted = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
        return ".tif", encode(converted or image.convert("RGBA" if mode == "PA" else mode), "TIFF")
    if kind == 3:
        return ".jpg", encode(image.convert(rng.choice(("CMYK", "L"))), "JPEG", progressive=rng.random() < 0.5)
    if kind == 4:
        return ".png", encode(image.convert("P"), "PNG", transparency=rng.choice((0, bytes(range(200)))))
    if kind == 5:
        return ".jpg", encode(image, "MPO", save_all=True, append_images=[draw(rng)])
    mode = rng.choice(("RGB", "RGBA"))
    frames = [draw(rng, mode=mode) for _ in range(rng.randint(2, 5))]
    name = rng.choice(("GIF", "WEBP", "PNG", "TIFF", "AVIF"))
    suffix = {"GIF": ".gif", "WEBP": ".webp", "PNG": ".png", "TIFF": ".tif", "AVIF": ".avif"}[name]
    return suffix, encode(frames[0], name, save_all=True, append_images=frames[1:], duration=40)


def damaged_animation(rng: random.Random) -> File:
    """Damage an image with several frames."""
    name, suffix = rng.choice((("GIF", ".gif"), ("WEBP", ".webp"), ("PNG", ".apng"), ("TIFF", ".tiff")))
    frames = [draw(rng) for _ in range(5)]
    data = encode(frames[0], name, save_all=True, append_images=frames[1:], duration=40)
    return suffix, rng.choice(list(BYTE_DAMAGES.values()))(data, rng)


def tiff_structure(rng: random.Random) -> File:
    """Damage the table of a TIFF: loops, huge counts and offsets beyond the end."""
    data = bytearray(encode(draw(rng), "TIFF", compression=rng.choice((None, "tiff_lzw", "tiff_adobe_deflate"))))
    table = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, table)[0]
    for _ in range(rng.randint(1, 4)):
        entry = table + 2 + 12 * rng.randrange(count)
        field, size = rng.choice(((entry + 2, 2), (entry + 4, 4), (entry + 8, 4)))
        data[field : field + size] = (
            rng.choice((0, 1, 2**15, 2**16 - 1)).to_bytes(2, "little")[:size].ljust(size, b"\xff")
        )
    if rng.random() < 0.3:
        data[table + 2 + 12 * count : table + 6 + 12 * count] = struct.pack("<I", table)
    return ".tif", bytes(data)


DAMAGES: dict[str, Callable[[random.Random], File]] = {
    "damaged bytes": damaged_bytes,
    "damaged bytes of an animation": damaged_animation,
    "wrong suffix": wrong_suffix,
    "other content": other_content,
    "huge size in the header": huge_size,
    "large image of one colour": filled_size,
    "one row or column": long_and_thin,
    "odd EXIF entries": odd_exif,
    "odd orientation": odd_orientation,
    "damaged EXIF, ICC or XMP": damaged_metadata,
    "much text": large_text,
    "no end marker": missing_end,
    "wrong checksum of an optional chunk": ancillary_checksum,
    "rare mode or animation": rare_mode,
    "damaged TIFF table": tiff_structure,
}
# Any viewer shows these, so they must be tagged.
READABLE = {
    "wrong suffix", "odd EXIF entries", "odd orientation", "damaged EXIF, ICC or XMP", "much text", "no end marker",
    "wrong checksum of an optional chunk", "rare mode or animation", "one row or column",
}  # fmt: skip
# These damages occur more often, because random bytes find errors that nobody expected.
WEIGHTS = {"damaged bytes": 8, "damaged bytes of an animation": 3, "huge size in the header": 3, "odd EXIF entries": 2}
