"""Makes the vectors of examples comparable."""

import torch
from torch.nn import functional as F

from .queries import BookQueries
from .votes import VECTOR_SOURCES

# Number of principal components to which image features, with thousands of dimensions, are reduced.
MAX_IMAGE_SIZE = 256
# Images from which the components are computed. More hardly change them.
MAX_IMAGES = 4000
BLOCK_SIZE = 4096


class VectorNormalizer:
    """Reduces image features to their principal components, and scales all vectors to length 1.

    Args:
        image_mean: `[width]`.
        image_components: `[components, width]`.
    """

    def __init__(self, image_mean: torch.Tensor, image_components: torch.Tensor):
        self.image_mean, self.image_components = image_mean, image_components

    @classmethod
    def from_images(cls, images: torch.Tensor) -> "VectorNormalizer":
        """Compute the components of image features `[images, width]`; zeros for missing images."""
        present = images.any(dim=1).nonzero().flatten()
        sample = images[present[:: -(-len(present) // MAX_IMAGES) or 1]].float()
        mean = sample.mean(dim=0) if len(sample) else sample.new_zeros(images.shape[1])
        return cls(mean, _principal_components(sample - mean))

    def __call__(self, queries: BookQueries) -> dict[str, torch.Tensor]:
        """Return unit vectors in half precision, whose dot products are similarities. Missing ones stay zero."""
        widths = {name: rows.shape[1] for name, rows in queries.vectors.items()} | {
            "image": len(self.image_components)
        }
        vectors = {name: torch.empty(len(queries), widths[name], dtype=torch.half) for name in VECTOR_SOURCES}
        # Block by block: image features are wide.
        for start in range(0, len(queries), BLOCK_SIZE):
            rows = slice(start, start + BLOCK_SIZE)
            block = {name: own[rows].float() for name, own in queries.vectors.items()}
            reduced = (block["image"] - self.image_mean) @ self.image_components.T
            block["image"] = reduced * block["image"].any(dim=1, keepdim=True)
            for name in VECTOR_SOURCES:
                vectors[name][rows] = F.normalize(block[name], dim=-1)
        return vectors


def _principal_components(centered: torch.Tensor) -> torch.Tensor:
    """Return the first principal components `[components, width]` of centred vectors `[vectors, width]`."""
    number = min(MAX_IMAGE_SIZE, *centered.shape)
    if not number:
        return centered.new_zeros(1, centered.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.pca_lowrank(centered, q=number, center=False)[2].T.contiguous()
