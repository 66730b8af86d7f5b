"""The OP-TSG model (Order-Prompted Tag Sequence Generation, ICCV 2023)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_optsg import OPTSGConfig
from .generation_optsg import OrderPromptGenerationMixin
from .multimodal_encoder import MemoryLayout, MultimodalEncoder, Pooler
from .prompt_encoder import PromptEncoder
from .sampled_softmax import sample_classes, use_sampled_classes
from .seeded_random import seeded_uniform
from .tag_alignment import TagAlignment, TagAlignmentOutput
from .tag_classifier import CosineClassifier, TagClassifier
from .tag_decoder import SlotSequence, TagDecoder, choose_pad_slots, lay_out_slots
from .towers import HALVES, TowerMixin, register_shipped_tower

# Most tags are absent from most examples. With an initial probability of 1/2, the first steps would learn only that.
INITIAL_CLASS_BIAS = -5.0


@dataclass
class OPTSGModelOutput(ModelOutput):
    """Output of [`OPTSGModel`].

    Args:
        order_prompts: `[batch, num_prompts, hidden_size]`.
        memory: `[batch, memory length, hidden_size]`, the fused tokens of frames and title.
        memory_mask: Boolean `[batch, memory length]`, true for real tokens.
        prompt_pooler_output: `[batch, hidden_size]`, the pooled representation that is added to the prompts' queries.
            Returned with `use_prompt_pooler`.
        classifier_pooler_output: `[batch, hidden_size]`, the pooled representation that the tag classifier reads.
            Returned by models with a tag classifier.
        prompt_attentions: `[batch, heads, num_prompts, memory length]` for each layer of the prompt encoder. Returned
            with `output_attentions` or eager attention. Rows sum to 1 and are 0 at padding.
        memory_layout: What each position of the memory represents. Returned with `output_attentions`.
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
    """Output of [`OPTSGForTagGeneration`]. All fields except `order_prompts` are returned only with `labels`.

    Args:
        loss: Scalar, `generation_loss + alignment_loss_weight * alignment_loss + classifier_loss_weight *
            classifier_loss`.
        logits: `[positions, tag_vocab_size]`, over the real positions, with the slots of each example concatenated in
            prompt order. In training with `num_sampled_tokens`, only the columns of `logit_tokens` are returned.
        generation_loss: Scalar, mean cross-entropy of the tokens, including [PAD] and [SEP].
        alignment_loss: Scalar, cross-entropy of the prompts over the candidate tags and [PAD].
        classifier_loss: Scalar, asymmetric loss over the label vocabulary. Returned with `tag_ids` by models with a
            tag classifier.
        assignment: `[batch, num_prompts]`, the index of the tag matched to each prompt, -1 for [PAD].
        targets: `[positions]`, the tokens that `logits` should predict.
        logit_tokens: `[columns]`, the tokens of the columns of `logits`. Returned if `logits` lacks some tokens.
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


class OPTSGPreTrainedModel(PreTrainedModel):
    """Base class of all models: configuration, initial weights, loading and saving."""

    config_class = OPTSGConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerLayer"]
    # Otherwise `Trainer` assumes that a `forward` with `**kwargs` divides the loss by the number of tokens of all
    # accumulated batches, and does not divide it.
    accepts_loss_kwargs = False

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
            raise ValueError(f"The weights do not fit the configuration: {', '.join(shapes[:5])}{more}.")
        return (model, report) if output_loading_info else model

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_name_or_path: str | None, text_name_or_path: str, **config_kwargs: Any
    ) -> "OPTSGPreTrainedModel":
        """Build a new model on two pretrained towers.

        Args:
            vision_name_or_path: Folder or Hub name of the vision tower (ViT, CLIP, SigLIP, DINOv2, ...). For a
                two-tower model such as CLIP, its vision tower is used. `None` for a model with precomputed frame
                features, which needs `frame_feature_size`.
            text_name_or_path: Folder or Hub name of the text tower. For a two-tower model, its text tower is used.
            config_kwargs: Arguments of the model's configuration.
        """
        towers = {}
        for half, name in zip(HALVES, (vision_name_or_path, text_name_or_path), strict=True):
            if name is None:
                continue
            tower_config = AutoConfig.from_pretrained(name)
            tower_config = getattr(tower_config, f"{half}_config", tower_config)
            register_shipped_tower(tower_config)
            # Otherwise a tower that was saved in half precision would stay in half precision.
            towers[half] = AutoModel.from_pretrained(name, config=tower_config, dtype=torch.float32)
            # `config.json` must not contain the local path of the tower.
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

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, its code and the code of `pipeline("tag-generation")`."""
        # Imported here, because an import at the top would load all pipelines of the library. The library copies this
        # file in both cases.
        from .pipeline_optsg import CUSTOM_PIPELINES

        # The code of a baseline imports the package, so it does not need the code of the pipeline.
        if type(self).__module__.rpartition(".")[0] == __package__:
            self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(*args, **kwargs)

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
        elif isinstance(module, TagAlignment):
            init.normal_(module.pad_embedding, std=self.config.initializer_range)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, CosineClassifier):
            init.constant_(module.bias, INITIAL_CLASS_BIAS)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class OPTSGTowers(TowerMixin, OPTSGPreTrainedModel):
    """The two towers alone, for models that compare their pooled tokens."""

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self._build_towers(config)


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
        **kwargs: Any,
    ) -> OPTSGModelOutput:
        """Compute the order prompts of a batch.

        Args:
            pixel_values: `[batch, frames, 3, height, width]`. An image is a video of one frame.
            frame_features: Precomputed, instead of `pixel_values`: `[batch, frames, frame_feature_size]` or
                `[batch, frames, tokens, frame_feature_size]`.
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
        frame_features, title_features = self.encode_inputs(
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
            layout = MemoryLayout.from_features(frame_features, title_features, frame_size, patch_size)
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
    """OP-TSG, which matches order prompts one-to-one with tags and generates the tag of each prompt.

    Example:

        >>> from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
        >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> inputs = processor(images="examples/images/bus.png", titles="bus")
        >>> tags = processor.batch_decode(model.generate(**inputs, max_tags=3))[0]
        >>> [tag["tag"] for tag in tags]
        ['bus', 'travel', 'transit']
    """

    _tied_weights_keys = {"lm_head.weight": "tag_decoder.token_embeddings.weight"}

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_alignment = TagAlignment(config)
        self.tag_classifier = TagClassifier(config) if config.use_tag_classifier and config.num_tag_classes else None
        self.tag_decoder = TagDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.tag_vocab_size)
        self.post_init()
        # A generation config derived from the model config would lose additional fields when it is loaded again.
        self.generation_config = GenerationConfig(decoding="parallel", pad_bias=0.0, threshold=0.0)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the tag decoder."""
        return self.tag_decoder.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the tag decoder."""
        self.tag_decoder.token_embeddings = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the tag vocabulary; see [`PreTrainedModel.resize_token_embeddings`]."""
        # The library would store the new size in the text tower's configuration.
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
        **kwargs: Any,
    ) -> OPTSGOutput:
        """Compute the training losses. To generate tags, call `generate`.

        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: See
                [`OPTSGModel.forward`].
            tag_input_ids: `[tags, max length]`, tokens of the candidate tags without [SEP], each tag once. Tags
                that no example has are negatives of the alignment.
            tag_lengths: `[tags]`, number of tokens of each tag.
            tag_text_input_ids, tag_text_attention_mask: `[tags, length]`, the same tags for the text tower.
            tag_features: `[tags, text width]`, precomputed instead of the text tower's.
            tag_ids: `[tags]`, the class of each tag of the batch, for the tag classifier.
            labels: `[batch, max tags per example]`, indices of each example's tags among the candidates, -100 for
                padding.
            decoding: Attention mask of the decoder, "parallel" or "sequential". By default it is chosen per example by
                `parallel_ratio` in training, and is parallel in evaluation.
            example_seeds: `[batch]`, see [`OPTSGModel.forward`]. They also choose attention mask and [PAD] slots.
            step_tokens, sampled_tokens: With `num_sampled_tokens`, the tokens of all tags of a training step, and the
                sampled other tokens, if they were chosen for all micro-batches of the step.

        Raises:
            ValueError: An example cannot be encoded, `labels` are given without their tags, a label is out of range, a
                tag is too long, or an example has more tags than there are prompts.
        """
        inputs = {"pixel_values": pixel_values, "frame_features": frame_features, "frame_mask": frame_mask}
        inputs |= {"input_ids": input_ids, "title_features": title_features, "attention_mask": attention_mask}
        outputs = self.model(**inputs, example_seeds=example_seeds)
        if labels is None:
            return OPTSGOutput(order_prompts=outputs.order_prompts)
        if tag_features is None:
            tag_features = self._embed_candidates(tag_text_input_ids, tag_text_attention_mask)
        alignment = self._align(outputs.order_prompts, tag_features, labels)
        parallel = self._choose_masks(decoding, len(labels), example_seeds)
        sequence, pad_weights = self._lay_out(alignment.assignment, tag_input_ids, tag_lengths, example_seeds)
        sampled = None if step_tokens is None else (step_tokens, sampled_tokens)
        generation = self._generation_loss(outputs, alignment, sequence, pad_weights, parallel, sampled)
        loss = generation["generation_loss"] + self.config.alignment_loss_weight * alignment.loss
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
            **generation,
        )

    def set_label_vocabulary(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Give the model a new label vocabulary and a new, untrained tag classifier for it.

        Args:
            input_ids: Token ids of each tag, without [SEP].
            counts: Number of training examples of each tag.

        Raises:
            ValueError: The model has `use_tag_classifier=False`, or an error of [`LabelVocabulary.set_tags`].
        """
        if not self.config.use_tag_classifier:
            raise ValueError("This model has use_tag_classifier=False, so it has no label vocabulary.")
        config = copy.deepcopy(self.config)
        config.num_tag_classes = len(input_ids)
        tag_classifier, pooler = TagClassifier(config), Pooler(config)
        tag_classifier.label_vocabulary.set_tags(input_ids, counts)
        self.config.num_tag_classes, tag_classifier.config = len(input_ids), self.config
        for module in (*tag_classifier.modules(), *pooler.modules()):
            self._init_weights(module)
        self.tag_classifier = tag_classifier.to(self.lm_head.weight).train(self.training)
        encoder = self.model.multimodal_encoder
        if encoder.classifier_pooler is None:
            encoder.classifier_pooler = pooler.to(self.lm_head.weight).train(self.training)

    def _embed_candidates(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("labels need tag_text_input_ids or tag_features; `processor(tags=...)` makes the former.")
        return self.model.embed_tags(input_ids, attention_mask)

    def _align(
        self, order_prompts: torch.Tensor, tag_features: torch.Tensor, labels: torch.Tensor
    ) -> TagAlignmentOutput:
        return self.tag_alignment(order_prompts, tag_features, labels)

    def _lay_out(
        self,
        assignment: torch.Tensor,
        tag_input_ids: torch.Tensor | None,
        tag_lengths: torch.Tensor | None,
        example_seeds: torch.Tensor | None,
        pad_slots: bool = True,
    ) -> tuple[SlotSequence, torch.Tensor]:
        """Lays out the slots, and returns the number of [PAD] slots that each decoded one represents, `[batch]`."""
        config = self.config
        if tag_input_ids is None or tag_lengths is None:
            raise ValueError("labels need tag_input_ids and tag_lengths; `processor(tags=...)` makes them.")
        if tag_input_ids.shape[1] > config.max_tag_tokens:
            raise ValueError(
                f"A tag has {tag_input_ids.shape[1]} tokens; this model generates at most max_tag_tokens="
                f"{config.max_tag_tokens}."
            )
        is_pad, ratio = (assignment < 0) & pad_slots, config.pad_slot_ratio if self.training else 1.0
        chosen, pad_weights = choose_pad_slots(is_pad, ratio, example_seeds)
        pad, sep = config.tag_pad_token_id, config.tag_sep_token_id
        return lay_out_slots(assignment, tag_input_ids, tag_lengths, pad, sep, chosen), pad_weights

    def _choose_masks(self, decoding: str | None, batch: int, example_seeds: torch.Tensor | None) -> torch.Tensor:
        """Choose which examples use the parallel attention mask, boolean `[batch]`."""
        ratios = {None: self.config.parallel_ratio if self.training else 1.0, "parallel": 1.0, "sequential": 0.0}
        if decoding not in ratios:
            raise ValueError(f'decoding={decoding!r} must be "parallel" or "sequential".')
        return seeded_uniform("attention mask", (batch,), example_seeds, self.device) < ratios[decoding]

    def _generation_loss(
        self,
        outputs: OPTSGModelOutput,
        alignment: TagAlignmentOutput,
        sequence: SlotSequence,
        pad_weights: torch.Tensor,
        parallel: torch.Tensor,
        sampled: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor | None]:
        """Decode the slots and compute logits, targets and generation loss. Model F overrides this method."""
        hidden_states = self.tag_decoder(
            outputs.order_prompts, sequence, parallel, outputs.memory, outputs.memory_mask
        )
        # Only real positions go through the output layer, which is the widest layer.
        hidden_states, targets = hidden_states[sequence.valid], sequence.targets[sequence.valid]
        logits, columns, logit_tokens = self._token_logits(hidden_states, targets, sampled)
        losses = F.cross_entropy(logits.float(), columns, reduction="none")
        pad_weights = pad_weights[:, None].expand_as(sequence.valid)[sequence.valid]
        weights = torch.where(targets == self.config.tag_pad_token_id, pad_weights, 1.0)
        loss = (losses * weights).sum() / weights.sum()
        return {"logits": logits, "targets": targets, "logit_tokens": logit_tokens, "generation_loss": loss}

    def _token_logits(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        sampled: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute logits over the vocabulary, or over the targets and sampled tokens in training.

        Returns:
            The logits `[positions, columns]`, the column of each target `[positions]`, and the columns' tokens
            `[columns]` (`None` for the whole vocabulary).
        """
        # In training, the embeddings may be text-initialised. The output layer's weight is then only their offset.
        tied = self.tag_decoder.token_embeddings if self.config.tie_word_embeddings else self.lm_head
        weight, bias = tied.weight, self.lm_head.bias
        if not self.training:
            return F.linear(hidden_states, weight, bias), targets, None
        if sampled is None:
            tokens, columns, correction = sample_classes(targets, len(weight), self.config.num_sampled_tokens)
        else:
            tokens, columns, correction = use_sampled_classes(targets, len(weight), *sampled)
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
