"""One vector an example from the towers' tokens: what similarity is measured by."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from modeling_optsg.layers import pool_tokens


def pool_frames(frame_features: torch.Tensor | None, frame_mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """The mean over an example's real frames and their tokens: `[batch, frames, tokens, width]` -> `[batch, width]`."""
    return None if frame_features is None else pool_tokens(frame_features.float().mean(dim=2), frame_mask)


def pool_examples(examples: Iterable[Mapping], config) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled images and titles of examples whose tower features are known.

    Args:
        examples: rows with `frame_features` `[frames, width]` or `[frames, tokens, width]` and `title_features`
            `[length, width]`, either of which may be missing or `None`.
        config: an [`OPTSGConfig`], for the widths.

    Returns:
        `[examples, frame_feature_size]` and `[examples, text width]`, float32; zero for what an example does not have.
    """
    widths = (config.frame_feature_size, config.text_config.hidden_size)
    pooled = ([], [])
    for example in examples:
        for rows, name, width in zip(pooled, ("frame_features", "title_features"), widths):
            features = example.get(name)
            if features is None or np.size(features) == 0:
                rows.append(np.zeros(width, np.float32))
            else:
                rows.append(np.asarray(features, dtype=np.float32).reshape(-1, width).mean(axis=0))
    return tuple(torch.from_numpy(np.stack(rows)) for rows in pooled)
