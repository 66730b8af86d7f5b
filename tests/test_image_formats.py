"""Images of phones and cameras: JPEG XL, AVIF, animated images and raw files."""

import io

import av
import numpy as np
import pytest
from image_helpers import noise_image, png
from numbered_videos import number_of, numbered_frame
from PIL import Image
from raw_photographs import raw_file

from modeling_optsg.image_formats import is_animated, jxl_size
from modeling_optsg.image_utils import read_image
from modeling_optsg.video_utils import is_video_file, read_frames
from optsg import raw_files
from optsg.file_tagger import TagSettings
from optsg.media_files import MediaFile
from optsg.tagger import Tagger


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (256, 256), (31, 57), (640, 480), (512, 9), (3, 1000)])
@pytest.mark.parametrize("container", [False, True])
def test_jpeg_xl_is_read_and_its_size_known_before_decoding(size, container, monkeypatch):
    pytest.importorskip("pillow_jxl")
    image = noise_image(*size)
    buffer = io.BytesIO()
    image.save(buffer, "JXL", lossless=True, use_container=container)
    assert jxl_size(buffer.getvalue()[:4096]) == size
    assert np.array_equal(read_image(buffer.getvalue(), "a"), image)
    monkeypatch.setattr("modeling_optsg.image_utils.MAX_DECODED_BYTES", 100)
    monkeypatch.setattr("modeling_optsg.image_utils._open", lambda _: pytest.fail("the plugin decodes when it opens"))
    with pytest.raises(ValueError, match="a is not an image .* MB of memory, more than the limit"):
        read_image(buffer.getvalue(), "a")


def test_missing_plugins_are_named_with_their_command(monkeypatch, tmp_path):
    pytest.importorskip("pillow_jxl")
    noise_image().save(tmp_path / "a.jxl")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "JXL"])
    with pytest.raises(ValueError, match=r'a.jxl is a JPEG XL image; to read it: pip install "optsg\[jxl\]"'):
        read_image(tmp_path / "a.jxl", "a")


def test_avif_is_read():
    image = Image.new("RGB", (32, 24), (200, 30, 40))
    buffer = io.BytesIO()
    image.save(buffer, "AVIF", quality=95)
    pixels = np.asarray(read_image(buffer.getvalue(), "a"), dtype=int)
    assert np.abs(pixels - np.asarray(image)).max() <= 3


@pytest.mark.parametrize("suffix", ["webp", "png", "apng", "gif", "avif"])
def test_animated_images_are_read_as_videos(tmp_path, suffix):
    frames = [Image.fromarray(numbered_frame(number)) for number in range(20)]
    path = tmp_path / f"moving.{suffix}"
    settings = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **settings)
    assert [number_of(frame) for frame in read_frames(path, 4)] == [2, 7, 12, 17]
    assert is_animated(path) and is_video_file(path)
    frames[0].save(path, save_all=True)
    assert not is_animated(path)
    assert not is_animated(tmp_path / "missing.webp")


def test_animations_are_turned_only_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise_image(32, 16), noise_image(32, 16).transpose(Image.Transpose.ROTATE_180)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], exif=exif)
    read = read_frames(tmp_path / "a.webp", 2)
    assert [frame.size for frame in read] == [(16, 32)] * 2
    assert [read_image(frame, "a") for frame in read] == read


def test_large_animations_are_rejected_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_optsg.video_utils.MAX_FRAME_PIXELS", 100)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="16 × 16 pixels, more than the limit 100"):
        read_frames(tmp_path / "a.webp", 2)


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (6, 270)])
def test_the_preview_of_a_raw_file_is_read_upright(tmp_path, orientation, degrees):
    pytest.importorskip("rawpy")
    preview = noise_image(8, 6).resize((320, 240))
    path = tmp_path / "photo.dng"
    path.write_bytes(raw_file(preview, orientation))
    shown = read_image(raw_files.read_preview(str(path)), "photo.dng")
    expected = preview.rotate(degrees, expand=True)
    assert shown.size == expected.size
    assert np.abs(np.asarray(shown, dtype=int) - np.asarray(expected)).mean() < 6
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="photo.dng (is not a raw file|has no preview)"):
        raw_files.read_preview(str(path))


def test_optsg_tag_reads_them(tiny_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("rawpy")
    (tmp_path / "a.dng").write_bytes(raw_file(noise_image(320, 240), 1))
    frames = [Image.fromarray(numbered_frame(number)) for number in range(20)]
    frames[0].save(tmp_path / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "c.png").write_bytes(png(noise_image()))
    (tmp_path / "d.nef").write_bytes(b"damaged")
    tagger = Tagger(str(tiny_checkpoint), TagSettings())
    counts, read = [], tagger.processor.read_pixels
    monkeypatch.setattr(
        tagger.processor, "read_pixels", lambda *a, **k: counts.append(len(pixels := read(*a, **k))) or pixels
    )
    files = [MediaFile(str(path), None, False) for path in sorted(tmp_path.iterdir())]
    results = [result for _, result in tagger(files, batch_size=4)]
    assert [isinstance(result, Exception) for result in results] == [False, False, False, True]
    assert sorted(counts) == [1, 1, tagger.processor.num_frames]


@pytest.mark.parametrize(
    ("suffix", "container"), [("m2ts", "mpegts"), ("MTS", "mpegts"), ("vob", "vob"), ("3g2", "3g2"), ("mxf", "mxf")]
)
def test_videos_of_cameras_are_read(tmp_path, suffix, container):
    path = tmp_path / f"video.{suffix}"
    codec = "mpeg2video" if container in ("vob", "mxf") else "libx264"
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"g": "12", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        for number in range(50):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        output.mux(stream.encode())
    assert [number_of(frame) for frame in read_frames(path, 5)] == [5, 15, 25, 35, 45]
