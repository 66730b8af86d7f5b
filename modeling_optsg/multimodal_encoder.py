"""Multimodal encoder: fuses the tokens of frames and title into one memory."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .layers import TransformerLayer, pool_tokens
from .seeded_random import seeded_uniform
from .tag_evidence import EvidencePooler, TagEvidence

# Number of image words in the memory of an unfamiliar image without a title. Titles are not much longer.
MEMORY_WORDS = 8


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
        title_length: int = 0,
        frame_size: tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> "MemoryLayout":
        """Derive the layout from the towers' tokens.

        Args:
            frame_features: `[batch, frames, tokens, frame_feature_size]`.
            title_length: Tokens of the longest title of the batch, or words that stand in for titles.
            frame_size: Height and width of a frame in pixels; `None` for precomputed features, whose grid is unknown.
            patch_size: The vision tower's patch size; `None` for a convolutional tower.
        """
        frames, tokens = (0, 0) if frame_features is None else frame_features.shape[1:3]
        grid = patch_grid(tokens, frame_size, patch_size) if frame_size is not None and tokens else None
        others = tokens - (grid[0] * grid[1] if grid is not None else 0)
        return cls(frames, grid, others, title_length)

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
        # The slots also depend on the style of the image.
        self.style_projection = None
        if _has_style(config):
            self.style_projection = nn.Linear(config.style_size, config.intermediate_size, bias=False)

    def forward(
        self,
        tokens: list[torch.Tensor | None],
        masks: list[torch.Tensor | None],
        style: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pool the tokens of both towers.

        Args:
            tokens: Tokens of frames and of titles, `[batch, length, width]` each, `None` for a missing modality.
            masks: `[batch, length]` each, true for tokens that are visible.
            style: `[batch, style_size]`, see [`TagEvidence`].

        Returns:
            `[batch, hidden_size]`.
        """
        some_part = next(part for part in tokens if part is not None)
        pooled = []
        for part, mask, norm, width in zip(tokens, masks, self.norms, self.widths, strict=True):
            if part is None:
                shape = (some_part.shape[0], width)
                pooled.append(torch.zeros(shape, dtype=norm.weight.dtype, device=some_part.device))
            else:
                # A missing modality contributes nothing, not even the bias of the norm.
                pooled.append(norm(pool_tokens(part, mask).to(norm.weight.dtype)) * mask.any(dim=1, keepdim=True))
        hidden_states = self.inner(self.dropout(torch.cat(pooled, dim=-1)))
        if style is not None:
            hidden_states = hidden_states + self.style_projection(style)
        hidden_states = self.outer(self.dropout(F.gelu(hidden_states)))
        return hidden_states + self.title_projection(pooled[1])


@dataclass(frozen=True)
class EncoderInputs:
    """The towers' features of a batch. A missing modality is `None`.

    Args:
        frame_features: `[batch, frames, tokens, frame_feature_size]`.
        frame_mask: `[batch, frames]`, true for real frames. By default all are real.
        image_features: `[batch, image_feature_size]`, given with `frame_features`.
        title_features: `[batch, title length, text width]`.
        attention_mask: `[batch, title length]`, true for real title tokens. By default all are real.
        word_features: `[batch, words, text width]`, text features of the most probable image words.
        word_probabilities: `[batch, words]`, summing to 1, or 0 for an example without an image.
        example_seeds: `[batch]`, seeds of modality and token dropout in training.
    """

    frame_features: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    title_features: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    word_features: torch.Tensor | None = None
    word_probabilities: torch.Tensor | None = None
    example_seeds: torch.Tensor | None = None


@dataclass(frozen=True)
class EncoderOutput:
    """Output of [`MultimodalEncoder`].

    Args:
        memory: `[batch, memory length, hidden_size]`.
        memory_mask: `[batch, memory length]`, boolean.
        title_length: Number of title positions, the last ones of the memory.
        prompt_pooled: `[batch, hidden_size]`, the pooled representation for the prompts; `None` without
            `use_prompt_pooler`.
        evidence: Evidence for the tag classifier; `None` without one.
    """

    memory: torch.Tensor
    memory_mask: torch.Tensor
    title_length: int
    prompt_pooled: torch.Tensor | None
    evidence: TagEvidence | None


