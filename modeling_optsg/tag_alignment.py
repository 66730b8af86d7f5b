"""Tag alignment (training only), which matches order prompts one-to-one with tags and aligns each with its tag."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


@dataclass
class TagAlignmentOutput(ModelOutput):
    """Output of [`TagAlignment`].

    Args:
        loss: Scalar, cross-entropy of every prompt over the candidate tags and [PAD].
        logits: `[batch, num_prompts, tags + 1]`, scaled similarities. The last column is [PAD].
        assignment: `[batch, num_prompts]`, the index of the tag matched to each prompt, -1 for [PAD].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    assignment: torch.Tensor | None = None


@torch.no_grad()
def match_prompts_to_tags(similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Match the prompts of each example one-to-one to its tags, padded with [PAD] to the number of prompts.

    The Hungarian algorithm solves a problem of size n x K, in which the cost of a pair is -(similarity to the tag -
    similarity to [PAD]). The result is the same as that of padding n tags to K and solving a K x K problem.

    Args:
        similarity: `[batch, num_prompts, tags + 1]`. The last column is the similarity to [PAD].
        labels: `[batch, max tags per example]`, indices of each example's tags, -100 for padding.

    Returns:
        `[batch, num_prompts]`, int64: the index of the tag matched to each prompt, -1 for [PAD].

    Raises:
        ValueError: An example has more tags than there are prompts, or a label is out of range.
        FloatingPointError: A similarity is NaN or inf.
    """
    num_tags = similarity.shape[-1] - 1
    is_tag = labels >= 0
    if (beyond := labels[labels >= num_tags]).numel():
        raise ValueError(f"Label {beyond[0].item()} is out of range: there are {num_tags} candidate tags.")
    num_prompts, max_tags = similarity.shape[1], is_tag.sum(dim=1).max().item()
    if max_tags > num_prompts:
        raise ValueError(
            f"An example has {max_tags} tags but the model has num_prompts={num_prompts}. Sample {num_prompts} of "
            "them, as OPTSGDataCollator does, or build a model with more prompts."
        )
    gain = similarity.float() - similarity[..., -1:].float()
    gain = gain.gather(2, labels.clamp(min=0)[:, None, :].expand(-1, num_prompts, -1)).cpu().numpy()
    if not np.isfinite(gain).all():
        raise FloatingPointError("The similarities of prompts and tags contain NaN or inf.")
    labels_cpu, is_tag = labels.cpu(), is_tag.cpu()
    assignment = torch.full(similarity.shape[:2], -1, dtype=torch.long)
    for example, own_columns in enumerate(is_tag):
        columns = own_columns.nonzero().flatten()
        prompts, tags = linear_sum_assignment(gain[example][:, columns.numpy()], maximize=True)
        assignment[example, prompts] = labels_cpu[example, columns[tags]]
    return assignment.to(labels.device)


class TagAlignment(nn.Module):
    """Compares order prompts and tags in a common space, matches them, and computes the alignment loss."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.prompt_projection = nn.Linear(config.hidden_size, config.alignment_size)
        self.tag_projection = nn.Linear(config.text_config.hidden_size, config.alignment_size)
        self.pad_embedding = nn.Parameter(torch.empty(config.alignment_size))
        # One dimension, because FSDP2 cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.empty(1))

    def similarity(self, order_prompts: torch.Tensor, tag_features: torch.Tensor) -> torch.Tensor:
        """Compute scaled cosine similarities of prompts with tags and [PAD].

        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            tag_features: `[tags, text width]`, pooled text-tower features of the candidate tags.

        Returns:
            `[batch, num_prompts, tags + 1]`. The last column is [PAD].
        """
        # Other types than those of the weights, for example from a cache.
        tag_features, order_prompts = (
            values.to(layer.weight.dtype)
            for values, layer in ((tag_features, self.tag_projection), (order_prompts, self.prompt_projection))
        )
        tags = torch.cat([self.tag_projection(tag_features), self.pad_embedding[None]]).float()
        prompts = F.normalize(self.prompt_projection(order_prompts).float(), dim=-1)
        # The upper bound of CLIP. Above 100, the softmax is nearly a hard maximum.
        scale = self.logit_scale.float().clamp(max=math.log(100)).exp()
        return scale * prompts @ F.normalize(tags, dim=-1).T

    def forward(
        self, order_prompts: torch.Tensor, tag_features: torch.Tensor, labels: torch.Tensor, with_pad: bool = True
    ) -> TagAlignmentOutput:
        """Match prompts with tags and compute the alignment loss.

        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            tag_features: `[tags, text width]`. Tags that do not belong to any example of the batch are negatives.
            labels: `[batch, max tags per example]`, indices into `tag_features`, -100 for padding.
            with_pad: Whether [PAD] is a candidate. If not, prompts without a matched tag are ignored.

        Raises:
            ValueError: See [`match_prompts_to_tags`].
            FloatingPointError: See [`match_prompts_to_tags`].
        """
        logits = self.similarity(order_prompts, tag_features)
        if not with_pad:
            # A constant similarity to [PAD] does not change the matching.
            assignment = match_prompts_to_tags(F.pad(logits[..., :-1], (0, 1)), labels)
            is_matched = assignment >= 0
            loss = F.cross_entropy(logits[..., :-1][is_matched].float(), assignment[is_matched])
            return TagAlignmentOutput(loss=loss, logits=logits, assignment=assignment)
        assignment = match_prompts_to_tags(logits, labels)
        targets = assignment.where(assignment >= 0, logits.shape[-1] - 1)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        weights = torch.where(assignment.flatten() >= 0, 1.0, self.config.no_object_weight)
        loss = (losses * weights).sum() / weights.sum().clamp(min=1e-6)
        return TagAlignmentOutput(loss=loss, logits=logits, assignment=assignment)
