"""Multimodal encoder: fuses the tokens of frames and title into one memory."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from .layers import TransformerLayer, pool_tokens
from .seeded_random import seeded_uniform


@dataclass(frozen=True)
class MemoryLayout:
    """The frame, patch or title token of each position of the memory.

    The memory holds frame after frame, then the title's tokens. A frame holds its other tokens, such as [CLS], then
    its patches row by row.

    Args:
        frames: Frames of the longest video of the batch, 0 without images.
        grid: Rows and columns of patches in a frame; `None` if a frame's tokens are not known to be patches.
        others: Tokens of a frame that are not patches.
        title: Tokens of the longest title of the batch, 0 without titles.
    """

    frames: int
    grid: tuple[int, int] | None
    others: int
    title: int

    @classmethod
    def from_features(
        cls,
        frame_features: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        frame_size: tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> "MemoryLayout":
        """Derive the layout from the towers' tokens.

        Args:
            frame_features: `[batch, frames, tokens, frame_feature_size]`.
            title_features: `[batch, title length, text width]`.
            frame_size: Height and width of a frame in pixels; `None` for precomputed features, whose grid is unknown.
            patch_size: The vision tower's patch size; `None` for a convolutional tower.
        """
        frames, tokens = (0, 0) if frame_features is None else frame_features.shape[1:3]
        grid = patch_grid(tokens, frame_size, patch_size) if frame_size is not None and tokens else None
        others = tokens - (grid[0] * grid[1] if grid is not None else 0)
        return cls(frames, grid, others, 0 if title_features is None else title_features.shape[1])

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Split values over the memory, for example attention weights.

        Args:
            values: `[..., memory length]`.

        Returns:
            The values of the patches `[..., frames, rows, columns]` (`None` without a grid), of a frame's other tokens
            `[..., frames, others]`, and of the title's tokens `[..., title]`.

        Raises:
            ValueError: `values` belongs to another memory.
        """
        num_patches = 0 if self.grid is None else self.grid[0] * self.grid[1]
        sizes = [self.frames * (self.others + num_patches), self.title]
        if values.shape[-1] != sum(sizes):
            raise ValueError(f"values has {values.shape[-1]} positions; this memory has {sum(sizes)}.")
        frames, title = values.split(sizes, dim=-1)
        frames = frames.reshape(*frames.shape[:-1], self.frames, self.others + num_patches)
        others, patches = frames.split([self.others, num_patches], dim=-1)
        return (None if self.grid is None else patches.unflatten(-1, self.grid)), others, title


