"""Models F and G of the paper's Figure 2: OP-TSG with other answers to "what if there is nothing left to say"."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from modeling_optsg.baselines.configuration import ModelFConfig, ModelGConfig
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, SlotContext, evaluation_mode, plain_settings
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration, OPTSGModel, OPTSGPreTrainedModel
from modeling_optsg.sampled_softmax import sample_classes
from modeling_optsg.tag_alignment import TagAlignment
from modeling_optsg.tag_classifier import CosineClassifier, LabelVocabulary, check_tag_ids
from modeling_optsg.tag_decoder import choose_empty_slots, lay_out_slots
from modeling_optsg.tag_ranking import rank_tags


class ModelFForTagGeneration(OPTSGForTagGeneration):
    """Model F (Figure 2b): no [PAD] tag. A binary head says which prompts are meaningful, and only those are decoded.

    A tag's probability is that of its prompt being meaningful times that of its tokens. `pad_bias` is a threshold on
    the head's logit, so that the two models are fitted alike.
    """

    config_class = ModelFConfig

    def __init__(self, config: ModelFConfig):
        super().__init__(config)
        self.meaningful_head = nn.Linear(config.hidden_size, 1)
        self.post_init()
        self.generation_config = GenerationConfig(decoding="parallel", pad_bias=0.0, threshold=0.0)

    def _align(self, order_prompts, tag_features, labels):
        # Without a [PAD] tag a prompt is compared with tags alone; one that is matched to none learns nothing here.
        return self.tag_alignment(order_prompts, tag_features, labels, with_pad=False)

    def _write(self, outputs, alignment, tag_input_ids, tag_lengths, decoding, example_seeds, classes):
        written = super()._write(outputs, alignment, tag_input_ids, tag_lengths, decoding, example_seeds, classes)
        meaningful = self.meaningful_head(outputs.order_prompts)[..., 0].float()
        matched = (alignment.assignment >= 0).float()
        # Both stand for what OP-TSG's decoder would have predicted position by position, and count as positions.
        head_loss = F.binary_cross_entropy_with_logits(meaningful, matched, reduction="sum")
        tokens = len(written["targets"])
        loss = (written["generation_loss"] * tokens + head_loss) / (tokens + meaningful.numel())
        return written | {"generation_loss": loss}

    def _lay_out(self, assignment, tag_input_ids, tag_lengths, example_seeds):
        pad, sep = self.config.tag_pad_token_id, self.config.tag_sep_token_id
        sequence = lay_out_slots(assignment, tag_input_ids, tag_lengths, pad, sep, empty_slots=False)
        return sequence, torch.ones(len(assignment), device=assignment.device)

    def _write_slots(self, prompts, examples, memory, memory_mask, search, context=None):
        config = self.config
        logits = self.meaningful_head(prompts)[:, 0].float()
        chosen = (logits > search.pad_bias).nonzero().flatten()
        count, width = len(prompts), search.hypotheses
        if not len(chosen):
            tokens = torch.full((count, width, 1), config.tag_pad_token_id, device=prompts.device)
            log_probs = torch.full((count, width), -torch.inf, device=prompts.device)
            heads, head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
            nothing = prompts.new_zeros(count, heads, 0, head_size)
            mask = torch.zeros(count, 0, dtype=torch.bool, device=prompts.device)
            return tokens, log_probs, logits, SlotContext([(nothing, nothing)] * config.num_decoder_layers, mask)
        found, found_log_probs, _, local = super()._write_slots(
            prompts[chosen],
            examples[chosen],
            memory,
            memory_mask,
            dataclasses.replace(search, pad_bias=-torch.inf),
            context,
        )
        tokens = found.new_full((count, *found.shape[1:]), config.tag_pad_token_id)
        log_probs = found_log_probs.new_full((count, width), -torch.inf)
        tokens[chosen] = found
        log_probs[chosen] = found_log_probs + F.logsigmoid(logits[chosen])[:, None]
        return tokens, log_probs, logits, local.spread(chosen, count)


@dataclass
class ModelGOutput(ModelOutput):
    """
    Args:
        loss: scalar, `classification_loss + alignment_loss_weight * alignment_loss`.
        logits: `[batch, num_prompts, num_tag_classes + 1]`; the last class is [PAD]. `None` in training with labels,
            where few of them are computed.
        generation_loss: scalar, cross-entropy of the prompts over the classes; named as the decoder's it stands for.
        alignment_loss: scalar, see [`TagAlignment`].
        assignment: `[batch, num_prompts]`, the index of the tag each prompt was matched to, -1 for [PAD].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    assignment: torch.Tensor | None = None


