"""Random changes of training images: size, position, angle, stroke width, and the colours of photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from modeling_optsg.data.checksums import is_cached, lock_cached, record_checksum
from modeling_optsg.data.collator import OPTSGDataCollator
from modeling_optsg.data.feature_cache import digest
from modeling_optsg.image_utils import read_image

# Part of the cache key: increase it when the changes below change.
VERSION = 1
MAX_ROTATION = 15.0
SCALES = (0.75, 1.2)
# Maximum shift, relative to width and height.
MAX_SHIFT = 0.08
# Probability of thinner strokes, and of thicker ones.
STROKE_PROBABILITY = 0.25
# Maximum change of brightness, contrast and saturation of photographs.
MAX_COLOUR_CHANGE = 0.2
COLOUR_CHANGES = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
# A drawing has one colour on at least this ratio of its pixels.
MIN_FLAT_RATIO = 0.25
# Larger images are reduced first, because changing them takes long. Towers see fewer pixels anyway.
MAX_SIDE = 1024


def change_image(image: Image.Image, random: np.random.Generator, is_photograph: bool = False) -> Image.Image:
    """Return a randomly changed copy of an RGB image, of the same size.

    Images are not flipped, since this would change what arrows and letters mean. The colours of drawings are kept,
    since they show which icon set an image is from, and each set is tagged in its own way.

    Args:
        image: The image.
        random: Source of the change.
        is_photograph: Change brightness, contrast and saturation instead of the stroke width. Uncovered parts get the
            mean colour of the image instead of the colour of its corner.
    """
    drawn = random.random()
    if drawn < STROKE_PROBABILITY and not is_photograph:
        image = image.filter(ImageFilter.MinFilter(3))
    elif drawn < 2 * STROKE_PROBABILITY and not is_photograph:
        image = image.filter(ImageFilter.MaxFilter(3))
    background = image.resize((1, 1), Image.Resampling.BOX) if is_photograph else image
    angle, scale = np.deg2rad(random.uniform(-MAX_ROTATION, MAX_ROTATION)), random.uniform(*SCALES)
    centre = np.array(image.size) / 2
    moved = centre + random.uniform(-MAX_SHIFT, MAX_SHIFT, size=2) * image.size
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    matrix = np.column_stack([rotation, centre - rotation @ moved])
    changed = image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(matrix.flatten()),
        Image.Resampling.BILINEAR,
        fillcolor=background.getpixel((0, 0)),
    )
    if is_photograph:
        for enhancer in COLOUR_CHANGES:
            changed = enhancer(changed).enhance(random.uniform(1 - MAX_COLOUR_CHANGE, 1 + MAX_COLOUR_CHANGE))
    return changed


def is_photograph(image: Image.Image) -> bool:
    """Return whether an RGB image is a photograph and not a drawing, which has a large area of one colour."""
    pixels = image.resize((64, 64), Image.Resampling.NEAREST)
    # Four bits per channel, because lossy compression changes colours a little.
    counts = [count for count, _ in ImageOps.posterize(pixels, 4).getcolors(64 * 64)]
    return max(counts) < MIN_FLAT_RATIO * sum(counts)


def change_frames(frames: Sequence[Image.Image], seed: int) -> list[Image.Image]:
    """Return randomly changed copies of an image or of the frames of a video. All of them are changed alike.

    Args:
        frames: RGB images, at least one.
        seed: Seed of the change.
    """
    photograph = is_photograph(frames[0])
    reduced = [frame.reduce(max(1, min(frame.size) // MAX_SIDE)) for frame in frames]
    # Another stream than that of the other random choices of an example.
    return [change_image(frame, np.random.default_rng([seed, VERSION]), photograph) for frame in reduced]


class ImageChangingCollator:
    """Collates training examples with randomly changed images and videos.

    The change depends only on `example_seed`. It differs from epoch to epoch, and it is the same for any number of
    processes and in a resumed run.

    Args:
        collator: Collates the changed examples.
    """

    def __init__(self, collator: OPTSGDataCollator):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, Any]:
        """Collate examples with `example_seed`.

        Raises:
            ValueError: An image or a video cannot be read, or an error of the collator.
        """
        return self.collator([self._change(example, row) for row, example in enumerate(examples)])

    def _change(self, example: Mapping, row: int) -> Mapping:
        # Examples with cached features have no pixels to change.
        if example.get("frame_features") is not None:
            return example
        if (image := example.get("image")) is not None:
            (changed,) = change_frames([read_image(image, f"images[{row}]", MAX_SIDE)], example["example_seed"])
            return {**example, "image": changed}
        if (video := example.get("video")) is not None:
            frames = self.collator.processor.read_video(video, f"videos[{row}]", MAX_SIDE)
            return {**example, "video": change_frames(frames, example["example_seed"])}
        return example


def changed_copies(rows: Dataset, number: int, cache_dir: Path) -> Dataset:
    """Return training examples with changed images.

    Args:
        rows: Examples with `image`.
        number: Index of the copy. Each copy is changed differently. The changes are the same in every run.
        cache_dir: Folder where the copy is kept.

    Raises:
        ValueError: The examples have no images.
    """
    if "image" not in rows.column_names:
        raise ValueError("--num_image_copies needs a dataset with images.")
    rows = rows.cast_column("image", ImageFeature(decode=False))
    fingerprint = digest(rows._fingerprint, VERSION, number)
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"copies-{fingerprint}.arrow"
    with lock_cached(path):
        is_complete = is_cached(path)
        copies = rows.map(
            _change_row,
            with_indices=True,
            fn_kwargs={"number": number},
            features=Features(rows.features | {"image": ImageFeature()}),
            new_fingerprint=fingerprint,
            cache_file_name=str(path),
            desc=f"Changed images, copy {number + 1}",
        )
        if not is_complete:
            record_checksum(path)
    return copies


def _change_row(row: dict, index: int, number: int) -> dict:
    if row["image"] is None:
        return {"image": None}
    image = read_image(row["image"], f"image {index}")
    return {"image": change_image(image, np.random.default_rng([number, index]))}
