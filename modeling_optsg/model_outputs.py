"""Outputs of the OP-TSG models."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .multimodal_encoder import MemoryLayout
from .tag_evidence import TagEvidence


@dataclass
class OPTSGModelOutput(ModelOutput):
    """Output of [`OPTSGModel`].

    Args:
        order_prompts: `[batch, num_prompts, hidden_size]`.
        memory: `[batch, memory length, hidden_size]`, the fused tokens of frames and title.
        memory_mask: Boolean `[batch, memory length]`, true for real tokens.
        prompt_pooler_output: `[batch, hidden_size]`, the pooled representation that is added to the prompts' queries.
            Returned with `use_prompt_pooler`.
        evidence: Input of the tag classifier. Returned by models with a tag classifier.
        image_words: `[batch, words]`, indices of the most probable image words. Returned for `pixel_values` by models
            with image words.
        image_word_scores: `[batch, words]`, their probabilities.
        prompt_attentions: `[batch, heads, num_prompts, memory length]` for each layer of the prompt encoder. Returned
            with `output_attentions` or eager attention. Rows sum to 1 and are 0 at padding.
        memory_layout: What each position of the memory represents. Returned with `output_attentions`.
    """

    order_prompts: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    prompt_pooler_output: torch.Tensor | None = None
    evidence: TagEvidence | None = None
    image_words: torch.Tensor | None = None
    image_word_scores: torch.Tensor | None = None
    prompt_attentions: tuple[torch.Tensor, ...] | None = None
    memory_layout: MemoryLayout | None = None


@dataclass
class OPTSGOutput(ModelOutput):
    """Output of [`OPTSGForTagGeneration`]. All fields except `order_prompts` are returned only with `labels`.

    Args:
        loss: Scalar, `generation_loss + alignment_loss_weight * alignment_loss + classifier_loss_weight *
            classifier_loss`.
        logits: `[positions, tag_vocab_size]`, over the real positions, with the slots of each example concatenated in
            prompt order. In training with `num_sampled_tokens`, only the columns of `logit_tokens` are returned.
        generation_loss: Scalar, mean cross-entropy of the tokens, including [PAD] and [SEP].
        alignment_loss: Scalar, cross-entropy of the prompts over the candidate tags and [PAD].
        classifier_loss: Scalar, asymmetric loss over the label vocabulary. Returned by models with a tag classifier
            that is not frozen.
        assignment: `[batch, num_prompts]`, which of the example's own tags is matched to each prompt, -1 for [PAD].
        targets: `[positions]`, the tokens that `logits` should predict.
        logit_tokens: `[columns]`, the tokens of the columns of `logits`. Returned if `logits` lacks some tokens.
        order_prompts: `[batch, num_prompts, hidden_size]`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    classifier_loss: torch.Tensor | None = None
    assignment: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    logit_tokens: torch.Tensor | None = None
    order_prompts: torch.Tensor | None = None
