"""The image processor of a vision tower, so that the whole image reaches the tower."""

import math
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from modeling_optsg.data.process_logging import get_logger

logger = get_logger(__name__)

# Settings of pixel values, which all image processors share.
PIXEL_SETTINGS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
CROP_SETTINGS = ("do_resize", "size", "do_center_crop", "crop_size")
# An aspect ratio of many photographs.
PHOTOGRAPH = (480, 320)
# Resizing blurs the edges, so that a little less than all may be measured.
WHOLE = 0.98


def load_image_processor(name_or_path: str, image_size: int | None = None) -> BaseImageProcessor:
    """Load the image processor of a vision tower.

    With `image_size`, images are resized to a square of this size, and nothing is cropped away. Otherwise the tower's
    own preprocessing is kept, with two exceptions: images for NaFlex (SigLIP 2) are resized to a square with the same
    number of patches, and the frames of VideoMAE are read one by one.

    Args:
        name_or_path: Folder or Hub name of the vision tower.
        image_size: Height and width in pixels.

    Raises:
        ValueError: The tower has no image processor.
    """
    try:
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"The vision tower {name_or_path} has no image processor: {error}") from error
    settings = image_processor.to_dict()
    if image_size is not None:
        return _resize_to_square(image_processor, image_size)
    if "max_num_patches" in settings:
        return _resize_to_square(image_processor, settings["patch_size"] * math.isqrt(settings["max_num_patches"]))
    if "VideoMAE" in type(image_processor).__name__:
        from transformers import CLIPImageProcessor  # which warns when it is imported without torchvision

        return CLIPImageProcessor(**_chosen(settings, (*PIXEL_SETTINGS, *CROP_SETTINGS)), do_convert_rgb=False)
    return image_processor


def _resize_to_square(image_processor: BaseImageProcessor, image_size: int) -> BaseImageProcessor:
    size = {"height": image_size, "width": image_size}
    settings = image_processor.to_dict()
    whole = {"do_resize": True, "size": size, "crop_size": size, "do_center_crop": False, "keep_aspect_ratio": False}
    try:
        changed = type(image_processor)(**settings | {name: whole[name] for name in whole if name in settings})
        if image_shapes(changed) == {(3, image_size, image_size)} and min(shown_part(changed)) > WHOLE:
            return changed
    except Exception:  # Image processors reject sizes in many ways.
        pass
    from transformers import ViTImageProcessor  # which warns when it is imported without torchvision

    # Some always keep the aspect ratio, as that of ConvNeXt, or do not return images, as that of NaFlex.
    return ViTImageProcessor(**_chosen(settings, PIXEL_SETTINGS), size=size)


def _chosen(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}


def image_shapes(image_processor: BaseImageProcessor) -> set[tuple[int, ...]]:
    """Return the shapes of the pixel values of a wide and of a tall image."""
    images = [Image.new("RGB", size) for size in (PHOTOGRAPH, PHOTOGRAPH[::-1])]
    return {_pixels(image_processor, image).shape for image in images}


def shown_part(image_processor: BaseImageProcessor) -> tuple[float, float]:
    """Measure how much of the width and of the height of a 3:2 photograph an image processor keeps.

    Returns:
        The two ratios; 1 if nothing is cropped away.
    """
    width, height = PHOTOGRAPH
    black, white = (_pixels(image_processor, Image.new("RGB", PHOTOGRAPH, name)) for name in ("black", "white"))
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    shown = []
    for ramp, axis in ((columns, 2), (rows, 1)):
        image = Image.fromarray(np.repeat(np.round(255 * ramp)[..., None], 3, axis=2).astype(np.uint8))
        # The pixel values of a ramp from 0 to 1, whatever the normalisation.
        values = (_pixels(image_processor, image) - black) / (white - black)
        length = values.shape[axis]
        first, last = np.moveaxis(values, axis, 0)[[0, -1]].mean(axis=(1, 2))
        # From the centres of the outer pixels to their outer edges.
        shown.append(min(1.0, float(last - first) * length / max(length - 1, 1)))
    return shown[0], shown[1]


def _pixels(image_processor: BaseImageProcessor, image: Image.Image) -> np.ndarray:
    return np.asarray(image_processor(images=[image])["pixel_values"][0], dtype=np.float64)


def check_image_processor(image_processor: BaseImageProcessor, tower: str, image_size: int | None) -> None:
    """Check that an image processor gives all images one size, and warn if it crops them.

    Args:
        image_processor: The image processor.
        tower: Name of the vision tower, for messages.
        image_size: `--image_size`, which never crops.

    Raises:
        ValueError: Images of different aspect ratios get different sizes, or the output is not an image.
    """
    shapes = image_shapes(image_processor)
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            f"The image processor of the vision tower {tower} gives the shapes {sorted(shapes)} to a wide and a tall "
            "image; expected [3, height, width] of one size. Give a fixed size with --image_size."
        )
    shown = shown_part(image_processor)
    if min(shown) <= WHOLE and image_size is None:
        size = next(iter(shapes))[-1]
        logger.warning(
            f"The preprocessing of the vision tower {tower} crops images: of a 3:2 photograph, it keeps "
            f"{shown[0]:.0%} of the width and {shown[1]:.0%} of the height. --image_size {size} shows the whole image."
        )
