"""Videos: frames at the centres of equal segments, from any container; files that are videos."""

import socket
import sys
import threading

import av
import numpy as np
import pytest
import torch
from image_helpers import noise_image, png, reference_pixels
from numbered_videos import number_of, numbered_frame, write_video
from PIL import Image

from modeling_optsg import video_utils
from modeling_optsg.image_utils import large_file_lock
from modeling_optsg.video_utils import is_video_file, read_frames


@pytest.fixture(scope="module")
def processor(tiny_processor):
    return tiny_processor


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", 100, g="12", bf="2")


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


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
def test_frames_are_exact_in_every_container(tmp_path, suffix, codec, options):
    path = write_video(tmp_path / f"video.{suffix}", 50, codec, **options)
    assert [number_of(frame) for frame in read_frames(path, 5)] == [5, 15, 25, 35, 45]
    assert [number_of(frame) for frame in read_frames(path.read_bytes(), 5)] == [5, 15, 25, 35, 45]


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "12", "bf": "2"}),
        ("mp4", "libsvtav1", {"g": "12", "svtav1-params": "lp=1"}),
        ("mpg", "mpeg2video", {"g": "12", "bf": "2"}),
        ("avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("ts", "libx264", {"g": "12", "bf": "2"}),
        ("ts", "libx264", {"g": "1000", "bf": "2"}),
    ],
)
def test_far_apart_frames_are_reached_by_seeking(tmp_path, monkeypatch, suffix, codec, options):
    def decode_through(self, num_frames):
        raise AssertionError("decoded from end to end")

    path = write_video(tmp_path / f"video.{suffix}", 50, codec, **options)
    monkeypatch.setattr("modeling_optsg.video_utils._Video._decode_through", decode_through)
    assert [number_of(frame) for frame in read_frames(path, 5)] == [5, 15, 25, 35, 45]


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "rawvideo"), ("mov", "rawvideo"), ("mov", "qtrle")])
def test_videos_with_a_palette_keep_their_colours(tmp_path, suffix, codec):
    path = tmp_path / f"palette.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "pal8" if codec == "rawvideo" else "rgb24"
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            if codec == "rawvideo":
                palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, axis=1)
                frame = av.VideoFrame.from_ndarray((numbered_frame(number)[..., 0], palette), format="pal8")
                frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert [number_of(frame) for frame in read_frames(path, 5)] == [5, 15, 25, 35, 45]


def test_large_frames_are_reduced(video):
    for whole, reduced in zip(read_frames(video, 4), read_frames(video, 4, min_side=16), strict=True):
        assert (whole.size, reduced.size) == ((112, 64), (28, 16))
        expected = np.asarray(whole.resize(reduced.size, Image.Resampling.BOX), dtype=float)
        assert np.abs(np.asarray(reduced) - expected).mean() < 2
    assert read_frames(video, 1, min_side=33)[0].size == (112, 64)


def test_frames_over_the_pixel_limit_are_rejected_before_decoding(video, tmp_path, monkeypatch):
    path = tmp_path / "huge.gif"
    Image.new("P", (16, 16)).save(path)
    data = bytearray(path.read_bytes())
    data[6:10] = (16000).to_bytes(2, "little") * 2
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"huge.gif .*16,000 × 16,000 pixels, more than the limit"):
        read_frames(path, 8)
    monkeypatch.setattr("modeling_optsg.video_utils.MAX_FRAME_PIXELS", 300 * 300)
    assert len(read_frames(video, 8)) == 8


def test_a_short_video_gives_all_its_frames(tmp_path):
    path = write_video(tmp_path / "short.mp4", 3)
    assert [number_of(frame) for frame in read_frames(path, 8)] == [0, 1, 2]


def test_an_animated_gif_is_read_on_white(processor, tmp_path):
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(6)]
    for i, frame in enumerate(frames):
        frame.paste((200, 0, 0, 255), (5 * i, 0, 5 * i + 5, 32))
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=2)
    batch = processor(videos=[path])
    on_white = [Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), frames[i]) for i in (0, 2, 3, 5)]
    expected = torch.stack([reference_pixels(processor, frame.convert("RGB")) for frame in on_white])
    assert torch.equal(batch["pixel_values"][0], expected)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_video_filmed_sideways_is_turned_upright(tmp_path, rotation):
    (plain,) = read_frames(write_video(tmp_path / "plain.mp4", 1), 1)
    (turned,) = read_frames(write_video(tmp_path / "turned.mp4", 1, rotation=rotation), 1)
    assert turned == plain.rotate(rotation, expand=True)


