"""The vision tower and the text tower, and how every model encodes its inputs with them."""

from collections.abc import Sequence

import torch
import transformers
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)

from .batch_tags import BatchTags
from .configuration_optsg import EfficientNetLiteConfig
from .efficientnet_lite import EfficientNetLiteForImageClassification, EfficientNetLiteModel
from .image_words import ImageWords, VisionFeatures
from .layers import pool_tokens
from .vision_tower import VIDEO_TOWER, as_tokens, pool_layers, run_vision_tower

HALVES = ("vision", "text")
# Weights of a tower that its tokens do not depend on: all towers, and by `model_type`.
UNUSED_WEIGHTS = ("pooler.", "embeddings.mask_token")
UNUSED_WEIGHTS_OF = {
    "clip_vision_model": ("post_layernorm.",),
    "convnext": ("layernorm.",),
    "convnextv2": ("layernorm.",),
    "siglip_vision_model": ("head.",),
    "siglip_text_model": ("head.",),
    "siglip2_vision_model": ("head.",),
    "siglip2_text_model": ("head.",),
}
# With more frames, feature maps take so much memory that the C library returns it to the system after every use, and
# has to map it again, which makes the vision tower slower.
FRAMES_AT_ONCE = 4


def register_tower(config: PreTrainedConfig) -> None:
    """Register a tower for the auto classes: the shipped vision tower, or a half of a two-tower model such as SigLIP.

    Loaded as remote code, the configuration of the shipped tower is of another class than the one that a registration
    at import time would name, so the class is taken from the configuration at hand.
    """
    if config.model_type == EfficientNetLiteConfig.model_type:
        AutoModel.register(type(config), EfficientNetLiteModel, exist_ok=True)
        AutoModelForImageClassification.register(type(config), EfficientNetLiteForImageClassification, exist_ok=True)
    elif type(config) not in MODEL_MAPPING:
        # The library registers some halves only as parts of the whole model.
        tower = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}Model", None)
        if tower is not None:
            AutoModel.register(type(config), tower, exist_ok=True)


def _auto_class(half: str, config: PreTrainedConfig) -> type:
    """Return the class that builds a tower. Of a text model with a decoder, such as T5, it is the encoder alone."""
    is_encoder = half == "text" and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return AutoModelForTextEncoding if is_encoder else AutoModel


