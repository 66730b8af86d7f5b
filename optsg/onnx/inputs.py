"""Images and titles as the inputs of an exported encoder."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from ..without_torch.image_utils import read_image


class ImageReader:
    """Reads images as the image processor of the model does.

    Args:
        settings: Entry `image` of `settings.json`.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        factor, mean, std = (np.array(settings[name], np.float32) for name in ("rescale_factor", "mean", "std"))
        # `(value * factor - mean) / std` of a byte, in one step.
        self.scale, self.shift = (factor / std)[:, None, None], (mean / std)[:, None, None]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of frames."""
        size = self.settings["size"]
        return tuple(self.settings["crop"] or (size["height"], size["width"]))

    def __call__(self, source: Any, name: str) -> np.ndarray:
        """Return the pixels `[3, height, width]` of an image, in any form that [`read_image`] takes."""
        image = read_image(source, name, self.settings["min_side"])
        image = image.resize(self._resized(*image.size), self.settings["resample"])
        if self.settings["crop"]:
            image = _crop_centre(image, *self.settings["crop"])
        return np.asarray(image, np.float32).transpose(2, 0, 1) * self.scale - self.shift

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        size = self.settings["size"]
        if "shortest_edge" not in size:
            return size["width"], size["height"]
        shortest = size["shortest_edge"]
        longest = int(shortest * max(width, height) / min(width, height))
        return (shortest, longest) if width <= height else (longest, shortest)


def _crop_centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop to the centre; what is outside of the image is black."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class TitleReader:
    """Encodes titles as the processor of the model does.

    Args:
        path: The file `tokenizer.json`.
    """

    def __init__(self, path: Path):
        self.tokenizer = Tokenizer.from_file(str(path))
        # A title that contains "[MASK]" is ordinary text.
        self.tokenizer.encode_special_tokens = True

    def __call__(self, titles: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and attention mask `[batch, length]`; the mask of a missing title is 0."""
        if not any(titles):
            return np.zeros((len(titles), 1), np.int64), np.zeros((len(titles), 1), np.int64)
        encoded = self.tokenizer.encode_batch([title or "" for title in titles])
        input_ids = np.array([one.ids for one in encoded], np.int64)
        attention_mask = np.array([one.attention_mask for one in encoded], np.int64)
        missing = [title is None for title in titles]
        input_ids[missing], attention_mask[missing] = self.tokenizer.padding["pad_id"], 0
        return input_ids, attention_mask
