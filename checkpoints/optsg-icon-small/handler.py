"""A checkpoint's handler for Inference Endpoints: requests in JSON or as a picture's bytes, tags out.

It stands beside the weights and needs nothing but `transformers`, what that loads the folder with, and PyAV for clips.
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
            data: `{"inputs": …, "parameters": {…}}`. The inputs are an item or a list of items; an item is a picture
                or a clip, or a dictionary of `"image"` or `"video"` or `"frames"` (a list of pictures) and `"title"`.
                Files are bytes or base64, with or without `data:…;base64,` before it; a picture may be a PIL one,
                which the toolkit makes of a body with a picture's content type. Parameters are the pipeline's `top_k`,
                `threshold`, `decoding` and `tag_vocabulary`.

        Returns:
            Per item `[{"label": str, "score": float, "novel": bool}]` by falling score.

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
        items = [self._item(item) for item in (inputs if many else [inputs])]
        found = self.pipeline(items, batch_size=8, **parameters)
        return found if many else found[0]

    @staticmethod
    def _item(item: Any) -> dict:
        if not isinstance(item, Mapping):
            content = _content(item)
            return {"video" if _is_clip(content) else "image": content}
        if unknown := item.keys() - set(PARTS):
            raise ValueError(f"an item has {sorted(unknown)}; expected some of {list(PARTS)}")
        item = {part: value for part, value in item.items() if value is not None}
        for part in item.keys() & {"image", "video"}:
            item[part] = _content(item[part])
        if "frames" in item:
            if not isinstance(item["frames"], list):
                raise ValueError('"frames" is not a list of pictures')
            item["frames"] = [_content(frame) for frame in item["frames"]]
        return item


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
    """A small file may be a picture of more pixels than there is memory, of which Pillow only warns."""
    most = Image.MAX_IMAGE_PIXELS
    try:
        # What is no picture is for the pipeline to say.
        with contextlib.suppress(OSError):
            width, height = Image.open(io.BytesIO(content)).size
            if most is not None and width * height > most:
                raise ValueError(f"a picture of {width} × {height} pixels exceeds limit of {most}")
    except Image.DecompressionBombError as error:
        raise ValueError(f"a picture's pixels are too many: {error}") from error
    return content


def _is_clip(content: Any) -> bool:
    """Whether a file begins as MP4 and its kin, Matroska or WebM, or AVI do."""
    if not isinstance(content, bytes):
        return False
    pictures = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    is_mp4 = content[4:8] == b"ftyp" and content[8:12] not in pictures
    return is_mp4 or content.startswith(b"\x1aE\xdf\xa3") or (content[:4] == b"RIFF" and content[8:12] == b"AVI ")
