"""ASY: every train tag is a class, learned with the asymmetric loss (Ridnik et al., ICCV 2021)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput

from modeling_optsg.baselines.configuration import ASYConfig
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode, plain_settings
from modeling_optsg.modeling_optsg import ABSENT_BIAS, OPTSGModel, OPTSGPreTrainedModel
from modeling_optsg.tag_classifier import (
    CosineClassifier,
    LabelVocabulary,
    asymmetric_loss,
    check_tag_ids,
    multi_hot_targets,
)
from modeling_optsg.tag_ranking import rank_tags


@dataclass
class ASYOutput(ModelOutput):
    """
    Args:
        loss: scalar, the asymmetric loss summed over the classes and averaged over the examples.
        logits: `[batch, num_tag_classes]`; their sigmoid is each tag's probability.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class ASYForTagClassification(OPTSGPreTrainedModel, GenerationMixin):
    """Multi-label classification over the train tags, on OP-TSG's own encoder: its queries pool the memory, and every
    tag's weights give it a probability. It cannot write a tag it has not seen.

    With `cosine_classifier` the example's summary is compared with every tag ([`CosineClassifier`]), and what the queries
    find is added by a share that is learned and begins at none; without, a linear layer classifies what the queries
    find, as in the paper.
    """

    config_class = ASYConfig

    def __init__(self, config: ASYConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout if config.cosine_classifier else config.dropout)
        if config.cosine_classifier:
            self.classifier = CosineClassifier(config, config.num_tag_classes)
            # Normalised, what the queries find is far larger than the summary, and at first it says nothing.
            self.query_gate = nn.Parameter(torch.zeros(1))
        else:
            self.classifier = nn.Linear(config.hidden_size, config.num_tag_classes)
        self.label_vocabulary = LabelVocabulary(config)
        self.post_init()
        self.generation_config = GenerationConfig(threshold=0.0)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            init.constant_(module.bias, ABSENT_BIAS)
        if module is self and self.config.cosine_classifier:
            init.zeros_(self.query_gate)

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
        labels: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
        **kwargs,
    ) -> ASYOutput:
        """
        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            tag_ids: `[tags]`, the class of each tag of the batch.
            labels: `[batch, most tags of an example]`, indices of each example's tags in `tag_ids`, -100 where none is.
            example_seeds: see [`OPTSGModel`].

        Raises:
            ValueError: an example cannot be read, or `labels` come without `tag_ids` or name a class there is not.
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
        found = outputs.order_prompts.mean(dim=1)
        if self.config.cosine_classifier and outputs.prompt_pooler_output is not None:
            found = self.query_gate * found + outputs.prompt_pooler_output
        logits = self.classifier(self.dropout(found))
        if labels is None:
            return ASYOutput(logits=logits)
        check_tag_ids(tag_ids, len(self.label_vocabulary))
        config = self.config
        targets = multi_hot_targets(labels, tag_ids, logits.shape[1])
        loss = asymmetric_loss(
            logits.float(), targets, config.asl_gamma_negative, config.asl_gamma_positive, config.asl_margin
        )
        return ASYOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        *,
        threshold: float | None = None,
        max_tags: int | None = None,
        logit_adjustment: float | None = None,
        generation_config=None,
        **inputs,
    ) -> OPTSGGenerateOutput:
        """Each example's tags by falling probability.

        Args:
            threshold: tags with a smaller probability are left out.
            max_tags: at most so many tags an example; 100 if not given, of which a threshold of any use keeps few.
            logit_adjustment: see [`LabelVocabulary.adjust`]; 0 if not given.
            generation_config: instead of the model's.
            inputs: of [`forward`], without labels.
        """
        settings = plain_settings(
            self, generation_config, threshold=threshold, max_tags=max_tags, logit_adjustment=logit_adjustment
        )
        with evaluation_mode(self):
            logits = self.label_vocabulary.adjust(self(**inputs).logits.float(), settings["logit_adjustment"])
        log_probs, classes = F.logsigmoid(logits).topk(min(settings["max_tags"] or 100, logits.shape[1]), dim=1)
        tokens = self.label_vocabulary.of(classes)[:, :, None]
        collected = rank_tags(
            tokens, log_probs[:, :, None], settings["threshold"], settings["max_tags"], self.config.tag_pad_token_id
        )
        return OPTSGGenerateOutput(sequences=collected.sequences, tag_scores=collected.tag_scores)


ASYConfig.register_for_auto_class()
ASYForTagClassification.register_for_auto_class("AutoModel")

__all__ = ["ASYForTagClassification", "ASYOutput"]
