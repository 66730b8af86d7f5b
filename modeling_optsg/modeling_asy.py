"""ASY: every train tag is a class, learned with the asymmetric loss (Ridnik et al., ICCV 2021)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_optsg import ASYConfig
from .modeling_optsg import OPTSGModel, OPTSGPreTrainedModel
from .tag_classes import TagClasses, check_class_labels
from .tag_generation import OPTSGGenerateOutput, collect_tags, evaluation_mode, plain_settings


@dataclass
class ASYOutput(ModelOutput):
    """
    Args:
        loss: scalar, the asymmetric loss summed over the classes and averaged over the items.
        logits: `[batch, num_tag_classes]`; their sigmoid is each tag's probability.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def asymmetric_loss(
    logits: torch.Tensor, targets: torch.Tensor, gamma_negative: float, gamma_positive: float, probability_shift: float
) -> torch.Tensor:
    """Asymmetric loss of multi-label classification (arXiv 2009.14119, equations 5 to 7), summed over the classes.

    Args:
        logits: `[batch, classes]`.
        targets: `[batch, classes]`, 1 where the class is present.
        gamma_negative, gamma_positive, probability_shift: γ⁻, γ⁺ and m of the paper.

    Returns:
        Scalar, the mean over the batch.
    """
    probability = logits.sigmoid()
    shifted = (probability - probability_shift).clamp(min=0)
    present = targets * (1 - probability) ** gamma_positive * F.logsigmoid(logits)
    # Without a shift log(1 - p) is taken from the logit: p itself rounds to 1.
    log_absent = F.logsigmoid(-logits) if probability_shift == 0 else torch.log1p(-shifted)
    absent = (1 - targets) * shifted**gamma_negative * log_absent
    return -(present + absent).sum(dim=-1).mean()


class ASYForTagClassification(OPTSGPreTrainedModel, GenerationMixin):
    """Multi-label classification over the train tags, on OP-TSG's own encoder: its queries pool the memory, and a
    linear layer gives every tag a probability. It cannot write a tag it has not seen."""

    config_class = ASYConfig

    def __init__(self, config: ASYConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_tag_classes)
        self.tag_classes = TagClasses(config)
        self.post_init()
        self.generation_config = GenerationConfig(threshold=0.0)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            # Most tags are absent from most items: at a half, the first steps would only teach that.
            init.constant_(module.bias, -5.0)

    def set_tag_classes(self, input_ids) -> None:
        """Says which tag each class is; see [`TagClasses.set_tags`]."""
        self.tag_classes.set_tags(input_ids)

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
        **kwargs,
    ) -> ASYOutput:
        """
        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            tag_ids: `[tags]`, the class of each tag of the batch.
            labels: `[batch, most tags of an item]`, indices of each item's tags in `tag_ids`, -100 where none is.

        Raises:
            ValueError: an item cannot be read, or `labels` come without `tag_ids` or name a class there is not.
        """
        prompts = self.model(
            pixel_values=pixel_values,
            frame_features=frame_features,
            frame_mask=frame_mask,
            input_ids=input_ids,
            title_features=title_features,
            attention_mask=attention_mask,
        ).order_prompts
        logits = self.classifier(self.dropout(prompts.mean(dim=1)))
        if labels is None:
            return ASYOutput(logits=logits)
        check_class_labels(tag_ids, len(self.tag_classes))
        targets = torch.zeros_like(logits, dtype=torch.float32)
        items, places = (labels >= 0).nonzero(as_tuple=True)
        targets[items, tag_ids[labels[items, places]]] = 1.0
        config = self.config
        loss = asymmetric_loss(
            logits.float(), targets, config.gamma_negative, config.gamma_positive, config.probability_shift
        )
        return ASYOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self, *, threshold: float | None = None, max_tags: int | None = None, generation_config=None, **inputs
    ) -> OPTSGGenerateOutput:
        """Each item's tags by falling probability.

        Args:
            threshold: tags with a smaller probability are left out.
            max_tags: at most so many tags an item; 100 if not given, of which a threshold of any use keeps few.
            generation_config: instead of the model's.
            inputs: of [`forward`], without labels.
        """
        settings = plain_settings(self, generation_config, threshold=threshold, max_tags=max_tags)
        with evaluation_mode(self):
            logits = self(**inputs).logits.float()
        log_probs, classes = F.logsigmoid(logits).topk(min(settings["max_tags"] or 100, logits.shape[1]), dim=1)
        tokens = self.tag_classes.of(classes)[:, :, None]
        sequences, tag_scores, slots = collect_tags(
            tokens, log_probs[:, :, None], settings["threshold"], settings["max_tags"], self.config.tag_pad_token_id
        )
        return OPTSGGenerateOutput(sequences=sequences, tag_scores=tag_scores)


ASYConfig.register_for_auto_class()
ASYForTagClassification.register_for_auto_class("AutoModel")

__all__ = ["ASYForTagClassification", "ASYOutput", "asymmetric_loss"]
