"""Reads frames from videos with PyAV."""

import contextlib
import io
import logging
import mimetypes
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from types import ModuleType
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from .image_formats import HEADER_BYTES, is_animated
from .image_utils import is_url, large_file_lock, read_image

logger = logging.getLogger(__name__)

# More than 8K. Frames are held in memory several at a time, as references of each other.
MAX_FRAME_PIXELS = 40_000_000
# More than 4K.
LARGE_FRAME_PIXELS = 9_000_000
MAX_REPEATED_RATIO = 0.01
# These decoders choose the frames to skip when they start, not for each packet.
DECODERS_WITHOUT_SKIPPING = ("libdav1d", "libaom-av1", "av1")


def evenly_spaced(count: int, num: int) -> list[int]:
    """Return the frame indices at the centres of `num` equal segments of `count` frames.

    If there are no more than `num` frames, all indices are returned.
    """
    return list(range(count)) if count <= num else [(2 * i + 1) * count // (2 * num) for i in range(num)]


def is_video_file(path: str | os.PathLike) -> bool:
    """Decides whether a local file is a video, by its content.

    Images that Pillow recognises are not videos, except GIF and other images with several frames. Any other file is a
    video if FFmpeg finds a video stream in it, or if it cannot be read and its name is that of a video, so that
    [`read_frames`] reports the reason.

    Returns:
        Whether the file is a video; `False` for addresses, folders, and files that are missing or cannot be opened.
    """
    if is_url(os.fspath(path)) or not os.path.isfile(path):
        return False
    try:
        with Image.open(path) as image:
            # Pillow recognises MPEG, but cannot read it.
            return image.format in ("GIF", "MPEG") or is_animated(path)
    except UnidentifiedImageError:
        pass
    except Exception:  # Pillow's plugins raise every kind of exception on damaged files.
        return False
    try:
        container_format = _container_format(path)
    except (ImportError, ValueError):
        return (mimetypes.guess_type(path)[0] or "").startswith("video/")
    # Single images have formats such as "png_pipe".
    return container_format != "image2" and not container_format.endswith("_pipe")


def read_frames(
    source: str | os.PathLike | bytes, num_frames: int, name: str | None = None, min_side: int | None = None
) -> list[Image.Image]:
    """Read the frames at the centres of `num_frames` equal segments of a video.

    All packets are listed first, without decoding them; then only the selected frames, and the frames they depend on,
    are decoded. A video without usable timestamps is decoded from start to end, twice.

    Args:
        source: Path of the video, or the bytes of its file. Animated GIF, PNG, WebP and AVIF are videos
            too.
        num_frames: Number of frames. A shorter video gives all its frames.
        name: Name of the video in error messages; its path by default.
        min_side: Minimum length of the shorter side of the frames in pixels. Larger frames are returned at a fraction
            of their size. By default, all frames keep their size.

    Returns:
        The frames in time order, turned upright, as RGB images, or RGBA images if the video has transparency.

    Raises:
        ValueError: The video cannot be read, has no video stream, or none of its frames can be decoded.
        ImportError: PyAV is not installed.
    """
    av = _import_av()
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    is_path = isinstance(source, (str, os.PathLike))
    name = name or (os.fspath(source) if is_path else "video given as bytes")
    if isinstance(source, str) and is_url(source):
        raise ValueError(f"{name} is a remote address, which is not downloaded; give a file or its bytes")
    try:
        # FFmpeg must not see the path: it would interpret "concat:…" or "frame%03d.png".
        with open(source, "rb") if is_path else io.BytesIO(source) as file:
            header = file.read(HEADER_BYTES)
            if header[8:12] in (b"WEBP", b"avis"):
                # FFmpeg reads only the first frame.
                return _read_animation(file, num_frames, min_side)
            return _Video(av, file, name, min_side).read(num_frames)
    except Exception as error:  # On damaged files PyAV raises more than its own errors.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} is not a video that can be read: {reason}") from error


def _read_animation(file: BinaryIO, num_frames: int, min_side: int | None) -> list[Image.Image]:
    file.seek(0)
    with Image.open(file, formats=("WEBP", "AVIF")) as image:
        _check_frame_size(*image.size)
        frames = []
        with _one_if_large(*image.size):
            for index in evenly_spaced(getattr(image, "n_frames", 1), num_frames):
                image.seek(index)
                frames.append(read_image(image, f"frame {index}", min_side))
    return frames


def _one_if_large(width: int, height: int) -> contextlib.AbstractContextManager:
    """Return a context in which there is only one large video or image at a time."""
    return large_file_lock if width * height > LARGE_FRAME_PIXELS else contextlib.nullcontext()


def _check_frame_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise ValueError(f"its frames have {width:,} × {height:,} pixels, more than the limit {MAX_FRAME_PIXELS:,}")


def _container_format(source: str | os.PathLike) -> str:
    """Return FFmpeg's name for the format of a video file, without decoding the video.

    Raises:
        ValueError: FFmpeg cannot read the file, or it has no video stream with a decoder.
        ImportError: PyAV is not installed.
    """
    av = _import_av()
    try:
        with open(source, "rb") as file:
            video = _Video(av, file, os.fspath(source))
            with video.open() as container:
                video.video_stream(container)
                return container.format.name
    except Exception as error:  # As in `read_frames`.
        raise ValueError(f"{source} is not a video that can be read: {error}") from error


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av") from error
    return av


class _Video:
    """A video file that is open for reading. PyAV objects have the type `Any`, because PyAV is optional."""

    def __init__(self, av: ModuleType, file: BinaryIO, name: str, min_side: int | None = None) -> None:
        self.av, self.file, self.name, self.min_side = av, file, name, min_side

    def read(self, num_frames: int) -> list[Image.Image]:
        """Read frames as [`read_frames`] does."""
        with contextlib.ExitStack() as stack:
            with self.open() as container:
                stream = self.video_stream(container)
                stack.enter_context(_one_if_large(stream.codec_context.width, stream.codec_context.height))
                timestamps, keyframes = self._timestamps(container, stream)
                wanted = [timestamps[i] for i in evenly_spaced(len(timestamps), num_frames)]
                # Only the first packet has the palette, so after a seek the frames would be black.
                has_palette = stream.codec_context.pix_fmt == "pal8"
                frames = [] if has_palette else self._seek_frames(container, stream, wanted, keyframes)
            return frames or self._decode_through(num_frames)

    def open(self) -> Any:
        """Open the container."""
        self.file.seek(0)
        # FFmpeg must not open the files and addresses that a playlist contains.
        container = self.av.open(self.file, container_options={"protocol_whitelist": "none"})
        if container.format.name == "tty":
            container.close()
            raise ValueError("it is a text file")
        return container

    def video_stream(self, container: Any) -> Any:
        """Return the video stream, which is not the cover art of a sound file."""
        cover_art = self.av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & cover_art), None)
        if stream is None:
            raise ValueError("it has no video stream")
        if stream.codec_context is None:
            raise ValueError("FFmpeg has no decoder for its video stream")
        _check_frame_size(stream.codec_context.width, stream.codec_context.height)
        # The size may change between frames.
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        if stream.codec_context.width * stream.codec_context.height > LARGE_FRAME_PIXELS:
            # Some decoders hold more frames for each thread.
            stream.codec_context.thread_count = 1
        return stream

    def _timestamps(self, container: Any, stream: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the sorted timestamps of all frames, and those of the key frames with their decoding timestamps.

        Both lists are empty if a timestamp is missing, or if many occur twice.
        """
        timestamps, keyframes, packets = [], [], 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                packets += 1
                if packet.is_discard:
                    continue
                if packet.pts is None:
                    return [], []
                timestamps.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        except self.av.FFmpegError as error:
            logger.warning("%s ends early, after %d frames (%s)", self.name, packets, error.strerror)
        if packets < stream.frames:
            logger.warning("%s has %d of the %d frames that its header announces", self.name, packets, stream.frames)
        # In MPEG program streams, FFmpeg guesses the timestamps between the few that are stored.
        if len(timestamps) - len(set(timestamps)) > MAX_REPEATED_RATIO * len(timestamps):
            return [], []
        return sorted(timestamps), sorted(keyframes)

    def _seek_frames(
        self, container: Any, stream: Any, wanted: list[int], keyframes: list[tuple[int, int]]
    ) -> list[Image.Image]:
        """Read the frames at the timestamps `wanted`; returns no frames if one of them is not found exactly."""
        images, decoded, position = [], None, None
        # Container formats seek by the timestamp of a frame, by that of decoding, or not before the frames that a
        # frame depends on. What worked for a frame is tried first for the next one.
        attempt, from_start = 0, 2
        for timestamp in wanted:
            index = bisect_right(keyframes, timestamp, key=itemgetter(0)) - 1
            if index < 0:
                return []
            frame = None
            if decoded is not None and (attempt == from_start or keyframes[index][0] <= position):
                frame = self._find(decoded, timestamp)
            else:
                targets = (timestamp, keyframes[index][1], keyframes[0][1])
                while frame is None and attempt <= from_start:
                    with contextlib.suppress(self.av.FFmpegError):
                        container.seek(targets[attempt], stream=stream)
                        decoded = self._needed(container, stream, set(wanted))
                        frame = self._find(decoded, timestamp, after=keyframes[index][0])
                    attempt += frame is None
            if frame is None:
                return []
            images.append(self._to_image(frame))
            position = timestamp
        return images

    def _find(self, decoded: Iterator, timestamp: int, after: int | None = None) -> Any:
        """Return the frame at a timestamp, `None` without one; `after` is the key frame that it depends on."""
        try:
            for frame in decoded:
                if frame.pts is None or (after is not None and frame.pts > after):
                    return None
                after = None
                if frame.pts >= timestamp:
                    return frame if frame.pts == timestamp and not frame.is_corrupt else None
        except self.av.FFmpegError:
            pass
        return None

    @staticmethod
    def _needed(container: Any, stream: Any, wanted: set[int]) -> Iterator:
        """Decode frames from the container's position on; frames that are not needed may be missing."""
        can_skip = stream.codec_context.name not in DECODERS_WITHOUT_SKIPPING
        for packet in container.demux(stream):
            # The codec knows which frames no other frame depends on: half of them with x264's defaults.
            stream.codec_context.skip_frame = "NONREF" if can_skip and packet.pts not in wanted else "DEFAULT"
            yield from packet.decode()

    def _decode_through(self, num_frames: int) -> list[Image.Image]:
        count = sum(1 for _ in self._decoded())
        if count == 0:
            raise ValueError("it has no frames that can be decoded; it is empty, truncated or damaged")
        wanted = set(evenly_spaced(count, num_frames))
        return [self._to_image(frame) for i, frame in enumerate(islice(self._decoded(), count)) if i in wanted]

    def _decoded(self) -> Iterator:
        broken = 0
        with self.open() as container:
            try:
                for packet in container.demux(self.video_stream(container)):
                    try:
                        yield from packet.decode()
                    except self.av.FFmpegError:
                        broken += 1
            except self.av.FFmpegError:
                broken += 1
        if broken:
            logger.warning("%s: %d damaged packets were skipped", self.name, broken)

    def _to_image(self, frame: Any) -> Image.Image:
        mode = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
        factor = max(1, min(frame.width, frame.height) // self.min_side) if self.min_side else 1
        width, height = (-(-length // factor) for length in (frame.width, frame.height))
        frame_size = {"width": width, "height": height, "interpolation": "AREA"} if factor > 1 else {}
        image = Image.fromarray(frame.reformat(format=mode, **frame_size).to_ndarray())
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image