def build_tower(half: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the vision or the text tower with random weights.

    Args:
        half: "vision" or "text".
        config: Configuration of the tower.
    """
    register_tower(config)
    return _auto_class(half, config).from_config(config)


def freeze_unused_weights(tower: PreTrainedModel) -> None:
    """Freeze the weights of a tower that only its pooled output depends on, which the models do not read.

    `DistributedDataParallel` waits for the gradients of all weights that are not frozen.
    """
    unused = UNUSED_WEIGHTS + UNUSED_WEIGHTS_OF.get(tower.config.model_type, ())
    for name, parameter in tower.named_parameters():
        if name.startswith(unused):
            parameter.requires_grad = False


def load_tower(half: str, name_or_path: str) -> PreTrainedModel:
    """Load a pretrained tower with 32-bit weights, in evaluation mode.

    Args:
        half: "vision" or "text".
        name_or_path: Folder or Hub name. Of a two-tower model such as CLIP, the vision or the text tower is loaded.

    Raises:
        ValueError: The checkpoint does not contain such a tower.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    config = getattr(config, f"{half}_config", config)
    register_tower(config)
    try:
        # Otherwise a tower that was saved in half precision would stay in half precision.
        tower, report = _auto_class(half, config).from_pretrained(
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True
        )
    except ValueError as error:
        # The other lines list all models of the library.
        reason = str(error).splitlines()[0]
        raise ValueError(f"The {half} tower {name_or_path} cannot be used: {reason}") from error
    # The pooled output of a tower is not needed, and checkpoints of other tasks do not have its weights.
    parameters = {name for name, _ in tower.named_parameters() if "pooler" not in name}
    if missing := sorted(parameters & set(report["missing_keys"])):
        raise ValueError(
            f"The {half} tower {name_or_path} cannot be used: the checkpoint lacks {len(missing)} of its weights, "
            f"such as {', '.join(missing[:3])}."
        )
    # `config.json` must not contain the local path of the tower.
    tower.config._name_or_path = ""
    if getattr(tower.config, "use_cache", False):
        # Texts are encoded, not generated.
        tower.config.use_cache = False
    return tower.eval()


@torch.no_grad()
def check_text_tower(tower: PreTrainedModel) -> None:
    """Run a text tower on two token sequences, one of them padded.

    Raises:
        ValueError: It cannot encode them, or the width of its output is not its `hidden_size`. The message says why.
    """
    input_ids, mask = torch.tensor([[1, 2, 3], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    try:
        states = tower(input_ids=input_ids, attention_mask=mask).last_hidden_state
    except Exception as error:  # A tower of another kind fails in its own way.
        raise ValueError(
            f"it cannot encode a text ({type(error).__name__}: {error}). Use a text encoder such as BERT or T5, the "
            "text tower of CLIP or SigLIP, or a decoder such as GPT-2"
        ) from error
    width = getattr(tower.config, "hidden_size", None)
    if states.shape != (2, 3, width):
        raise ValueError(f"its output has shape {list(states.shape)}; expected [texts, tokens, hidden_size={width}]")


class TowerMixin:
    """Encodes frames, titles and the texts of tags. For models with a `vision_tower` and a `text_tower`."""

    def _build_towers(self, config: PreTrainedConfig) -> None:
        for half in HALVES:
            tower_config = getattr(config, f"{half}_config")
            setattr(self, f"{half}_tower", None if tower_config is None else build_tower(half, tower_config))
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
        # A traced program cannot depend on the mask, so it encodes all frames. VideoMAE needs to know the real ones.
        is_video_tower = self.vision_tower.config.model_type == VIDEO_TOWER
        is_traced = torch.compiler.is_compiling() and not is_video_tower
        # Towers do not run on an empty batch, so all frames are encoded if none is real.
        some_masked = not is_traced and frame_mask is not None and frame_mask.any() and not frame_mask.all()
        is_real = frame_mask.flatten().bool() if some_masked else None
        # `len` would fix the batch size of a traced program.
        counts = () if is_traced else [pixel_values.shape[1]] * len(pixel_values)
        if is_real is not None:
            frames, counts = frames[is_real], [count for count in frame_mask.sum(dim=1).tolist() if count]
        if is_traced or is_video_tower or self.training or frames.device.type != "cpu":
            tokens, pooled, words = self._run_vision_tower(frames, counts)
        else:
            parts = [self._run_vision_tower(part, [1] * len(part)) for part in frames.split(FRAMES_AT_ONCE)]
            tokens, pooled, words = (None if part[0] is None else torch.cat(part) for part in zip(*parts))

        def per_frame(values: torch.Tensor) -> torch.Tensor:
            if is_real is not None:
                padded = values.new_zeros(len(is_real), *values.shape[1:])
                padded[is_real] = values
                values = padded
            elif is_traced and frame_mask is not None:
                is_masked = ~frame_mask.flatten().bool()
                values = values.masked_fill(is_masked.view(-1, *[1] * (values.ndim - 1)), 0)
            return values.unflatten(0, pixel_values.shape[:2])

        return VisionFeatures(
            per_frame(tokens),
            pool_tokens(per_frame(pooled), frame_mask),
            None if words is None else pool_tokens(per_frame(words), frame_mask),
        )

    def _run_vision_tower(
        self, frames: torch.Tensor, counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return tokens, image features and probabilities of image words of frames `[frames, 3, height, width]`."""
        layers = self.config.vision_feature_layers
        outputs = run_vision_tower(self.vision_tower, frames, counts, output_hidden_states=bool(layers))
        tokens = as_tokens(outputs.last_hidden_state)
        pooled = tokens.mean(dim=1) if not layers else pool_layers([outputs.hidden_states[layer] for layer in layers])
        return tokens, pooled, None if self.image_words is None else self.image_words(outputs)

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
        return pool_tokens(self.encode_text(input_ids, attention_mask), attention_mask)

    def embed_batch_tags(
        self,
        tags: BatchTags,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        negative_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the text features `[tags, text width]` of the different tags of a batch.

        Args:
            tags: The tags.
            input_ids, attention_mask: `[batch, max tags per example, length]`, the tags for the text tower.
            features: `[batch, max tags per example, text width]`, precomputed instead.
            negative_features: `[batch, negatives, text width]`, those of the negatives.

        Raises:
            ValueError: The features of the tags or of the negatives are missing.
        """
        if len(tags.first) > tags.num_own and negative_features is None:
            raise ValueError(
                "negative_input_ids need negative_features; OPTSGDataCollator with a tag_table adds them."
            )
        if features is not None:
            return tags.select(features, negative_features)
        if input_ids is None:
            raise ValueError("labels need tag_text_input_ids or tag_features; `processor(tags=...)` makes the former.")
        mask = None if attention_mask is None else tags.select(attention_mask)
        own = self.embed_tags(tags.select(input_ids), mask)
        if len(tags.first) == tags.num_own:
            return own
        negatives = tags.first[tags.num_own :] - tags.labels.numel()
        return torch.cat([own, negative_features.flatten(0, -2)[negatives].to(own)])

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
