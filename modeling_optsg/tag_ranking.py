"""From what slots propose to an example's tags: each tag once, with one probability."""

import math
from dataclasses import dataclass

import torch

# The slots' say on a tag that none of them wrote, and the most they can be sure of: a logit needs both bounds.
MIN_SLOT_PROBABILITY = 1e-3


@dataclass
class ClassifierEvidence:
    """What the example as a whole says of tags, and how much it counts ([`TagClassifier`]).

    Args:
        logits: `[batch, classes]`, of every train tag.
        classes: which class a train tag is, by its tokens. Of other tags the example as a whole says nothing.
        num_candidates: `[batch, num_candidates, longest]`, train tags that are candidates whether a slot wrote them or not,
            filled up with `tag_pad_token_id`.
        weights: for a train tag of the slots' logit and of the example's, and the bias of their sum; for a novel one of
            the slots' logit, and the bias. `None` leaves scores to the slots.
    """

    logits: torch.Tensor
    classes: dict[tuple[int, ...], int]
    num_candidates: torch.Tensor
    weights: tuple[float, float, float, float, float] | None = None

    def score(self, probability: float, logit: float | None) -> float:
        """The probability that follows from the slots' and from the example's logit."""
        bounded = min(max(probability, MIN_SLOT_PROBABILITY), 1 - MIN_SLOT_PROBABILITY)
        slot_logit = math.log(bounded / (1 - bounded))
        slots, example, bias, novel, novel_bias = self.weights
        total = novel * slot_logit + novel_bias if logit is None else slots * slot_logit + example * logit + bias
        # The logistic function, where its exponential would not overflow.
        return 0.5 * (1 + math.tanh(total / 2))


@dataclass
class RankedTags:
    """
    Args:
        sequences, tag_scores, slots, slot_scores, classifier_logits: see [`OPTSGGenerateOutput`].
    """

    sequences: torch.Tensor
    tag_scores: torch.Tensor
    slots: torch.Tensor
    slot_scores: torch.Tensor | None = None
    classifier_logits: torch.Tensor | None = None


def rank_tags(
    tokens,
    log_probs,
    threshold: float,
    max_tags: int | None,
    pad_token_id: int,
    evidence: ClassifierEvidence | None = None,
) -> RankedTags:
    """Each example's tags by falling probability, each once.

    For the slots, a tag's probability is that at least one of them writes it, `1 - Π(1 - p)` over those that propose
    it: where the matching has not settled which of several slots a tag goes to, its probability is shared out among
    them. With `evidence` that has weights, it is weighed against what the example as a whole says, in logits.

    Args:
        tokens: `[batch, slots, hypotheses, longest]`, filled up with `pad_token_id`.
        log_probs: `[batch, slots, hypotheses]`, -inf where nothing is written.
    """
    batch, _, hypotheses, longest = tokens.shape
    if evidence is not None:
        longest = max(longest, evidence.num_candidates.shape[-1])
    kept = []
    for example, (example_tokens, example_log_probs) in enumerate(
        zip(tokens.flatten(1, 2).tolist(), log_probs.flatten(1).tolist())
    ):
        place_of, log_missed, written = {}, {}, set()
        for place in sorted(range(len(example_log_probs)), key=lambda place: -example_log_probs[place]):
            tag = _without_filler(example_tokens[place], pad_token_id)
            # Sampling may draw a tag several times in a slot, which makes it no likelier.
            if example_log_probs[place] > -math.inf and (tag, place // hypotheses) not in written:
                written.add((tag, place // hypotheses))
                place_of.setdefault(tag, place)
                # Logarithms keep the small probabilities that 1 - p would round away; rounding may leave a p past 1.
                probability = min(math.exp(example_log_probs[place]), 1.0)
                log_missed[tag] = log_missed.get(tag, 0.0) + (
                    math.log1p(-probability) if probability < 1 else -math.inf
                )
        found = [(tag, -math.expm1(log_missed[tag]), place // hypotheses) for tag, place in place_of.items()]
        if evidence is not None:
            for row in evidence.num_candidates[example].tolist():
                tag = _without_filler(row, pad_token_id)
                if tag not in place_of:
                    found.append((tag, 0.0, -1))
            known = [evidence.classes.get(tag, -1) for tag, _, _ in found]
            logits = evidence.logits[example, known].tolist() if known else []
            found = [(*entry, None if k < 0 else logit) for entry, k, logit in zip(found, known, logits)]
        weighed = evidence is not None and evidence.weights is not None
        scores = [evidence.score(entry[1], entry[3]) if weighed else entry[1] for entry in found]
        # Rounded as they are returned: a threshold equal to a returned score keeps its tag.
        scores = torch.tensor(scores).tolist()
        scored = sorted(zip(scores, found), key=lambda pair: -pair[0])
        kept.append([(score, *entry) for score, entry in scored if score >= threshold][:max_tags])
    most = max(max(map(len, kept)), 1)
    sequences = torch.full((batch, most, longest), pad_token_id)
    tag_scores, slot_scores, classifier_logits = torch.zeros(3, batch, most)
    slots = torch.full((batch, most), -1)
    for example, entries in enumerate(kept):
        for rank, (score, tag, slot_score, slot, *logit) in enumerate(entries):
            sequences[example, rank, : len(tag)] = torch.tensor(tag)
            tag_scores[example, rank], slots[example, rank], slot_scores[example, rank] = score, slot, slot_score
            classifier_logits[example, rank] = (logit and logit[0]) or 0.0
    collected = RankedTags(sequences, tag_scores, slots)
    if evidence is not None:
        collected.slot_scores, collected.classifier_logits = slot_scores, classifier_logits
    for name, value in vars(collected).items():
        setattr(collected, name, value.to(tokens.device) if value is not None else None)
    return collected


def _without_filler(tokens: list[int], pad_token_id: int) -> tuple[int, ...]:
    length = len(tokens)
    while length and tokens[length - 1] == pad_token_id:
        length -= 1
    return tuple(tokens[:length])
