"""Finds the image, the video or the frame features of an example in a folder, by the example's id."""

import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .frame_features import read_frame_features, usual_width

logger = logging.getLogger(__name__)


class UnusableMediaError(Exception):
    """An example has no file that can be used; the message completes "examples …"."""


class MediaFolder:
    """A folder in which the file of an example is named by the example's id.

    Args:
        folder: The folder.
        kind: "image", "video" or "frame_features".
        suffixes: Suffixes of the files. Of two files with the same id, the one with the earlier suffix is used.
        check_media: Whether images and videos are opened, which takes milliseconds and decodes nothing.
    """

    def __init__(self, folder: Path, kind: str, suffixes: tuple[str, ...], check_media: bool = True):
        self.folder = folder.resolve()
        self.kind = kind
        self.check_media = check_media
        # One scan instead of a look at the disk for each suffix of each example.
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(suffixes)]
        names.sort(key=lambda name: suffixes.index(os.path.splitext(name)[1].lower()), reverse=True)
        self._names = {os.path.splitext(name)[0]: name for name in names}
        # By majority, because any single file may be the wrong one.
        self._width = usual_width(self._sorted_paths()) if kind == "frame_features" else None

    def read(self, example_id: str) -> dict | np.ndarray:
        """Return an undecoded image or video as `datasets` has it, or frame features `[frames, width]`.

        Raises:
            UnusableMediaError: The file is missing, outside the folder or damaged.
            ImportError: The files need a package that is not installed.
        """
        path = self._path(example_id)
        if self.kind == "frame_features":
            return self._read_features(path)
        if self.check_media:
            try:
                (check_image if self.kind == "image" else check_video)(path)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                logger.info("%s: %s", path, error)
                raise UnusableMediaError(f"whose {self.kind} cannot be opened") from error
        return {"bytes": None, "path": str(path)}

    def _sorted_paths(self) -> list[Path]:
        return [self.folder / name for _, name in sorted(self._names.items())]

    def _path(self, example_id: str) -> Path:
        # An id must not lead out of the folder.
        if example_id in (".", "..") or "/" in example_id or os.sep in example_id or "\0" in example_id:
            raise UnusableMediaError("whose id is not a file name")
        path = self.folder / self._names[example_id] if example_id in self._names else None
        if path is None or not path.exists():
            raise UnusableMediaError(f"without a file in {self.folder.name}/")
        if not path.resolve().is_relative_to(self.folder):
            raise UnusableMediaError(f"whose file links out of {self.folder.name}/")
        return path

    def _read_features(self, path: Path) -> np.ndarray:
        try:
            features = read_frame_features(path)
        except ImportError:
            raise
        except Exception as error:  # Each format has its own errors for damaged files.
            logger.info("%s: %s", path, error)
            raise UnusableMediaError("whose features cannot be read") from error
        if features.shape[1] != self._width:
            raise UnusableMediaError(f"whose features are not {self._width} wide like most")
        return features


def check_image(path: Path) -> None:
    """Open an image without decoding it.

    Raises:
        OSError, Image.DecompressionBombError: The file is not an image that Pillow opens.
    """
    Image.open(path).close()


def check_video(path: Path) -> None:
    """Open a video without decoding it.

    Raises:
        ValueError: The file is not a video, or has no video stream that FFmpeg decodes.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("checking videos needs PyAV: pip install av") from error

    try:
        # A Python file and no protocols: a playlist must not make FFmpeg open the files and addresses it names.
        with open(path, "rb") as file, av.open(file, container_options={"protocol_whitelist": "none"}) as container:
            if container.format.name == "tty":
                raise ValueError("it is a text file")
            cover_art = av.stream.Disposition.attached_pic
            stream = next((stream for stream in container.streams.video if not stream.disposition & cover_art), None)
            if stream is None or stream.codec_context is None:
                raise ValueError("it has no video stream that FFmpeg decodes")
    except Exception as error:  # On damaged files PyAV raises more than its own errors.
        raise ValueError(f"{path} is not a video that can be read: {error}") from error
