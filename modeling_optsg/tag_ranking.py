"""Ranks the candidates of an example: each tag once, with one probability."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tag_merging import ClassifierOutput, TagCandidate, rank_candidates


@dataclass
class RankedTags:
    """The tags of a batch, best first.

    Args:
        sequences: See [`OPTSGGenerateOutput`].
        tag_scores: See [`OPTSGGenerateOutput`].
        slots: See [`OPTSGGenerateOutput`].
        slot_scores: See [`OPTSGGenerateOutput`].
        classifier_logits: See [`OPTSGGenerateOutput`].
    """

    sequences: torch.Tensor
    tag_scores: torch.Tensor
    slots: torch.Tensor
    slot_scores: torch.Tensor | None = None
    classifier_logits: torch.Tensor | None = None


def rank_tags(
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    threshold: float | Sequence[float],
    max_tags: int | None | Sequence[int | None],
    pad_token_id: int,
    classifier: ClassifierOutput | None = None,
) -> RankedTags:
    """Merge the tags of the slots and the classifier candidates, and rank them.

    The slots' probability of a tag is that at least one of them generates it, `1 - Π(1 - p)`. Where the matching has
    not settled which of several slots gets a tag, the tag's probability is divided among them, and this adds it up.
    With fusion weights it is fused with the classifier logit.

    Args:
        tokens: `[batch, slots, hypotheses, max length]`, padded with `pad_token_id`.
        log_probs: `[batch, slots, hypotheses]`, -inf where nothing was generated.
        threshold: Tags with a smaller probability are dropped; one number, or one for each example.
        max_tags: Maximum number of tags; one number, or one for each example. `None` for no limit.
        pad_token_id: Token of [PAD].
        classifier: The tag classifier's output.
    """
    num_hypotheses, max_length = tokens.shape[2:]
    if classifier is not None:
        max_length = max(max_length, classifier.candidates.shape[-1])
    thresholds = [threshold] * len(tokens) if isinstance(threshold, float) else threshold
    limits = max_tags if isinstance(max_tags, Sequence) else [max_tags] * len(tokens)
    ranked = []
    rows = zip(tokens.flatten(1, 2).tolist(), log_probs.flatten(1).tolist(), strict=True)
    for example, (example_tokens, example_log_probs) in enumerate(rows):
        candidates = rank_candidates(
            example_tokens,
            example_log_probs,
            num_hypotheses,
            pad_token_id,
            thresholds[example],
            classifier,
            example,
        )
        ranked.append(candidates[: limits[example]])
    return _to_tensors(ranked, max_length, pad_token_id, classifier is not None, tokens.device)


def _to_tensors(
    ranked: list[list[TagCandidate]], max_length: int, pad_token_id: int, with_classifier: bool, device: torch.device
) -> RankedTags:
    shape = (len(ranked), max(max(map(len, ranked)), 1))
    sequences = torch.full((*shape, max_length), pad_token_id)
    tag_scores, slot_scores, classifier_logits = torch.zeros(3, *shape)
    slots = torch.full(shape, -1)
    for example, candidates in enumerate(ranked):
        if not candidates:
            continue
        # One tensor per example: one per tag takes several times as long.
        end = len(candidates)
        padded = [candidate.tag + (pad_token_id,) * (max_length - len(candidate.tag)) for candidate in candidates]
        sequences[example, :end] = torch.tensor(padded)
        tag_scores[example, :end] = torch.tensor([candidate.score for candidate in candidates])
        slots[example, :end] = torch.tensor([candidate.slot for candidate in candidates])
        slot_scores[example, :end] = torch.tensor([candidate.slot_score for candidate in candidates])
        logits = [candidate.classifier_logit or 0.0 for candidate in candidates]
        classifier_logits[example, :end] = torch.tensor(logits)
    tensors = {"sequences": sequences, "tag_scores": tag_scores, "slots": slots}
    if with_classifier:
        tensors |= {"slot_scores": slot_scores, "classifier_logits": classifier_logits}
    return RankedTags(**{name: tensor.to(device) for name, tensor in tensors.items()})
