"""Augmented copies of training images, with a different size, position, angle and stroke width."""

from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageFilter

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


def change_image(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return a randomly changed copy of an RGB image, of the same size.

    Images are not flipped, since this would change what arrows and letters mean. Colours are kept, since they show
    which icon set an image is from, and each set is tagged in its own way.
    """
    drawn = random.random()
    if drawn < STROKE_PROBABILITY:
        image = image.filter(ImageFilter.MinFilter(3))
    elif drawn < 2 * STROKE_PROBABILITY:
        image = image.filter(ImageFilter.MaxFilter(3))
    angle, scale = np.deg2rad(random.uniform(-MAX_ROTATION, MAX_ROTATION)), random.uniform(*SCALES)
    centre = np.array(image.size) / 2
    moved = centre + random.uniform(-MAX_SHIFT, MAX_SHIFT, size=2) * image.size
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    matrix = np.column_stack([rotation, centre - rotation @ moved])
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(matrix.flatten()),
        Image.Resampling.BILINEAR,
        fillcolor=image.getpixel((0, 0)),
    )


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
    return rows.map(
        _change_row,
        with_indices=True,
        fn_kwargs={"number": number},
        features=Features(rows.features | {"image": ImageFeature()}),
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_dir / f"copies-{fingerprint}.arrow"),
        desc=f"Changed images, copy {number + 1}",
    )


def _change_row(row: dict, index: int, number: int) -> dict:
    if row["image"] is None:
        return {"image": None}
    image = read_image(row["image"], f"image {index}")
    return {"image": change_image(image, np.random.default_rng([number, index]))}