def patch_grid(
    tokens: int, frame_size: tuple[int, int], patch_size: int | tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Compute rows and columns of the patches among a frame's tokens.

    Args:
        tokens: Number of tokens of a frame.
        frame_size: Height and width in pixels.
        patch_size: Patch size of the tower, one number or height and width; `None` for a convolutional tower.

    Returns:
        Rows and columns, or `None` if they cannot be told.
    """
    height, width = frame_size
    if patch_size is not None:
        patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        grid = (height // patch_height, width // patch_width)
        # A tower with fewer tokens than patches has merged some; its grid then follows from the aspect ratio.
        if 0 < grid[0] * grid[1] <= tokens:
            return grid
    rows = round((tokens * height / width) ** 0.5)
    return (rows, tokens // rows) if rows and tokens % rows == 0 else None


class Pooler(nn.Module):
    """Pooled representation of an example: the towers' tokens, averaged per modality and projected.

    It is a short path from the towers to the prompts: attention has to learn where to look first, an average does not.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.widths = (config.frame_feature_size, config.text_config.hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)
        self.inner = nn.Linear(sum(self.widths), config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        self.outer = nn.Linear(config.intermediate_size, config.hidden_size)
        # The text tower encodes titles and tags: with this projection an example starts near the tags that its title
        # names.
        self.title_projection = nn.Linear(config.text_config.hidden_size, config.hidden_size, bias=False)

    def forward(self, tokens: list[torch.Tensor | None], masks: list[torch.Tensor | None]) -> torch.Tensor:
        """Pool the tokens of both towers.

        Args:
            tokens: Tokens of frames and of titles, `[batch, length, width]` each, `None` for a missing modality.
            masks: `[batch, length]` each, true for tokens that are visible.

        Returns:
            `[batch, hidden_size]`.
        """
        batch = next(part.shape[0] for part in tokens if part is not None)
        pooled = []
        for part, mask, norm, width in zip(tokens, masks, self.norms, self.widths, strict=True):
            if part is None:
                pooled.append(norm.weight.new_zeros(batch, width))
            else:
                # A missing modality contributes nothing, not even the bias of the norm.
                pooled.append(norm(pool_tokens(part, mask).to(norm.weight.dtype)) * mask.any(dim=1, keepdim=True))
        hidden_states = nn.functional.gelu(self.inner(self.dropout(torch.cat(pooled, dim=-1))))
        return self.outer(self.dropout(hidden_states)) + self.title_projection(pooled[1])


class MultimodalEncoder(nn.Module):
    """Projects the towers' tokens to one width, adds frame positions and modalities, and fuses them.

    The towers belong to the model, not to this module, so that they can be frozen, cached or left out.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.frame_projection = nn.Sequential(
            nn.LayerNorm(config.frame_feature_size), nn.Linear(config.frame_feature_size, config.hidden_size)
        )
        self.title_projection = nn.Sequential(
            nn.LayerNorm(config.text_config.hidden_size), nn.Linear(config.text_config.hidden_size, config.hidden_size)
        )
        self.frame_positions = nn.Embedding(config.max_frames, config.hidden_size)
        self.modalities = nn.Embedding(2, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.prompt_pooler = Pooler(config) if config.use_prompt_pooler else None
        # The classifier has a separate pooler, because models with different mistakes are better together.
        self.classifier_pooler = Pooler(config) if config.use_tag_classifier and config.num_tag_classes else None

    def forward(
        self,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode a batch.

        Args:
            frame_features: `[batch, frames, tokens, frame_feature_size]`.
            frame_mask: `[batch, frames]`, true for real frames. By default all are real.
            title_features: `[batch, title length, text width]`.
            attention_mask: `[batch, title length]`, true for real title tokens. By default all are real.
            example_seeds: `[batch]`, seeds of modality and token dropout in training.

        Returns:
            The memory `[batch, memory length, hidden_size]`, its boolean mask `[batch, memory length]`, the pooled
            representation for the prompts `[batch, hidden_size]` (`None` without `use_prompt_pooler`) and the one for
            the tag classifier `[batch, hidden_size]` (`None` without a tag classifier).

        Raises:
            ValueError: Frames and titles are both missing, a video is longer than `max_frames`, or an example has
                neither a frame nor a title.
        """
        if frame_features is None and title_features is None:
            raise ValueError("Nothing to encode: pass pixel_values, frame_features, input_ids or title_features.")
        # Index 0 is the frames, index 1 the title.
        tokens, embedded, masks = [None, None], [None, None], [None, None]
        if frame_features is not None:
            tokens[0] = frame_features.flatten(1, 2)
            embedded[0], masks[0] = self._embed_frames(frame_features, frame_mask)
        if title_features is not None:
            tokens[1] = title_features
            embedded[1] = self.title_projection(title_features) + self.modalities.weight[1]
            masks[1] = _full_mask(title_features) if attention_mask is None else attention_mask.bool()
        if self.training:
            masks = self._hide_at_random(masks, example_seeds)
        memory = torch.cat([part for part in embedded if part is not None], dim=1)
        memory_mask = torch.cat([mask for mask in masks if mask is not None], dim=1)
        if not (present := memory_mask.any(dim=1)).all():
            empty = (~present).nonzero().flatten().tolist()
            raise ValueError(f"Examples {empty} of the batch have neither a frame nor a title.")
        prompt_pooled, classifier_pooled = (
            None if pooler is None else pooler(tokens, masks)
            for pooler in (self.prompt_pooler, self.classifier_pooler)
        )
        memory = self.dropout(memory)
        for layer in self.layers:
            memory, _ = layer(memory, memory_mask[:, None, None, :])
        return self.norm(memory), memory_mask, prompt_pooled, classifier_pooled

    def _embed_frames(
        self, frame_features: torch.Tensor, frame_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frames, tokens, width = frame_features.shape[1:]
        if width != self.config.frame_feature_size:
            raise ValueError(
                f"frame_features has width {width}; this model expects frame_feature_size="
                f"{self.config.frame_feature_size}."
            )
        if frames > self.config.max_frames:
            raise ValueError(
                f"A video of {frames} frames is longer than max_frames={self.config.max_frames}; sample fewer frames."
            )
        positions = self.frame_positions(torch.arange(frames, device=frame_features.device))
        embedded = self.frame_projection(frame_features) + positions[:, None] + self.modalities.weight[0]
        mask = _full_mask(frame_features) if frame_mask is None else frame_mask.bool()
        return embedded.flatten(1, 2), mask.repeat_interleave(tokens, dim=1)

    def _hide_at_random(
        self, masks: list[torch.Tensor | None], seeds: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """Apply modality dropout (never to an only modality) and token dropout (never to all tokens)."""
        frames, title = masks
        device, batch = next((mask.device, len(mask)) for mask in masks if mask is not None)
        if frames is not None and title is not None and self.config.modality_dropout > 0:
            has_both = frames.any(dim=1) & title.any(dim=1)
            drop = seeded_uniform("modality dropout", (batch,), seeds, device) < self.config.modality_dropout
            drop &= has_both
            drop_frames = seeded_uniform("dropped modality", (batch,), seeds, device) < 0.5
            masks = [frames & ~(drop & drop_frames)[:, None], title & ~(drop & ~drop_frames)[:, None]]
        ratio = self.config.memory_token_dropout
        if ratio > 0:
            purposes = ("frame token dropout", "title token dropout")
            kept = [
                None if mask is None else mask & (seeded_uniform(purpose, tuple(mask.shape), seeds, device) >= ratio)
                for purpose, mask in zip(purposes, masks, strict=True)
            ]
            has_any = torch.cat([mask for mask in kept if mask is not None], dim=1).any(dim=1)[:, None]
            masks = [
                None if mask is None else torch.where(has_any, thinned, mask)
                for thinned, mask in zip(kept, masks, strict=True)
            ]
        return masks


def _full_mask(tokens: torch.Tensor) -> torch.Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
