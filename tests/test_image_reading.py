"""Images are read as viewers show them, at a fraction of their size, and in bounded memory."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from image_helpers import noise_image, png
from PIL import Image, JpegImagePlugin, PngImagePlugin

from modeling_optsg import image_utils
from modeling_optsg.image_utils import read_image

# Values of EXIF entries that Pillow cannot write again: entry, type, count, value.
ODD_ENTRIES = {
    "undefined instead of rational": (0x011A, 7, 4, b"\1\2\3\4"),
    "bits as text": (0x0102, 2, 4, b"8\0\0\0"),
    "a floating-point pointer": (0x8769, 11, 1, struct.pack(">f", 1.5)),
    "a negative number of 16 bits": (0x0213, 8, 1, struct.pack(">hh", -2, 0)),
}


def photograph(width, height, seed=0):
    """Returns an image that is smooth as a photograph, with some noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray(np.clip(smooth + random.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def difference(first, second):
    """Returns the mean and the maximum difference of two images, in levels."""
    differences = np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))
    return differences.mean(), differences.max()


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [(1600, 1200), (1203, 901), (500, 2000)])
def test_pixels_of_a_reduced_jpeg_are_close(settings, size):
    data = encoded(photograph(*size), "JPEG", quality=90, **settings)
    whole, reduced = read_image(data, "a"), read_image(data, "a", min_side=160)
    assert whole.size == size and 160 <= min(reduced.size) < 2 * 160
    mean, most = difference(*(image.resize((40, 40), Image.Resampling.BILINEAR) for image in (whole, reduced)))
    assert mean < 0.5 and most <= 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
def test_pixels_of_a_reduced_image_of_any_mode_are_close(mode):
    image = photograph(1203, 901)
    if mode in ("RGBA", "LA"):
        image.putalpha(photograph(1203, 901, seed=1).convert("L"))
        image = image.convert(mode)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) << 8)
    else:
        image = image.convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    whole, reduced = read_image(data, "a"), read_image(data, "a", min_side=160)
    assert reduced.size == (241, 181) and reduced.mode == "RGB"
    mean, _ = difference(*(image.resize((40, 40), Image.Resampling.BILINEAR) for image in (whole, reduced)))
    assert mean < 1


def test_small_images_keep_their_pixels():
    image = noise_image(300, 200)
    assert difference(read_image(png(image), "a", min_side=101), image) == (0, 0)
    assert image.size == read_image(image, "a", min_side=101).size


def with_exif(image, entry, orientation):
    """Returns a JPEG with an EXIF entry and an orientation, which are written without Pillow's checks."""
    kinds = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 8: 2, 11: 4}
    entries = sorted([entry, (0x0112, 3, 1, struct.pack(">HH", orientation, 0))])
    assert all(kinds[kind] * count <= 4 for _, kind, count, _ in entries)
    body = b"".join(
        struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries
    )
    tiff = b"MM\0*" + struct.pack(">IH", 8, len(entries)) + body + bytes(4)
    return encoded(image, "JPEG", exif=b"Exif\0\0" + tiff, quality=95)


@pytest.mark.parametrize("entry", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
@pytest.mark.parametrize("min_side", [None, 64])
def test_odd_exif_entries_do_not_hide_the_orientation(entry, min_side):
    image = photograph(320, 200)
    upright = read_image(with_exif(image, entry, 6), "a", min_side)
    expected = image.transpose(Image.Transpose.ROTATE_270)
    assert (upright.width < upright.height) and (min_side or upright.size == (200, 320))
    mean, _ = difference(*(shown.resize((20, 32), Image.Resampling.BOX) for shown in (upright, expected)))
    assert mean < 3


@pytest.mark.parametrize("settings", [{}, {"progressive": True}])
@pytest.mark.parametrize("min_side", [None, 16])
def test_a_jpeg_without_its_end_marker_is_read(settings, min_side):
    data = encoded(noise_image(64, 48), "JPEG", **settings)
    for shorter in (data[:-1], data[:-2]):
        assert read_image(shorter, "a", min_side) == read_image(data, "a", min_side)
    with pytest.raises(ValueError, match="truncated"):
        read_image(data[: -len(data) // 4], "a", min_side)


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"Comment\0damaged", checksum=7),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      10\nnothing hexadecimal"),
        chunk(b"gAMA", b"1"),
    ],
    ids=["checksum", "large text", "raw profile", "short"],
)
def test_damaged_texts_of_a_png_are_passed_over(extra):
    image = noise_image()
    image.putalpha(200)
    data = png(image.convert("RGB"), transparency=image.convert("RGB").getpixel((3, 3)))
    header = 8 + 25
    assert read_image(data[:header] + extra + data[header:], "a") == read_image(data, "a")
    with pytest.raises(ValueError, match="is not an image that can be read"):
        read_image(data[:header] + extra + data[header:-200], "a")


