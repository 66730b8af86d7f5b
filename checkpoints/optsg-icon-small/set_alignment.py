"""Room 3, for the item as a whole: which tags belong to it, learned from every train tag at once.

The matching shows a prompt the tags of its batch; a classifier sees every train tag at every step, and learns more
from a rare one. Here the item's summary is compared with all train tags as a classifier compares it. What comes of it
is weighed against what the slots write, and proposes tags that they do not.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .tag_classes import SimilarityClassifier, TagClasses, check_class_labels


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


def present_tags(labels: torch.Tensor, tag_ids: torch.Tensor, num_tags: int) -> torch.Tensor:
    """Labels as a table: `[batch, num_tags]`, 1 where an item has the tag.

    Args:
        labels: `[batch, most tags of an item]`, indices into `tag_ids`, -100 where there is none.
        tag_ids: `[tags]`, the column of each tag of the batch.
    """
    targets = torch.zeros(len(labels), num_tags, device=labels.device)
    items, places = (labels >= 0).nonzero(as_tuple=True)
    targets[items, tag_ids[labels[items, places]]] = 1.0
    return targets


class SetAlignment(nn.Module):
    """Compares an item's summary with the train tags; `tag_classes` says what they are."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.set_dropout)
        self.classifier = SimilarityClassifier(config, config.num_tag_classes)
        self.tag_classes = TagClasses(config)

    def logits(self, summary: torch.Tensor) -> torch.Tensor:
        """`[batch, hidden_size]`, from the multimodal encoder -> `[batch, num_tag_classes]`."""
        return self.classifier(self.dropout(summary))

    def forward(self, summary: torch.Tensor, labels: torch.Tensor, tag_ids: torch.Tensor) -> torch.Tensor:
        """The asymmetric loss over all train tags.

        Args:
            summary: as in [`logits`]; labels, tag_ids: see [`OPTSGForTagGeneration.forward`].

        Raises:
            ValueError: `tag_ids` name a class there is not.
        """
        check_class_labels(tag_ids, len(self.tag_classes))
        config, logits = self.config, self.logits(summary).float()
        return asymmetric_loss(
            logits,
            present_tags(labels, tag_ids, logits.shape[1]),
            config.gamma_negative,
            config.gamma_positive,
            config.probability_shift,
        )
