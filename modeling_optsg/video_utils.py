"""Frames from videos, through PyAV."""

import io
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice

from PIL import Image, UnidentifiedImageError

from .image_utils import is_url

logger = logging.getLogger(__name__)


def evenly_spaced(count: int, num: int) -> list[int]:
    """The indices at the centres of `num` equal segments of `count` frames; all of them if there are no more."""
    return list(range(count)) if count <= num else [(2 * i + 1) * count // (2 * num) for i in range(num)]


def is_video_file(path: str | os.PathLike) -> bool:
    """Whether a local file is a video by its content; a file that cannot be opened, or an address, is not."""
    if is_url(os.fspath(path)):
        return False
    try:
        with Image.open(path) as image:
            # Pillow shows the first frame of a GIF, and recognises MPEG without reading it.
            return image.format in ("GIF", "MPEG")
    except UnidentifiedImageError:
        return True
    except (OSError, ValueError):
        return False


def read_frames(source: str | os.PathLike | bytes, num_frames: int, name: str | None = None) -> list[Image.Image]:
    """Reads `num_frames` frames of a video, those at the centres of as many equal segments of its frames.

    The video's packets are listed first, without decoding them; then only the frames asked for, and those they depend
    on, are decoded. A video whose timestamps do not allow that is decoded from end to end, twice.

    Args:
        source: path of the video, or the bytes of its file. Animated GIF and PNG are videos too; animated WebP is not.
        num_frames: how many frames. A video that has fewer gives all it has.
        name: what to call the video in errors; its path by default.

    Returns:
        The frames in time order, turned upright, as RGB images, or RGBA where the video has transparency.

    Raises:
        ValueError: naming the video, if it cannot be read, has no video stream, or none of its frames can be decoded.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av") from error

    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    is_path = isinstance(source, (str, os.PathLike))
    name = name or (os.fspath(source) if is_path else "video given as bytes")
    if isinstance(source, str) and is_url(source):
        raise ValueError(f"{name} is a remote address; nothing is downloaded here, give a file or its bytes")
    try:
        # A Python file, never the path: FFmpeg would take "concat:…" or "frame%03d.png" for more than a file name.
        with open(source, "rb") if is_path else io.BytesIO(source) as file:
            return _Video(av, file, name).read(num_frames)
    except Exception as error:  # On damaged files PyAV raises more than its own errors.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} is not a video that can be read: {reason}") from error


def check_video(source: str | os.PathLike) -> None:
    """Opens a video without decoding it: milliseconds.

    Raises:
        ValueError: it is no file that FFmpeg knows, or has no video stream with a decoder.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av") from error

    try:
        with open(source, "rb") as file:
            video = _Video(av, file, os.fspath(source))
            with video._open() as container:
                video._video_stream(container)
    except Exception as error:  # As in `read_frames`.
        raise ValueError(f"{source} is not a video that can be read: {error}") from error


class _Video:
    def __init__(self, av, file, name: str):
        self.av, self.file, self.name = av, file, name

    def read(self, num_frames: int) -> list[Image.Image]:
        with self._open() as container:
            stream = self._video_stream(container)
            timestamps, keyframes = self._timestamps(container, stream)
            wanted = [timestamps[i] for i in evenly_spaced(len(timestamps), num_frames)]
            frames = self._seek_frames(container, stream, wanted, keyframes)
        return frames or self._decode_through(num_frames)

    def _open(self):
        self.file.seek(0)
        # A playlist must not make FFmpeg open the files and addresses it names.
        container = self.av.open(self.file, container_options={"protocol_whitelist": "none"})
        if container.format.name == "tty":
            container.close()
            raise ValueError("it is a text file")
        return container

    def _video_stream(self, container):
        cover_art = self.av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & cover_art), None)
        if stream is None:
            raise ValueError("it has no video stream")
        if stream.codec_context is None:
            raise ValueError("FFmpeg has no decoder for its video stream")
        return stream

    def _timestamps(self, container, stream) -> tuple[list[int], list[int]]:
        """The timestamps of all frames and of the key frames, in order; two empty lists if they cannot be told."""
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
                    keyframes.append(packet.pts)
        except self.av.FFmpegError as error:
            logger.warning("%s breaks off after %d frames (%s)", self.name, packets, error.strerror)
        if packets < stream.frames:
            logger.warning("%s holds %d of the %d frames it announces", self.name, packets, stream.frames)
        if len(set(timestamps)) < len(timestamps):
            return [], []
        return sorted(timestamps), sorted(keyframes)

    def _seek_frames(self, container, stream, wanted: list[int], keyframes: list[int]) -> list[Image.Image]:
        """The frames at the timestamps `wanted`, or none at all if one of them cannot be had exactly."""
        images, decoded, position = [], None, None
        try:
            for timestamp in wanted:
                keyframe = bisect_right(keyframes, timestamp) - 1
                if keyframe < 0:
                    return []
                if position is None or keyframes[keyframe] > position:
                    container.seek(timestamp, stream=stream)
                    decoded = self._needed(container, stream, set(wanted))
                frame = next((f for f in decoded if f.pts is None or f.pts >= timestamp), None)
                if frame is None or frame.pts != timestamp or frame.is_corrupt:
                    return []
                images.append(_to_image(frame))
                position = timestamp
        except self.av.FFmpegError:
            return []
        return images

    @staticmethod
    def _needed(container, stream, wanted: set[int]) -> Iterator:
        """Frames from where the container stands; those that are not wanted and of no use to others may be missing."""
        for packet in container.demux(stream):
            # The codec itself knows which frames no other one depends on: half of them, with x264's settings.
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def _decode_through(self, num_frames: int) -> list[Image.Image]:
        count = sum(1 for _ in self._decoded())
        if count == 0:
            raise ValueError("it has no frames that can be decoded; it is empty, truncated or damaged")
        wanted = set(evenly_spaced(count, num_frames))
        return [_to_image(frame) for i, frame in enumerate(islice(self._decoded(), count)) if i in wanted]

    def _decoded(self) -> Iterator:
        broken = 0
        with self._open() as container:
            try:
                for packet in container.demux(self._video_stream(container)):
                    try:
                        yield from packet.decode()
                    except self.av.FFmpegError:
                        broken += 1
            except self.av.FFmpegError:
                broken += 1
        if broken:
            logger.warning("%s: %d damaged packets were skipped", self.name, broken)


def _to_image(frame) -> Image.Image:
    has_alpha = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba")) if has_alpha else frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
