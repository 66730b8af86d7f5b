"""Checks the arguments of the processor and of the pipeline, and gives them one form. Needs no torch."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from .video_utils import is_video_file

PIXEL_INPUTS = ("images", "videos", "pixel_values")
VISUAL_INPUTS = (*PIXEL_INPUTS, "frame_features")
# The parts of an example of the pipeline and the processor's arguments for them.
PARTS = {
    "image": "images",
    "video": "videos",
    "frames": "videos",
    "frame_features": "frame_features",
    "title": "titles",
}
# The limit on Linux; other systems have a lower one.
MAX_PATH_LENGTH = 4096
# Further columns that a row of a tagging dataset may have; they are ignored.
OTHER_COLUMNS = ("id", "tags", "file_name", "group")


def name_parts(example: Any) -> dict[str, Any]:
    """Return the parts of an example of the pipeline by the processor's arguments for them.

    Args:
        example: An image, the path of a video, or a dictionary with some of `PARTS`.

    Raises:
        ValueError: The dictionary has unknown keys, or both a video and frames.
    """
    if not isinstance(example, Mapping):
        is_video = isinstance(example, (str, os.PathLike)) and is_video_file(example)
        example = {"video" if is_video else "image": example}
    elif "bytes" in example and example.keys() <= {"bytes", "path"}:
        example = {"image": example}
    given = {part: value for part, value in example.items() if part in PARTS and value is not None}
    if unknown := example.keys() - PARTS.keys() - set(OTHER_COLUMNS):
        raise ValueError(f"unknown keys {sorted(map(str, unknown))} in an example; expected some of {list(PARTS)}")
    if {"video", "frames"} <= given.keys():
        raise ValueError('an example has both "video" and "frames"; pass one of them')
    return {PARTS[part]: value for part, value in given.items()}


class ProcessorInputs:
    """The arguments of a call of [`OPTSGProcessor`], as lists with one entry per example.

    Raises:
        ValueError: The arguments differ in length, an example has no input, or more than one image.
    """

    def __init__(
        self, images: Any, videos: Any, titles: Any, tags: Any, frame_features: Any, pixel_values: Any
    ) -> None:
        is_file = isinstance(images, (str, os.PathLike, bytes, Mapping, Image.Image))
        self.images = _to_list("images", images, single=is_file or getattr(images, "ndim", 4) < 4)
        is_file = isinstance(videos, (str, os.PathLike, bytes, Mapping))
        self.videos = _to_list("videos", videos, single=is_file or getattr(videos, "ndim", 5) < 5)
        self.titles = _to_list("titles", titles, single=isinstance(titles, str))
        is_tag_set = isinstance(tags, (list, tuple, set)) and isinstance(next(iter(tags), ""), str)
        self.tags = _to_list("tags", tags, single=is_tag_set)
        is_video = getattr(frame_features, "ndim", 3) < 3
        self.frame_features = _to_list("frame_features", frame_features, single=is_video)

        is_example = getattr(pixel_values, "ndim", 5) < 5
        self.pixel_values = _to_list("pixel_values", pixel_values, single=is_example)

        columns = {name: values for name, values in vars(self).items() if values is not None}
        if len({len(values) for values in columns.values()}) > 1:
            counts = ", ".join(f"{len(values)} {name}" for name, values in columns.items())
            raise ValueError(f"got {counts}; expected one entry per example, None for a missing input")
        self.size = len(next(iter(columns.values()), []))
        if self.size == 0:
            raise ValueError("there are no examples; give images, videos, frame_features or titles")
        for name in (*VISUAL_INPUTS, "titles", "tags"):
            setattr(self, name, columns.get(name, [None] * self.size))
        self.titles = [_check_title(title, i) for i, title in enumerate(self.titles)]
        self._check_examples()

    def has(self, name: str) -> bool:
        """Return whether any example has this input."""
        return any(value is not None for value in getattr(self, name))

    def _check_examples(self) -> None:
        for i in range(self.size):
            given = [f"{name}[{i}]" for name in VISUAL_INPUTS if getattr(self, name)[i] is not None]
            if len(given) > 1:
                raise ValueError(f"example {i} has {' and '.join(given)}; expected one of them")
            if not given and self.titles[i] is None:
                names = ", ".join(f"{name}[{i}]" for name in VISUAL_INPUTS)
                raise ValueError(
                    f"example {i} has neither an image nor a title: {names} and titles[{i}] are all missing or empty"
                )
        if self.has("frame_features") and any(self.has(name) for name in PIXEL_INPUTS):
            raise ValueError("some examples have frame features and others pixels; a batch must not have both")


def _to_list(name: str, values: Any, single: bool) -> list | None:
    """Convert an argument to a list. `single` means that it is one example and not a batch."""
    if values is None:
        return None
    if single:
        return [values]
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} is of type {type(values).__name__}; expected one entry per example")
    return list(values)


def _check_title(title: Any, i: int) -> str | None:
    """Check a title; a blank one becomes `None`."""
    if title is None:
        return None
    if not isinstance(title, str):
        raise ValueError(f"titles[{i}] is {title!r} of type {type(title).__name__}; expected str or None")
    check_unicode(title, f"titles[{i}], {title!r},")
    return title if title.strip() else None


def check_unicode(text: str, name: str) -> None:
    """Check that text can be encoded; `name` stands for it in the error message.

    Raises:
        ValueError: The text contains a part of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode text ({error.reason})") from error
