"""Serve a checkpoint on Inference Endpoints: JSON or the bytes of an image in, tags out.

`optsg push` publishes this file next to the weights. It needs only `transformers`, the requirements of the model's
code, and PyAV to read videos. To use the book of the checkpoint, it needs the package `optsg`.
"""

import base64
import binascii
import importlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import pipeline

logger = logging.getLogger(__name__)

PACKAGE = "modeling_optsg"
# Folder of the book inside a checkpoint.
INDEX_FOLDER = "index"
PARTS = ("image", "video", "frames", "title")
PARAMETERS = ("top_k", "threshold", "decoding", "tag_vocabulary")
# Some clients add "options" that are meant for another server.
REQUEST = ("inputs", "parameters", "options")
# HEIC and AVIF start like MP4.
STILL_IMAGE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
URL_SAFE_TO_STANDARD = str.maketrans("-_", "+/")


class EndpointHandler:
    """The handler that the Inference Endpoints toolkit calls.

    Args:
        path: The checkpoint's folder. If it has a book, tags of similar examples are used too. Without the package
            `optsg`, the book is not used, and a warning is logged.

    Raises:
        ValueError: The book is damaged or was made with another model.
    """

    def __init__(self, path: str = "."):
        self.pipeline = pipeline("tag-generation", model=path, trust_remote_code=True)
        self.options: dict[str, Any] = {}
        if Path(path, INDEX_FOLDER).is_dir():
            if importlib.util.find_spec(PACKAGE) is None:
                logger.warning("The book is not used, because it needs the package optsg. Add it to requirements.txt.")
            else:
                make_tagger = importlib.import_module(f"{PACKAGE}.book").BookTagger
                tagger = make_tagger(self.pipeline.model, self.pipeline.processor, path)
                # Two requests at the same time would make the indices twice.
                tagger.book.prepare()
                self.options["book"] = tagger

    def __call__(self, data: Mapping[str, Any]) -> list[dict] | list[list[dict]]:
        """Answer a request.

        Args:
            data: `{"inputs": …, "parameters": {…}}`. The inputs are an example or a list of examples. An example is
                an image, a video, or a dictionary with "title" and one of "image", "video" and "frames" (a list of
                images). Files are bytes or base64, with or without a `data:…;base64,` prefix. An image may be a PIL
                image, which the toolkit makes from a body with an image content type. The parameters are `top_k`,
                `threshold`, `decoding` and `tag_vocabulary` of the pipeline. With a `tag_vocabulary`, the book is not
                used.

        Returns:
            Per example `[{"label": str, "score": float, "novel": bool}]`, sorted by falling score. With a book, a tag
            also has the `"source"` and the `"neighbours"` that [`BookTagger`] describes.

        Raises:
            ValueError: The request is malformed, or a file cannot be read. Paths and addresses are never opened.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError('expected {"inputs": …, "parameters": {…}}')
        if unknown := data.keys() - set(REQUEST):
            raise ValueError(f'unknown keys {sorted(map(str, unknown))} in the request; settings go in "parameters"')
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ValueError(f'"parameters" is of type {type(parameters).__name__}; expected an object')
        if unknown := parameters.keys() - set(PARAMETERS):
            raise ValueError(f"unknown parameters {sorted(map(str, unknown))}; expected some of {list(PARAMETERS)}")
        inputs = data["inputs"]
        is_batch = isinstance(inputs, list)
        examples = [_read_example(example) for example in (inputs if is_batch else [inputs])]
        options = {} if parameters.get("tag_vocabulary") is not None else self.options
        tags = self.pipeline(examples, batch_size=8, **parameters, **options)
        return tags if is_batch else tags[0]


def _read_example(example: Any) -> dict[str, Any]:
    """Return an example of the request as the pipeline takes it, with its files decoded."""
    if not isinstance(example, Mapping):
        content = _read_file(example)
        return {"video" if _is_video(content) else "image": content}
    if unknown := example.keys() - set(PARTS):
        raise ValueError(f"unknown keys {sorted(map(str, unknown))} in an example; expected some of {list(PARTS)}")
    example = {part: value for part, value in example.items() if value is not None}
    for part in example.keys() & {"image", "video"}:
        example[part] = _read_file(example[part])
    if "frames" in example:
        if not isinstance(example["frames"], list):
            raise ValueError(f'"frames" is of type {type(example["frames"]).__name__}; expected a list of images')
        example["frames"] = [_read_file(frame) for frame in example["frames"]]
    return example


def _read_file(file: Any) -> bytes | Image.Image:
    """Return a file's bytes. Text is base64 and never a path or an address, which would be the server's."""
    if isinstance(file, bytes | bytearray):
        return bytes(file)
    if isinstance(file, Image.Image):
        return file
    if not isinstance(file, str):
        raise ValueError(f"a file is of type {type(file).__name__}; expected its bytes in base64")
    if file.startswith("data:"):
        _, _, file = file.partition(",")
    # Both alphabets are accepted, with or without padding and line breaks.
    text = "".join(file.split()).rstrip("=").translate(URL_SAFE_TO_STANDARD)
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("a file is text that is not base64; paths and addresses are not opened") from error
    return content


def _is_video(content: bytes | Image.Image) -> bool:
    """Return whether a file starts like MP4 or QuickTime, Matroska or WebM, or AVI."""
    if not isinstance(content, bytes):
        return False
    is_mp4 = content[4:8] == b"ftyp" and content[8:12] not in STILL_IMAGE_BRANDS
    return is_mp4 or content.startswith(b"\x1aE\xdf\xa3") or (content[:4] == b"RIFF" and content[8:12] == b"AVI ")
