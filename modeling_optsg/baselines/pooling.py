"""Pooled tower features, which nearest neighbours are found by."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from transformers import PreTrainedConfig

from modeling_optsg.layers import Standardizer


def pool_examples(examples: Iterable[Mapping], config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the precomputed tower features of examples.

    Args:
        examples: Rows with `image_features` `[width]`, or else `frame_features` `[frames, width]` or
            `[frames, tokens, width]`, and `title_features` `[length, width]`. Either may be missing or `None`.
        config: The model's configuration, for the widths.

    Returns:
        Image features `[examples, image_feature_size]` and title features `[examples, text width]`, float32, zero for
        a missing modality.
    """
    widths = (config.frame_feature_size, config.text_config.hidden_size)
    images, titles = [], []
    for example in examples:
        pooled = example.get("image_features")
        images.append(_average(example.get("frame_features"), widths[0]) if pooled is None else pooled)
        titles.append(_average(example.get("title_features"), widths[1]))
    images = [np.zeros(config.image_feature_size, np.float32) if image is None else image for image in images]
    titles = [np.zeros(widths[1], np.float32) if title is None else title for title in titles]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(titles))


def _average(features: np.ndarray | None, width: int) -> np.ndarray | None:
    if features is None or np.size(features) == 0:
        return None
    return np.asarray(features, dtype=np.float32).reshape(-1, width).mean(axis=0)


class ImageScaling(Standardizer):
    """Standardises image features with the statistics of the training images. A missing (zero) image stays zero."""

    def fit(self, images: torch.Tensor) -> None:
        """Fit mean and scale to the images `[images, width]` that are not missing."""
        present = images[images.any(dim=1)]
        if len(present):
            self.fit_moments(present)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Standardise images `[batch, width]`."""
        return self.standardize(images) * images.any(dim=1, keepdim=True)
