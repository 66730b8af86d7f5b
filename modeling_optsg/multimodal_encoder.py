"""Room 1: frames and title in, one memory out."""

from dataclasses import dataclass

import torch
from torch import nn

from .layers import TransformerLayer, pool_tokens
from .seeded_random import seeded_uniform


@dataclass(frozen=True)
class MemoryLayout:
    """Which frame, patch or title token each place of the memory stands for: frame after frame, in each the vision
    tower's tokens (first those of no place, such as [CLS], then the patches row by row), then the title's tokens.

    Args:
        frames: frames of the batch's longest video, 0 without images.
        grid: rows and columns of patches in a frame; `None` where the tokens of a frame are not known to be patches.
        others: tokens of a frame that are no patches.
        title: tokens of the batch's longest title, 0 without titles.
    """

    frames: int
    grid: tuple[int, int] | None
    others: int
    title: int

    @classmethod
    def of(cls, frame_features=None, title_features=None, frame_size=None, patch_size=None) -> "MemoryLayout":
        """
        Args:
            frame_features: `[batch, frames, tokens, frame_feature_size]`.
            title_features: `[batch, title length, text width]`.
            frame_size: height and width of a frame in pixels; `None` for precomputed features, whose grid is unknown.
            patch_size: the vision tower's, `None` if it has none (convolutions halve an image until it is a grid).
        """
        frames, tokens = (0, 0) if frame_features is None else frame_features.shape[1:3]
        grid = patch_grid(tokens, frame_size, patch_size) if frame_size is not None and tokens else None
        others = tokens - (grid[0] * grid[1] if grid is not None else 0)
        return cls(frames, grid, others, 0 if title_features is None else title_features.shape[1])

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Takes values over the memory apart, attention for example.

        Args:
            values: `[..., memory length]`.

        Returns:
            Of the patches `[..., frames, rows, columns]` (`None` without a grid), of a frame's other tokens
            `[..., frames, others]`, and of the title's tokens `[..., title]`.

        Raises:
            ValueError: `values` are of another memory.
        """
        count = 0 if self.grid is None else self.grid[0] * self.grid[1]
        sizes = [self.frames * (self.others + count), self.title]
        if values.shape[-1] != sum(sizes):
            raise ValueError(f"values are for {values.shape[-1]} places; this memory has {sum(sizes)}.")
        frames, title = values.split(sizes, dim=-1)
        frames = frames.reshape(*frames.shape[:-1], self.frames, self.others + count)
        others, patches = frames.split([self.others, count], dim=-1)
        return (None if self.grid is None else patches.unflatten(-1, self.grid)), others, title


def patch_grid(tokens: int, frame_size: tuple[int, int], patch_size=None) -> tuple[int, int] | None:
    """Rows and columns of the patches among a frame's tokens, `None` if they cannot be told.

    Args:
        frame_size: height and width in pixels.
        patch_size: of a tower that cuts a frame into patches: a number, or one each for height and width.
    """
    height, width = frame_size
    if patch_size is not None:
        vertical, horizontal = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        grid = (height // vertical, width // horizontal)
        # Fewer tokens than patches: later layers have merged some, and the rest is as with convolutions.
        if 0 < grid[0] * grid[1] <= tokens:
            return grid
    rows = round((tokens * height / width) ** 0.5)
    return (rows, tokens // rows) if rows and tokens % rows == 0 else None


class Pooler(nn.Module):
    """One vector an example from the towers' tokens, averaged by modality: a short way from towers to prompts. Attention
    has to learn where to look before anything else can be learned; this is there from the first step."""

    def __init__(self, config):
        super().__init__()
        self.widths = (config.frame_feature_size, config.text_config.hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)
        self.inner = nn.Linear(sum(self.widths), config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        self.outer = nn.Linear(config.intermediate_size, config.hidden_size)
        # Titles and tags are read by one tower: an example begins near the tags that say what its title says.
        self.title_projection = nn.Linear(config.text_config.hidden_size, config.hidden_size, bias=False)

    def forward(self, parts: list[torch.Tensor | None], masks: list[torch.Tensor | None]) -> torch.Tensor:
        """
        Args:
            parts: tower tokens of frames and of titles, `[batch, length, width]` each, `None` where there are none.
            masks: `[batch, length]` each, true for tokens that may be looked at.

        Returns:
            `[batch, hidden_size]`.
        """
        batch = next(part.shape[0] for part in parts if part is not None)
        pooled = []
        for part, mask, norm, width in zip(parts, masks, self.norms, self.widths):
            if part is None:
                pooled.append(norm.weight.new_zeros(batch, width))
            else:
                # What an example does not have says nothing, not even the norm's bias.
                pooled.append(norm(pool_tokens(part, mask).to(norm.weight.dtype)) * mask.any(dim=1, keepdim=True))
        hidden_states = nn.functional.gelu(self.inner(self.dropout(torch.cat(pooled, dim=-1))))
        summary = self.outer(self.dropout(hidden_states))
        return summary + self.title_projection(pooled[1])


class MultimodalEncoder(nn.Module):
    """Projects the towers' tokens to one width, marks their frame and modality, and fuses them.

    The towers themselves belong to the model, so that they can be any `AutoModel`, frozen, cached or left out.
    """

    def __init__(self, config):
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
        # What is compared with all train tags is learned apart: two that err differently know more than one.
        self.classifier_pooler = Pooler(config) if config.use_tag_classifier and config.num_tag_classes else None

    def forward(
        self,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            frame_features: `[batch, frames, tokens, frame_feature_size]`.
            frame_mask: `[batch, frames]`, true for real frames; all real when left out.
            title_features: `[batch, title length, text width]`.
            attention_mask: `[batch, title length]`, true for real title tokens; all real when left out.
            example_seeds: `[batch]`, in training, of what is hidden at random.

        Returns:
            The memory `[batch, memory length, hidden_size]`, its boolean mask `[batch, memory length]`, and two
            summaries of the example, `[batch, hidden_size]`: where the order prompts begin (`None` without
            `use_prompt_pooler`), and what is compared with the train tags (`None` without `use_tag_classifier`).

        Raises:
            ValueError: neither frames nor title are given, a video is longer than `max_frames`, or an example is left
                with nothing to look at.
        """
        parts, masks, tokens_of, given = [], [], [None, None], []
        if frame_features is not None:
            batch, frames, tokens, width = frame_features.shape
            if width != self.config.frame_feature_size:
                raise ValueError(
                    f"frame_features are {width} wide; this model reads frame_feature_size="
                    f"{self.config.frame_feature_size}."
                )
            if frames > self.config.max_frames:
                raise ValueError(
                    f"A video of {frames} frames is longer than max_frames={self.config.max_frames}; sample fewer."
                )
            if frame_mask is None:
                frame_mask = torch.ones(batch, frames, device=frame_features.device)
            positions = self.frame_positions(torch.arange(frames, device=frame_features.device))
            hidden_states = self.frame_projection(frame_features) + positions[:, None] + self.modalities.weight[0]
            parts.append(hidden_states.flatten(1, 2))
            masks.append(frame_mask.bool().repeat_interleave(tokens, dim=1))
            tokens_of[0] = frame_features.flatten(1, 2)
            given.append(0)
        if title_features is not None:
            if attention_mask is None:
                attention_mask = torch.ones(title_features.shape[:2], device=title_features.device)
            parts.append(self.title_projection(title_features) + self.modalities.weight[1])
            masks.append(attention_mask.bool())
            tokens_of[1] = title_features
            given.append(1)
        if not parts:
            raise ValueError("Nothing to look at: give pixel_values, frame_features, input_ids or title_features.")
        if self.training:
            masks = self._hide_at_random(masks, given, example_seeds)
        memory, memory_mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        if not (present := memory_mask.any(dim=1)).all():
            empty = (~present).nonzero().flatten().tolist()
            raise ValueError(f"Examples {empty} of the batch have neither a frame nor a title.")
        shown = dict(zip(given, masks))
        summary, classifier_pooler = (
            None if module is None else module(tokens_of, [shown.get(modality) for modality in (0, 1)])
            for module in (self.prompt_pooler, self.classifier_pooler)
        )
        memory = self.dropout(memory)
        for layer in self.layers:
            memory, _ = layer(memory, memory_mask[:, None, None, :])
        return self.norm(memory), memory_mask, summary, classifier_pooler

    def _hide_at_random(
        self, masks: list[torch.Tensor], modalities: list[int], seeds: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Modality dropout (never of an example's only modality) and token dropout (never of all an example's tokens);
        `modalities` says what each mask is of: 0 frames, 1 the title."""
        batch, device = masks[0].shape[0], masks[0].device
        if len(masks) == 2 and self.config.modality_dropout > 0:
            both = masks[0].any(dim=1) & masks[1].any(dim=1)
            drop = seeded_uniform("modality is dropped", (batch,), seeds, device) < self.config.modality_dropout
            drop &= both
            first = seeded_uniform("which modality", (batch,), seeds, device) < 0.5
            masks = [masks[0] & ~(drop & first)[:, None], masks[1] & ~(drop & ~first)[:, None]]
        share = self.config.memory_token_dropout
        if share > 0:
            kept = []
            for modality, mask in zip(modalities, masks):
                purpose = ("frame tokens", "title tokens")[modality]
                kept.append(mask & (seeded_uniform(purpose, tuple(mask.shape), seeds, device) >= share))
            some = torch.cat(kept, dim=1).any(dim=1)[:, None]
            masks = [torch.where(some, k, m) for k, m in zip(kept, masks)]
        return masks
