"""Image formats that Pillow reads with plugins, and what their headers say."""

import os

from PIL import Image, features

try:
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()
try:
    import pillow_jxl  # noqa: F401  registers the format
except ImportError:
    pass

# After the length of the first box and "ftyp".
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
JXL_STARTS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")
# Bits of the height or the width, by their first two bits.
JXL_LENGTH_BITS = (9, 13, 18, 30)
# Width to height, by the three bits between them.
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
HEADER_BYTES = 4096
# Pillow recognises these, and they may contain several frames.
ANIMATED_FORMATS = ("WEBP", "PNG", "GIF", "AVIF")


def missing_plugin(header: bytes) -> str | None:
    """Return what the format of a file is and how to install its plugin; `None` if Pillow needs no other plugin.

    Args:
        header: The first bytes of the file.
    """
    brand = header[8:12] if header[4:8] == b"ftyp" else b""
    if brand in HEIC_BRANDS and "HEIF" not in Image.ID:
        return 'a HEIC image; to read it: pip install "optsg[heic]"'
    if brand in AVIF_BRANDS and not features.check("avif"):
        return 'an AVIF image; to read it: pip install "pillow>=11.3"'
    if header.startswith(JXL_STARTS) and "JXL" not in Image.ID:
        return 'a JPEG XL image; to read it: pip install "optsg[jxl]"'
    return None


def is_animated(path: str | os.PathLike) -> bool:
    """Return whether an image file has several frames, such as an animated WebP or PNG; `False` if it is damaged."""
    try:
        with Image.open(path, formats=ANIMATED_FORMATS) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # Pillow's plugins raise every kind of exception on damaged files.
        return False


def jxl_size(header: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG XL image, whose plugin decodes it at once; `None` if it is damaged.

    Args:
        header: The first bytes of the file.
    """
    start = 0
    if not header.startswith(b"\xff\x0a"):
        whole, part = header.find(b"jxlc"), header.find(b"jxlp")
        start = whole + 4 if whole >= 0 else part + 8
    if header[start : start + 2] != b"\xff\x0a":
        return None
    bits = int.from_bytes(header[start + 2 : start + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    is_small = take(1)

    def length() -> int:
        return 8 * (take(5) + 1) if is_small else take(JXL_LENGTH_BITS[take(2)]) + 1

    height = length()
    ratio = take(3)
    if ratio == 0:
        return length(), height
    numerator, denominator = JXL_RATIOS[ratio - 1]
    return height * numerator // denominator, height