class ModelGForTagClassification(OPTSGPreTrainedModel, GenerationMixin):
    """Model G (Figure 2c): a multi-class head on each prompt names its tag; nothing is written."""

    config_class = ModelGConfig
    # It knows one way of naming tags, in which slots are independent.
    independent_decodings = (None,)

    def __init__(self, config: ModelGConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_alignment = TagAlignment(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.cosine_classifier:
            self.classifier = CosineClassifier(config, config.num_tag_classes + 1)
        else:
            self.classifier = nn.Linear(config.hidden_size, config.num_tag_classes + 1)
        self.label_vocabulary = LabelVocabulary(config)
        self.post_init()
        self.generation_config = GenerationConfig(pad_bias=0.0, threshold=0.0)

    def set_label_vocabulary(self, input_ids, counts=None) -> None:
        """Says which tag each class is; see [`LabelVocabulary.set_tags`]."""
        self.label_vocabulary.set_tags(input_ids, counts)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tag_ids: torch.Tensor | None = None,
        tag_text_input_ids: torch.Tensor | None = None,
        tag_text_attention_mask: torch.Tensor | None = None,
        tag_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
        **kwargs,
    ) -> ModelGOutput:
        """
        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            tag_ids: `[tags]`, the class of each tag of the batch.
            tag_text_input_ids, tag_text_attention_mask, tag_features, labels, example_seeds: see
                [`OPTSGForTagGeneration.forward`].

        Raises:
            ValueError: an example cannot be read, or `labels` come without the classes or the texts of their tags.
        """
        prompts = self.model(
            pixel_values=pixel_values,
            frame_features=frame_features,
            frame_mask=frame_mask,
            input_ids=input_ids,
            title_features=title_features,
            attention_mask=attention_mask,
            example_seeds=example_seeds,
        ).order_prompts
        dropped = self.dropout(prompts)
        if labels is None:
            return ModelGOutput(logits=self.classifier(dropped))
        check_tag_ids(tag_ids, len(self.label_vocabulary))
        if tag_features is None:
            if tag_text_input_ids is None:
                raise ValueError("labels need tag_text_input_ids (or tag_features) too; the data collator makes them.")
            tag_features = self.model.embed_tags(tag_text_input_ids, tag_text_attention_mask)
        alignment = self.tag_alignment(prompts, tag_features, labels)
        assignment = alignment.assignment
        pad = len(self.label_vocabulary)
        targets = torch.where(assignment >= 0, tag_ids[assignment.clamp(min=0)], pad)
        logits = None
        if not self.training:
            logits = self.classifier(dropped)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        else:
            # As OP-TSG's decoder is trained: few of the empty slots, and a sample of the classes.
            chosen, stands_for = choose_empty_slots(targets == pad, self.config.pad_slot_ratio, example_seeds)
            kept = (targets != pad) | chosen
            weights = torch.where(targets == pad, stands_for[:, None], 1.0)[kept]
            targets = targets[kept]
            classes, columns, correction = sample_classes(targets, pad + 1, self.config.num_sampled_tokens)
            kept_logits = self._class_logits(dropped[kept], classes) + correction
            losses = F.cross_entropy(kept_logits.float(), columns, reduction="none")
            loss = (losses * weights).sum() / weights.sum()
        return ModelGOutput(
            loss=loss + self.config.alignment_loss_weight * alignment.loss,
            logits=logits,
            generation_loss=loss,
            alignment_loss=alignment.loss,
            assignment=assignment,
        )

    def _class_logits(self, hidden_states, classes):
        if self.config.cosine_classifier:
            return self.classifier(hidden_states, classes)
        return F.linear(hidden_states, self.classifier.weight[classes], self.classifier.bias[classes])

    @torch.no_grad()
    def generate(
        self,
        *,
        threshold: float | None = None,
        pad_bias: float | None = None,
        max_tags: int | None = None,
        num_return_sequences: int | None = None,
        logit_adjustment: float | None = None,
        generation_config=None,
        output_slots: bool = False,
        **inputs,
    ) -> OPTSGGenerateOutput:
        """Each example's tags by falling probability.

        Args:
            threshold: tags with a smaller probability are left out.
            pad_bias: added to the logit of [PAD]; a slot whose [PAD] wins names nothing.
            max_tags: at most so many tags an example.
            num_return_sequences: num_return_sequences a slot, 1 if not given.
            logit_adjustment: see [`LabelVocabulary.adjust`]; 0 if not given. [PAD] keeps its logit.
            generation_config: instead of the model's.
            output_slots: return what every slot proposes too.
            inputs: of [`forward`], without labels.
        """
        settings = plain_settings(
            self,
            generation_config,
            threshold=threshold,
            pad_bias=pad_bias,
            max_tags=max_tags,
            num_return_sequences=num_return_sequences,
            logit_adjustment=logit_adjustment,
        )
        with evaluation_mode(self):
            logits = self(**inputs).logits.float()
            logits[..., :-1] = self.label_vocabulary.adjust(logits[..., :-1], settings["logit_adjustment"])
        log_probs = logits.log_softmax(dim=-1)[..., :-1]
        width = min(settings["num_return_sequences"] or 1, log_probs.shape[-1])
        log_probs, classes = log_probs.topk(width, dim=-1)
        pad_margins = logits[..., :-1].amax(dim=-1) - logits[..., -1]
        log_probs = log_probs.masked_fill((pad_margins <= settings["pad_bias"])[..., None], -torch.inf)
        tokens = self.label_vocabulary.of(classes)
        collected = rank_tags(
            tokens,
            log_probs,
            settings["threshold"],
            settings["max_tags"],
            self.config.tag_pad_token_id,
        )
        return OPTSGGenerateOutput(
            **vars(collected),
            pad_margins=pad_margins,
            slot_tokens=tokens if output_slots else None,
            slot_log_probs=log_probs if output_slots else None,
        )


for config, model in ((ModelFConfig, ModelFForTagGeneration), (ModelGConfig, ModelGForTagClassification)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")

__all__ = ["ModelFForTagGeneration", "ModelGForTagClassification", "ModelGOutput"]
