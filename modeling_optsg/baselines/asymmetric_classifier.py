"""ASY: multi-label classification with the asymmetric loss (Ridnik et al., ICCV 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput

from modeling_optsg.baselines.configuration import ASYConfig
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode
from modeling_optsg.generation_settings import read_ranking_settings
from modeling_optsg.modeling_optsg import INITIAL_CLASS_BIAS, OPTSGModel, OPTSGPreTrainedModel
from modeling_optsg.tag_classifier import (
    CosineClassifier,
    LabelVocabulary,
    asymmetric_loss,
    check_tag_ids,
    multi_hot_targets,
)
from modeling_optsg.tag_ranking import rank_tags

DEFAULT_MAX_TAGS = 100


@dataclass
class ASYOutput(ModelOutput):
    """Output of [`ASYForTagClassification`].

    Args:
        loss: Scalar, the asymmetric loss summed over classes and averaged over examples. Returned with `labels`.
        logits: `[batch, num_tag_classes]`. Their sigmoid is each tag's probability.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class ASYForTagClassification(OPTSGPreTrainedModel, GenerationMixin):
    """Multi-label classifier over the label vocabulary, on OP-TSG's own encoder. It cannot predict novel tags.

    As in the paper, queries pool the memory and a linear layer classifies their mean. With `cosine_classifier`, a
    [`CosineClassifier`] reads the pooled tower features, and the queries' mean is added through a learned gate that
    starts at 0.
    """

    config_class = ASYConfig

    def __init__(self, config: ASYConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout if config.cosine_classifier else config.dropout)
        if config.cosine_classifier:
            self.classifier = CosineClassifier(config, config.num_tag_classes)
            # The queries' outputs are normalised and much larger than the pooled features, and carry nothing at first.
            self.query_gate = nn.Parameter(torch.zeros(1))
        else:
            self.classifier = nn.Linear(config.hidden_size, config.num_tag_classes)
        self.label_vocabulary = LabelVocabulary(config)
        self.post_init()
        self.generation_config = GenerationConfig(threshold=0.0)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            init.constant_(module.bias, INITIAL_CLASS_BIAS)
        if module is self and self.config.cosine_classifier:
            init.zeros_(self.query_gate)

    def set_label_vocabulary(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Set the tag of each class; see [`LabelVocabulary.set_tags`]."""
        self.label_vocabulary.set_tags(input_ids, counts)

    def forward(
        self, tag_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None, **inputs: Any
    ) -> ASYOutput:
        """Compute logits, and with `labels` the loss.

        Args:
            tag_ids: `[tags]`, the class of each tag of the batch.
            labels: `[batch, max tags per example]`, indices into `tag_ids`, -100 for padding.
            inputs: Arguments of [`OPTSGModel.forward`].

        Raises:
            ValueError: An example cannot be encoded, or `labels` come without the classes of their tags.
        """
        outputs = self.model(**inputs)
        pooled = outputs.order_prompts.mean(dim=1)
        if self.config.cosine_classifier and outputs.prompt_pooler_output is not None:
            pooled = self.query_gate * pooled + outputs.prompt_pooler_output
        logits = self.classifier(self.dropout(pooled))
        if labels is None:
            return ASYOutput(logits=logits)
        check_tag_ids(tag_ids, len(self.label_vocabulary))
        config = self.config
        loss = asymmetric_loss(
            logits.float(),
            multi_hot_targets(labels, tag_ids, logits.shape[1]),
            config.asl_gamma_negative,
            config.asl_gamma_positive,
            config.asl_margin,
        )
        return ASYOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        *,
        threshold: float | None = None,
        max_tags: int | None = None,
        logit_adjustment: float | None = None,
        generation_config: GenerationConfig | None = None,
        **inputs: Any,
    ) -> OPTSGGenerateOutput:
        """Predicts the tags of each example, most probable first.

        Args:
            threshold: Minimum probability of a tag.
            max_tags: Maximum number of tags of an example. Defaults to 100.
            logit_adjustment: See [`LabelVocabulary.adjust_logits`].
            generation_config: Used instead of the model's.
            inputs: Arguments of [`OPTSGModel.forward`].
        """
        settings = read_ranking_settings(
            self, generation_config, threshold=threshold, max_tags=max_tags, logit_adjustment=logit_adjustment
        )
        with evaluation_mode(self):
            logits = self(**inputs).logits.float()
        logits = self.label_vocabulary.adjust_logits(logits, settings["logit_adjustment"])
        num_tags = min(settings["max_tags"] or DEFAULT_MAX_TAGS, logits.shape[1])
        log_probs, classes = F.logsigmoid(logits).topk(num_tags, dim=1)
        ranked = rank_tags(
            self.label_vocabulary.tokens_of(classes)[:, :, None],
            log_probs[:, :, None],
            settings["threshold"],
            settings["max_tags"],
            self.config.tag_pad_token_id,
        )
        return OPTSGGenerateOutput(sequences=ranked.sequences, tag_scores=ranked.tag_scores)


ASYConfig.register_for_auto_class()
ASYForTagClassification.register_for_auto_class("AutoModel")
