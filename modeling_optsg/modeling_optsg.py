"""OP-TSG (Order-Prompted Tag Sequence Generation, ICCV 2023): wires the rooms."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import ModelOutput

from .configuration_optsg import EfficientNetLiteConfig, OPTSGConfig
from .efficientnet_lite import EfficientNetLiteModel
from .generation_optsg import OrderPromptGenerationMixin
from .multimodal_encoder import MemoryLayout, MultimodalEncoder, Pooler
from .prompt_encoder import PromptEncoder
from .sampled_softmax import classes_of_step, sample_classes
from .seeded_random import seeded_uniform
from .tag_alignment import TagAlignment, TagAlignmentOutput
from .tag_classifier import CosineClassifier, TagClassifier
from .tag_decoder import SlotSequence, TagDecoder, choose_empty_slots, lay_out_slots


@dataclass
class OPTSGModelOutput(ModelOutput):
    """
    Args:
        order_prompts: `[batch, num_prompts, hidden_size]`.
        memory: `[batch, memory length, hidden_size]`, the fused tokens of frames and title.
        memory_mask: `[batch, memory length]`, boolean, true for real tokens.
        summary: `[batch, hidden_size]`, what the example is as a whole; `None` without `use_prompt_pooler`.
        classifier_pooler: `[batch, hidden_size]`, the same for the comparison with train tags; `None` without
            `use_tag_classifier`.
        prompt_attentions: with `output_attentions` or eager attention, where prompts look: one
            `[batch, heads, num_prompts, memory length]` a prompt layer, each row adding up to 1, 0 at padding.
        memory_layout: with `output_attentions`, which frame, patch or title token each place of the memory stands for.
    """

    order_prompts: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    prompt_pooler_output: torch.Tensor | None = None
    classifier_pooler_output: torch.Tensor | None = None
    prompt_attentions: tuple[torch.Tensor, ...] | None = None
    memory_layout: MemoryLayout | None = None


@dataclass
class OPTSGOutput(ModelOutput):
    """
    Args:
        loss: scalar, `generation_loss + alignment_loss_weight * alignment_loss + classifier_loss_weight * classifier_loss`.
        logits: `[positions, tag_vocab_size]`, over the real positions of the batch's examples one after the other, each
            example's slots laid end to end in prompt order. In training with `num_sampled_tokens`, a column for each of
            `logit_tokens` only.
        logit_tokens: `[columns]`, the tokens of the columns of `logits`; `None` where they are all there.
        generation_loss: scalar, mean cross-entropy of the written tokens, [PAD] and [SEP] among them.
        alignment_loss: scalar, cross-entropy of prompts over the candidate tags and [PAD].
        classifier_loss: scalar, asymmetric loss of the example as a whole over the train tags; `None` without `use_tag_classifier` or
            `tag_ids`.
        assignment: `[batch, num_prompts]`, the index of the tag each prompt was matched to, -1 for [PAD].
        targets: `[positions]`, the tokens that `logits` were to predict.
        order_prompts: `[batch, num_prompts, hidden_size]`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    classifier_loss: torch.Tensor | None = None
    assignment: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    logit_tokens: torch.Tensor | None = None
    order_prompts: torch.Tensor | None = None


# Most tags are absent from most examples: at a half, a classifier's first steps would only teach that.
ABSENT_BIAS = -5.0


