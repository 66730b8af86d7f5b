"""Images: files, bytes, PIL images and arrays become upright RGB images on white."""

import io

import numpy as np
import pytest
import torch
from image_helpers import noise_image, png, reference_pixels
from PIL import Image
from transformers import ViTImageProcessor

from modeling_optsg import OPTSGProcessor
from modeling_optsg.image_utils import is_url


@pytest.fixture(scope="module")
def processor(tiny_processor):
    return tiny_processor


@pytest.fixture
def photo():
    return noise_image()


def pixels(processor, image):
    return processor(images=image)["pixel_values"][0, 0]


def test_an_image_is_a_video_of_one_frame(processor, photo):
    batch = processor(images=[photo])
    assert set(batch) == {"pixel_values", "frame_mask"}
    assert batch["pixel_values"].shape == (1, 1, 3, 32, 32)
    assert batch["frame_mask"].tolist() == [[1]]
    assert torch.equal(batch["pixel_values"][0, 0], reference_pixels(processor, photo))


def test_all_forms_of_an_image_give_the_same_pixels(processor, photo, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    data, array = path.read_bytes(), np.asarray(photo)
    channels_first = np.moveaxis(array, -1, 0)
    forms = [str(path), path, data, photo, array, channels_first, torch.tensor(channels_first)]
    forms += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for form in forms:
        assert torch.equal(pixels(processor, form), reference_pixels(processor, photo))
    batch = processor(images=forms)
    assert (batch["pixel_values"] == reference_pixels(processor, photo)).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_become_rgb(processor, photo, mode):
    image = photo.convert(mode)
    assert torch.equal(pixels(processor, image), reference_pixels(processor, image.convert("RGB")))


def test_a_grey_array_may_have_two_or_three_dimensions(processor, photo):
    grey = np.asarray(photo.convert("L"))
    for array in (grey, grey[..., None], grey[None]):
        assert torch.equal(pixels(processor, array), reference_pixels(processor, photo.convert("L").convert("RGB")))


def test_sixteen_bits_are_scaled_to_eight(processor):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    image = Image.open(io.BytesIO(png(Image.fromarray(ramp))))
    assert image.mode.startswith("I")
    eight_bits = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert torch.equal(pixels(processor, image), reference_pixels(processor, eight_bits))
    assert torch.equal(pixels(processor, image.convert("I")), reference_pixels(processor, eight_bits))


def test_transparency_becomes_white(processor):
    white = reference_pixels(processor, Image.new("RGB", (8, 8), "white"))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    colour_key = Image.new("RGB", (8, 8), (10, 20, 30))
    for image in (
        clear,
        clear.convert("LA"),
        np.asarray(clear),
        png(palette, transparency=0),
        png(colour_key, transparency=(10, 20, 30)),
    ):
        assert torch.equal(pixels(processor, image), white)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert torch.equal(pixels(processor, half), reference_pixels(processor, Image.new("RGB", (8, 8), (127, 127, 127))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(processor, photo, orientation):
    flip, turn = Image.Transpose.FLIP_LEFT_RIGHT, {3: 180, 4: 180, 5: 90, 6: 270, 7: 270, 8: 90}
    upright = photo.transpose(flip) if orientation in (2, 4, 5, 7) else photo
    upright = upright.rotate(turn.get(orientation, 0), expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(pixels(processor, png(photo, exif=exif)), reference_pixels(processor, upright))


def test_the_input_image_is_not_changed(processor):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    before = image.copy()
    processor(images=image)
    assert image == before


def unreadable_image(kind, tmp_path):
    path = tmp_path / "bad.png"
    noise = noise_image(64, 64)
    if kind == "truncated":
        path.write_bytes(png(noise)[:4000])
    elif kind == "truncated jpeg":
        path = path.with_suffix(".jpg")
        noise.save(path)
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "header only":
        path.write_bytes(png(noise)[:20])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "floating point":
        path = path.with_suffix(".tif")
        Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    return path


@pytest.mark.parametrize(
    "kind", ["truncated", "truncated jpeg", "header only", "text", "empty", "folder", "floating point", "missing"]
)
def test_an_unreadable_image_is_named_by_path_or_index(processor, photo, tmp_path, kind):
    path = unreadable_image(kind, tmp_path)
    with pytest.raises(ValueError, match=path.name):
        processor(images=[photo, path])
    if path.is_file():
        with pytest.raises(ValueError, match=r"images\[1\]"):
            processor(images=[photo, path.read_bytes()])
        with pytest.raises(ValueError, match=path.name):
            processor(images=[photo, {"path": str(path), "bytes": path.read_bytes()}])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), "float32, expected uint8"),
        (np.zeros((8, 8, 2), dtype=np.uint8), r"shape \[8, 8, 2\]"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "no pixels"),
        (Image.new("RGB", (0, 8)), "no pixels"),
        (Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "beyond 16 bits"),
        (7, "got int"),
        ({"bytes": None, "path": None}, "neither 'bytes' nor 'path'"),
        ("https://example.org/cat.png", "https://example.org/cat.png is a remote address"),
        ("data:image/png;base64,AAAA", "remote address"),
    ],
)
def test_an_invalid_image_is_reported_with_the_reason(processor, photo, image, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[photo, image])


@pytest.mark.parametrize("name", ["C://photos/x.jpg", "data:x.png", "C:\\photos\\x.jpg", "a/b://c.png"])
def test_local_paths_are_not_addresses(name):
    assert not is_url(name)
    assert is_url("s3://bucket/x.jpg") and is_url("data:,x") and is_url("data:image/png;base64,AAAA")


def test_photographs_of_phones_are_read(processor, photo, tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "photo.heic"
    heif.from_pillow(photo).save(path, quality=-1)
    expected = reference_pixels(processor, Image.open(path).convert("RGB"))
    assert torch.equal(pixels(processor, path), expected)
    assert torch.equal(pixels(processor, path.read_bytes()), expected)
    # Without the plugin, the error says what to install.
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=r'is a HEIC image; to read it: pip install "optsg\[heic\]"'):
            processor(images=[photo, source])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_decompression_bomb_is_reported(processor, tmp_path, monkeypatch, mode):
    Image.new(mode, (30, 30)).save(tmp_path / "bomb.png")
    # The limit of Pillow does not count.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    processor(images=tmp_path / "bomb.png")
    monkeypatch.setattr("modeling_optsg.image_utils.MAX_DECODED_BYTES", 4 * 30 * 30 - 1)
    with pytest.raises(ValueError, match="bomb.png.*more than the limit"):
        processor(images=tmp_path / "bomb.png")


def test_images_of_different_sizes_are_reported(text_tokenizer, tag_tokenizer, photo):
    uneven = OPTSGProcessor(ViTImageProcessor(size={"shortest_edge": 16}), text_tokenizer, tag_tokenizer)
    with pytest.raises(ValueError, match="expected one size"):
        uneven(images=[photo, photo.rotate(90, expand=True)])
    with pytest.raises(ValueError, match=r"videos\[0\].*one size"):
        uneven(videos=[[photo, photo.rotate(90, expand=True)]])
