"""Merges and scores the candidates of one example. Needs no torch, so that exported models rank in the same way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Clamp probabilities of slots so that their logits are finite, also for tags that no slot generated.
MIN_SLOT_PROBABILITY = 1e-3


@dataclass
class ClassifierOutput:
    """Logits and candidates of the tag classifier, and how they are fused with the slots.

    Args:
        logits: `[batch, classes]`, classifier logits of the label vocabulary; a tensor, or an array of numpy.
        classes: The class of each tag of the label vocabulary, by its token ids. Novel tags have none.
        candidates: `[batch, num_candidates, max length]`, tags that are candidates whether a slot generated them or
            not, padded with [PAD].
        fusion_weights: Five numbers for each example: for a tag of the label vocabulary the weight of the slots'
            logit, the weight of the classifier logit, and the bias; for a novel tag the weight of the slots' logit,
            and the bias. With `None` the probability is that of the slots.
    """

    logits: Any
    classes: dict[tuple[int, ...], int]
    candidates: Any
    fusion_weights: Sequence[tuple[float, float, float, float, float]] | None = None

    def fuse(self, example: int, slot_probability: float, classifier_logit: float | None) -> float:
        """Fuses the slots' probability of an example's tag with its classifier logit (`None` for a novel tag)."""
        clamped = min(max(slot_probability, MIN_SLOT_PROBABILITY), 1 - MIN_SLOT_PROBABILITY)
        slot_logit = math.log(clamped / (1 - clamped))
        slot_weight, classifier_weight, bias, novel_weight, novel_bias = self.fusion_weights[example]
        if classifier_logit is None:
            logit = novel_weight * slot_logit + novel_bias
        else:
            logit = slot_weight * slot_logit + classifier_weight * classifier_logit + bias
        # The sigmoid, without overflow.
        return 0.5 * (1 + math.tanh(logit / 2))


@dataclass
class TagCandidate:
    """A tag that an example may get.

    Args:
        tag: Its token ids.
        slot: The slot that generates it with the largest probability, -1 if none does.
        log_missed: The log-probability that no slot generates the tag. Logarithms keep small probabilities that
            1 - p rounds away.
        classifier_logit: `None` for a novel tag.
        score: Its probability.
        seen_in: Slots that generate it.
    """

    tag: tuple[int, ...]
    slot: int = -1
    log_missed: float = 0.0
    classifier_logit: float | None = None
    score: float = 0.0
    seen_in: set[int] = field(default_factory=set)

    @property
    def slot_score(self) -> float:
        """The probability that at least one slot generates the tag."""
        return -math.expm1(self.log_missed)


def rank_candidates(
    tokens: list[list[int]],
    log_probs: list[float],
    num_hypotheses: int,
    pad_token_id: int,
    threshold: float,
    classifier: ClassifierOutput | None = None,
    example: int = 0,
) -> list[TagCandidate]:
    """Merge what the slots of an example generated with its classifier candidates, best first; see [`rank_tags`].

    Args:
        tokens: Token ids of the hypotheses of all slots, padded with `pad_token_id`.
        log_probs: Their log-probabilities, -inf where nothing was generated.
        num_hypotheses: Hypotheses of each slot.
        pad_token_id: Token of [PAD].
        threshold: Tags with a smaller probability are dropped.
        classifier: The tag classifier's output for a batch.
        example: Index of the example in the batch.
    """
    candidates = _merge_slots(tokens, log_probs, num_hypotheses, pad_token_id)
    if classifier is not None:
        _add_classifier_candidates(candidates, classifier, example, pad_token_id)
    return _score(list(candidates.values()), classifier, example, threshold)


def _merge_slots(
    tokens: list[list[int]], log_probs: list[float], num_hypotheses: int, pad_token_id: int
) -> dict[tuple[int, ...], TagCandidate]:
    candidates: dict[tuple[int, ...], TagCandidate] = {}
    for index in sorted(range(len(log_probs)), key=lambda index: -log_probs[index]):
        if log_probs[index] == -math.inf:
            continue
        tag, slot = _strip_padding(tokens[index], pad_token_id), index // num_hypotheses
        candidate = candidates.setdefault(tag, TagCandidate(tag, slot))
        # Sampling may draw a tag several times in one slot, which does not make it more probable.
        if slot not in candidate.seen_in:
            candidate.seen_in.add(slot)
            # Rounding may leave a probability just above 1.
            probability = min(math.exp(log_probs[index]), 1.0)
            candidate.log_missed += math.log1p(-probability) if probability < 1 else -math.inf
    return candidates


def _add_classifier_candidates(
    candidates: dict[tuple[int, ...], TagCandidate], classifier: ClassifierOutput, example: int, pad_token_id: int
) -> None:
    for row in classifier.candidates[example].tolist():
        tag = _strip_padding(row, pad_token_id)
        candidates.setdefault(tag, TagCandidate(tag))
    known = [candidate for candidate in candidates.values() if candidate.tag in classifier.classes]
    classes = [classifier.classes[candidate.tag] for candidate in known]
    for candidate, logit in zip(known, classifier.logits[example, classes].tolist(), strict=True):
        candidate.classifier_logit = logit


def _score(
    candidates: list[TagCandidate], classifier: ClassifierOutput | None, example: int, threshold: float
) -> list[TagCandidate]:
    fused = classifier is not None and classifier.fusion_weights is not None
    scores = [
        classifier.fuse(example, candidate.slot_score, candidate.classifier_logit) if fused else candidate.slot_score
        for candidate in candidates
    ]
    # Rounded to float32 as they are returned: a threshold equal to a returned score keeps its tag.
    for candidate, score in zip(candidates, np.array(scores, np.float32).tolist(), strict=True):
        candidate.score = score
    kept = [candidate for candidate in candidates if candidate.score >= threshold]
    return sorted(kept, key=lambda candidate: -candidate.score)


def _strip_padding(tokens: list[int], pad_token_id: int) -> tuple[int, ...]:
    length = len(tokens)
    while length and tokens[length - 1] == pad_token_id:
        length -= 1
    return tuple(tokens[:length])
