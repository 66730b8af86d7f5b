"""The OP-TSG model (Order-Prompted Tag Sequence Generation, ICCV 2023)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.utils.generic import can_return_tuple

from .base_models import OPTSGModel, OPTSGPreTrainedModel
from .batch_tags import BatchTags, check_labels
from .book_reader import BookReader, CandidateTags
from .configuration_optsg import OPTSGConfig
from .generation_optsg import OrderPromptGenerationMixin
from .layers import OutputLayer
from .model_outputs import OPTSGModelOutput, OPTSGOutput
from .multimodal_encoder import MultimodalEncoder
from .sampled_softmax import sample_classes, use_sampled_classes
from .seeded_random import seeded_uniform
from .tag_alignment import TagAlignment, TagAlignmentOutput
from .tag_classifier import TagClassifier
from .tag_decoder import SlotSequence, TagDecoder, choose_pad_slots, lay_out_slots
from .tag_tokens import TagTokensMixin


class OPTSGForTagGeneration(TagTokensMixin, OPTSGPreTrainedModel, OrderPromptGenerationMixin):
    """OP-TSG, which matches order prompts one-to-one with tags and generates the tag of each prompt.

    Example:

        >>> from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
        >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> inputs = processor(images="examples/images/bus.png", titles="bus")
        >>> tags = processor.batch_decode(model.generate(**inputs, max_tags=3))[0]
        >>> [tag["tag"] for tag in tags]
        ['bus', 'coach', 'transit']
    """

    def __init__(self, config: OPTSGConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_alignment = TagAlignment(config)
        self.tag_classifier = TagClassifier(config) if config.use_tag_classifier and config.num_tag_classes else None
        self.tag_decoder = TagDecoder(config)
        self.lm_head = OutputLayer(config.hidden_size, config.tag_vocab_size)
        self.book_reader = BookReader(config) if config.book_evidence_size else None
        self.post_init()
        # A generation config derived from the model config would lose additional fields when it is loaded again.
        self.generation_config = GenerationConfig(decoding="parallel", pad_bias=0.0, threshold=0.0)

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
        labels: torch.Tensor | None = None,
        tag_text_input_ids: torch.Tensor | None = None,
        tag_text_attention_mask: torch.Tensor | None = None,
        tag_features: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_features: torch.Tensor | None = None,
        is_mismatched: torch.Tensor | None = None,
        decoding: str | None = None,
        example_seeds: torch.Tensor | None = None,
        step_tokens: torch.Tensor | None = None,
        sampled_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OPTSGOutput:
        """Compute the training losses. To generate tags, call `generate`.

        Every tensor has the examples in its first dimension, so that a batch can be divided among devices. Tags that
        several examples have are made unique here.

        Args:
            pixel_values, frame_features, image_features, frame_mask, input_ids, title_features, attention_mask: See
                [`OPTSGModel.forward`].
            labels: `[batch, max tags per example, max length]`, tokens of each example's tags without [SEP], -100 for
                padding. The tag classifier learns those that are in its label vocabulary.
            tag_text_input_ids, tag_text_attention_mask: `[batch, max tags per example, length]`, the same tags for
                the text tower.
            tag_features: `[batch, max tags per example, text width]`, precomputed instead of the text tower's.
            negative_input_ids: `[batch, negatives, max length]`, tokens of other tags, which are negatives of the
                alignment, -100 for padding. Those that an example of the batch has are not negatives.
            negative_features: `[batch, negatives, text width]`, their text features.
            is_mismatched: `[batch]`, see [`TagClassifier.forward`].
            decoding: Attention mask of the decoder, "parallel" or "sequential". By default it is chosen per example by
                `parallel_ratio` in training, and is parallel in evaluation.
            example_seeds: `[batch]`, see [`OPTSGModel.forward`]. They also choose attention mask and [PAD] slots.
            step_tokens, sampled_tokens: With `num_sampled_tokens`, the tokens of all tags of a training step, and the
                sampled other tokens, if they were chosen for all micro-batches of the step.

        Raises:
            ValueError: An example cannot be encoded, `labels` have another shape or are given without the texts of
                their tags, a tag is too long, or an example has more tags than there are prompts.
        """
        inputs = {"pixel_values": pixel_values, "frame_features": frame_features, "frame_mask": frame_mask}
        inputs |= {"input_ids": input_ids, "title_features": title_features, "attention_mask": attention_mask}
        inputs |= {"image_features": image_features}
        outputs = self.model(**inputs, example_seeds=example_seeds, return_dict=True)
        if not check_labels(labels, tag_text_input_ids=tag_text_input_ids, tag_features=tag_features):
            return OPTSGOutput(order_prompts=outputs.order_prompts)
        tags = BatchTags.from_labels(labels, negative_input_ids)
        features = self.model.embed_batch_tags(
            tags, tag_text_input_ids, tag_text_attention_mask, tag_features, negative_features
        )
        alignment = self._align(outputs.order_prompts, features, tags.labels)
        parallel = self._choose_masks(decoding, len(labels), example_seeds)
        sequence, pad_weights = self._lay_out(alignment.assignment, tags, example_seeds)
        sampled = None if step_tokens is None else (step_tokens, sampled_tokens)
        generation = self._generation_loss(outputs, alignment, sequence, pad_weights, parallel, sampled)
        loss = generation["generation_loss"] + self.config.alignment_loss_weight * alignment.loss
        classifier_loss = None
        if self.tag_classifier is not None and not self._classifier_is_frozen():
            classifier_loss = self.tag_classifier(outputs.evidence, labels, is_mismatched)
            loss = loss + self.config.classifier_loss_weight * classifier_loss
        return OPTSGOutput(
            loss=loss,
            alignment_loss=alignment.loss,
            classifier_loss=classifier_loss,
            assignment=tags.own_index(alignment.assignment),
            order_prompts=outputs.order_prompts,
            **generation,
        )

    def _classifier_is_frozen(self) -> bool:
        """Return whether nothing that the classifier loss trains is trained, so that it is not needed."""
        trained = (self.tag_classifier, self.model.multimodal_encoder.evidence_pooler)
        return self.training and not any(p.requires_grad for module in trained for p in module.parameters())

    def add_book_reader(self, evidence_size: int) -> None:
        """Give the model a new, untrained book reader.

        Args:
            evidence_size: Number of evidence values of a candidate.
        """
        self.config.book_evidence_size = evidence_size
        # Not in half precision, in which it could not be trained.
        reader = BookReader(self.config).apply(self._init_weights)
        self.book_reader = reader.to(self.device, torch.float32).train(self.training)

    def read_book(
        self,
        order_prompts: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        candidate_input_ids: torch.Tensor,
        evidence: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the probability that each slot points at each candidate tag; see [`BookReader.forward`].

        Args:
            order_prompts, memory, memory_mask: See [`OPTSGModelOutput`].
            candidate_input_ids: `[batch, candidates, max length]`, tokens of the tags of similar examples without
                [SEP], padded with [PAD]. A candidate without tokens is padding.
            evidence: `[batch, candidates, book_evidence_size]`.

        Raises:
            ValueError: The model has no book reader.
        """
        if self.book_reader is None:
            raise ValueError("This model has no book reader (book_evidence_size=0).")
        is_token = (candidate_input_ids != self.config.tag_pad_token_id)[..., None]
        # Training the reader does not change the token embeddings.
        tokens = self.tag_decoder.token_embeddings(candidate_input_ids).detach() * is_token
        embeddings = tokens.sum(dim=2) / is_token.sum(dim=2).clamp(min=1)
        dtype = self.book_reader.slots.dtype
        embeddings, evidence, order_prompts, memory = (
            tensor.to(dtype) for tensor in (embeddings, evidence, order_prompts, memory)
        )
        candidates = CandidateTags(embeddings, evidence, is_token.any(dim=2)[..., 0])
        return self.book_reader(order_prompts, memory, memory_mask, candidates)

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
        # `apply` visits inner modules first, so an outer module can override their initial weights.
        tag_classifier = TagClassifier(config).apply(self._init_weights)
        tag_classifier.label_vocabulary.set_tags(input_ids, counts)
        # Nothing below can fail, so an error above leaves the model unchanged.
        self.config.num_tag_classes, tag_classifier.config = len(input_ids), self.config
        self.tag_classifier = tag_classifier.to(self.device, self.dtype).train(self.training)
        encoder = self.model.multimodal_encoder
        if encoder.evidence_pooler is None:
            extended = MultimodalEncoder(self.config).apply(self._init_weights)
            extended.load_state_dict(encoder.state_dict(), strict=False)
            self.model.multimodal_encoder = extended.to(self.device, self.dtype).train(self.training)

    def _align(
        self, order_prompts: torch.Tensor, tag_features: torch.Tensor, labels: torch.Tensor
    ) -> TagAlignmentOutput:
        return self.tag_alignment(order_prompts, tag_features, labels)

    def _lay_out(
        self,
        assignment: torch.Tensor,
        tags: BatchTags,
        example_seeds: torch.Tensor | None,
        pad_slots: bool = True,
    ) -> tuple[SlotSequence, torch.Tensor]:
        """Lays out the slots, and returns the number of [PAD] slots that each decoded one represents, `[batch]`."""
        config, max_length = self.config, int(tags.lengths[: tags.num_own].max())
        if max_length > config.max_tag_tokens:
            raise ValueError(
                f"A tag has {max_length} tokens; this model generates at most max_tag_tokens={config.max_tag_tokens}."
            )
        is_pad, ratio = (assignment < 0) & pad_slots, config.pad_slot_ratio if self.training else 1.0
        chosen, pad_weights = choose_pad_slots(is_pad, ratio, example_seeds)
        pad, sep = config.tag_pad_token_id, config.tag_sep_token_id
        return lay_out_slots(assignment, tags.input_ids, tags.lengths, pad, sep, chosen), pad_weights

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
        if not self.training:
            return self.token_logits(hidden_states), targets, None
        num_tokens = self.config.tag_vocab_size
        if sampled is None:
            tokens, columns, correction = sample_classes(targets, num_tokens, self.config.num_sampled_tokens)
        else:
            tokens, columns, correction = use_sampled_classes(targets, num_tokens, *sampled)
        if len(tokens) == num_tokens:
            return self.token_logits(hidden_states), targets, None
        return self.token_logits(hidden_states, tokens).float() + correction, columns, tokens


OPTSGConfig.register_for_auto_class()
OPTSGForTagGeneration.register_for_auto_class("AutoModel")
