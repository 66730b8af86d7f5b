"""One vector an item from the towers' tokens: what likeness is measured by."""

import torch


def pool_tokens(tokens: torch.Tensor | None, mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """The mean of an item's real tokens.

    Args:
        tokens: `[batch, length, width]`; mask: `[batch, length]`, all real when left out.

    Returns:
        `[batch, width]`; zero for an item without any.
    """
    if tokens is None:
        return None
    if mask is None:
        return tokens.float().mean(dim=1)
    weights = mask.float()[..., None]
    return (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pool_frames(frame_features: torch.Tensor | None, frame_mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """The mean over an item's real frames and their tokens: `[batch, frames, tokens, width]` -> `[batch, width]`."""
    return None if frame_features is None else pool_tokens(frame_features.float().mean(dim=2), frame_mask)
