"""The vision tower and the text tower, and how every model encodes its inputs with them."""

import torch
from transformers import AutoModel, PreTrainedConfig

from .configuration_optsg import EfficientNetLiteConfig
from .efficientnet_lite import EfficientNetLiteModel

HALVES = ("vision", "text")


def register_shipped_tower(config: PreTrainedConfig) -> None:
    """Register the shipped vision tower for `config`, if it is that tower's configuration.

    Loaded as remote code, the configuration's class is another object than the one that a registration at import time
    would name, so the class is taken from the configuration at hand.
    """
    if config.model_type == EfficientNetLiteConfig.model_type:
        AutoModel.register(type(config), EfficientNetLiteModel, exist_ok=True)


class TowerMixin:
    """Encodes frames, titles and the texts of tags. For models with a `vision_tower` and a `text_tower`."""

    def _build_towers(self, config: PreTrainedConfig) -> None:
        for half in HALVES:
            tower_config = getattr(config, f"{half}_config")
            if tower_config is not None:
                register_shipped_tower(tower_config)
            tower = AutoModel.from_config(tower_config) if tower_config is not None else None
            setattr(self, f"{half}_tower", tower)

    def encode_frames(self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the vision tower on frames.

        Args:
            pixel_values: `[batch, frames, 3, height, width]`.
            frame_mask: `[batch, frames]`. The tower does not run on masked frames; their tokens are zero.

        Returns:
            `[batch, frames, tokens, frame_feature_size]`, which `forward` accepts as `frame_features`.

        Raises:
            ValueError: The model has no vision tower.
        """
        if self.vision_tower is None:
            raise ValueError("This model has no vision tower; pass frame_features instead of pixel_values.")
        frames = pixel_values.flatten(0, 1)
        # Towers do not run on an empty batch, so all frames are encoded if none is real.
        some_masked = frame_mask is not None and frame_mask.any() and not frame_mask.all()
        is_real = frame_mask.flatten().bool() if some_masked else None
        tokens = self.vision_tower(pixel_values=frames if is_real is None else frames[is_real]).last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if is_real is not None:
            padded = tokens.new_zeros(len(frames), *tokens.shape[1:])
            tokens = padded.masked_scatter(is_real[:, None, None], tokens)
        return tokens.unflatten(0, pixel_values.shape[:2])

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the text tower on texts.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`. The tokens of a row without text are undefined; mask them out.

        Returns:
            `[batch, length, text width]`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # A row that attends to nothing is NaN in some kernels, so the first token of an empty row is let in.
        is_empty = attention_mask.any(dim=1, keepdim=True).logical_not()
        is_first = torch.arange(attention_mask.shape[1], device=attention_mask.device) == 0
        attention_mask = attention_mask.masked_fill(is_empty & is_first, 1)
        return self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def embed_tags(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute mean-pooled text-tower features `[tags, text width]` of tags.

        Args:
            input_ids: `[tags, length]`, tokens of the text tower's tokenizer.
            attention_mask: `[tags, length]`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens = self.encode_text(input_ids, attention_mask)
        weights = attention_mask[..., None].to(tokens.dtype)
        return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def encode_inputs(
        self,
        pixel_values: torch.Tensor | None,
        frame_features: torch.Tensor | None,
        frame_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        title_features: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Compute the towers' tokens of a batch, or pass on precomputed ones.

        Args:
            pixel_values: See [`OPTSGModel.forward`].
            frame_features: See [`OPTSGModel.forward`].
            frame_mask: See [`OPTSGModel.forward`].
            input_ids: See [`OPTSGModel.forward`].
            title_features: See [`OPTSGModel.forward`].
            attention_mask: See [`OPTSGModel.forward`].

        Returns:
            Frame tokens `[batch, frames, tokens, frame_feature_size]` and title tokens
            `[batch, title length, text width]`, `None` for a missing modality.

        Raises:
            ValueError: A modality is given twice, or a shape is wrong.
        """
        if pixel_values is not None and frame_features is not None:
            raise ValueError("Pass pixel_values or frame_features, not both.")
        if input_ids is not None and title_features is not None:
            raise ValueError("Pass input_ids or title_features, not both.")
        if pixel_values is not None:
            if pixel_values.ndim != 5:
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}; expected [batch, frames, 3, height, width]."
                )
            frame_features = self.encode_frames(pixel_values, frame_mask)
        elif frame_features is not None:
            if frame_features.ndim not in (3, 4):
                raise ValueError(
                    f"frame_features has shape {tuple(frame_features.shape)}; expected [batch, frames, width] or "
                    "[batch, frames, tokens, width]."
                )
            if frame_features.ndim == 3:
                frame_features = frame_features[:, :, None]
        if input_ids is not None:
            title_features = self.encode_text(input_ids, attention_mask)
        return frame_features, title_features