@pytest.mark.parametrize("place", ["exif", "xmp"])
def test_a_png_with_a_damaged_text_keeps_its_rotation(place):
    exif, xmp = Image.Exif(), PngImagePlugin.PngInfo()
    if place == "exif":
        exif[0x0112] = 6
    else:
        xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    data = png(noise_image(30, 20), exif=exif, pnginfo=xmp)
    header = 8 + 25
    damaged = data[:header] + chunk(b"tEXt", b"Comment\0damaged", checksum=7) + data[header:]
    assert read_image(damaged, "a").size == (20, 30)
    assert read_image(damaged, "a") == read_image(data, "a")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_an_image_is_turned_only_once(suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(30, 20).save(tmp_path / f"a.{suffix}", exif=exif)
    for min_side in (None, 8):
        once = read_image(tmp_path / f"a.{suffix}", "a", min_side)
        assert once.width < once.height and read_image(once, "a") == once
    given = Image.open(tmp_path / f"a.{suffix}")
    assert read_image(given, "a") == read_image(given, "a") == read_image(tmp_path / f"a.{suffix}", "a")


def test_large_unreadable_files_are_not_read_whole(monkeypatch, tmp_path):
    path = tmp_path / "big.jpg"
    with open(path, "wb") as file:
        file.truncate(1 << 28)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="big.jpg is not an image that can be read"):
            read_image(path, "a")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    data = encoded(noise_image(), "JPEG")[:-2]
    assert read_image(data, "a")
    monkeypatch.setattr(image_utils, "MAX_REPAIRED_BYTES", len(data) - 1)
    with pytest.raises(ValueError, match="truncated"):
        read_image(data, "a")


def test_postscript_is_not_run(monkeypatch, tmp_path):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    path = tmp_path / "photo.jpg"
    noise_image().save(path, "EPS")
    with pytest.raises(ValueError, match="photo.jpg is not an image that can be read"):
        read_image(path, "a")


def with_size(data, width, height):
    """Changes the size in the header of a JPEG."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def test_large_photographs_are_read_at_reduced_size(monkeypatch):
    data = encoded(photograph(800, 600), "JPEG")
    # The pixel limits of Pillow are for whole images.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(image_utils, "MAX_DECODED_BYTES", 100_000)
    assert read_image(data, "a", min_side=70).size == (100, 75)
    with pytest.raises(ValueError, match="800 × 600 pixels and needs 2 MB of memory, more than the limit"):
        read_image(data, "a")


def test_too_large_images_are_opened_once(monkeypatch):
    opened, decode = [], image_utils._decode
    monkeypatch.setattr(image_utils, "_decode", lambda *given: opened.append(given) or decode(*given))
    monkeypatch.setattr(image_utils, "MAX_DECODED_BYTES", 100)
    for kind in ("PNG", "JPEG"):
        opened.clear()
        with pytest.raises(ValueError, match="more than the limit"):
            read_image(encoded(noise_image(), kind), "a")
        assert len(opened) == 1


def test_too_large_images_are_rejected_before_decoding(monkeypatch):
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: pytest.fail("it was decoded"))
    data = encoded(noise_image(), "JPEG")
    with pytest.raises(ValueError, match=r"65,000 × 65,000 pixels, more than 500,000,000"):
        read_image(with_size(data, 65000, 65000), "a", min_side=64)
    progressive = encoded(noise_image(), "JPEG", progressive=True).replace(b"\xff\xc2", b"\xff\xc0", 1)
    progressive = with_size(progressive, 20000, 20000).replace(b"\xff\xc0", b"\xff\xc2", 1)
    with pytest.raises(ValueError, match="MB of memory, more than the limit"):
        read_image(progressive, "a", min_side=64)
