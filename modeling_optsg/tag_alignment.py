"""Room 3: which prompt writes which tag. Bipartite matching of prompts and tags, and the loss that follows from it."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput


@dataclass
class TagAlignmentOutput(ModelOutput):
    """
    Args:
        loss: scalar, cross-entropy of every prompt over the candidate tags and [PAD].
        logits: `[batch, num_prompts, tags + 1]`, scaled similarities; the last column is [PAD].
        assignment: `[batch, num_prompts]`, the candidate tag each prompt is to write, -1 for [PAD].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    assignment: torch.Tensor | None = None


@torch.no_grad()
def match_prompts_to_tags(similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One-to-one matching of an example's prompts to its tag set padded with [PAD] to the number of prompts.

    Padding n tags to K and solving the K×K problem equals solving n×K at the cost
    −(similarity to the tag − similarity to [PAD]) of each pair, which is what is done here.

    Args:
        similarity: `[batch, num_prompts, tags + 1]`; the last column is the similarity to [PAD].
        labels: `[batch, most tags of an example]`, indices of each example's tags, -100 where there is none.

    Returns:
        `[batch, num_prompts]` int64: the index of the tag each prompt is matched to, -1 for [PAD].

    Raises:
        ValueError: an example has more tags than there are prompts, or a label is no candidate.
        FloatingPointError: a similarity is no number.
    """
    batch, num_prompts, columns = similarity.shape
    present = labels >= 0
    if (beyond := labels[labels >= columns - 1]).numel():
        raise ValueError(f"Label {beyond[0].item()} names no tag: only {columns - 1} candidate tags were given.")
    if (most := present.sum(dim=1).max().item()) > num_prompts:
        raise ValueError(
            f"An example has {most} tags but the model has num_prompts={num_prompts}; sample {num_prompts} of them "
            "(the data collator does) or build a model with more prompts."
        )
    gain = similarity.float() - similarity[..., -1:].float()
    gain = gain.gather(2, labels.clamp(min=0)[:, None, :].expand(-1, num_prompts, -1)).cpu().numpy()
    if not np.isfinite(gain).all():
        raise FloatingPointError("Prompts and tags have similarities that are no numbers.")
    counts = present.sum(dim=1).tolist()
    # Labels are padded at the end or anywhere: the matching only sees an example's real columns.
    order = torch.argsort((~present).to(torch.int8), dim=1, stable=True).cpu()
    cpu_labels = labels.cpu()
    assignment = torch.full((batch, num_prompts), -1, dtype=torch.long)
    for example, count in enumerate(counts):
        columns_of_example = order[example, :count]
        prompts, tags = linear_sum_assignment(gain[example][:, columns_of_example.numpy()], maximize=True)
        assignment[example, prompts] = cpu_labels[example, columns_of_example[tags]]
    return assignment.to(labels.device)


class TagAlignment(nn.Module):
    """Compares order prompts and tags in a common space, matches them, and pulls each prompt to its tag."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.prompt_projection = nn.Linear(config.hidden_size, config.alignment_size)
        self.tag_projection = nn.Linear(config.text_config.hidden_size, config.alignment_size)
        self.pad_embedding = nn.Parameter(torch.empty(config.alignment_size))
        # One entry, not none: what has no dimension cannot be divided among processes.
        self.logit_scale = nn.Parameter(torch.empty(1))

    def initial_logit_scale(self) -> float:
        return self.config.logit_scale_init_value

    def similarity(self, order_prompts: torch.Tensor, tag_features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            tag_features: `[tags, text width]`, pooled text-tower features of the candidate tags.

        Returns:
            `[batch, num_prompts, tags + 1]`: cosine similarities over the temperature; the last column is [PAD].
        """
        tags = torch.cat([self.tag_projection(tag_features), self.pad_embedding[None]])
        prompts = F.normalize(self.prompt_projection(order_prompts), dim=-1)
        # A hundred is CLIP's bound: past it the softmax is a hard maximum and the gradient is noise.
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        return scale * prompts @ F.normalize(tags, dim=-1).T

    def forward(
        self, order_prompts: torch.Tensor, tag_features: torch.Tensor, labels: torch.Tensor, with_pad: bool = True
    ) -> TagAlignmentOutput:
        """
        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            tag_features: `[tags, text width]`; tags no example of the batch has serve as negatives.
            labels: `[batch, most tags of an example]`, indices into `tag_features`, -100 where there is none.
            with_pad: whether there is a [PAD] tag. Without it prompts are compared with tags alone, and those that
                are matched to none do not count.
        """
        logits = self.similarity(order_prompts, tag_features)
        if not with_pad:
            # Equal for all prompts, [PAD] cancels out of the matching; no probability is left for it.
            assignment = match_prompts_to_tags(F.pad(logits[..., :-1], (0, 1)), labels)
            matched = assignment >= 0
            loss = F.cross_entropy(logits[..., :-1][matched].float(), assignment[matched])
            return TagAlignmentOutput(loss=loss, logits=logits, assignment=assignment)
        assignment = match_prompts_to_tags(logits, labels)
        targets = assignment.where(assignment >= 0, logits.shape[-1] - 1)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        weights = torch.where(assignment.flatten() >= 0, 1.0, self.config.no_object_weight)
        loss = (losses * weights).sum() / weights.sum().clamp(min=1e-6)
        return TagAlignmentOutput(loss=loss, logits=logits, assignment=assignment)
