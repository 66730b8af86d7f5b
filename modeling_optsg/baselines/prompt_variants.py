"""Models F and G of the paper's Figure 2, which decide differently which prompts have a tag."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from modeling_optsg.base_models import OPTSGModel, OPTSGPreTrainedModel
from modeling_optsg.baselines.configuration import ModelFConfig, ModelGConfig
from modeling_optsg.batch_tags import BatchTags, check_labels
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode
from modeling_optsg.generation_settings import read_ranking_settings
from modeling_optsg.layers import OutputLayer, compute_columns
from modeling_optsg.model_outputs import OPTSGModelOutput
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.sampled_softmax import sample_classes
from modeling_optsg.slot_search import SlotCandidates, SlotContext, SlotSearch
from modeling_optsg.tag_alignment import TagAlignment, TagAlignmentOutput
from modeling_optsg.tag_classifier import CosineClassifier, LabelVocabulary
from modeling_optsg.tag_decoder import SlotSequence, choose_pad_slots
from modeling_optsg.tag_ranking import rank_tags


class ModelFForTagGeneration(OPTSGForTagGeneration):
    """Model F (Figure 2b), in which a binary head instead of the [PAD] tag decides which prompts are decoded.

    The probability of a tag is the probability that its prompt has a tag, times the probability of its tokens.
    `pad_bias` is a threshold on the logit of the head, so Model F and OP-TSG are fitted in the same way.
    """

    config_class = ModelFConfig

    def __init__(self, config: ModelFConfig):
        super().__init__(config)
        self.has_tag_head = nn.Linear(config.hidden_size, 1)
        self.post_init()
        self.generation_config = GenerationConfig(decoding="parallel", pad_bias=0.0, threshold=0.0)

    def _align(
        self, order_prompts: torch.Tensor, tag_features: torch.Tensor, labels: torch.Tensor
    ) -> TagAlignmentOutput:
        return self.tag_alignment(order_prompts, tag_features, labels, with_pad=False)

    def _lay_out(self, *args: Any, **kwargs: Any) -> tuple[SlotSequence, torch.Tensor]:
        return super()._lay_out(*args, **kwargs, pad_slots=False)

    def _generation_loss(
        self, outputs: OPTSGModelOutput, alignment: TagAlignmentOutput, *args: Any
    ) -> dict[str, torch.Tensor | None]:
        generation = super()._generation_loss(outputs, alignment, *args)
        has_tag = self.has_tag_head(outputs.order_prompts)[..., 0].float()
        targets = (alignment.assignment >= 0).float()
        head_loss = F.binary_cross_entropy_with_logits(has_tag, targets, reduction="sum")
        # Each prompt counts as one position, as its [PAD] or first token does in OP-TSG.
        num_tokens = len(generation["targets"])
        loss = (generation["generation_loss"] * num_tokens + head_loss) / (num_tokens + has_tag.numel())
        return generation | {"generation_loss": loss}

    def _bound_scores(self, *args: Any) -> None:
        """Keep every hypothesis: the bound would not know the probability that a prompt has a tag."""

    def _search_slots(
        self, search: SlotSearch, prompts: torch.Tensor, examples: torch.Tensor, context: SlotContext | None = None
    ) -> SlotCandidates:
        logits = self.has_tag_head(prompts)[:, 0].float()
        chosen = (logits > search.settings.pad_bias).nonzero().flatten()
        if not len(chosen):
            return self._no_candidates(search, prompts, logits)
        found = search.run(prompts[chosen], examples[chosen], context, pad_bias=-torch.inf)
        tokens = found.tokens.new_full((len(prompts), *found.tokens.shape[1:]), self.config.tag_pad_token_id)
        log_probs = found.log_probs.new_full((len(prompts), search.width), -torch.inf)
        tokens[chosen] = found.tokens
        log_probs[chosen] = found.log_probs + F.logsigmoid(logits[chosen])[:, None]
        if found.context is not None:
            found.context = found.context.scatter(chosen, len(prompts))
        return SlotCandidates(tokens, log_probs, logits, found.context)

    def _no_candidates(self, search: SlotSearch, prompts: torch.Tensor, logits: torch.Tensor) -> SlotCandidates:
        count, heads = len(prompts), self.config.num_attention_heads
        cache, nothing = DynamicCache(), prompts.new_zeros(count, heads, 0, self.config.hidden_size // heads)
        for index in range(self.config.num_decoder_layers):
            cache.update(nothing, nothing, index)
        return SlotCandidates(
            tokens=torch.full((count, search.width, 1), self.config.tag_pad_token_id, device=prompts.device),
            log_probs=torch.full((count, search.width), -torch.inf, device=prompts.device),
            pad_margins=logits,
            context=SlotContext(cache, torch.zeros(count, 0, dtype=torch.bool, device=prompts.device)),
        )


@dataclass
class ModelGOutput(ModelOutput):
    """Output of [`ModelGForTagClassification`].

    Args:
        loss: Scalar, `generation_loss + alignment_loss_weight * alignment_loss`. Returned with `labels`.
        logits: `[batch, num_prompts, num_tag_classes + 1]`. The last class is [PAD]. Not returned in training with
            `labels`, because only a sample of the classes is computed.
        generation_loss: Scalar, cross-entropy of the prompts over the classes. It replaces the decoder's loss.
        alignment_loss: Scalar, see [`TagAlignment`].
        assignment: `[batch, num_prompts]`, which of the example's own tags is matched to each prompt, -1 for [PAD].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    assignment: torch.Tensor | None = None


