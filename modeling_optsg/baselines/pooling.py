"""Pooled tower features, which nearest neighbours are found by."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from transformers import PreTrainedConfig

from modeling_optsg.layers import pool_tokens


def pool_frames(frame_features: torch.Tensor | None, frame_mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """Average the tokens of each example's real frames.

    Args:
        frame_features: `[batch, frames, tokens, width]`, or `None`.
        frame_mask: `[batch, frames]`, true for real frames. By default all are real.

    Returns:
        `[batch, width]`, or `None` without `frame_features`.
    """
    return None if frame_features is None else pool_tokens(frame_features.float().mean(dim=2), frame_mask)


def pool_examples(examples: Iterable[Mapping], config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the precomputed tower features of examples.

    Args:
        examples: Rows with `frame_features` `[frames, width]` or `[frames, tokens, width]` and `title_features`
            `[length, width]`. Either may be missing or `None`.
        config: The model's configuration, for the widths.

    Returns:
        Image features `[examples, frame_feature_size]` and title features `[examples, text width]`, float32, zero for
        a missing modality.
    """
    widths = (config.frame_feature_size, config.text_config.hidden_size)
    pooled = ([], [])
    for example in examples:
        for rows, name, width in zip(pooled, ("frame_features", "title_features"), widths, strict=True):
            features = example.get(name)
            if features is None or np.size(features) == 0:
                rows.append(np.zeros(width, np.float32))
            else:
                rows.append(np.asarray(features, dtype=np.float32).reshape(-1, width).mean(axis=0))
    image_features, title_features = (torch.from_numpy(np.stack(rows)) for rows in pooled)
    return image_features, title_features


def centre_images(images: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of the training images `[width]` from `[batch, width]`. A missing (zero) image stays zero."""
    return (images - mean) * images.any(dim=1, keepdim=True)


def mean_image(images: torch.Tensor) -> torch.Tensor:
    """Average the images that are not missing: `[examples, width]` to `[width]`, zero if all are missing."""
    present = images[images.any(dim=1)]
    return present.mean(dim=0) if len(present) else torch.zeros_like(images[0])
