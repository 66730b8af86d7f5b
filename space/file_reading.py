"""Reads files of strangers in a process of its own, with a limit on memory and time.

A decoder that crashes, hangs or fills its memory on a crafted file ends that process and not the Space. As a program
this file is that process: it loads the processor and answers one request after the other.
"""

import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

from limits import Limits, Refused

IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
VIDEOS = {"mp4", "mov", "matroska", "webm", "avi", "gif", "apng", "mpegts", "mpeg", "ogg", "flv"}
LOAD_SECONDS = 300


class FileReader:
    """The process that reads, started anew when a file has ended it.

    Args:
        model: folder or Hub name of the model whose processor reads.
    """

    def __init__(self, model: str, limits: Limits):
        self.model, self.limits = model, limits
        self.lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        command = [sys.executable, os.path.abspath(__file__), self.model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.loaded = False
        pickle.dump(self.limits, self.process.stdin)
        self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self) -> None:
        """Until the process has loaded what it needs."""
        with self.lock:
            self._load()

    def read(self, path: str, name: str, title: str = "") -> tuple[str, dict]:
        """
        Args:
            path: of the file, which must have been sent to this Space.
            name: what its sender calls it.

        Returns:
            "image" or "video", and the processor's arrays for this one example.

        Raises:
            Refused: it cannot be read, or is larger or takes longer than the limits allow.
        """
        with self.lock:
            self._load()
            try:
                pickle.dump((path, name, title), self.process.stdin)
                self.process.stdin.flush()
                error, answer = self._answer(self.limits.read_seconds)
            except (EOFError, OSError, pickle.UnpicklingError):
                self.stop()
                self._start()
                raise Refused(
                    f"{name} took more than {self.limits.read_seconds} seconds or {self.limits.read_megabytes} MB "
                    "to read, and was given up."
                ) from None
        if error is not None:
            raise Refused(error)
        return answer

    def _load(self) -> None:
        if self.process.poll() is not None:
            self.stop()
            self._start()
        if not self.loaded:
            self.loaded = self._answer(LOAD_SECONDS)

    def _answer(self, seconds: int):
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            return pickle.load(self.process.stdout)
        finally:
            timer.cancel()


def kind_of(path: str, name: str, limits: Limits) -> str:
    """Whether a file is a "image" or a "video", from its header and, of a video, its packets; nothing is decoded.

    Raises:
        Refused: it is neither, or beyond the limits.
    """
    from PIL import Image, UnidentifiedImageError

    size = os.path.getsize(path)
    if size == 0:
        raise Refused(f"{name} is empty.")
    if size > limits.file_megabytes * 10**6:
        raise Refused(f"{name} has {size / 1e6:.0f} MB; at most {limits.file_megabytes} MB are taken.")
    Image.MAX_IMAGE_PIXELS = limits.image_megapixels * 10**6
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGES) as image:
                moves = image.format in ("GIF", "PNG") and getattr(image, "is_animated", False)
                if not moves:
                    return "image"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Refused(f"{name} has more than {limits.image_megapixels} million pixels.") from None
    except UnidentifiedImageError:
        pass
    except Exception as error:  # Pillow's plugins raise every kind of exception on damaged files.
        raise Refused(f"{name} is not an image that can be read: {error}".replace(path, name)) from None
    _check_video(path, name, limits)
    return "video"


def _check_video(path: str, name: str, limits: Limits) -> None:
    import av

    neither = f"{name} is neither an image nor a video that can be read."
    try:
        with open(path, "rb") as file, av.open(file, container_options={"protocol_whitelist": "none"}) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or not VIDEOS & set(container.format.name.split(",")):
                raise Refused(neither)
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > limits.image_megapixels * 10**6:
                raise Refused(f"{name} has frames of more than {limits.image_megapixels} million pixels.")
            frames, first, last = 0, None, None
            for packet in container.demux(stream):
                frames += packet.size > 0
                if packet.pts is not None:
                    first = packet.pts if first is None else min(first, packet.pts)
                    last = packet.pts if last is None else max(last, packet.pts)
                seconds = float((last - first) * stream.time_base) if last is not None else 0
                if frames > limits.video_frames or seconds > limits.video_seconds:
                    raise Refused(
                        f"{name} is a video of more than {limits.video_seconds} seconds or {limits.video_frames} frames."
                    )
                if frames * pixels > limits.video_gigapixels * 10**9:
                    raise Refused(f"{name} has more than {limits.video_gigapixels} billion pixels in all its frames.")
    except Refused:
        raise
    except Exception:  # On damaged files PyAV raises more than its own errors.
        raise Refused(neither) from None


def _prepare(processor, path: str, name: str, title: str, limits: Limits) -> tuple[str, dict]:
    from PIL import Image

    kind = kind_of(path, name, limits)
    # With the bytes at hand the processor names the file as its sender does, not by its place on this server.
    file = {"bytes": Path(path).read_bytes(), "path": name}
    files = {"images": [file]} if kind == "image" else {"videos": [file]}
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return kind, dict(processor(**files, titles=[title], return_tensors="np"))
    except (ValueError, MemoryError) as error:
        raise Refused(str(error) or f"{name} needs more memory than the reading of a file may take.") from None


def _limit_memory(megabytes: int) -> None:
    """From what this process has now. Only where the system knows such a limit; time is limited everywhere."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + megabytes * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(model: str) -> None:
    # Whatever a library prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits = pickle.load(sys.stdin.buffer)
    import av  # noqa: F401  Before the limit, so that the library itself does not count.
    import torch
    from transformers import AutoProcessor

    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    _limit_memory(limits.read_megabytes)
    answer = True
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            path, name, title = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (None, _prepare(processor, path, name, title, limits))
        except Refused as error:
            answer = (str(error), None)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            answer = (f"{name} cannot be read.", None)


if __name__ == "__main__":
    main(sys.argv[1])
