"""Ranks the candidates of an example: each tag once, with one probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# Clamp probabilities of slots so that their logits are finite, also for tags that no slot generated.
MIN_SLOT_PROBABILITY = 1e-3


@dataclass
class ClassifierOutput:
    """Logits and candidates of the tag classifier, and how they are fused with the slots.

    Args:
        logits: `[batch, classes]`, classifier logits of the label vocabulary.
        classes: The class of each tag of the label vocabulary, by its token ids. Novel tags have none.
        candidates: `[batch, num_candidates, max length]`, tags that are candidates whether a slot generated them or
            not, padded with [PAD].
        fusion_weights: Five numbers for each example: for a tag of the label vocabulary the weight of the slots'
            logit, the weight of the classifier logit, and the bias; for a novel tag the weight of the slots' logit,
            and the bias. With `None` the probability is that of the slots.
    """

    logits: torch.Tensor
    classes: dict[tuple[int, ...], int]
    candidates: torch.Tensor
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


@dataclass
class _Candidate:
    tag: tuple[int, ...]
    slot: int = -1
    # The log-probability that no slot generates the tag. Logarithms keep small probabilities that 1 - p rounds away.
    log_missed: float = 0.0
    classifier_logit: float | None = None
    score: float = 0.0
    seen_in: set[int] = field(default_factory=set)

    @property
    def slot_score(self) -> float:
        return -math.expm1(self.log_missed)


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
        candidates = _merge_slots(example_tokens, example_log_probs, num_hypotheses, pad_token_id)
        if classifier is not None:
            _add_classifier_candidates(candidates, classifier, example, pad_token_id)
        ranked.append(_score(list(candidates.values()), classifier, example, thresholds[example])[: limits[example]])
    return _to_tensors(ranked, max_length, pad_token_id, classifier is not None, tokens.device)


def _merge_slots(
    tokens: list[list[int]], log_probs: list[float], num_hypotheses: int, pad_token_id: int
) -> dict[tuple[int, ...], _Candidate]:
    candidates: dict[tuple[int, ...], _Candidate] = {}
    for index in sorted(range(len(log_probs)), key=lambda index: -log_probs[index]):
        if log_probs[index] == -math.inf:
            continue
        tag, slot = _strip_padding(tokens[index], pad_token_id), index // num_hypotheses
        candidate = candidates.setdefault(tag, _Candidate(tag, slot))
        # Sampling may draw a tag several times in one slot, which does not make it more probable.
        if slot not in candidate.seen_in:
            candidate.seen_in.add(slot)
            # Rounding may leave a probability just above 1.
            probability = min(math.exp(log_probs[index]), 1.0)
            candidate.log_missed += math.log1p(-probability) if probability < 1 else -math.inf
    return candidates


def _add_classifier_candidates(
    candidates: dict[tuple[int, ...], _Candidate], classifier: ClassifierOutput, example: int, pad_token_id: int
) -> None:
    for row in classifier.candidates[example].tolist():
        tag = _strip_padding(row, pad_token_id)
        candidates.setdefault(tag, _Candidate(tag))
    known = [candidate for candidate in candidates.values() if candidate.tag in classifier.classes]
    classes = [classifier.classes[candidate.tag] for candidate in known]
    for candidate, logit in zip(known, classifier.logits[example, classes].tolist(), strict=True):
        candidate.classifier_logit = logit


def _score(
    candidates: list[_Candidate], classifier: ClassifierOutput | None, example: int, threshold: float
) -> list[_Candidate]:
    fused = classifier is not None and classifier.fusion_weights is not None
    scores = [
        classifier.fuse(example, candidate.slot_score, candidate.classifier_logit) if fused else candidate.slot_score
        for candidate in candidates
    ]
    # Rounded to float32 as they are returned: a threshold equal to a returned score keeps its tag.
    for candidate, score in zip(candidates, torch.tensor(scores).tolist(), strict=True):
        candidate.score = score
    kept = [candidate for candidate in candidates if candidate.score >= threshold]
    return sorted(kept, key=lambda candidate: -candidate.score)


def _to_tensors(
    ranked: list[list[_Candidate]], max_length: int, pad_token_id: int, with_classifier: bool, device: torch.device
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


def _strip_padding(tokens: list[int], pad_token_id: int) -> tuple[int, ...]:
    length = len(tokens)
    while length and tokens[length - 1] == pad_token_id:
        length -= 1
    return tuple(tokens[:length])