class ModelGForTagClassification(OPTSGPreTrainedModel, GenerationMixin):
    """Model G (Figure 2c): a multi-class head on each prompt predicts its tag. It cannot predict novel tags."""

    config_class = ModelGConfig
    # The model has a single decoding with independent slots.
    independent_decodings = (None,)

    def __init__(self, config: ModelGConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_alignment = TagAlignment(config)
        self.dropout = nn.Dropout(config.dropout)
        num_classes = config.num_tag_classes + 1
        if config.cosine_classifier:
            self.classifier = CosineClassifier(config, num_classes)
        else:
            self.classifier = OutputLayer(config.hidden_size, num_classes)
        self.label_vocabulary = LabelVocabulary(config)
        self.post_init()
        self.generation_config = GenerationConfig(pad_bias=0.0, threshold=0.0)

    def set_label_vocabulary(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Set the tag of each class; see [`LabelVocabulary.set_tags`]."""
        self.label_vocabulary.set_tags(input_ids, counts)

    @can_return_tuple
    def forward(
        self,
        labels: torch.Tensor | None = None,
        tag_text_input_ids: torch.Tensor | None = None,
        tag_text_attention_mask: torch.Tensor | None = None,
        tag_features: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_features: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ModelGOutput:
        """Compute the logits, or the losses if `labels` are given.

        Args:
            labels, tag_text_input_ids, tag_text_attention_mask, tag_features: See [`OPTSGForTagGeneration.forward`].
            negative_input_ids, negative_features, example_seeds: See [`OPTSGForTagGeneration.forward`].
            inputs: Arguments of [`OPTSGModel.forward`].

        Raises:
            ValueError: An example cannot be encoded, a tag of `labels` is not a class, or the texts of the tags are
                missing.
        """
        prompts = self.model(**inputs, example_seeds=example_seeds, return_dict=True).order_prompts
        hidden_states = self.dropout(prompts)
        if not check_labels(labels, tag_text_input_ids=tag_text_input_ids, tag_features=tag_features):
            return ModelGOutput(logits=self.classifier(hidden_states))
        classes = self.label_vocabulary.known_classes_of(labels)
        tags = BatchTags.from_labels(labels, negative_input_ids)
        features = self.model.embed_batch_tags(
            tags, tag_text_input_ids, tag_text_attention_mask, tag_features, negative_features
        )
        alignment = self.tag_alignment(prompts, features, tags.labels)
        assignment = tags.own_index(alignment.assignment)
        targets = torch.where(assignment >= 0, classes.gather(1, assignment.clamp(min=0)), len(self.label_vocabulary))
        logits = None
        if self.training:
            loss = self._sampled_loss(hidden_states, targets, example_seeds)
        else:
            logits = self.classifier(hidden_states)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return ModelGOutput(
            loss=loss + self.config.alignment_loss_weight * alignment.loss,
            logits=logits,
            generation_loss=loss,
            alignment_loss=alignment.loss,
            assignment=assignment,
        )

    def _sampled_loss(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, example_seeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the loss over some [PAD] slots and a sample of the classes, as in the decoder of OP-TSG."""
        pad = len(self.label_vocabulary)
        chosen, pad_weights = choose_pad_slots(targets == pad, self.config.pad_slot_ratio, example_seeds)
        kept = (targets != pad) | chosen
        weights = torch.where(targets == pad, pad_weights[:, None], 1.0)[kept]
        classes, columns, correction = sample_classes(targets[kept], pad + 1, self.config.num_sampled_tokens)
        logits = self._class_logits(hidden_states[kept], classes) + correction
        losses = F.cross_entropy(logits.float(), columns, reduction="none")
        return (losses * weights).sum() / weights.sum()

    def _class_logits(self, hidden_states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        if self.config.cosine_classifier:
            return self.classifier(hidden_states, classes)
        return compute_columns(self.classifier, hidden_states, classes)

    @torch.no_grad()
    def generate(
        self,
        *,
        threshold: float | None = None,
        pad_bias: float | None = None,
        max_tags: int | None = None,
        num_return_sequences: int | None = None,
        logit_adjustment: float | None = None,
        generation_config: GenerationConfig | None = None,
        output_slots: bool = False,
        **inputs: Any,
    ) -> OPTSGGenerateOutput:
        """Predicts the tags of each example, most probable first.

        Args:
            threshold: Minimum probability of a tag.
            pad_bias: Added to the logit of [PAD]. A slot in which [PAD] wins predicts no tag.
            max_tags: Maximum number of tags of an example.
            num_return_sequences: Maximum number of tags per slot. Default: 1.
            logit_adjustment: See [`LabelVocabulary.adjust_logits`]. The logit of [PAD] is not adjusted.
            generation_config: Generation config that replaces the one of the model.
            output_slots: Whether to return the predictions of every slot.
            inputs: Arguments of [`OPTSGModel.forward`].
        """
        settings = read_ranking_settings(
            self,
            generation_config,
            inputs,
            threshold=threshold,
            pad_bias=pad_bias,
            max_tags=max_tags,
            num_return_sequences=num_return_sequences,
            logit_adjustment=logit_adjustment,
        )
        with evaluation_mode(self):
            logits = self(**inputs, return_dict=True).logits.float()
        logits[..., :-1] = self.label_vocabulary.adjust_logits(logits[..., :-1], settings["logit_adjustment"])
        log_probs = logits.log_softmax(dim=-1)[..., :-1]
        num_tags = min(settings["num_return_sequences"] or 1, log_probs.shape[-1])
        log_probs, classes = log_probs.topk(num_tags, dim=-1)
        pad_margins = logits[..., :-1].amax(dim=-1) - logits[..., -1]
        log_probs = log_probs.masked_fill((pad_margins <= settings["pad_bias"])[..., None], -torch.inf)
        tokens = self.label_vocabulary.tokens_of(classes)
        pad = self.config.tag_pad_token_id
        ranked = rank_tags(tokens, log_probs, settings["threshold"], settings["max_tags"], pad)
        return OPTSGGenerateOutput(
            **vars(ranked),
            pad_margins=pad_margins,
            slot_tokens=tokens if output_slots else None,
            slot_log_probs=log_probs if output_slots else None,
        )


for config, model in ((ModelFConfig, ModelFForTagGeneration), (ModelGConfig, ModelGForTagClassification)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