class EvidenceEncoder(nn.Module):
    """Selects the visible tokens of a batch, and pools them into evidence for the tag classifier.

    The towers belong to the model, not to this module, so that they can be frozen, cached or left out.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.evidence_pooler = EvidencePooler(config) if _has_classifier(config) else None

    def forward(self, inputs: EncoderInputs) -> TagEvidence | None:
        """Compute the evidence of a batch, `None` without a tag classifier; see [`select`]."""
        return self.select(inputs)[2]

    def select(
        self, inputs: EncoderInputs
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], TagEvidence | None]:
        """Select the visible tokens and compute the evidence.

        Args:
            inputs: The features of the towers.

        Returns:
            Tokens of frames and of titles, `[batch, length, width]` each, `None` for a missing modality; their masks
            `[batch, length]`, true for tokens that are visible; and the evidence.

        Raises:
            ValueError: Frames and titles are both missing, a video is longer than `max_frames`, or an example has
                neither a frame nor a title.
        """
        # Index 0 is the frames, index 1 the title.
        tokens = [inputs.frame_features, inputs.title_features]
        if tokens[0] is None and tokens[1] is None:
            raise ValueError("Nothing to encode: pass pixel_values, frame_features, input_ids or title_features.")
        masks = [self._frame_mask(inputs), None]
        if tokens[1] is not None:
            masks[1] = _full_mask(tokens[1]) if inputs.attention_mask is None else inputs.attention_mask.bool()
        if self.training:
            masks = self._hide_at_random(masks, inputs.example_seeds)
            tokens[1], masks[1] = self._pool_titles_at_random(tokens[1], masks[1], inputs.example_seeds)
        has_any = torch.stack([mask.any(dim=1) for mask in masks if mask is not None]).any(dim=0)
        # A traced program cannot depend on the content of a batch, so it does not check it.
        if not torch.compiler.is_compiling() and not has_any.all():
            empty = (~has_any).nonzero().flatten().tolist()
            raise ValueError(f"Examples {empty} of the batch have neither a frame nor a title.")
        if tokens[0] is not None:
            tokens[0] = tokens[0].flatten(1, 2)
        evidence = None if self.evidence_pooler is None else self._collect_evidence(inputs, tokens, masks)
        return tokens, masks, evidence

    def _collect_evidence(
        self, inputs: EncoderInputs, tokens: list[torch.Tensor | None], masks: list[torch.Tensor | None]
    ) -> TagEvidence:
        evidence = self.evidence_pooler(inputs.image_features, tokens, masks, inputs.word_features)
        evidence.word_probabilities = inputs.word_probabilities
        return evidence

    def _frame_mask(self, inputs: EncoderInputs) -> torch.Tensor | None:
        """Return which frame tokens are real, `[batch, frames * tokens]`."""
        features = inputs.frame_features
        if features is None:
            return None
        frames, tokens, width = features.shape[1:]
        if width != self.config.frame_feature_size:
            raise ValueError(
                f"frame_features has width {width}; this model expects frame_feature_size="
                f"{self.config.frame_feature_size}."
            )
        if frames > self.config.max_frames:
            raise ValueError(
                f"A video of {frames} frames is longer than max_frames={self.config.max_frames}; sample fewer frames."
            )
        mask = _full_mask(features) if inputs.frame_mask is None else inputs.frame_mask.bool()
        return mask.repeat_interleave(tokens, dim=1)

    def _pool_titles_at_random(
        self, titles: torch.Tensor | None, mask: torch.Tensor | None, seeds: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Replace some titles with the mean of their tokens, because image words are such means."""
        if titles is None or self.config.pooled_title_ratio == 0:
            return titles, mask
        drawn = seeded_uniform("pooled title", (len(titles),), seeds, titles.device)
        chosen = ((drawn < self.config.pooled_title_ratio) & mask.any(dim=1))[:, None]
        is_first = torch.arange(titles.shape[1], device=titles.device) == 0
        pooled = pool_tokens(titles, mask).to(titles.dtype)[:, None]
        return torch.where((chosen & is_first)[..., None], pooled, titles), torch.where(chosen, is_first, mask)

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