def test_a_truncated_video_gives_its_frames_and_a_warning(tmp_path, caplog):
    path = write_video(tmp_path / "cut.mp4", 60, g="6", bf="0", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    frames = [number_of(frame) for frame in read_frames(path, 100)]
    assert frames == list(range(len(frames)))
    assert 10 < len(frames) < 60
    assert "cut.mp4" in caplog.text


def test_lists_of_frames_are_sampled_like_files(processor, video):
    frames = [numbered_frame(number) for number in range(100)]
    expected = [reference_pixels(processor, Image.fromarray(frames[i])) for i in (12, 37, 62, 87)]
    for form in (frames, np.stack(frames), tuple(Image.fromarray(frame) for frame in frames)):
        batch = processor(videos=[form])
        assert torch.equal(batch["pixel_values"][0], torch.stack(expected))
    assert torch.equal(processor(videos=np.stack(frames))["pixel_values"][0], torch.stack(expected))
    decoded = [reference_pixels(processor, frame) for frame in read_frames(video, 4)]
    for form in (video, str(video), video.read_bytes(), {"bytes": None, "path": str(video)}):
        assert torch.equal(processor(videos=form)["pixel_values"][0], torch.stack(decoded))


@pytest.mark.parametrize(
    "kind",
    ["truncated", "noise", "empty", "missing", "folder", "text", "sound", "header only", "unknown codec"],
)
def test_an_unreadable_video_is_named_by_path_or_index(processor, video, tmp_path, kind):
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
        path = write_sound(path.with_suffix(".wav"))
    elif kind == "header only":
        write_video(path, 0)
    elif kind == "unknown codec":
        path.write_bytes(video.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(ValueError, match=path.name):
        processor(videos=[video, path])
    if path.is_file():
        with pytest.raises(ValueError, match=r"videos\[1\]"):
            processor(videos=[video, path.read_bytes()])


def test_cover_art_is_not_a_video(tmp_path):
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
        ([], r"videos\[0\] has no frames"),
        ([numbered_frame(0), None], r"videos\[0\]\[1\].*NoneType"),
        ([numbered_frame(0), "missing.png"], "missing.png"),
        (Image.new("RGB", (8, 8)), r"videos\[0\] is one Image"),
        (numbered_frame(0), r"videos\[0\] is one ndarray"),
        (7, r"videos\[0\] is one int"),
        ("https://example.org/video.mp4", "https://example.org/video.mp4 is a remote address"),
        ({"bytes": None, "path": None}, "neither 'bytes' nor 'path'"),
    ],
)
def test_an_invalid_video_is_reported_with_the_reason(processor, video, message):
    with pytest.raises(ValueError, match=message):
        processor(videos=[video])


def test_a_playlist_cannot_open_an_address(tmp_path):
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


# is_video_file


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("video.mp4", "libx264"),
        ("video.mkv", "libx264"),
        ("video.ts", "libx264"),
        ("video.avi", "mpeg4"),
        ("video.mov", "mjpeg"),
        ("video.webm", "libvpx"),
        ("video.h264", "libx264"),
        ("video.mpg", "mpeg2video"),
        ("video.m2v", "mpeg2video"),
    ],
)
def test_a_video_is_recognised_by_its_content(tmp_path, name, codec):
    path = write_video(tmp_path / name, 10, codec, **({"strict": "unofficial"} if codec == "mjpeg" else {}))
    assert is_video_file(path) and is_video_file(str(path))
    assert is_video_file(path.rename(tmp_path / "unnamed"))


def test_a_video_with_the_name_of_an_image_is_a_video(video, tmp_path):
    (tmp_path / "misnamed.png").write_bytes(video.read_bytes())
    assert is_video_file(tmp_path / "misnamed.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "ppm", "ico"])
def test_an_image_is_recognised_whatever_its_name(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise_image().save(path)
    assert not is_video_file(path)
    assert not is_video_file(path.rename(tmp_path / "misnamed.mp4"))


def test_an_animated_gif_or_webp_is_a_video(tmp_path):
    frames = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(3)]
    for name in ("moving.gif", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert is_video_file(tmp_path / "moving.gif") and is_video_file(tmp_path / "moving.webp")


def test_missing_files_folders_and_addresses_are_not_videos(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    assert not is_video_file(tmp_path / "missing.mp4")
    assert not is_video_file(tmp_path / "folder.mp4")
    assert not is_video_file("https://example.org/video.mp4")
    assert not is_video_file("data:video/mp4;base64,AAAA")


@pytest.mark.parametrize(
    "content", [b"", b"not an image", png(noise_image())[:20]], ids=["empty", "text", "truncated"]
)
def test_an_unreadable_file_is_a_video_only_by_its_name(tmp_path, content):
    for name, is_video in (("file.png", False), ("file", False), ("file.txt", False), ("file.mp4", True)):
        (tmp_path / name).write_bytes(content)
        # A truncated image is an image under any name.
        assert is_video_file(tmp_path / name) == (is_video and not content.startswith(b"\x89PNG"))


def test_a_damaged_video_is_a_video_and_sound_is_not(video, tmp_path):
    path = tmp_path / "truncated.mp4"
    path.write_bytes(video.read_bytes()[:500])
    assert is_video_file(path)
    assert not is_video_file(write_sound(tmp_path / "sound.wav"))


def test_without_pyav_the_name_decides(video, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    unnamed = tmp_path / "video"
    unnamed.write_bytes(video.read_bytes())
    assert is_video_file(video) and not is_video_file(unnamed)


def test_large_videos_are_decoded_one_at_a_time(video, tmp_path, monkeypatch):
    expected, to_image, locked = read_frames(video, 4), video_utils._Video._to_image, []

    def convert(self, frame):
        locked.append(large_file_lock.locked())
        return to_image(self, frame)

    monkeypatch.setattr(video_utils._Video, "_to_image", convert)
    assert read_frames(video, 4) == expected and not any(locked)
    locked.clear()
    monkeypatch.setattr(video_utils, "LARGE_FRAME_PIXELS", 100)
    assert read_frames(video, 4) == expected and locked == [True] * 4
    # A video without timestamps is decoded twice, and an animation by Pillow.
    stream = write_video(tmp_path / "video.h264", 20, g="12", codec="libx264")
    assert len(read_frames(stream, 4)) == 4 and locked == [True] * 8
    frames = [noise_image(), noise_image().transpose(Image.Transpose.ROTATE_180)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    assert len(read_frames(tmp_path / "a.webp", 2)) == 2 and not large_file_lock.locked()
