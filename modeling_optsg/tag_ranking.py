"""From what slots propose to an item's tags: each tag once, with one probability."""

import math
from dataclasses import dataclass

import torch

# The slots' say on a tag that none of them wrote, and the most they can be sure of: a logit needs both bounds.
SLOT_FLOOR = 1e-3


@dataclass
class SetEvidence:
    """What the item as a whole says of tags, and how much it counts ([`SetAlignment`]).

    Args:
        logits: `[batch, classes]`, of every train tag.
        classes: which class a train tag is, by its tokens. Of other tags the item as a whole says nothing.
        proposals: `[batch, proposals, longest]`, train tags that are candidates whether a slot wrote them or not,
            filled up with `tag_pad_token_id`.
        weights: for a train tag of the slots' logit and of the item's, and the bias of their sum; for a novel one of
            the slots' logit, and the bias. `None` leaves scores to the slots.
    """

    logits: torch.Tensor
    classes: dict[tuple[int, ...], int]
    proposals: torch.Tensor
    weights: tuple[float, float, float, float, float] | None = None

    def score(self, probability: float, logit: float | None) -> float:
        """The probability that follows from the slots' and from the item's logit."""
        bounded = min(max(probability, SLOT_FLOOR), 1 - SLOT_FLOOR)
        slot_logit = math.log(bounded / (1 - bounded))
        slots, item, bias, novel, novel_bias = self.weights
        total = novel * slot_logit + novel_bias if logit is None else slots * slot_logit + item * logit + bias
        # The logistic function, where its exponential would not overflow.
        return 0.5 * (1 + math.tanh(total / 2))


@dataclass
class CollectedTags:
    """
    Args:
        sequences, tag_scores, slots, slot_scores, set_logits: see [`OPTSGGenerateOutput`].
    """

    sequences: torch.Tensor
    tag_scores: torch.Tensor
    slots: torch.Tensor
    slot_scores: torch.Tensor | None = None
    set_logits: torch.Tensor | None = None


def collect_tags(
    tokens, log_probs, threshold: float, max_tags: int | None, pad_token_id: int, evidence: SetEvidence | None = None
) -> CollectedTags:
    """Each item's tags by falling probability, each once.

    For the slots, a tag's probability is that at least one of them writes it, `1 - Π(1 - p)` over those that propose
    it: where the matching has not settled which of several slots a tag goes to, its probability is shared out among
    them. With `evidence` that has weights, it is weighed against what the item as a whole says, in logits.

    Args:
        tokens: `[batch, slots, hypotheses, longest]`, filled up with `pad_token_id`.
        log_probs: `[batch, slots, hypotheses]`, -inf where nothing is written.
    """
    batch, _, hypotheses, longest = tokens.shape
    if evidence is not None:
        longest = max(longest, evidence.proposals.shape[-1])
    kept = []
    for item, (item_tokens, item_log_probs) in enumerate(
        zip(tokens.flatten(1, 2).tolist(), log_probs.flatten(1).tolist())
    ):
        place_of, log_missed, written = {}, {}, set()
        for place in sorted(range(len(item_log_probs)), key=lambda place: -item_log_probs[place]):
            tag = _without_filler(item_tokens[place], pad_token_id)
            # Sampling may draw a tag several times in a slot, which makes it no likelier.
            if item_log_probs[place] > -math.inf and (tag, place // hypotheses) not in written:
                written.add((tag, place // hypotheses))
                place_of.setdefault(tag, place)
                # Logarithms keep the small probabilities that 1 - p would round away; rounding may leave a p past 1.
                probability = min(math.exp(item_log_probs[place]), 1.0)
                log_missed[tag] = log_missed.get(tag, 0.0) + (
                    math.log1p(-probability) if probability < 1 else -math.inf
                )
        found = [(tag, -math.expm1(log_missed[tag]), place // hypotheses) for tag, place in place_of.items()]
        if evidence is not None:
            for row in evidence.proposals[item].tolist():
                tag = _without_filler(row, pad_token_id)
                if tag not in place_of:
                    found.append((tag, 0.0, -1))
            known = [evidence.classes.get(tag, -1) for tag, _, _ in found]
            logits = evidence.logits[item, known].tolist() if known else []
            found = [(*entry, None if k < 0 else logit) for entry, k, logit in zip(found, known, logits)]
        weighed = evidence is not None and evidence.weights is not None
        scores = [evidence.score(entry[1], entry[3]) if weighed else entry[1] for entry in found]
        # Rounded as they are returned: a threshold equal to a returned score keeps its tag.
        scores = torch.tensor(scores).tolist()
        scored = sorted(zip(scores, found), key=lambda pair: -pair[0])
        kept.append([(score, *entry) for score, entry in scored if score >= threshold][:max_tags])
    most = max(max(map(len, kept)), 1)
    sequences = torch.full((batch, most, longest), pad_token_id)
    tag_scores, slot_scores, set_logits = torch.zeros(3, batch, most)
    slots = torch.full((batch, most), -1)
    for item, entries in enumerate(kept):
        for rank, (score, tag, slot_score, slot, *logit) in enumerate(entries):
            sequences[item, rank, : len(tag)] = torch.tensor(tag)
            tag_scores[item, rank], slots[item, rank], slot_scores[item, rank] = score, slot, slot_score
            set_logits[item, rank] = (logit and logit[0]) or 0.0
    collected = CollectedTags(sequences, tag_scores, slots)
    if evidence is not None:
        collected.slot_scores, collected.set_logits = slot_scores, set_logits
    for name, value in vars(collected).items():
        setattr(collected, name, value.to(tokens.device) if value is not None else None)
    return collected


def _without_filler(tokens: list[int], pad_token_id: int) -> tuple[int, ...]:
    length = len(tokens)
    while length and tokens[length - 1] == pad_token_id:
        length -= 1
    return tuple(tokens[:length])