class _WithDimension(ConversionOps):
    """Reads parameters of one entry that were saved without a dimension, as all were before models could be divided
    among processes."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: torch.atleast_1d(tensors[0])}

    @property
    def reverse_op(self):
        # What is saved stays as it is.
        return self


class OPTSGPreTrainedModel(PreTrainedModel):
    config_class = OPTSGConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerLayer"]
    # `Trainer` would otherwise take the `**kwargs` of `forward` as a promise to divide the loss by the tokens of all
    # accumulated batches, and leave it undivided.
    accepts_loss_kwargs = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        converters = [WeightConverter(name, name, [_WithDimension()]) for name in ("logit_scale", "query_gate")]
        register_checkpoint_conversion_mapping(cls.config_class.model_type, converters, overwrite=True)

    @classmethod
    def from_pretrained(
        cls, *args, ignore_mismatched_sizes: bool = False, output_loading_info: bool = False, **kwargs
    ):
        """As of [`PreTrainedModel`], with a `ValueError` that names the tensors of another shape than the model's:
        the library's own error leaves them to its log."""
        model, report = super().from_pretrained(
            *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        if report["mismatched_keys"] and not ignore_mismatched_sizes:
            shapes = [f"{name} is {[*saved]}, not {[*own]}" for name, saved, own in sorted(report["mismatched_keys"])]
            raise ValueError(
                f"The weights do not fit the configuration: {', '.join(shapes[:5])}"
                f"{f', and {len(shapes) - 5} more' if len(shapes) > 5 else ''}."
            )
        return (model, report) if output_loading_info else model

    @classmethod
    def from_vision_text_pretrained(cls, vision_name_or_path, text_name_or_path, **config_kwargs):
        """A new model on two pretrained towers.

        Args:
            vision_name_or_path: folder or Hub name of the vision tower (ViT, CLIP, SigLIP, DINOv2, …); of a two-tower
                model such as CLIP the vision half is taken. `None` for a model that reads precomputed frame features
                (give `frame_feature_size`).
            text_name_or_path: folder or Hub name of the text tower; of a two-tower model the text half is taken.
            config_kwargs: any argument of the model's configuration.
        """
        towers = {}
        for half, name in (("vision", vision_name_or_path), ("text", text_name_or_path)):
            if name is None:
                continue
            tower_config = AutoConfig.from_pretrained(name)
            tower_config = getattr(tower_config, f"{half}_config", tower_config)
            if tower_config.model_type == EfficientNetLiteConfig.model_type:
                AutoModel.register(type(tower_config), EfficientNetLiteModel, exist_ok=True)
            # A tower saved in half precision would stay so inside a model of single precision.
            towers[half] = AutoModel.from_pretrained(name, config=tower_config, dtype=torch.float32)
            # Where the tower lay on this machine is nobody else's business; `config.json` would tell.
            towers[half].config._name_or_path = ""
        config = cls.config_class(
            vision_config=towers["vision"].config if "vision" in towers else None,
            text_config=towers["text"].config,
            **config_kwargs,
        )
        model = cls(config)
        for half, tower in towers.items():
            getattr(model.model, f"{half}_tower").load_state_dict(tower.state_dict())
        return model

    def save_pretrained(self, *args, **kwargs):
        """As of [`PreTrainedModel`]; the folder also gets the code of `pipeline("tag-generation")`."""
        # The library copies the files that are imported, wherever in the code; this one would load all its pipelines.
        from .pipeline_optsg import CUSTOM_PIPELINES

        self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
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
            # Queries that start alike would be matched alike: they begin a unit apart, not 0.02.
            init.normal_(module.queries, std=1.0)
        elif isinstance(module, TagAlignment):
            init.normal_(module.pad_embedding, std=self.config.initializer_range)
            init.constant_(module.logit_scale, module.initial_logit_scale())
        elif isinstance(module, CosineClassifier):
            init.constant_(module.bias, ABSENT_BIAS)
            init.constant_(module.logit_scale, module.initial_logit_scale)


class OPTSGTowers(OPTSGPreTrainedModel):
    """The two towers, and how every system reads examples with them."""

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        # Loaded as remote code, this class's configuration is a different object from the one a registration at
        # import time would name; the type is taken from the configuration at hand.
        if config.vision_config is not None and config.vision_config.model_type == EfficientNetLiteConfig.model_type:
            AutoModel.register(type(config.vision_config), EfficientNetLiteModel, exist_ok=True)
        self.vision_tower = AutoModel.from_config(config.vision_config) if config.vision_config is not None else None
        self.text_tower = AutoModel.from_config(config.text_config)

    def encode_frames(self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Vision-tower tokens of frames.

        Args:
            pixel_values: `[batch, frames, 3, height, width]`.
            frame_mask: `[batch, frames]`; the tower is not run on masked frames, whose tokens are zero.

        Returns:
            `[batch, frames, tokens, frame_feature_size]`, what `forward` takes as `frame_features`.
        """
        if self.vision_tower is None:
            raise ValueError("This model has no vision tower: give frame_features instead of pixel_values.")
        frames = pixel_values.flatten(0, 1)
        # Towers do not run on an empty batch: with no real frame at all, none is left out.
        masked = frame_mask is not None and frame_mask.any() and not frame_mask.all()
        real = frame_mask.flatten().bool() if masked else None
        tokens = self.vision_tower(pixel_values=frames if real is None else frames[real]).last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if real is not None:
            tokens = tokens.new_zeros(len(frames), *tokens.shape[1:]).masked_scatter(real[:, None, None], tokens)
        return tokens.unflatten(0, pixel_values.shape[:2])

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Text-tower tokens `[batch, length, text width]` of `input_ids` `[batch, length]`; rows without any text come
        back as they are, to be masked by the caller."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # A row that attends to nothing is NaN in some kernels; its first token is let in and masked out afterwards.
        empty = attention_mask.any(dim=1, keepdim=True).logical_not()
        first = torch.arange(attention_mask.shape[1], device=attention_mask.device) == 0
        attention_mask = attention_mask.masked_fill(empty & first, 1)
        return self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def embed_tags(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean-pooled text-tower features `[tags, text width]` of tags `[tags, length]`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens = self.encode_text(input_ids, attention_mask)
        weights = attention_mask[..., None].to(tokens.dtype)
        return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def read(
        self, pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Tower tokens of a batch, whichever way it is given; arguments and errors are those of [`OPTSGModel`].

        Returns:
            `frame_features` `[batch, frames, tokens, frame_feature_size]` and `title_features`
            `[batch, title length, text width]`, `None` where there is none.
        """
        if pixel_values is not None and frame_features is not None:
            raise ValueError("Give pixel_values or frame_features, not both.")
        if input_ids is not None and title_features is not None:
            raise ValueError("Give input_ids or title_features, not both.")
        if pixel_values is not None:
            if pixel_values.ndim != 5:
                raise ValueError(
                    f"pixel_values must be [batch, frames, 3, height, width], got shape {tuple(pixel_values.shape)}."
                )
            frame_features = self.encode_frames(pixel_values, frame_mask)
        elif frame_features is not None:
            if frame_features.ndim not in (3, 4):
                raise ValueError(
                    "frame_features must be [batch, frames, width] or [batch, frames, tokens, width], got shape "
                    f"{tuple(frame_features.shape)}."
                )
            if frame_features.ndim == 3:
                frame_features = frame_features[:, :, None]
        if input_ids is not None:
            title_features = self.encode_text(input_ids, attention_mask)
        return frame_features, title_features


class OPTSGModel(OPTSGTowers):
    """The towers, the multimodal encoder and the order prompt encoder: examples in, order prompts out."""

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self.multimodal_encoder = MultimodalEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        example_seeds: torch.Tensor | None = None,
        **kwargs,
    ) -> OPTSGModelOutput:
        """
        Args:
            pixel_values: `[batch, frames, 3, height, width]`; an image is a video of one frame.
            frame_features: precomputed instead of pixels, `[batch, frames, frame_feature_size]` or
                `[batch, frames, tokens, frame_feature_size]`.
            frame_mask: `[batch, frames]`, true (1) for real frames; an example without an image has none.
            input_ids: `[batch, title length]`, title tokens of the text tower's tokenizer.
            title_features: precomputed instead of `input_ids`, `[batch, title length, text width]`.
            attention_mask: `[batch, title length]`, true (1) for real tokens; an example without a title has none.
            output_attentions: return where each order prompt looks, whatever the attention's implementation.
            example_seeds: `[batch]`, whole numbers: in training, what is drawn for an example follows from its own (see
                [`seeded_uniform`]) and not from the process's random state.

        Raises:
            ValueError: an example has nothing to look at, both pixels and features are given, or shapes do not fit.
        """
        frame_features, title_features = self.read(
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask
        )
        memory, memory_mask, prompt_pooled, classifier_pooled = self.multimodal_encoder(
            frame_features, frame_mask, title_features, attention_mask, example_seeds
        )
        order_prompts, attentions = self.prompt_encoder(memory, memory_mask, prompt_pooled, output_attentions)
        layout = None
        if output_attentions:
            frame_size = None if pixel_values is None else tuple(pixel_values.shape[-2:])
            patch_size = getattr(self.config.vision_config, "patch_size", None)
            layout = MemoryLayout.of(frame_features, title_features, frame_size, patch_size)
        return OPTSGModelOutput(
            order_prompts=order_prompts,
            memory=memory,
            memory_mask=memory_mask,
            prompt_pooler_output=prompt_pooled,
            classifier_pooler_output=classifier_pooled,
            prompt_attentions=tuple(attentions) if all(a is not None for a in attentions) else None,
            memory_layout=layout,
        )


class OPTSGForTagGeneration(OPTSGPreTrainedModel, OrderPromptGenerationMixin):
    """OP-TSG: order prompts matched one-to-one to an example's tags, and a decoder that writes each prompt's tag."""

    _tied_weights_keys = {"lm_head.weight": "tag_decoder.token_embeddings.weight"}

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_alignment = TagAlignment(config)
        self.tag_classifier = TagClassifier(config) if config.use_tag_classifier and config.num_tag_classes else None
        self.tag_decoder = TagDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.tag_vocab_size)
        self.post_init()
        # The one made from the model's configuration forgets fields it does not know when it is loaded again.
        self.generation_config = GenerationConfig(decoding="parallel", pad_bias=0.0, threshold=0.0)

    def get_input_embeddings(self):
        return self.tag_decoder.token_embeddings

    def set_input_embeddings(self, value):
        self.tag_decoder.token_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def resize_token_embeddings(self, *args, **kwargs):
        """Resizes the tag vocabulary. The library would note the new size in the text tower's configuration."""
        text_vocab_size = self.config.text_config.vocab_size
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.text_config.vocab_size = text_vocab_size
        self.config.tag_vocab_size = embeddings.num_embeddings
        return embeddings

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tag_input_ids: torch.Tensor | None = None,
        tag_lengths: torch.Tensor | None = None,
        tag_text_input_ids: torch.Tensor | None = None,
        tag_text_attention_mask: torch.Tensor | None = None,
        tag_features: torch.Tensor | None = None,
        tag_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoding: str | None = None,
        example_seeds: torch.Tensor | None = None,
        step_tokens: torch.Tensor | None = None,
        sampled_tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> OPTSGOutput:
        """The training losses; to write tags call `generate`.

        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            tag_input_ids: `[tags, longest tag]`, the candidate tags' tokens without [SEP] (each tag of the batch once;
                tags no example has are negatives of the alignment).
            tag_lengths: `[tags]`, number of tokens of each.
            tag_text_input_ids, tag_text_attention_mask: `[tags, length]`, the same tags for the text tower.
            tag_features: `[tags, text width]`, precomputed instead of the text tower's.
            tag_ids: `[tags of the batch]`, the class of each under [`set_label_vocabulary`]; without it there is no
                `classifier_loss`.
            labels: `[batch, most tags of an example]`, indices of each example's tags among the candidates, -100 where there
                is none.
            decoding: attention mask of the decoder, "parallel" or "sequential"; by default examples are divided at random
                by `parallel_ratio` in training and all parallel in evaluation.
            example_seeds: see [`OPTSGModel`]; which mask an example has and which empty slots it writes follow from it too.
            step_tokens, sampled_tokens: in training with `num_sampled_tokens`, the tokens of all tags of the step and
                those drawn beside them, in place of the batch's own and others that are drawn here.

        Raises:
            ValueError: an example cannot be read (see [`OPTSGModel`]), `labels` come without their tags or name tags that
                are not there, a tag is longer than `max_tag_tokens`, or an example has more tags than there are prompts.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            frame_features=frame_features,
            frame_mask=frame_mask,
            input_ids=input_ids,
            title_features=title_features,
            attention_mask=attention_mask,
            example_seeds=example_seeds,
        )
        if labels is None:
            return OPTSGOutput(order_prompts=outputs.order_prompts)
        tags = {"tag_input_ids": tag_input_ids, "tag_lengths": tag_lengths}
        if tag_features is None:
            tags["tag_text_input_ids (or tag_features)"] = tag_text_input_ids
        if missing := [name for name, value in tags.items() if value is None]:
            raise ValueError(f"labels need {', '.join(missing)} too; `processor(tags=...)` makes them.")
        if tag_features is None:
            tag_features = self.model.embed_tags(tag_text_input_ids, tag_text_attention_mask)
        alignment = self._align(outputs.order_prompts, tag_features, labels)
        classes = None if step_tokens is None else (step_tokens, sampled_tokens)
        written = self._write(outputs, alignment, tag_input_ids, tag_lengths, decoding, example_seeds, classes)
        loss = written["generation_loss"] + self.config.alignment_loss_weight * alignment.loss
        classifier_loss = None
        if self.tag_classifier is not None and tag_ids is not None:
            classifier_loss = self.tag_classifier(outputs.classifier_pooler_output, labels, tag_ids)
            loss = loss + self.config.classifier_loss_weight * classifier_loss
        return OPTSGOutput(
            loss=loss,
            alignment_loss=alignment.loss,
            classifier_loss=classifier_loss,
            assignment=alignment.assignment,
            order_prompts=outputs.order_prompts,
            **written,
        )

    def set_label_vocabulary(self, input_ids, counts=None) -> None:
        """Says which tag each class is: the train tags, which the example as a whole is compared with; token ids of each
        without [SEP], and training counts. Replaces those of before and what was learned of them.

        Raises:
            ValueError: see [`LabelVocabulary.set_tags`], or the model has no `use_tag_classifier`.
        """
        if not self.config.use_tag_classifier:
            raise ValueError("This model has use_tag_classifier=false: it is compared with no train tags.")
        config = copy.deepcopy(self.config)
        config.num_tag_classes = len(input_ids)
        use_tag_classifier = TagClassifier(config)
        use_tag_classifier.label_vocabulary.set_tags(input_ids, counts)
        self.config.num_tag_classes, use_tag_classifier.config = len(input_ids), self.config
        summary = Pooler(config)
        for module in (*use_tag_classifier.modules(), *summary.modules()):
            self._init_weights(module)
        self.tag_classifier = use_tag_classifier.to(self.lm_head.weight).train(self.training)
        encoder = self.model.multimodal_encoder
        if encoder.classifier_pooler is None:
            encoder.classifier_pooler = summary.to(self.lm_head.weight).train(self.training)

    def _align(self, order_prompts, tag_features, labels) -> TagAlignmentOutput:
        return self.tag_alignment(order_prompts, tag_features, labels)

    def _lay_out(self, assignment, tag_input_ids, tag_lengths, example_seeds) -> tuple[SlotSequence, torch.Tensor]:
        """The slots that are written, and how many empty ones each of an example's stands for, `[batch]`."""
        config = self.config
        # Most slots are empty and say the same: some of them say it for all.
        share = config.pad_slot_ratio if self.training else 1.0
        chosen, stands_for = choose_empty_slots(assignment < 0, share, example_seeds)
        pad, sep = config.tag_pad_token_id, config.tag_sep_token_id
        return lay_out_slots(assignment, tag_input_ids, tag_lengths, pad, sep, chosen), stands_for

    def _write(
        self,
        outputs: OPTSGModelOutput,
        alignment: TagAlignmentOutput,
        tag_input_ids,
        tag_lengths,
        decoding: str | None,
        example_seeds: torch.Tensor | None,
        classes: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor | None]:
        if tag_input_ids.shape[1] > self.config.max_tag_tokens:
            raise ValueError(
                f"A tag has {tag_input_ids.shape[1]} tokens; this model writes at most max_tag_tokens="
                f"{self.config.max_tag_tokens}."
            )
        share = {None: self.config.parallel_ratio if self.training else 1.0, "parallel": 1.0, "sequential": 0.0}
        if decoding not in share:
            raise ValueError(f'decoding={decoding!r} must be "parallel" or "sequential".')
        size, device = (len(outputs.memory),), outputs.memory.device
        parallel = seeded_uniform("parallel mask", size, example_seeds, device) < share[decoding]
        sequence, stands_for = self._lay_out(alignment.assignment, tag_input_ids, tag_lengths, example_seeds)
        hidden_states = self.tag_decoder(
            outputs.order_prompts, sequence, parallel, outputs.memory, outputs.memory_mask
        )
        # Only real positions go through the output layer, the widest of all.
        hidden_states, targets = hidden_states[sequence.valid], sequence.targets[sequence.valid]
        logits, columns, logit_tokens = self._token_logits(hidden_states, targets, classes)
        losses = F.cross_entropy(logits.float(), columns, reduction="none")
        stands_for = stands_for[:, None].expand_as(sequence.valid)[sequence.valid]
        weights = torch.where(targets == self.config.tag_pad_token_id, stands_for, 1.0)
        loss = (losses * weights).sum() / weights.sum()
        return {"logits": logits, "targets": targets, "logit_tokens": logit_tokens, "generation_loss": loss}

    def _token_logits(
        self, hidden_states, targets, classes: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits over the vocabulary, or in training over the targets and `num_sampled_tokens` others; the column of
        each target; and the columns' tokens."""
        # In training the embeddings may be tied to text; the output layer's own weight is then their offsets alone.
        tied = self.tag_decoder.token_embeddings if self.config.tie_word_embeddings else self.lm_head
        weight, bias = tied.weight, self.lm_head.bias
        if not self.training:
            return F.linear(hidden_states, weight, bias), targets, None
        if classes is None:
            tokens, columns, correction = sample_classes(targets, len(weight), self.config.num_sampled_tokens)
        else:
            tokens, columns, correction = classes_of_step(targets, len(weight), *classes)
        if len(tokens) == len(weight):
            return F.linear(hidden_states, weight, bias), targets, None
        return F.linear(hidden_states, weight[tokens], bias[tokens]).float() + correction, columns, tokens


OPTSGConfig.register_for_auto_class()
OPTSGForTagGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "OPTSGForTagGeneration",
    "OPTSGModel",
    "OPTSGModelOutput",
    "OPTSGOutput",
    "OPTSGPreTrainedModel",
    "OPTSGTowers",
]
