"""Configurations of OP-TSG and of the small convolutional vision tower that ships with it."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteModel`] (EfficientNet-Lite: no squeeze-and-excitation, ReLU6).

    Args:
        stem_size: channels of the stem convolution.
        stages: one `[repeats, kernel size, stride, expansion ratio, channels]` a stage; the default is Lite0.
        hidden_size: channels of the last feature map, the width other models see.
        batch_norm_eps: epsilon of every batch normalisation.
    """

    model_type = "efficientnet_lite"

    stem_size: int = 32
    stages: list | None = None
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3

    def __post_init__(self, **kwargs):
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


# Registered here and not in `__init__`: remote code loads this file alone, and the towers' `AutoConfig` look-up
# happens while `OPTSGConfig` is being built from its JSON.
AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)


class OPTSGConfig(PreTrainedConfig):
    """Configuration of [`OPTSGModel`] and [`OPTSGForTagGeneration`].

    Args:
        vision_config: configuration of the vision tower (anything `AutoModel` builds); `None` for a model that only
            reads precomputed frame features.
        text_config: configuration of the text tower, which reads titles and, for the alignment, tags.
        frame_feature_size: width of precomputed frame features and of the vision tower's tokens; taken from
            `vision_config.hidden_size` when left out.
        hidden_size: width d of everything after the towers.
        num_attention_heads, intermediate_size: shape of every transformer layer after the towers.
        num_encoder_layers, num_prompt_layers, num_decoder_layers: depth of the three rooms.
        num_prompts: K, the number of order prompts.
        max_frames: longest video, in frames.
        max_tag_tokens: longest tag, in tokens of the tag tokenizer.
        tag_vocab_size: size of the tag tokenizer.
        tag_pad_token_id: token of the pre-defined [PAD] tag (also the filler of `tag_input_ids`).
        tag_sep_token_id: token that ends a tag.
        dropout: dropout after attention and feed-forward blocks; `attention_dropout` that of attention weights.
        modality_dropout: in training, probability that an example with image and title loses one of the two.
        use_prompt_pooler: whether the order prompts begin from the example's pooled tower features, beside what they find in
            the memory.
        use_tag_classifier: whether the example as a whole is compared with all train tags too, in training and for the
            probability of a written tag.
        num_tag_classes: number of train tags it is compared with; with 0 there is no such comparison.
        classifier_loss_weight: its share in the loss; classifier_dropout: dropout of the summary there.
        asl_gamma_negative, asl_gamma_positive, asl_margin: of its asymmetric loss: focusing exponents (γ⁻, γ⁺) for
            absent and present tags, and by how much the probability of an absent tag is lowered (m).
        memory_token_dropout: in training, probability that a token of the memory is hidden from an example.
        alignment_size: width of the space in which prompts and tags are compared.
        alignment_loss_weight: λ of `loss = generation_loss + λ * alignment_loss`.
        no_object_weight: weight of a [PAD]-aligned prompt in the alignment loss.
        logit_scale_init_value: initial logarithm of the scale of similarities (learned).
        parallel_ratio: share of the examples that train with the parallel attention mask; the rest are sequential.
        pad_slot_ratio: in training, share of the [PAD]-aligned slots that are written, at random; their loss counts as
            that of all.
        num_sampled_tokens: in training, tokens drawn at random as negatives beside the batch's own in place of the
            whole vocabulary; 0 for all of it.
        initializer_range: standard deviation of the weights' initialisation.
    """

    model_type = "optsg"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="efficientnet_lite", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    frame_feature_size: int | None = None
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
    use_prompt_pooler: bool = True
    use_tag_classifier: bool = True
    num_tag_classes: int = 0
    classifier_loss_weight: float = 0.3
    classifier_dropout: float = 0.3
    asl_gamma_negative: float = 4.0
    asl_gamma_positive: float = 1.0
    asl_margin: float = 0.05
    alignment_size: int = 256
    alignment_loss_weight: float = 1.0
    no_object_weight: float = 0.1
    # ln(1 / 0.07), as in CLIP.
    logit_scale_init_value: float = 2.6593
    parallel_ratio: float = 0.5
    pad_slot_ratio: float = 1.0
    num_sampled_tokens: int = 0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.frame_feature_size is None and self.vision_config is not None:
            self.frame_feature_size = self.vision_config.hidden_size
        self._check()

    def _check(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.vision_config is not None and self.vision_config.hidden_size != self.frame_feature_size:
            raise ValueError(
                f"frame_feature_size={self.frame_feature_size} must equal vision_config.hidden_size="
                f"{self.vision_config.hidden_size}: precomputed features stand in for the tower's tokens."
            )
        if self.frame_feature_size is None:
            raise ValueError("frame_feature_size is needed when there is no vision_config: the width of the features.")
        if self.tag_pad_token_id == self.tag_sep_token_id:
            raise ValueError(
                f"tag_pad_token_id and tag_sep_token_id are both {self.tag_pad_token_id}; they must differ."
            )
        for name in ("num_prompts", "max_tag_tokens", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        shares = "dropout attention_dropout classifier_dropout modality_dropout memory_token_dropout parallel_ratio"
        for name in (*shares.split(), "pad_slot_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        for name in ("num_sampled_tokens", "asl_gamma_negative", "asl_gamma_positive"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.asl_margin < 1:
            raise ValueError(f"asl_margin={self.asl_margin} must lie in [0, 1).")


__all__ = ["EfficientNetLiteConfig", "OPTSGConfig"]
