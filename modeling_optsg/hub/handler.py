"""A checkpoint's handler for Inference Endpoints: requests in JSON or as an image's bytes, tags out.

It stands beside the weights and needs nothing but `transformers`, what that loads the folder with, and PyAV for videos.
"""

import base64
import binascii
import contextlib
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import pipeline

PARTS = ("image", "video", "frames", "title")
PARAMETERS = ("top_k", "threshold", "decoding", "tag_vocabulary")
# Some clients send options for a server of their own.
REQUEST = ("inputs", "parameters", "options")


class EndpointHandler:
    """
    Args:
        path: the checkpoint's folder.
    """

    def __init__(self, path: str = "."):
        self.pipeline = pipeline("tag-generation", model=path, trust_remote_code=True)

    def __call__(self, data: Mapping[str, Any]) -> list[dict] | list[list[dict]]:
        """Answers a request.

        Args:
            data: `{"inputs": …, "parameters": {…}}`. The inputs are an example or a list of examples; an example is an image
                or a video, or a dictionary of `"image"` or `"video"` or `"frames"` (a list of images) and `"title"`.
                Files are bytes or base64, with or without `data:…;base64,` before it; an image may be a PIL one,
                which the toolkit makes of a body with an image's content type. Parameters are the pipeline's `top_k`,
                `threshold`, `decoding` and `tag_vocabulary`.

        Returns:
            Per example `[{"label": str, "score": float, "novel": bool}]` by falling score.

        Raises:
            ValueError: the request is not one, or a file cannot be read. Nothing is opened or fetched by name.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError('expected {"inputs": …, "parameters": {…}}')
        if unknown := data.keys() - set(REQUEST):
            raise ValueError(f'a request has {sorted(map(str, unknown))}; settings go in "parameters"')
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ValueError(f'"parameters" is of type {type(parameters).__name__}; expected an object')
        if unknown := parameters.keys() - set(PARAMETERS):
            raise ValueError(f"there are no parameters {sorted(unknown)}; there are {list(PARAMETERS)}")
        inputs = data["inputs"]
        many = isinstance(inputs, list)
        examples = [self._example(example) for example in (inputs if many else [inputs])]
        found = self.pipeline(examples, batch_size=8, **parameters)
        return found if many else found[0]

    @staticmethod
    def _example(example: Any) -> dict:
        if not isinstance(example, Mapping):
            content = _content(example)
            return {"video" if _is_video(content) else "image": content}
        if unknown := example.keys() - set(PARTS):
            raise ValueError(f"an example has {sorted(unknown)}; expected some of {list(PARTS)}")
        example = {part: value for part, value in example.items() if value is not None}
        for part in example.keys() & {"image", "video"}:
            example[part] = _content(example[part])
        if "frames" in example:
            if not isinstance(example["frames"], list):
                raise ValueError('"frames" is not a list of images')
            example["frames"] = [_content(frame) for frame in example["frames"]]
        return example


def _content(file: Any) -> Any:
    """A file's bytes. Text is base64 and never a path or an address: those would be the server's own."""
    if isinstance(file, bytes | bytearray):
        return _of_few_pixels(bytes(file))
    if isinstance(file, Image.Image):
        return file
    if not isinstance(file, str):
        raise ValueError(f"a file is of type {type(file).__name__}; expected its bytes in base64")
    if file.startswith("data:"):
        _, _, file = file.partition(",")
    # Of either alphabet, with or without its filler.
    file = "".join(file.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        content = base64.b64decode(file + "=" * (-len(file) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("a file is text that is not base64; paths and addresses are not read here") from error
    return _of_few_pixels(content)


def _of_few_pixels(content: bytes) -> bytes:
    """A small file may be an image of more pixels than there is memory, of which Pillow only warns."""
    most = Image.MAX_IMAGE_PIXELS
    try:
        # What is no image is for the pipeline to say.
        with contextlib.suppress(OSError):
            width, height = Image.open(io.BytesIO(content)).size
            if most is not None and width * height > most:
                raise ValueError(f"an image of {width} × {height} pixels exceeds limit of {most}")
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image's pixels are too many: {error}") from error
    return content


def _is_video(content: Any) -> bool:
    """Whether a file begins as MP4 and its kin, Matroska or WebM, or AVI do."""
    if not isinstance(content, bytes):
        return False
    images = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    is_mp4 = content[4:8] == b"ftyp" and content[8:12] not in images
    return is_mp4 or content.startswith(b"\x1aE\xdf\xa3") or (content[:4] == b"RIFF" and content[8:12] == b"AVI ")
