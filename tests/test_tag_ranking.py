"""The merged probability of a tag, and its fusion with the tag classifier."""

import math

import pytest
import torch

from modeling_optsg.tag_merging import MIN_SLOT_PROBABILITY, ClassifierOutput
from modeling_optsg.tag_ranking import rank_tags

PAD = 0


def test_a_tag_of_several_slots_is_listed_once():
    """Its probability is that at least one of the slots generates it."""
    tokens = torch.tensor([[[[5, 6]], [[7, 0]], [[5, 6]], [[0, 0]]]])
    log_probs = torch.tensor([[[0.2], [0.3], [0.9], [0.0]]]).log()
    ranked = rank_tags(tokens, log_probs, 0.0, None, PAD)
    assert ranked.sequences.tolist() == [[[5, 6], [7, 0]]]
    assert ranked.slots.tolist() == [[2, 1]]
    torch.testing.assert_close(ranked.tag_scores, torch.tensor([[1 - 0.1 * 0.8, 0.3]]))


def test_a_tag_sampled_twice_in_one_slot_counts_once():
    tokens, log_probs = torch.tensor([[[[5], [5]], [[5], [6]]]]), torch.tensor([[[0.2, 0.2], [0.5, 0.1]]]).log()
    ranked = rank_tags(tokens, log_probs, 0.0, None, PAD)
    assert ranked.sequences.tolist() == [[[5], [6]]] and ranked.slots.tolist() == [[1, 1]]
    torch.testing.assert_close(ranked.tag_scores, torch.tensor([[1 - 0.8 * 0.5, 0.1]]))


def test_a_tag_is_listed_even_if_its_probability_underflows():
    ranked = rank_tags(torch.tensor([[[[5]], [[6]]]]), torch.tensor([[[-300.0], [-200.0]]]), 0.0, None, PAD)
    assert ranked.sequences.tolist() == [[[6], [5]]]
    assert ranked.slots.tolist() == [[1, 0]]
    assert ranked.tag_scores.tolist() == [[0, 0]]


def test_slots_and_classifier_are_fused_in_logits():
    tokens = torch.tensor([[[[5, 6]], [[7, 0]], [[5, 6]], [[0, 0]]]])
    log_probs = torch.tensor([[[0.2], [0.3], [0.9], [0.0]]]).log()
    classifier = ClassifierOutput(
        logits=torch.tensor([[2.0, 3.0, -4.0]]),
        classes={(5, 6): 0, (9, 4, 8): 1, (3,): 2},
        candidates=torch.tensor([[[5, 6, 0], [9, 4, 8]]]),
        fusion_weights=[(0.5, 2.0, -1.0, 1.5, -0.5)],
    )
    ranked = rank_tags(tokens, log_probs, 0.0, None, PAD, classifier)

    def fused(probability, classifier_logit):
        probability = max(probability, MIN_SLOT_PROBABILITY)
        slot_logit = math.log(probability / (1 - probability))
        # A novel tag has no classifier logit.
        is_novel = classifier_logit is None
        logit = 1.5 * slot_logit - 0.5 if is_novel else 0.5 * slot_logit + 2 * classifier_logit - 1
        return 1 / (1 + math.exp(-logit))

    scores = {(9, 4, 8): fused(0, 3.0), (5, 6): fused(0.92, 2.0), (7,): fused(0.3, None)}
    expected = sorted(scores, key=lambda tag: -scores[tag])
    assert [tuple(t for t in row if t != PAD) for row in ranked.sequences[0].tolist()] == expected
    torch.testing.assert_close(ranked.tag_scores[0], torch.tensor([scores[tag] for tag in expected]))
    columns = (ranked.slots[0].tolist(), ranked.slot_scores[0].tolist(), ranked.classifier_logits[0].tolist())
    by_tag = dict(zip(expected, zip(*columns)))
    assert by_tag[9, 4, 8] == (-1, 0.0, 3.0)
    assert by_tag[7,] == pytest.approx((1, 0.3, 0.0))
    assert by_tag[5, 6] == pytest.approx((2, 0.92, 2.0))
