"""Reads uploaded files in a separate process with limited memory and time.

If a crafted file crashes the decoder, hangs it or fills its memory, only that process ends and the Space continues.
Run as a program, this file is that process: it loads the processor and answers one request after another.

A crafted file may also take over that process, so its answers are parsed as data. An answer is a line of JSON,
followed by the arrays in the format of `safetensors`. A request is a line of JSON.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy
from client_budget import ReadingBudget
from limits import InputError, Limits

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
VIDEO_FORMATS = {"mp4", "mov", "matroska", "webm", "avi", "gif", "apng", "mpegts", "mpeg", "ogg", "flv"}
LOAD_SECONDS = 300
# The reading process has ended, or its answer has another format.
FAILURES = (OSError, ValueError, safetensors.SafetensorError)
MAX_HEADER_BYTES, MAX_ARRAY_BYTES, MAX_MESSAGE_CHARACTERS = 100_000, 500_000_000, 1000


class FileReader:
    """The process that reads files. It is restarted whenever it has ended.

    Args:
        model: Folder or Hub name of the model whose processor reads the files.
        limits: The limits of this Space.
    """

    def __init__(self, model: str, limits: Limits):
        self.model, self.limits = model, limits
        self.lock, self.budget = threading.Lock(), ReadingBudget(limits)
        self.is_stopped = False
        self._start()

    def _start(self) -> None:
        command = [sys.executable, os.path.abspath(__file__), self.model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.loaded = False
        self._send(self.limits.as_dict())

    def _send(self, request: dict) -> None:
        # ASCII escapes, since file names need not be valid Unicode.
        self.process.stdin.write(json.dumps(request, allow_nan=False).encode() + b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Kill the process, and do not start it again.

        This does not wait for the end of the process, which takes a second on a busy machine.
        """
        self.is_stopped = True
        self.process.kill()

    def _kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _restart(self) -> None:
        """Start the process again.

        Raises:
            InputError: The Space is stopping.
        """
        self._kill()
        if self.is_stopped:
            raise InputError("This Space is stopping.")
        self._start()

    def wait_until_ready(self) -> None:
        """Wait until the process has loaded the processor."""
        with self.lock:
            self._ensure_loaded()

    def read(self, path: str, name: str, title: str = "", client: str = "") -> tuple[str, dict[str, np.ndarray]]:
        """Read and preprocess one file.

        Args:
            path: Path of the file, which must have been uploaded to this Space.
            name: The visitor's name for the file, used in messages.
            title: Title of the image or video.
            client: Address of the visitor, whose time for reading is limited.

        Returns:
            `"image"` or `"video"`, and the processor's arrays for this example.

        Raises:
            InputError: The file cannot be read or exceeds the limits, or the visitor has used its time.
        """
        self.budget.check(client)
        with self.lock:
            self._ensure_loaded()
            self.budget.check(client)
            # The client also pays for the restart of the process that its file ended.
            with self.budget.measured(client):
                header, arrays = self._read(path, name, title)
        if "error" in header:
            raise InputError(str(header["error"]))
        return "video" if header.get("kind") == "video" else "image", arrays

    def _read(self, path: str, name: str, title: str) -> tuple[dict, dict[str, np.ndarray]]:
        try:
            self._send({"path": path, "name": name, "title": title})
            return self._receive(self.limits.read_seconds)
        except FAILURES:
            self._restart()
            with contextlib.suppress(*FAILURES):  # The next file starts the process again.
                self._ensure_loaded()
            raise InputError(
                f"{name} could not be read within {self.limits.read_seconds} seconds and "
                f"{self.limits.read_megabytes} MB of memory."
            ) from None

    def _ensure_loaded(self) -> None:
        if self.process.poll() is not None:
            self._restart()
        if not self.loaded:
            self._receive(LOAD_SECONDS)
            self.loaded = True

    def _receive(self, seconds: int) -> tuple[dict, dict[str, np.ndarray]]:
        """Return the next answer of the process, which is killed after that many seconds.

        Raises:
            ValueError, safetensors.SafetensorError: The process has ended, or its answer has another format.
        """
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            return read_answer(self.process.stdout)
        finally:
            timer.cancel()