class MultimodalEncoder(EvidenceEncoder):
    """Projects the towers' tokens to one width, adds frame positions and modalities, and fuses them."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
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
        self.style_projection = None
        if _has_style(config):
            self.style_projection = nn.Linear(config.style_size, config.hidden_size, bias=False)

    def forward(self, inputs: EncoderInputs) -> EncoderOutput:
        """Encode a batch; see [`EvidenceEncoder.select`]."""
        tokens, masks, evidence = self.select(inputs)
        if evidence is not None:
            tokens, masks = _use_trusted_evidence(tokens, masks, evidence, inputs.word_features)
        style = None if evidence is None else evidence.style
        prompt_pooled = None if self.prompt_pooler is None else self.prompt_pooler(tokens, masks, style)
        memory = self._embed(tokens, inputs.frame_features)
        if style is not None:
            memory = memory + self.style_projection(style)[:, None]
        memory = self.dropout(memory)
        memory_mask = torch.cat([mask for mask in masks if mask is not None], dim=1)
        for layer in self.layers:
            memory, _ = layer(memory, memory_mask[:, None, None, :])
        title_length = 0 if tokens[1] is None else tokens[1].shape[1]
        return EncoderOutput(self.norm(memory), memory_mask, title_length, prompt_pooled, evidence)

    def _embed(self, tokens: list[torch.Tensor | None], frame_features: torch.Tensor | None) -> torch.Tensor:
        """Project the tokens, and add positions of frames and modalities."""
        device = next(part.device for part in tokens if part is not None)
        modalities, embedded = self.modalities(torch.arange(2, device=device)), []
        if tokens[0] is not None:
            frames, tokens_per_frame = frame_features.shape[1:3]
            positions = self.frame_positions(torch.arange(frames, device=device))
            positions = positions.repeat_interleave(tokens_per_frame, dim=0)
            embedded.append(self.frame_projection(tokens[0]) + positions + modalities[0])
        if tokens[1] is not None:
            embedded.append(self.title_projection(tokens[1]) + modalities[1])
        return torch.cat(embedded, dim=1)


def _has_classifier(config: PreTrainedConfig) -> bool:
    return bool(config.use_tag_classifier and config.num_tag_classes)


def _has_style(config: PreTrainedConfig) -> bool:
    return bool(_has_classifier(config) and config.style_size)


def _full_mask(tokens: torch.Tensor) -> torch.Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _use_trusted_evidence(
    tokens: list[torch.Tensor | None],
    masks: list[torch.Tensor | None],
    evidence: TagEvidence,
    word_features: torch.Tensor | None,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Mask frames of an ignored image, and insert image words for a missing title."""
    frames, titles = masks
    if frames is not None:
        frames = frames & evidence.uses_image[:, None]
    if word_features is not None:
        reads_words, word_features = evidence.reads_words, word_features[:, :MEMORY_WORDS]
        frames = frames & ~reads_words[:, None]
        words = word_features.shape[1]
        length = words if titles is None else max(words, titles.shape[1])
        # An example that reads words has no title. All are padded to one length.
        word_features = F.pad(word_features, (0, 0, 0, length - words))
        is_word = reads_words[:, None] & (torch.arange(length, device=word_features.device) < words)
        if titles is None:
            tokens, titles = [tokens[0], word_features * is_word[..., None]], is_word
        else:
            missing = length - titles.shape[1]
            padded = F.pad(tokens[1], (0, 0, 0, missing))
            tokens = [tokens[0], torch.where(is_word[..., None], word_features.to(padded.dtype), padded)]
            titles = F.pad(titles, (0, missing)) | is_word
    return tokens, [frames, titles]
