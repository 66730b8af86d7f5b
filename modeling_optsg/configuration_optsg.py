"""Configurations of OP-TSG and of the small vision tower that ships with it."""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

RATIOS = (
    "dropout",
    "attention_dropout",
    "classifier_dropout",
    "modality_dropout",
    "memory_token_dropout",
    "pooled_title_ratio",
    "parallel_ratio",
    "pad_slot_ratio",
)


# Small towers, of the sizes of the shipped checkpoint: EfficientNet-Lite0 and MiniLM-L6.
DEFAULT_VISION_CONFIG = {"model_type": "efficientnet_lite"}
DEFAULT_TEXT_CONFIG = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteModel`].

    EfficientNet-Lite is EfficientNet without squeeze-and-excitation and with ReLU6. The defaults are those of Lite0.

    Args:
        stem_size: Channels of the stem convolution.
        stages: One `[repeats, kernel size, stride, expansion ratio, channels]` per stage.
        hidden_size: Channels of the last feature map.
        batch_norm_eps: Epsilon of every batch normalisation.
    """

    model_type = "efficientnet_lite"

    stem_size: int = 32
    stages: list | None = None
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3

    def __post_init__(self, **kwargs: Any):
        if self.stages is None:
            self.stages = [
                [1, 3, 1, 1, 16],
                [2, 3, 2, 6, 24],
                [2, 5, 2, 6, 40],
                [3, 3, 2, 6, 80],
                [3, 5, 1, 6, 112],
                [4, 5, 2, 6, 192],
                [1, 3, 1, 6, 320],
            ]
        super().__post_init__(**kwargs)


# Registered here and not in `__init__`: remote code loads this file alone, and `AutoConfig` looks up the towers while
# `OPTSGConfig` is being built from its JSON.
AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)


class OPTSGConfig(PreTrainedConfig):
    """Configuration of [`OPTSGModel`] and [`OPTSGForTagGeneration`].

    Without any tower it has small ones, EfficientNet-Lite0 and a BERT of six layers.

    Args:
        vision_config: Configuration of the vision tower, anything that `AutoModel` builds. `None` for a model that
            reads precomputed frame features only.
        text_config: Configuration of the text tower, which encodes titles and the texts of tags.
        frame_feature_size: Width of the vision tower's tokens and of precomputed frame features. Defaults to
            `hidden_size` of `vision_config`, or the last of its `hidden_sizes`.
        vision_feature_layers: Hidden states of the vision tower to pool into image features (mean and maximum of
            each). With `None`, image features are the mean of the last hidden state.
        image_feature_size: Width of image features. Defaults to `frame_feature_size`.
        image_word_labels: Class names of the vision tower's classifier. `None` for a model without image words.
        image_word_feature_size: Input width of this classifier, before any projection.
        image_word_projection_size: Output width of the projection before this classifier, as in CLIP. `None` for no
            projection.
        image_word_pooling: Pooling of the tower's tokens for this classifier: "pooler_output", "first_token" or
            "mean".
        image_word_normalize: L2-normalise the input of this classifier, as in CLIP.
        num_image_words: Number of image words to average over, for an unfamiliar image without a title.
        hidden_size: Width of everything after the towers.
        num_attention_heads: Attention heads of every layer after the towers.
        intermediate_size: Width of the feed-forward block of every layer after the towers.
        num_encoder_layers: Layers of the multimodal encoder.
        num_prompt_layers: Layers of the prompt encoder.
        num_decoder_layers: Layers of the tag decoder.
        num_prompts: K, the number of order prompts.
        max_frames: Maximum number of frames of a video.
        max_tag_tokens: Maximum number of tokens of a tag.
        tag_vocab_size: Size of the tag tokenizer's vocabulary.
        tag_pad_token_id: Token of the predefined [PAD] tag. It also pads `tag_input_ids`.
        tag_sep_token_id: Token that ends a tag.
        dropout: Dropout after attention and feed-forward blocks.
        attention_dropout: Dropout of attention weights.
        modality_dropout: Probability that a training example with an image and a title loses one of the two.
        memory_token_dropout: Probability that a token of the memory is hidden in training.
        pooled_title_ratio: Ratio of training titles whose tokens are replaced by their mean. Image words are such
            means, so the model must learn to read them.
        use_prompt_pooler: Add the pooled tower features to the queries of the prompt encoder.
        use_tag_classifier: Train a tag classifier over the label vocabulary and fuse its logits with the slots'.
        num_tag_classes: Size of the label vocabulary. With 0 there is no tag classifier.
        classifier_loss_weight: Weight of the classifier loss.
        title_loss_weight: Weight of the title-only term of the classifier loss.
        image_loss_weight: Weight of the image-only term of the classifier loss.
        style_size: Width of the style vector, which is computed from the image and changes the tags of classifier and
            slots. 0 disables it.
        classifier_dropout: Dropout of the classifier's input.
        asl_gamma_negative: Focusing exponent γ⁻ of the asymmetric loss, for absent tags.
        asl_gamma_positive: Focusing exponent γ⁺ of the asymmetric loss, for present tags.
        asl_margin: Probability margin m of the asymmetric loss. Probabilities of absent tags are lowered by it.
        alignment_size: Width of the space in which prompts and tags are compared.
        alignment_loss_weight: Weight λ of the alignment loss.
        no_object_weight: Weight of a [PAD]-aligned prompt in the alignment loss.
        logit_scale_init_value: Initial logarithm of the scale of cosine similarities. The default is CLIP's,
            ln(1 / 0.07).
        parallel_ratio: Ratio of training examples that use the parallel attention mask. The others use the sequential
            mask.
        pad_slot_ratio: Ratio of [PAD]-aligned slots that are decoded in training. Their loss is scaled up to count as
            that of all.
        num_sampled_tokens: Number of random tokens next to a training batch's own in the softmax over tokens. With 0
            the softmax is over the whole vocabulary.
        book_evidence_size: Number of evidence values of a candidate tag from a book. With 0 there is no book reader.
        num_reader_layers: Layers of the book reader.
        initializer_range: Standard deviation of initial weights.
        tie_word_embeddings: Share the token embeddings with the output layer.

    Raises:
        ValueError: A value is out of range, or two values contradict each other.

    Example:

        >>> from modeling_optsg import OPTSGConfig
        >>> config = OPTSGConfig(text_config={"model_type": "bert"}, frame_feature_size=512, num_prompts=10)
        >>> config.num_prompts, config.vision_config
        (10, None)
    """

    model_type = "optsg"
    # `Trainer` gathers all other outputs over batches and processes. These are scalars, have no dimension of examples
    # or are large.
    keys_to_ignore_at_inference = [
        "logits",
        "generation_loss",
        "alignment_loss",
        "classifier_loss",
        "targets",
        "logit_tokens",
        "order_prompts",
        "target_log_probs",
        "copy_gate",
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="efficientnet_lite", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    frame_feature_size: int | None = None
    vision_feature_layers: list | None = None
    image_feature_size: int | None = None
    image_word_labels: list | None = None
    image_word_feature_size: int | None = None
    image_word_projection_size: int | None = None
    image_word_pooling: str = "pooler_output"
    image_word_normalize: bool = False
    num_image_words: int = 32
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    num_encoder_layers: int = 2
    num_prompt_layers: int = 2
    num_decoder_layers: int = 2
    num_prompts: int = 20
    max_frames: int = 32
    max_tag_tokens: int = 16
    tag_vocab_size: int = 8192
    tag_pad_token_id: int = 0
    tag_sep_token_id: int = 1
    dropout: float = 0.1
    attention_dropout: float = 0.0
    modality_dropout: float = 0.1
    memory_token_dropout: float = 0.0
    pooled_title_ratio: float = 0.1
    use_prompt_pooler: bool = True
    use_tag_classifier: bool = True
    num_tag_classes: int = 0
    classifier_loss_weight: float = 0.3
    title_loss_weight: float = 1.0
    image_loss_weight: float = 0.5
    style_size: int = 64
    classifier_dropout: float = 0.3
    asl_gamma_negative: float = 4.0
    asl_gamma_positive: float = 1.0
    asl_margin: float = 0.05
    alignment_size: int = 256
    alignment_loss_weight: float = 1.0
    no_object_weight: float = 0.1
    logit_scale_init_value: float = math.log(1 / 0.07)
    parallel_ratio: float = 0.5
    pad_slot_ratio: float = 1.0
    num_sampled_tokens: int = 0
    book_evidence_size: int = 0
    num_reader_layers: int = 2
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any):
        if self.vision_config is None and self.text_config is None and self.frame_feature_size is None:
            self.vision_config, self.text_config = dict(DEFAULT_VISION_CONFIG), dict(DEFAULT_TEXT_CONFIG)
        super().__post_init__(**kwargs)
        if self.frame_feature_size is None and self.vision_config is not None:
            widths = getattr(self.vision_config, "hidden_sizes", None) or [None]
            self.frame_feature_size = getattr(self.vision_config, "hidden_size", widths[-1])
        if self.image_feature_size is None:
            self.image_feature_size = self.frame_feature_size
        self._check()

    def _check(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.frame_feature_size is None:
            raise ValueError(
                "Set frame_feature_size, the width of the frame features or of the vision tower's tokens: "
                "from_vision_text_pretrained measures it."
            )
        if self.vision_config is None and self.vision_feature_layers:
            raise ValueError("vision_feature_layers needs a vision_config; with frame features, leave it out.")
        width = getattr(self.vision_config, "hidden_size", None)
        if width is not None and width != self.frame_feature_size:
            raise ValueError(
                f"frame_feature_size={self.frame_feature_size} must equal vision_config.hidden_size={width}: frame "
                "features replace the vision tower's tokens."
            )
        if self.tag_pad_token_id == self.tag_sep_token_id:
            raise ValueError(
                f"tag_pad_token_id and tag_sep_token_id are both {self.tag_pad_token_id}; they must differ."
            )
        for name in ("num_prompts", "max_tag_tokens", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in RATIOS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        for name in ("num_sampled_tokens", "asl_gamma_negative", "asl_gamma_positive"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.asl_margin < 1:
            raise ValueError(f"asl_margin={self.asl_margin} must lie in [0, 1).")


__all__ = ["EfficientNetLiteConfig", "OPTSGConfig"]