def write_answer(file: BinaryIO, header: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write an answer of the reading process.

    Args:
        file: The file.
        header: A JSON object.
        arrays: Arrays by name.
    """
    data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    file.write(json.dumps({**header, "bytes": len(data)}, allow_nan=False).encode() + b"\n" + data)
    file.flush()


def read_answer(file: BinaryIO) -> tuple[dict, dict[str, np.ndarray]]:
    """Read what [`write_answer`] wrote, without trusting it.

    Raises:
        ValueError, safetensors.SafetensorError: The file has ended, or the answer has another format or is too long.
    """
    line = file.readline(MAX_HEADER_BYTES)
    if not line.endswith(b"\n"):
        raise ValueError("The answer is incomplete or too long.")
    try:
        header = json.loads(line)
    except RecursionError as error:
        raise ValueError("The answer is nested too deeply.") from error
    size = header.get("bytes") if isinstance(header, dict) else None
    if type(size) is not int or not 0 <= size <= MAX_ARRAY_BYTES:
        raise ValueError(f"The answer has arrays of {size!r} bytes; the limit is {MAX_ARRAY_BYTES} bytes.")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("The answer is incomplete.")
    return header, safetensors.numpy.load(data)


def detect_kind(path: str, name: str, limits: Limits) -> str:
    """Tell an image from a video and check its size, without decoding it.

    Args:
        path: Path of the file.
        name: The visitor's name for the file, used in messages.
        limits: The limits of this Space.

    Returns:
        `"image"` or `"video"`.

    Raises:
        InputError: The file is neither, or exceeds the limits.
    """
    from PIL import Image, UnidentifiedImageError

    size = os.path.getsize(path)
    if size == 0:
        raise InputError(f"{name} is empty.")
    if size > limits.file_megabytes * 10**6:
        raise InputError(f"{name} has {size / 1e6:.0f} MB; the limit is {limits.file_megabytes} MB.")
    Image.MAX_IMAGE_PIXELS = limits.image_megapixels * 10**6
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                animated = image.format in ("GIF", "PNG") and getattr(image, "is_animated", False)
                if not animated:
                    return "image"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(f"{name} exceeds the limit of {limits.image_megapixels} million pixels.") from None
    except UnidentifiedImageError:
        pass
    except Exception as error:  # Pillow's plugins raise every kind of exception on damaged files.
        raise InputError(f"{name} cannot be read as an image: {error}".replace(path, name)) from None
    _check_video(path, name, limits)
    return "video"


def _check_video(path: str, name: str, limits: Limits) -> None:
    """Check a video's format, frame size, duration and number of frames from its packets."""
    import av

    neither = f"{name} is neither an image nor a video that can be read."
    try:
        with open(path, "rb") as file, av.open(file, container_options={"protocol_whitelist": "none"}) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or not VIDEO_FORMATS & set(container.format.name.split(",")):
                raise InputError(neither)
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > limits.image_megapixels * 10**6:
                raise InputError(f"The frames of {name} exceed the limit of {limits.image_megapixels} million pixels.")
            frames, first, last = 0, None, None
            for packet in container.demux(stream):
                frames += packet.size > 0
                if packet.pts is not None:
                    first = packet.pts if first is None else min(first, packet.pts)
                    last = packet.pts if last is None else max(last, packet.pts)
                seconds = float((last - first) * stream.time_base) if last is not None else 0
                if frames > limits.video_frames or seconds > limits.video_seconds:
                    raise InputError(
                        f"{name} exceeds the limit of {limits.video_seconds} seconds or {limits.video_frames} frames."
                    )
                if frames * pixels > limits.video_gigapixels * 10**9:
                    raise InputError(
                        f"The frames of {name} together exceed the limit of {limits.video_gigapixels} billion pixels."
                    )
    except InputError:
        raise
    except Exception:  # PyAV raises more than its own errors on damaged files.
        raise InputError(neither) from None


def _preprocess(processor: Any, path: str, name: str, title: str, limits: Limits) -> tuple[str, dict]:
    """Run the processor on one file; see [`FileReader.read`]."""
    from PIL import Image

    kind = detect_kind(path, name, limits)
    # With bytes, the processor's messages use the visitor's name for the file instead of its path on this server.
    file = {"bytes": Path(path).read_bytes(), "path": name}
    files = {"images": [file]} if kind == "image" else {"videos": [file]}
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return kind, dict(processor(**files, titles=[title], return_tensors="np"))
    except (ValueError, MemoryError) as error:
        raise InputError(str(error) or f"{name} needs too much memory.") from None


def _limit_memory(megabytes: int) -> None:
    """Limit the additional memory of this process. Only Linux supports this; the time limit works everywhere."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + megabytes * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(model: str) -> None:
    """Answer requests from standard input until it is closed.

    Args:
        model: Folder or Hub name of the model whose processor reads the files.
    """
    # Libraries may print; their output must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits = Limits(**json.loads(sys.stdin.buffer.readline()))
    import av  # noqa: F401  Loaded before the limit is set, so that the library itself does not count.
    import torch
    from loading import load_processor

    torch.set_num_threads(1)
    processor = load_processor(model)
    _limit_memory(limits.read_megabytes)
    write_answer(answers, {}, {})
    for line in sys.stdin.buffer:
        request, arrays = json.loads(line), {}
        name = request["name"]
        try:
            kind, arrays = _preprocess(processor, request["path"], name, request["title"], limits)
            header = {"kind": kind}
        except InputError as error:
            header = {"error": str(error)[:MAX_MESSAGE_CHARACTERS]}
        except Exception as error:
            print(f"{name!r}: {type(error).__name__}: {error!r}", file=sys.stderr)
            header = {"error": f"{name} cannot be read."}
        write_answer(answers, header, arrays)


if __name__ == "__main__":
    main(sys.argv[1])
