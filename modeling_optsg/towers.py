"""The vision tower and the text tower, and how every model encodes its inputs with them."""

from collections.abc import Sequence

import torch
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .configuration_optsg import EfficientNetLiteConfig
from .efficientnet_lite import EfficientNetLiteForImageClassification, EfficientNetLiteModel
from .image_words import ImageWords, VisionFeatures
from .layers import pool_tokens

HALVES = ("vision", "text")


def register_shipped_tower(config: PreTrainedConfig) -> None:
    """Register the shipped vision tower for `config`, if it is that tower's configuration.

    Loaded as remote code, the configuration's class is another object than the one that a registration at import time
    would name, so the class is taken from the configuration at hand.
    """
    if config.model_type == EfficientNetLiteConfig.model_type:
        AutoModel.register(type(config), EfficientNetLiteModel, exist_ok=True)
        AutoModelForImageClassification.register(type(config), EfficientNetLiteForImageClassification, exist_ok=True)


class TowerMixin:
    """Encodes frames, titles and the texts of tags. For models with a `vision_tower` and a `text_tower`."""

    def _build_towers(self, config: PreTrainedConfig) -> None:
        for half in HALVES:
            tower_config = getattr(config, f"{half}_config")
            if tower_config is not None:
                register_shipped_tower(tower_config)
            tower = AutoModel.from_config(tower_config) if tower_config is not None else None
            setattr(self, f"{half}_tower", tower)
        self.image_words = ImageWords(config) if config.image_word_labels else None

    def encode_frames(self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> VisionFeatures:
        """Run the vision tower on frames.

        Args:
            pixel_values: `[batch, frames, 3, height, width]`.
            frame_mask: `[batch, frames]`. The tower does not run on masked frames; their tokens are zero.

        Returns:
            The features. `forward` accepts `frame_features` and `image_features`, and then uses no image words.

        Raises:
            ValueError: The model has no vision tower.
        """
        if self.vision_tower is None:
            raise ValueError("This model has no vision tower; pass frame_features instead of pixel_values.")
        frames = pixel_values.flatten(0, 1)
        # Towers do not run on an empty batch, so all frames are encoded if none is real.
        some_masked = frame_mask is not None and frame_mask.any() and not frame_mask.all()
        is_real = frame_mask.flatten().bool() if some_masked else None
        layers = self.config.vision_feature_layers
        outputs = self.vision_tower(
            pixel_values=frames if is_real is None else frames[is_real], output_hidden_states=bool(layers)
        )
        tokens = _as_tokens(outputs.last_hidden_state)
        pooled = tokens.mean(dim=1) if not layers else pool_layers([outputs.hidden_states[layer] for layer in layers])
        words = None if self.image_words is None else self.image_words(outputs)

        def per_frame(values: torch.Tensor) -> torch.Tensor:
            if is_real is not None:
                padded = values.new_zeros(len(frames), *values.shape[1:])
                padded[is_real] = values
                values = padded
            return values.unflatten(0, pixel_values.shape[:2])

        return VisionFeatures(
            per_frame(tokens),
            pool_tokens(per_frame(pooled), frame_mask),
            None if words is None else pool_tokens(per_frame(words), frame_mask),
        )

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
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[VisionFeatures | None, torch.Tensor | None]:
        """Compute the towers' features of a batch, or pass on precomputed ones.

        Args:
            pixel_values: See [`OPTSGModel.forward`].
            frame_features: See [`OPTSGModel.forward`].
            image_features: See [`OPTSGModel.forward`].
            frame_mask: See [`OPTSGModel.forward`].
            input_ids: See [`OPTSGModel.forward`].
            title_features: See [`OPTSGModel.forward`].
            attention_mask: See [`OPTSGModel.forward`].

        Returns:
            The features of the frames, and title tokens `[batch, title length, text width]`; `None` for a missing
            modality.

        Raises:
            ValueError: A modality is given twice, a shape is wrong, or image features are missing.
        """
        if pixel_values is not None and frame_features is not None:
            raise ValueError("Pass pixel_values or frame_features, not both.")
        if input_ids is not None and title_features is not None:
            raise ValueError("Pass input_ids or title_features, not both.")
        vision = None
        if pixel_values is not None:
            if pixel_values.ndim != 5:
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}; expected [batch, frames, 3, height, width]."
                )
            vision = self.encode_frames(pixel_values, frame_mask)
        elif frame_features is not None:
            vision = self._read_features(frame_features, image_features, frame_mask)
        if input_ids is not None:
            title_features = self.encode_text(input_ids, attention_mask)
        return vision, title_features

    def _read_features(
        self, frame_features: torch.Tensor, image_features: torch.Tensor | None, frame_mask: torch.Tensor | None
    ) -> VisionFeatures:
        if frame_features.ndim not in (3, 4):
            raise ValueError(
                f"frame_features has shape {tuple(frame_features.shape)}; expected [batch, frames, width] or "
                "[batch, frames, tokens, width]."
            )
        if frame_features.ndim == 3:
            frame_features = frame_features[:, :, None]
        if image_features is None:
            if self.config.vision_feature_layers:
                raise ValueError("Pass image_features as well, which encode_frames computes with frame_features.")
            image_features = pool_tokens(frame_features.float().mean(dim=2), frame_mask)
        elif image_features.shape != (len(frame_features), self.config.image_feature_size):
            raise ValueError(
                f"image_features has shape {tuple(image_features.shape)}; expected [batch, image_feature_size="
                f"{self.config.image_feature_size}]."
            )
        return VisionFeatures(frame_features, image_features)


def _as_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return a feature map `[images, width, rows, columns]` as tokens `[images, tokens, width]`."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


@torch.no_grad()
def measure_image_features(tower: PreTrainedModel, layers: Sequence[int]) -> int:
    """Return the width of [`pool_layers`] for some hidden states of a vision tower.

    Raises:
        ValueError: The tower does not have these hidden states.
    """
    size = getattr(tower.config, "image_size", 64)
    size = size if isinstance(size, int) else 64
    outputs = tower.eval()(pixel_values=torch.zeros(1, 3, size, size), output_hidden_states=True)
    count = len(outputs.hidden_states)
    if any(not -count <= layer < count for layer in layers):
        raise ValueError(f"vision_feature_layers={list(layers)}: the vision tower has {count} hidden states.")
    return pool_layers([outputs.hidden_states[layer] for layer in layers]).shape[1]


def pool_layers(hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Describe images by several layers of a vision tower, because fine details are lost in its last layer.

    Args:
        hidden_states: Feature maps `[images, width, rows, columns]` or tokens `[images, tokens, width]`.

    Returns:
        `[images, twice the sum of the widths]`: the mean and the maximum of each layer over its positions.
    """
    pooled = []
    for layer in map(_as_tokens, hidden_states):
        pooled += [layer.mean(dim=1), layer.amax(dim=1)]
    return torch.cat(pooled, dim=-1)
