"""The score bound: the prefix tree against brute force, and what generation drops by it."""

import math

import pytest
import torch
from reference_search import BATCH_SIZE, NUM_PROMPTS, make_slot_inputs, make_slot_model, tags_of

from modeling_optsg.score_bound import PrefixTree, ScoreBound
from modeling_optsg.tag_merging import ClassifierOutput

PAD, VOCAB = 0, 7
WEIGHTS = [(0.3, 0.8, -0.2, 0.9, -0.5), (0.0, 2.0, -0.7, -1.1, -13.0)]


@pytest.fixture(scope="module")
def tags():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 5, (60,), generator=generator).tolist()
    drawn = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [list(tag) for tag in dict.fromkeys(map(tuple, drawn))]


@pytest.fixture(scope="module")
def tree(tags):
    return PrefixTree(torch.tensor([tag + [PAD] * (4 - len(tag)) for tag in tags]), PAD)


def test_the_largest_logit_below_a_prefix_equals_brute_force(tags, tree):
    logits = torch.randn(2, len(tags), generator=torch.Generator().manual_seed(1))
    for length in (1, 2, 3, 4):
        prefixes = torch.cartesian_prod(*[torch.arange(1, VOCAB)] * length).view(-1, length)[:300]
        examples = torch.arange(len(prefixes)) % 2
        found = tree.max_logits(logits, examples, tree.find(prefixes))
        for prefix, example, value in zip(prefixes.tolist(), examples.tolist(), found.tolist()):
            below = [logits[example, i].item() for i, tag in enumerate(tags) if tag[:length] == prefix]
            assert value == pytest.approx(max(below, default=-math.inf))


@pytest.mark.parametrize("example", [0, 1])
def test_what_the_bound_drops_cannot_reach_the_threshold(tags, tree, example):
    """Compares with the fused score of every tag below the prefix, known and novel, at any smaller probability."""
    logits = 3 * torch.randn(2, len(tags), generator=torch.Generator().manual_seed(2))
    classifier = ClassifierOutput(logits, {tuple(tag): i for i, tag in enumerate(tags)}, torch.empty(2, 0, 1), WEIGHTS)
    prefixes, probabilities = torch.arange(1, VOCAB)[:, None], torch.tensor([0.9, 0.5, 0.1, 0.01, 0.002, 0.3])
    for threshold in (0.02, 0.2, 0.6):
        bound = ScoreBound([threshold] * 2, classifier, tree)
        kept = bound.can_reach(torch.full((len(prefixes),), example), prefixes, probabilities.log())
        for prefix, probability, is_kept in zip(prefixes[:, 0].tolist(), probabilities.tolist(), kept.tolist()):
            own = [logits[example, i].item() for i, tag in enumerate(tags) if tag[0] == prefix] + [None]
            best = max(classifier.fuse(example, p, logit) for logit in own for p in (probability, 0.0))
            assert is_kept == (best >= threshold)


def test_slots_with_the_same_prefix_count_together():
    examples, tokens = torch.tensor([0, 0, 0, 1]), torch.tensor([[3], [3], [3], [3]])
    log_probs = torch.tensor([0.4, 0.4, 0.01, 0.4]).log()
    assert ScoreBound([0.5, 0.5], None, None).can_reach(examples, tokens, log_probs).tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 3}], ids=["greedy", "beams"])
def test_generation_finds_the_tags_of_an_exact_search(make_model, settings):
    model, inputs = make_slot_model(make_model), make_slot_inputs()
    settings = {"pad_bias": -3.0, **settings}
    scores = model.generate(**inputs, **settings).tag_scores
    threshold = scores[scores > 0].median().item()
    bounded = model.generate(**inputs, **settings, threshold=threshold)
    exact = model.generate(**inputs, **settings, threshold=threshold, output_slots=True)
    assert bounded.slot_tokens is None and exact.slot_tokens is not None
    for index in range(BATCH_SIZE):
        actual, expected = tags_of(bounded, index), tags_of(exact, index)
        assert {tag for tag, _, _ in actual} == {tag for tag, _, _ in expected}
        # Without slots that hardly change a tag's probability.
        assert sum(score for *_, score in actual) == pytest.approx(sum(score for *_, score in expected), rel=0.05)


def test_hypotheses_below_the_threshold_do_not_reach_the_output_layer(make_model):
    model, inputs = make_slot_model(make_model), make_slot_inputs()
    settings = {"pad_bias": -3.0, "num_beams": 3, "num_return_sequences": 3, "threshold": 0.3}
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    model.generate(**inputs, **settings)
    bounded = rows.copy()
    rows.clear()
    # Slots are returned without a bound.
    model.generate(**inputs, **settings, output_slots=True)
    assert bounded[0] == rows[0] == BATCH_SIZE * NUM_PROMPTS
    assert sum(bounded[1:]) < 0.5 * sum(rows[1:])


def test_a_tree_without_tags_finds_none():
    tree = PrefixTree(torch.zeros(0, 4, dtype=torch.long), PAD)
    assert tree.find(torch.tensor([[3, 4], [5, 6]])).tolist() == [-1, -1]


def test_tokens_that_no_tag_has_are_not_found():
    # Token 10 of the root would have the key of token 1 below node 1.
    tree = PrefixTree(torch.tensor([[4, 1], [8, 0]]), PAD)
    assert tree.find(torch.tensor([[4], [10], [8]])).tolist()[1] == -1
