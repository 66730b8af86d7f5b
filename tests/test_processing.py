import copy
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from numbered_videos import number_of, numbered_frame, write_video
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from modeling_optsg.processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from modeling_optsg.tokenization_optsg import train_tag_tokenizer
from modeling_optsg.video_utils import read_frames

LABEL_VOCABULARY = {"arrow": 3, "left": 2, "red square": 1, "e-mail": 1, "创意美食": 2, "家常菜": 1}
WORDS = ["a", "red", "square", "arrow", "left", "e", "-", "mail", "[", "]", "mask", "pad"]


@pytest.fixture(scope="module")
def text_tokenizer():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"红色方块创意美食家常菜"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=12,
        **{f"{name}_token": f"[{name.upper()}]" for name in names},
    )


@pytest.fixture(scope="module")
def tag_tokenizer():
    return train_tag_tokenizer(LABEL_VOCABULARY)


@pytest.fixture(scope="module")
def processor(text_tokenizer, tag_tokenizer):
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return OPTSGProcessor(
        image_processor, text_tokenizer, tag_tokenizer, num_frames=4, num_prompts=3, label_vocabulary=LABEL_VOCABULARY
    )


@pytest.fixture(scope="module")
def feature_processor(text_tokenizer, tag_tokenizer):
    return OPTSGFeatureProcessor(
        text_tokenizer, tag_tokenizer, num_frames=4, num_prompts=3, label_vocabulary=LABEL_VOCABULARY
    )


