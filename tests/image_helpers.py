"""Makes test images and their reference pixels."""

import io

import numpy as np
from PIL import Image


def noise_image(width=24, height=16):
    """Returns an image without symmetries."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def reference_pixels(processor, image):
    """Returns the pixels that the image processor alone computes from an RGB image."""
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
