"""ASY: multi-label classification with the asymmetric loss (Ridnik et al., ICCV 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from modeling_optsg.base_models import OPTSGEvidenceModel, OPTSGPreTrainedModel
from modeling_optsg.baselines.configuration import ASYConfig
from modeling_optsg.batch_tags import check_labels
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode
from modeling_optsg.generation_settings import read_ranking_settings
from modeling_optsg.tag_classifier import LabelVocabulary, TagClassifier
from modeling_optsg.tag_ranking import rank_tags

DEFAULT_MAX_TAGS = 100


@dataclass
class ASYOutput(ModelOutput):
    """Output of [`ASYForTagClassification`].

    Args:
        loss: Scalar, the asymmetric loss summed over classes and averaged over examples. Returned with `labels`.
        logits: `[batch, num_tag_classes]`. Their sigmoid is each tag's probability. Returned without `labels`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class ASYForTagClassification(OPTSGPreTrainedModel, GenerationMixin):
    """Multi-label classifier over the label vocabulary: OP-TSG's [`TagClassifier`] alone.

    It cannot predict novel tags.
    """

    config_class = ASYConfig

    def __init__(self, config: ASYConfig):
        super().__init__(config)
        self.model = OPTSGEvidenceModel(config)
        self.tag_classifier = TagClassifier(config)
        self.post_init()
        self.generation_config = GenerationConfig(threshold=0.0)

    @property
    def label_vocabulary(self) -> LabelVocabulary:
        """The tag of each class."""
        return self.tag_classifier.label_vocabulary

    def set_label_vocabulary(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Set the tag of each class; see [`LabelVocabulary.set_tags`]."""
        self.label_vocabulary.set_tags(input_ids, counts)

    @can_return_tuple
    def forward(
        self,
        labels: torch.Tensor | None = None,
        is_mismatched: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ASYOutput:
        """Compute logits, or with `labels` the loss.

        Args:
            labels: `[batch, max tags per example, max length]`, see [`OPTSGForTagGeneration.forward`].
            is_mismatched: `[batch]`, see [`TagClassifier.forward`].
            inputs: Arguments of [`OPTSGModel.forward`].

        Raises:
            ValueError: An example cannot be encoded, or a tag of `labels` is not a class.
        """
        tag_inputs = {name: inputs.get(name) for name in ("tag_text_input_ids", "tag_features")}
        if not check_labels(labels, **tag_inputs):
            return ASYOutput(logits=self.tag_classifier.logits(self.model(**inputs, return_dict=True)))
        self.label_vocabulary.known_classes_of(labels)
        evidence = self.model(**inputs, return_dict=True)
        return ASYOutput(loss=self.tag_classifier(evidence, labels, is_mismatched))

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
            self, generation_config, inputs, threshold=threshold, max_tags=max_tags, logit_adjustment=logit_adjustment
        )
        with evaluation_mode(self):
            logits = self(**inputs, return_dict=True).logits.float()
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
