"""The base class of all models, the towers, and the models that compute evidence and order prompts."""

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .book_reader import INITIAL_GENERATE_LOGIT, BookReader
from .configuration_optsg import OPTSGConfig
from .image_words import ImageWords, VisionFeatures
from .layers import Standardizer, dtype_of
from .model_outputs import OPTSGModelOutput
from .multimodal_encoder import EncoderInputs, EvidenceEncoder, MemoryLayout, MultimodalEncoder
from .prepared_weights import prepare_weights, restore_weights
from .prompt_encoder import PromptEncoder
from .tag_alignment import TagAlignment
from .tag_classifier import CosineClassifier, LabelVocabulary, TagClassifier
from .tag_evidence import (
    INITIAL_ATTENTION_WEIGHT,
    INITIAL_LOG_IMAGE_WEIGHT,
    INITIAL_LOG_SCALES,
    AttentionPooler,
    EvidencePooler,
    ImageStandardizer,
    TagEvidence,
)
from .towers import HALVES, TowerMixin, check_text_tower, freeze_unused_weights, load_tower
from .vision_tower import measure_vision_tower

# Most tags are absent from most examples. With an initial probability of 1/2, the first steps would learn only that.
INITIAL_CLASS_BIAS = -5.0


class OPTSGPreTrainedModel(PreTrainedModel):
    """Base class of all models: configuration, initial weights, loading and saving."""

    config_class = OPTSGConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Modules with parameters of their own, which a device map can only place as a whole.
    _no_split_modules = [
        "TransformerLayer",
        "PromptEncoder",
        "EvidencePooler",
        "TagAlignment",
        "TagClassifier",
        "CosineClassifier",
        "BookReader",
    ]
    # Statistics of the training examples, see [`Float32Buffers`].
    _keep_in_fp32_modules_strict = ["standardizer", "image_scaling", "log_counts"]
    # Otherwise `Trainer` assumes that a `forward` with `**kwargs` divides the loss by the number of tokens of all
    # accumulated batches, and does not divide it.
    accepts_loss_kwargs = False
    # Set by `prepare_for_inference`: what `train` restores.
    _copied_weights: list[tuple[nn.Linear, nn.Parameter]] | None = None

    @classmethod
    def from_pretrained(
        cls, *args: Any, ignore_mismatched_sizes: bool = False, output_loading_info: bool = False, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a model; see [`PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: A tensor has a different shape than in the model. The message contains its name.
        """
        model, report = super().from_pretrained(
            *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        if report["mismatched_keys"] and not ignore_mismatched_sizes:
            shapes = [f"{name} is {[*saved]}, not {[*own]}" for name, saved, own in sorted(report["mismatched_keys"])]
            more = f", and {len(shapes) - 5} more" if len(shapes) > 5 else ""
            raise ValueError(
                f"The weights do not fit the configuration: {', '.join(shapes[:5])}{more}. Load the checkpoint with "
                "its own configuration; set_label_vocabulary then gives it other classes, and resize_token_embeddings "
                "another number of tokens. With ignore_mismatched_sizes=True, these tensors are new and untrained."
            )
        # Loading makes new parameters.
        model.freeze_untrained_weights()
        return (model, report) if output_loading_info else model

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_name_or_path: str | None, text_name_or_path: str, **config_kwargs: Any
    ) -> "OPTSGPreTrainedModel":
        """Build a new model on two pretrained towers.

        Args:
            vision_name_or_path: Folder or Hub name of the vision tower (ViT, CLIP, SigLIP, DINOv2, ConvNeXt, ...). For
                a two-tower model such as CLIP, its vision tower is used. `None` for a model with precomputed frame
                features, which needs `frame_feature_size`.
            text_name_or_path: Folder or Hub name of the text tower (BERT, T5, GPT-2, ...). For a two-tower model, its
                text tower is used.
            config_kwargs: Arguments of the model's configuration.

        Raises:
            ValueError: A tower cannot be used. The message names it and the reason.
        """
        towers = {}
        for half, name in zip(HALVES, (vision_name_or_path, text_name_or_path), strict=True):
            if name is None:
                continue
            towers[half] = tower = load_tower(half, name)
            try:
                if half == "text":
                    check_text_tower(tower)
                else:
                    layers = config_kwargs.get("vision_feature_layers")
                    frame_width, config_kwargs["image_feature_size"] = measure_vision_tower(tower, layers)
                    config_kwargs.setdefault("frame_feature_size", frame_width)
            except ValueError as error:
                raise ValueError(f"The {half} tower {name} cannot be used: {error}.") from error
        if "vision" in towers and config_kwargs["frame_feature_size"] != frame_width:
            raise ValueError(
                f"frame_feature_size={config_kwargs['frame_feature_size']} must equal the width of the vision tower's "
                f"features, {frame_width}; leave it out."
            )
        config = cls.config_class(
            vision_config=towers["vision"].config if "vision" in towers else None,
            text_config=towers["text"].config,
            **config_kwargs,
        )
        model = cls(config)
        for half, tower in towers.items():
            getattr(model.model, f"{half}_tower").load_state_dict(tower.state_dict())
        return model

    @property
    def device(self) -> torch.device:
        """Device of the inputs: that of the first weight or buffer that is not offloaded."""
        tensors = (tensor for tensor in chain(self.parameters(), self.buffers()) if not tensor.is_meta)
        return next((tensor.device for tensor in tensors), torch.device("meta"))

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the tag decoder, which only models that generate tags token by token have.

        Raises:
            NotImplementedError: The model does not have a tag decoder.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no embeddings of tag tokens: it does not generate tags token by token, so it "
            "also has no vocabulary of tokens to resize."
        )

    def prepare_for_inference(self) -> "OPTSGPreTrainedModel":
        """Lay out the weights for fast inference on a CPU, and put the model into evaluation mode.

        Results are the same to rounding. The weights of linear layers are stored transposed, an output layer that
        shares its weight with embeddings gets a copy of it, and the shipped vision tower folds its batch
        normalisation. `train()` undoes all three. Call it after the weights are loaded: later changes do not reach
        the folded layers and the copy. On other devices nothing changes.

        Returns:
            The model itself.

        Example:

            >>> from modeling_optsg import OPTSGForTagGeneration
            >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small").prepare_for_inference()
        """
        self.eval()
        if self.device.type == "cpu":
            self._copied_weights = (self._copied_weights or []) + prepare_weights(self)
        return self

    def train(self, mode: bool = True) -> "OPTSGPreTrainedModel":
        """Set the mode; see [`torch.nn.Module.train`]. Undoes [`prepare_for_inference`]."""
        if mode and self._copied_weights is not None:
            restore_weights(self, self._copied_weights)
            self._copied_weights = None
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, its code and the code of `pipeline("tag-generation")`."""
        # Imported here, because an import at the top would load all pipelines of the library. The library copies this
        # file in both cases.
        from .pipeline_optsg import CUSTOM_PIPELINES

        # The code of a baseline imports the package, so it does not need the code of the pipeline.
        if type(self).__module__.rpartition(".")[0] == __package__:
            self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        """Initialise the weights, and freeze those that `forward` does not train."""
        super().post_init()
        self.freeze_untrained_weights()

    def freeze_untrained_weights(self) -> None:
        """Freeze the weights that no loss of `forward` depends on; see [`freeze_unused_weights`].

        The book reader is trained alone (`train_book_reader`), and image words are classes of the vision tower.
        """
        for module in self.modules():
            if isinstance(module, TowerMixin):
                for tower in (module.vision_tower, module.text_tower):
                    if tower is not None:
                        freeze_unused_weights(tower)
            elif isinstance(module, (BookReader, ImageWords)):
                module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, PromptEncoder):
            # Similar queries would be matched to the same tags, so the initial queries are far apart.
            init.normal_(module.queries, std=1.0)
        elif isinstance(module, BookReader):
            init.normal_(module.slots, std=0.5)
            init.constant_(module.generate_logit.bias, INITIAL_GENERATE_LOGIT)
        elif isinstance(module, AttentionPooler):
            init.normal_(module.query, std=1.0)
        elif isinstance(module, TagAlignment):
            init.normal_(module.pad_embedding, std=self.config.initializer_range)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, CosineClassifier):
            init.constant_(module.bias, INITIAL_CLASS_BIAS)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, TagClassifier):
            init.constant_(module.bias, INITIAL_CLASS_BIAS)
        elif isinstance(module, LabelVocabulary):
            # Classes without tags.
            init.constant_(module.tokens, module.pad_token_id)
            init.zeros_(module.log_counts)
        elif isinstance(module, ImageWords):
            init.zeros_(module.text_features)
        elif isinstance(module, EvidencePooler):
            init.copy_(module.log_scales, torch.tensor(INITIAL_LOG_SCALES))
            init.constant_(module.log_image_weight, INITIAL_LOG_IMAGE_WEIGHT)
            init.constant_(module.attention_weight, INITIAL_ATTENTION_WEIGHT)
            # Start with an open gate.
            init.zeros_(module.gate_outer.weight)
            init.ones_(module.gate_outer.bias)
        elif isinstance(module, ImageStandardizer):
            init.ones_(module.scale)
            for buffer in (module.mean, module.components, module.half_familiar_distance):
                init.zeros_(buffer)
        elif isinstance(module, Standardizer):
            init.zeros_(module.mean)
            init.ones_(module.scale)


class OPTSGTowers(TowerMixin, OPTSGPreTrainedModel):
    """The two towers alone, for models that compare their pooled tokens."""

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self._build_towers(config)

    def train(self, mode: bool = True) -> "OPTSGTowers":
        """Set the mode of all modules. Frozen towers and batch normalisation stay in evaluation mode.

        Batches are too small to estimate the statistics of batch normalisation.
        """
        super().train(mode)
        for tower in (self.vision_tower, self.text_tower, self.image_words):
            if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def encode(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[EncoderInputs, torch.Tensor | None]:
        """Compute the tower features of a batch, unless it has them already.

        Args:
            pixel_values, frame_features, image_features, frame_mask: See [`OPTSGModel.forward`].
            input_ids, title_features, attention_mask, example_seeds: See [`OPTSGModel.forward`].
            kwargs: Other arguments of a batch, which are ignored.

        Returns:
            The features, and the most probable image words `[batch, words]` as indices, `None` without them.
        """
        vision, title_features = self.encode_inputs(
            pixel_values, frame_features, image_features, frame_mask, input_ids, title_features, attention_mask
        )
        words, word_features, word_probabilities = self._look_up_words(vision)
        # Precomputed features may have another type than the weights. Image features are standardised in 32 bits.
        dtype = dtype_of(self.multimodal_encoder)
        frame_features, title_features, word_features = (
            None if features is None else features.to(dtype)
            for features in (None if vision is None else vision.frame_features, title_features, word_features)
        )
        if self.training:
            # A missing modality has no tokens. Its layers still get a gradient, which other processes may wait for.
            if frame_features is None and title_features is not None:
                frame_features = title_features.new_zeros(len(title_features), 0, 1, self.config.frame_feature_size)
                frame_mask = None
            elif title_features is None and frame_features is not None:
                width = self.config.text_config.hidden_size
                title_features, attention_mask = frame_features.new_zeros(len(frame_features), 0, width), None
        inputs = EncoderInputs(
            frame_features=frame_features,
            frame_mask=frame_mask,
            image_features=None if vision is None else vision.image_features,
            title_features=title_features,
            attention_mask=attention_mask,
            word_features=word_features,
            word_probabilities=word_probabilities,
            example_seeds=example_seeds,
        )
        return inputs, words

    def _look_up_words(self, vision: VisionFeatures | None) -> tuple[torch.Tensor | None, ...]:
        """Return the most probable image words, their text features and their probabilities, `None` without them."""
        if self.image_words is None or vision is None or vision.word_probabilities is None:
            return None, None, None
        number = min(self.config.num_image_words, vision.word_probabilities.shape[1])
        probabilities, words = vision.word_probabilities.topk(number, dim=1)
        return words, self.image_words.text_features[words], probabilities


class OPTSGEvidenceModel(OPTSGTowers):
    """The towers and the evidence for a tag classifier, without memory and order prompts."""

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self.multimodal_encoder = EvidenceEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, **inputs: Any) -> TagEvidence:
        """Compute the evidence of a batch.

        Args:
            inputs: Arguments of [`OPTSGModel.forward`].

        Raises:
            ValueError: As in [`OPTSGModel.forward`].
        """
        return self.multimodal_encoder(self.encode(**inputs)[0])


class OPTSGModel(OPTSGTowers):
    """The towers, the multimodal encoder and the prompt encoder, which compute order prompts of images and titles.

    Example:

        >>> import torch
        >>> from modeling_optsg import OPTSGConfig, OPTSGModel
        >>> bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = OPTSGModel(OPTSGConfig(text_config=bert, frame_feature_size=64, num_prompts=10)).eval()
        >>> outputs = model(frame_features=torch.randn(2, 8, 64), input_ids=torch.tensor([[7, 8], [9, 0]]))
        >>> outputs.order_prompts.shape
        torch.Size([2, 10, 256])
    """

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self.multimodal_encoder = MultimodalEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        example_seeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OPTSGModelOutput:
        """Compute the order prompts of a batch.

        Args:
            pixel_values: `[batch, frames, 3, height, width]`. An image is a video of one frame.
            frame_features: Precomputed, instead of `pixel_values`: `[batch, frames, frame_feature_size]` or
                `[batch, frames, tokens, frame_feature_size]`.
            image_features: `[batch, image_feature_size]`, precomputed by `encode_frames` with `frame_features`.
                Required with `vision_feature_layers`; by default their mean.
            frame_mask: `[batch, frames]`, true (1) for real frames. An example without an image has none.
            input_ids: `[batch, title length]`, title tokens of the text tower's tokenizer.
            title_features: Precomputed, instead of `input_ids`: `[batch, title length, text width]`.
            attention_mask: `[batch, title length]`, true (1) for real tokens. An example without a title has none.
            output_attentions: Whether to return the attention of each order prompt, for any attention implementation.
            example_seeds: `[batch]`, integers. In training, the dropout of modalities and tokens depends on them
                instead of on torch's global generator; see [`seeded_uniform`].

        Raises:
            ValueError: An example has neither a frame nor a title, a modality is given twice, or a shape is wrong.
        """
        features, words = self.encode(
            pixel_values,
            frame_features,
            image_features,
            frame_mask,
            input_ids,
            title_features,
            attention_mask,
            example_seeds,
        )
        encoded = self.multimodal_encoder(features)
        order_prompts, attentions = self.prompt_encoder(
            encoded.memory, encoded.memory_mask, encoded.prompt_pooled, output_attentions
        )
        layout = None
        if output_attentions:
            frame_size = None if pixel_values is None else tuple(pixel_values.shape[-2:])
            patch_size = getattr(self.config.vision_config, "patch_size", None)
            layout = MemoryLayout.from_features(features.frame_features, encoded.title_length, frame_size, patch_size)
        return OPTSGModelOutput(
            order_prompts=order_prompts,
            memory=encoded.memory,
            memory_mask=encoded.memory_mask,
            prompt_pooler_output=encoded.prompt_pooled,
            evidence=encoded.evidence,
            image_words=words,
            image_word_scores=features.word_probabilities,
            prompt_attentions=tuple(attentions) if all(a is not None for a in attentions) else None,
            memory_layout=layout,
        )