@pytest.fixture
def photo():
    """24 × 16 pixels, no two corners alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def png(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def pixels(processor, image):
    return processor(images=image)["pixel_values"][0, 0]


def reference(processor, image):
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def write_tone(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", 100, g="12", bf="2")


# Images


def test_a_image_is_a_video_of_one_frame_as_its_image_processor_makes_it(processor, photo):
    batch = processor(images=[photo])
    assert set(batch) == {"pixel_values", "frame_mask"}
    assert batch["pixel_values"].shape == (1, 1, 3, 32, 32)
    assert batch["frame_mask"].tolist() == [[1]]
    assert torch.equal(batch["pixel_values"][0, 0], reference(processor, photo))


def test_every_way_to_give_a_image_gives_the_same_pixels(processor, photo, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    data, array = path.read_bytes(), np.asarray(photo)
    channels_first = np.moveaxis(array, -1, 0)
    ways = [str(path), path, data, photo, array, channels_first, torch.tensor(channels_first)]
    ways += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for way in ways:
        assert torch.equal(pixels(processor, way), reference(processor, photo))
    batch = processor(images=ways)
    assert (batch["pixel_values"] == reference(processor, photo)).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_become_rgb(processor, photo, mode):
    image = photo.convert(mode)
    assert torch.equal(pixels(processor, image), reference(processor, image.convert("RGB")))


def test_a_grey_array_may_be_flat_or_have_one_channel(processor, photo):
    grey = np.asarray(photo.convert("L"))
    for array in (grey, grey[..., None], grey[None]):
        assert torch.equal(pixels(processor, array), reference(processor, photo.convert("L").convert("RGB")))


def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(processor):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    image = Image.open(io.BytesIO(png(Image.fromarray(ramp))))
    assert image.mode.startswith("I")
    eight_bits = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert torch.equal(pixels(processor, image), reference(processor, eight_bits))
    assert torch.equal(pixels(processor, image.convert("I")), reference(processor, eight_bits))


def test_transparency_becomes_white(processor):
    white = reference(processor, Image.new("RGB", (8, 8), "white"))
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
    assert torch.equal(pixels(processor, half), reference(processor, Image.new("RGB", (8, 8), (127, 127, 127))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(processor, photo, orientation):
    flip, turn = Image.Transpose.FLIP_LEFT_RIGHT, {3: 180, 4: 180, 5: 90, 6: 270, 7: 270, 8: 90}
    upright = photo.transpose(flip) if orientation in (2, 4, 5, 7) else photo
    upright = upright.rotate(turn.get(orientation, 0), expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(pixels(processor, png(photo, exif=exif)), reference(processor, upright))


def test_the_image_given_is_left_as_it_was(processor):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    before = image.copy()
    processor(images=image)
    assert image == before


def bad_image(kind, tmp_path):
    path = tmp_path / "bad.png"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
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
def test_a_bad_image_is_named_by_its_path_or_its_index(processor, photo, tmp_path, kind):
    path = bad_image(kind, tmp_path)
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
def test_what_is_no_image_is_named_with_its_reason(processor, photo, image, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[photo, image])


def test_a_decompression_bomb_is_refused_by_name(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (30, 30)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png.*decompression bomb"):
        processor(images=tmp_path / "bomb.png")


def test_an_image_processor_that_makes_many_sizes_is_named(text_tokenizer, tag_tokenizer, photo):
    uneven = OPTSGProcessor(ViTImageProcessor(size={"shortest_edge": 16}), text_tokenizer, tag_tokenizer)
    with pytest.raises(ValueError, match="pixel_values; expected one size"):
        uneven(images=[photo, photo.rotate(90, expand=True)])
    with pytest.raises(ValueError, match="example 0.*one size"):
        uneven(videos=[[photo, photo.rotate(90, expand=True)]])


# Videos


@pytest.mark.parametrize("num_frames", [1, 3, 4, 7, 100])
def test_frames_are_the_centres_of_equal_segments(video, num_frames):
    centres = [int((i + 0.5) * 100 / num_frames) for i in range(num_frames)]
    assert [number_of(frame) for frame in read_frames(video, num_frames)] == centres


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "12", "bf": "2"}),
        ("mkv", "libx264", {"g": "12", "bf": "2"}),
        ("ts", "libx264", {"g": "12", "bf": "2"}),
        ("avi", "mpeg4", {"g": "12"}),
        ("avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("mov", "mjpeg", {"strict": "unofficial"}),
        ("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("h264", "libx264", {"g": "12", "bf": "2"}),
    ],
)
def test_spacing_is_exact_in_every_container(tmp_path, suffix, codec, options):
    path = write_video(tmp_path / f"video.{suffix}", 50, codec, **options)
    assert [number_of(frame) for frame in read_frames(path, 5)] == [5, 15, 25, 35, 45]
    assert [number_of(frame) for frame in read_frames(path.read_bytes(), 5)] == [5, 15, 25, 35, 45]


def test_far_apart_frames_are_reached_by_seeking(video, monkeypatch):
    def decode_through(self, num_frames):
        raise AssertionError("decoded from end to end")

    monkeypatch.setattr("modeling_optsg.video_utils._Video._decode_through", decode_through)
    assert len(read_frames(video, 4)) == 4


def test_a_short_video_gives_all_its_frames(tmp_path):
    path = write_video(tmp_path / "short.mp4", 3)
    assert [number_of(frame) for frame in read_frames(path, 8)] == [0, 1, 2]


def test_an_animated_gif_is_a_video_and_its_transparency_white(processor, tmp_path):
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(6)]
    for i, frame in enumerate(frames):
        frame.paste((200, 0, 0, 255), (5 * i, 0, 5 * i + 5, 32))
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=2)
    batch = processor(videos=[path])
    on_white = [Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), frames[i]) for i in (0, 2, 3, 5)]
    expected = torch.stack([reference(processor, frame.convert("RGB")) for frame in on_white])
    assert torch.equal(batch["pixel_values"][0], expected)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_video_filmed_sideways_is_turned_upright(tmp_path, rotation):
    (plain,) = read_frames(write_video(tmp_path / "plain.mp4", 1), 1)
    (turned,) = read_frames(write_video(tmp_path / "turned.mp4", 1, rotation=rotation), 1)
    assert turned == plain.rotate(rotation, expand=True)


def test_a_video_cut_off_gives_the_frames_that_are_left_and_says_so(tmp_path, caplog):
    path = write_video(tmp_path / "cut.mp4", 60, g="6", bf="0", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    frames = [number_of(frame) for frame in read_frames(path, 100)]
    assert frames == list(range(len(frames)))
    assert 10 < len(frames) < 60
    assert "cut.mp4" in caplog.text


def test_frames_given_as_a_list_are_spaced_as_a_file_is(processor, video):
    frames = [numbered_frame(number) for number in range(100)]
    expected = [reference(processor, Image.fromarray(frames[i])) for i in (12, 37, 62, 87)]
    for video in (frames, np.stack(frames), tuple(Image.fromarray(frame) for frame in frames)):
        batch = processor(videos=[video])
        assert torch.equal(batch["pixel_values"][0], torch.stack(expected))
    assert torch.equal(processor(videos=np.stack(frames))["pixel_values"][0], torch.stack(expected))
    decoded = [reference(processor, frame) for frame in read_frames(video, 4)]
    for video in (video, str(video), video.read_bytes(), {"bytes": None, "path": str(video)}):
        assert torch.equal(processor(videos=video)["pixel_values"][0], torch.stack(decoded))


@pytest.mark.parametrize(
    "kind",
    ["truncated", "noise", "empty", "missing", "folder", "text", "sound", "header only", "unknown codec"],
)
def test_a_bad_video_is_named_by_its_path_or_its_index(processor, video, tmp_path, kind):
    path = tmp_path / "bad.mp4"
    if kind == "truncated":
        path.write_bytes(video.read_bytes()[:500])
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path = path.with_suffix(".txt")
        path.write_text("a list of videos\n" * 20)
    elif kind == "sound":
        path = write_tone(path.with_suffix(".wav"))
    elif kind == "header only":
        write_video(path, 0)
    elif kind == "unknown codec":
        path.write_bytes(video.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(ValueError, match=path.name):
        processor(videos=[video, path])
    if path.is_file():
        with pytest.raises(ValueError, match=r"videos\[1\]"):
            processor(videos=[video, path.read_bytes()])


def test_cover_art_does_not_make_a_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 112, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(sound.encode(frame))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered_frame(1), format="rgb24")))
        container.mux(sound.encode())
        container.mux(cover.encode())
    with pytest.raises(ValueError, match="song.mp4.*it has no video stream"):
        read_frames(path, 1)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], r"videos\[0\] is a video without frames"),
        ([numbered_frame(0), None], r"videos\[0\]\[1\].*NoneType"),
        ([numbered_frame(0), "missing.png"], "missing.png"),
        (Image.new("RGB", (8, 8)), r"videos\[0\] is one Image"),
        (numbered_frame(0), r"videos\[0\] is one ndarray"),
        (7, r"videos\[0\] is one int"),
        ("https://example.org/video.mp4", "https://example.org/video.mp4 is a remote address"),
        ({"bytes": None, "path": None}, "neither 'bytes' nor 'path'"),
    ],
)
def test_what_is_no_video_is_named_with_its_reason(processor, video, message):
    with pytest.raises(ValueError, match=message):
        processor(videos=[video])


def test_a_playlist_cannot_make_the_reader_call_an_address(tmp_path):
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            try:
                while True:
                    server.accept()[0].close()
                    calls.append(True)
            except OSError:
                return

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/video.ts"
        path = tmp_path / "list.m3u8"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(ValueError, match="list.m3u8"):
            read_frames(path, 1)
        server.shutdown(socket.SHUT_RDWR)
        listener.join(timeout=5)
    assert not calls


def test_without_pyav_the_error_says_what_to_install(video, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        read_frames(video, 1)


# Batches


def test_images_videos_and_titles_mix_in_a_batch(processor, photo, video):
    short = [numbered_frame(0), numbered_frame(1)]
    batch = processor(
        images=[photo, None, None, None],
        videos=[None, video, short, None],
        titles=["a red square", None, "  ", "left"],
    )
    assert batch["pixel_values"].shape == (4, 4, 3, 32, 32)
    assert batch["frame_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert (batch["pixel_values"][batch["frame_mask"] == 0] == 0).all()
    assert torch.equal(batch["pixel_values"][0, :1], processor(images=photo)["pixel_values"][0])
    assert torch.equal(batch["pixel_values"][1], processor(videos=video)["pixel_values"][0])
    assert torch.equal(batch["pixel_values"][2, :2], processor(videos=[short])["pixel_values"][0])
    assert batch["attention_mask"].sum(1).tolist() == [5, 0, 0, 3]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_what_no_example_has_is_absent(processor, photo):
    assert set(processor(images=[photo, photo], titles=[None, ""])) == {"pixel_values", "frame_mask"}
    assert set(processor(images=[None, None], titles=["left", "red"])) == {"input_ids", "attention_mask"}


def test_a_single_example_needs_no_lists(processor, photo):
    single = processor(images=photo, titles="a red square", tags=["red square", "arrow"])
    listed = processor(images=[photo], titles=["a red square"], tags=[["red square", "arrow"]])
    assert set(single) == set(listed)
    assert all(torch.equal(single[name], listed[name]) for name in listed)


def test_numpy_arrays_on_request(processor, photo):
    batch = processor(images=photo, titles="left", tags=["left"], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in batch.values())
    with pytest.raises(ValueError, match="'tf'"):
        processor(titles="left", return_tensors="tf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no examples"),
        ({"images": []}, "no examples"),
        ({"images": [None, None], "titles": ["left", ""]}, "example 1 has neither an image nor a title"),
        ({"titles": ["left", None, "red"]}, "example 1 has neither an image nor a title"),
        ({"titles": ["left", "red"], "images": [None]}, "1 images, 2 titles"),
        ({"titles": ["left", "red"], "tags": [["left"]]}, "2 titles, 1 tags"),
        ({"titles": ["left", float("nan")]}, r"titles\[1\] is nan of type float"),
        ({"titles": ["left", "\ud800"]}, r"titles\[1\].*not valid Unicode"),
        ({"images": ["a.png"], "videos": ["a.mp4"]}, r"example 0 has images\[0\] and videos\[0\]"),
        ({"images": 7}, "images is of type int"),
        ({"titles": 7}, "titles is of type int"),
    ],
)
def test_a_bad_batch_is_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_precomputed_frame_features_stand_in_for_pixels(feature_processor):
    short, long = np.ones((2, 5), dtype=np.float16), torch.arange(50.0).reshape(10, 5)
    batch = feature_processor(frame_features=[short, None, long], titles=[None, "left", "red"])
    assert batch["frame_features"].shape == (3, 4, 5)
    assert batch["frame_mask"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(batch["frame_features"][2], long[[1, 3, 6, 8]])
    assert torch.equal(batch["frame_features"][0, :2], torch.ones(2, 5))
    assert "pixel_values" not in batch
    tokens = feature_processor(frame_features=[torch.ones(2, 7, 5)])
    assert tokens["frame_features"].shape == (1, 2, 7, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_features": [np.ones((2, 5)), np.ones((2, 6))]}, r"different shapes \[\(5,\), \(6,\)\]"),
        ({"frame_features": [np.ones(5)]}, r"frame_features\[0\] has shape \[5\]"),
        ({"frame_features": [np.ones((0, 5))]}, r"frame_features\[0\] has shape \[0, 5\]"),
        ({"images": [Image.new("RGB", (8, 8))]}, "example 0 has an image.*frame features only"),
        ({"images": ["a.png", None], "frame_features": [None, np.ones((2, 5))]}, "one or the other"),
        ({"images": ["a.png"], "frame_features": [np.ones((2, 5))]}, r"images\[0\] and frame_features\[0\]"),
    ],
)
def test_bad_frame_features_are_named(feature_processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_processor(**arguments)


# Titles


def test_titles_are_encoded_as_their_tokenizer_encodes_them(processor):
    titles = ["a red square", "红色方块", "e-mail"]
    expected = processor.tokenizer(titles, padding=True, return_tensors="pt")
    batch = processor(titles=titles)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert processor.tokenizer.unk_token_id not in batch["input_ids"]


def test_a_long_title_is_cut_at_the_text_towers_length(processor):
    assert processor(titles="red " * 50)["input_ids"].shape == (1, 12)


def test_a_tokenizer_without_a_length_cuts_nothing(processor):
    endless = copy.deepcopy(processor)
    endless.tokenizer.model_max_length = int(1e30)
    assert endless(titles="red " * 50)["input_ids"].shape == (1, 52)


def test_a_title_that_spells_a_special_token_is_text(processor):
    ids = processor(titles="a [MASK]")["input_ids"][0].tolist()
    assert processor.tokenizer.mask_token_id not in ids
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "[", "mask", "]", "[SEP]"]


# Tags


def test_each_tag_of_the_batch_is_encoded_once_and_labels_point_to_it(processor):
    tag_sets = [["arrow", "left", "arrow"], ["创意美食", "left", "e-mail"]]
    batch = processor(titles=["left", "创意"], tags=tag_sets)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [[0, 1, -100], [2, 1, 3]]
    tags = ["arrow", "left", "创意美食", "e-mail"]
    assert batch["tag_lengths"].tolist() == [len(processor.tag_tokenizer(tag)["input_ids"]) for tag in tags]
    for tag, ids, length in zip(tags, batch["tag_input_ids"], batch["tag_lengths"], strict=True):
        assert processor.tag_tokenizer.decode(ids[:length]) == tag
        assert (ids[length:] == 0).all() and (ids[:length] > 1).all()
    text = processor.tokenizer(tags, padding=True, return_tensors="pt")
    assert torch.equal(batch["tag_text_input_ids"], text["input_ids"])
    assert torch.equal(batch["tag_text_attention_mask"], text["attention_mask"])


def test_tags_in_any_language_survive_encoding_and_batch_decode(processor):
    tags = ["创意美食", "全新的标签", "🍜 soup", "[PAD]", "e-mail", " two  spaces"]
    long_tags = copy.deepcopy(processor)
    long_tags.max_tag_tokens = 64
    sequences = long_tags.encode_tags(tags)["tag_input_ids"][None]
    (decoded,) = processor.batch_decode(sequences)
    assert [entry["tag"] for entry in decoded] == tags
    assert [entry["novel"] for entry in decoded] == [False, True, True, True, False, True]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([[]], r"tags\[0\] is empty"),
        ([], r"tags\[0\] is empty"),
        ([["left"], None], r"tags\[1\] is None"),
        ([["left"], "red"], r"tags\[1\] is 'red'; expected the list"),
        (["left", 7], r"tags\[0\] holds 7 of type int"),
        ([["left", ""]], "tag '' is blank"),
        ([["left", " \t"]], "is blank"),
        ([["left", 7]], r"tags\[0\] holds 7 of type int"),
        ([["left", "\ud800"]], "not valid Unicode"),
        ([["x" * 40]], f"'{'x' * 40}' has 41 tokens, more than max_tag_tokens = 16"),
        ([["arrow", "left", "e-mail", "red square"]], r"tags\[0\] holds 4 tags, more than num_prompts = 3"),
    ],
)
def test_bad_tags_are_named(processor, tags, message):
    examples = len(tags) if tags and isinstance(tags[0], list) else 1
    with pytest.raises(ValueError, match=message):
        processor(titles=["left"] * examples, tags=tags)


def test_repeated_tags_do_not_count_as_too_many(processor):
    assert processor(titles="left", tags=["arrow", "left"] * 5)["labels"].tolist() == [[0, 1]]


def test_tags_of_exactly_the_longest_length_are_allowed(processor):
    tag = "x" * 15
    assert processor.encode_tags([tag])["tag_lengths"].tolist() == [16]


# Decoding


def sequences_of(processor, *examples):
    ids = [[processor.tag_tokenizer(tag)["input_ids"] if tag else [] for tag in example] for example in examples]
    length = max(len(row) for example in ids for row in example) + 1
    return torch.tensor([[row + [0] * (length - len(row)) for row in example] for example in ids])


def test_batch_decode_sorts_by_score_leaves_out_empty_rows_and_marks_novel_tags(processor):
    sequences = sequences_of(processor, ["left", "", "new tag"], ["", "", ""])
    outputs = SimpleNamespace(sequences=sequences, tag_scores=torch.tensor([[0.25, 0.9, 0.75], [0.9, 0.9, 0.9]]))
    assert processor.batch_decode(outputs) == [
        [{"tag": "new tag", "score": 0.75, "novel": True}, {"tag": "left", "score": 0.25, "novel": False}],
        [],
    ]


def test_spellings_of_one_tag_are_merged_with_the_larger_score(processor):
    whole = processor.tag_tokenizer("left")["input_ids"]
    letters = processor.tag_tokenizer.convert_tokens_to_ids(list("Ġleft"))
    assert whole != letters
    sequences = torch.tensor([[whole + [0] * (len(letters) - len(whole)), letters]])
    for scores in ([0.25, 0.75], [0.75, 0.25]):
        outputs = SimpleNamespace(sequences=sequences, tag_scores=torch.tensor([scores]))
        assert processor.batch_decode(outputs) == [[{"tag": "left", "score": 0.75, "novel": False}]]


def test_blank_tags_and_broken_characters_do_not_stop_decoding(processor):
    space = processor.tag_tokenizer.convert_tokens_to_ids("Ġ")
    half_character = processor.tag_tokenizer.convert_tokens_to_ids("å")
    decoded = processor.batch_decode(torch.tensor([[[space, space, 0], [space, half_character, 0]]]))
    assert decoded == [[{"tag": "\ufffd", "score": None, "novel": True}]]


def test_an_output_without_tags_is_no_tags(processor):
    empty = SimpleNamespace(sequences=torch.zeros(2, 0, 0, dtype=torch.long), tag_scores=torch.zeros(2, 0))
    assert processor.batch_decode(empty) == [[], []]


def test_outputs_of_another_shape_are_refused(processor):
    with pytest.raises(ValueError, match=r"sequences have shape \(2, 3\)"):
        processor.batch_decode(torch.zeros(2, 3, dtype=torch.long))
    outputs = SimpleNamespace(sequences=torch.zeros(2, 3, 4, dtype=torch.long), tag_scores=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"tag_scores have shape \(2, 4\); expected \(2, 3\)"):
        processor.batch_decode(outputs)


# Construction, saving and loading


@pytest.mark.parametrize("setting", ["num_frames", "num_prompts", "max_tag_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_settings_are_positive_whole_numbers(processor, setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        OPTSGProcessor(processor.image_processor, processor.tokenizer, processor.tag_tokenizer, **{setting: value})


def test_a_text_tokenizer_is_no_tag_tokenizer(processor):
    with pytest.raises(ValueError, match="expected 0 and 1"):
        OPTSGProcessor(processor.image_processor, processor.tokenizer, processor.tokenizer)


def test_a_component_of_the_wrong_kind_is_refused(processor):
    with pytest.raises(TypeError, match="image_processor"):
        OPTSGProcessor(processor.tokenizer, processor.tokenizer, processor.tag_tokenizer)


def assert_equal_batches(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def example(photo):
    return {
        "images": [photo, None],
        "titles": ["a [red] square", "红色方块"],
        "tags": [["red square"], ["创意美食", "[PAD]"]],
    }


def test_saving_and_loading_changes_nothing(processor, photo, tmp_path):
    processor.save_pretrained(tmp_path / "first")
    loaded = OPTSGProcessor.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    loaded = OPTSGProcessor.from_pretrained(str(tmp_path / "second"))
    assert_equal_batches(loaded(**example(photo)), processor(**example(photo)))
    assert loaded.label_vocabulary == LABEL_VOCABULARY
    assert (loaded.num_frames, loaded.num_prompts, loaded.max_tag_tokens) == (4, 3, 16)
    assert OPTSGProcessor.from_pretrained(tmp_path / "first", num_frames=2).num_frames == 2
    assert OPTSGProcessor.from_pretrained(tmp_path / "first", label_vocabulary={"one": 1}).label_vocabulary == {
        "one": 1
    }


def test_training_tags_are_saved_as_readable_text_in_a_file_of_their_own(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert "创意美食" in (tmp_path / "label_vocabulary.json").read_text(encoding="utf-8")
    assert "label_vocabulary" not in json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert "label_vocabulary" not in repr(processor)


def test_a_folder_without_its_training_tags_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "label_vocabulary.json").unlink()
    with pytest.raises(OSError, match="label_vocabulary.json"):
        OPTSGProcessor.from_pretrained(tmp_path)


def test_a_processor_can_be_pickled(processor, photo):
    restored = pickle.loads(pickle.dumps(processor))
    assert_equal_batches(restored(**example(photo)), processor(**example(photo)))


def test_model_input_names_are_what_the_model_takes(processor, photo):
    assert set(processor(images=photo, titles="left")) < set(processor.model_input_names)


REMOTE_LOAD = """
import sys, torch
from transformers import AutoProcessor
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(titles=["红色方块"], tags=[["创意美食"]])
    print(type(processor).__name__, processor.batch_decode(batch["tag_input_ids"][None])[0])
assert "modeling_optsg" not in sys.modules
"""


def test_saved_folders_load_where_the_package_is_not_installed(processor, feature_processor, tmp_path, monkeypatch):
    monkeypatch.setattr(OPTSGProcessor, "_auto_class", None)
    OPTSGProcessor.register_for_auto_class()
    processor.save_pretrained(tmp_path / "images")
    feature_processor.save_pretrained(tmp_path / "features")
    script = tmp_path / "load.py"
    script.write_text(REMOTE_LOAD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "images"), str(tmp_path / "features")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    tags = [{"tag": "创意美食", "score": None, "novel": False}]
    assert done.stdout.splitlines() == [f"OPTSGProcessor {tags}", f"OPTSGFeatureProcessor {tags}"]
