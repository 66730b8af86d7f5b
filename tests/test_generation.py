"""`generate` against a search written out plainly: no caches, no batches, one hypothesis at a time."""

import itertools
import json
import math
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from modeling_optsg import OPTSGForTagGeneration, TagVocabularyLogitsProcessor
from modeling_optsg import generation_optsg as tag_generation
from modeling_optsg.tag_decoder import SlotRows, SlotSequence
from modeling_optsg.tag_ranking import rank_tags

PAD, SEP = 0, 1
VOCABULARY = 12
NUM_PROMPTS, MAX_TAG_TOKENS = 5, 4
BOTH = pytest.mark.parametrize("decoding", ["parallel", "sequential"])


@pytest.fixture(scope="module")
def model(make_model):
    """Writes short and long tags and leaves slots empty."""
    model = make_model(
        None,
        seed=7,
        frame_feature_size=6,
        num_prompts=NUM_PROMPTS,
        max_tag_tokens=MAX_TAG_TOKENS,
        tag_vocab_size=VOCABULARY,
        # Tied, an untrained model repeats its first token.
        tie_word_embeddings=False,
        use_prompt_pooler=False,
        use_tag_classifier=False,
    )
    with torch.no_grad():
        model.lm_head.bias.normal_(std=0.5)
        model.lm_head.bias[[PAD, SEP]] += 1.0
    return model


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    return {"frame_features": 3 * torch.randn(4, 3, 6), "frame_mask": mask}


def example(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


# The search written out


class SlowWriter:
    """One example's next-token logits, from the whole of what has been written, with nothing kept between calls."""

    def __init__(self, model, inputs):
        self.model = model
        with torch.no_grad():
            self.encoded = model.model(**inputs)

    @torch.no_grad()
    def logits(self, context, slot, prefix):
        """Of the token after `prefix` in `slot`, seeing the `(slot, tag)` of `context`, empty where [PAD] won."""
        positions = [(s, p, t) for s, tag in [*context, (slot, prefix)] for p, t in enumerate([PAD, *tag])]
        slots, places, tokens = (torch.tensor([column]) for column in zip(*positions))
        sequence = SlotSequence(tokens, torch.full_like(tokens, -100), slots, places, torch.ones_like(slots).bool())
        encoded = self.encoded
        hidden_states = self.model.tag_decoder(
            encoded.order_prompts, sequence, torch.tensor([False]), encoded.memory, encoded.memory_mask
        )
        return self.model.lm_head(hidden_states[0, -1]).float()

    def step(self, context, slot, prefix, pad_bias=0.0, process=None):
        """The model's own log-probabilities and the scores to choose by."""
        logits = self.logits(context, slot, prefix)
        own = logits.log_softmax(-1)
        if len(prefix) == MAX_TAG_TOKENS:
            return own, torch.where(torch.arange(len(logits)) == SEP, logits, -torch.inf)
        logits[SEP if not prefix else PAD] = -torch.inf
        if not prefix:
            logits[PAD] += pad_bias
        if process is not None:
            logits = process(torch.tensor([prefix], dtype=torch.long), logits[None])[0]
        return own, logits


@dataclass
class Hypothesis:
    tag: tuple = ()
    log_prob: float = 0.0
    ranking: float = 0.0
    finished: bool = False

    def __lt__(self, other):
        return self.ranking < other.ranking


def search_slot(writer, context, slot, num_beams=1, length_penalty=0.0, **settings):
    """Hypotheses of a slot, best first; none where [PAD] wins."""
    own, scores = writer.step(context, slot, (), **settings)
    if scores.argmax() == PAD:
        return []
    scores[PAD] = -torch.inf
    ranking = scores.log_softmax(-1)
    beam = [Hypothesis((t,), own[t].item(), ranking[t].item()) for t in range(len(scores)) if ranking[t] > -torch.inf]

    def worth(hypothesis):
        return hypothesis.ranking / len(hypothesis.tag) ** length_penalty

    beam = sorted(beam, key=worth, reverse=True)[:num_beams]
    while not all(hypothesis.finished for hypothesis in beam):
        candidates = [h for h in beam if h.finished]
        for h in beam:
            if h.finished:
                continue
            own, scores = writer.step(context, slot, h.tag, **settings)
            if scores.max() == -torch.inf:
                continue
            ranking = scores.log_softmax(-1)
            for token in (ranking > -torch.inf).nonzero().flatten().tolist():
                tag = h.tag if token == SEP else (*h.tag, token)
                candidates.append(
                    Hypothesis(tag, h.log_prob + own[token].item(), h.ranking + ranking[token].item(), token == SEP)
                )
        beam = sorted(candidates, key=worth, reverse=True)[:num_beams]
    return beam


def write_slowly(model, inputs, decoding, keep=1, **settings):
    """Every `(slot, tag, log-probability)` of one example, before anything is merged or left out."""
    writer, context, written = SlowWriter(model, inputs), [], []
    for slot in range(model.config.num_prompts):
        found = search_slot(writer, context if decoding == "sequential" else [], slot, **settings)
        written += [(slot, h.tag, h.log_prob) for h in found[:keep]]
        context.append((slot, found[0].tag if found else ()))
    return written


def merged(written):
    """Tags by falling probability of being written by at least one slot, each once, with its likeliest slot."""
    best, missed = {}, {}
    for slot, tag, log_prob in sorted(written, key=lambda row: -row[2]):
        best.setdefault(tag, slot)
        missed[tag] = missed.get(tag, 1.0) * (1.0 - math.exp(log_prob))
    return sorted(((tag, slot, 1.0 - missed[tag]) for tag, slot in best.items()), key=lambda row: -row[2])


def tags_of(outputs, index):
    """`(tag, slot, score)` of an example."""
    rows = zip(outputs.sequences[index].tolist(), outputs.slots[index].tolist(), outputs.tag_scores[index].tolist())
    return [(tuple(t for t in tokens if t != PAD), slot, score) for tokens, slot, score in rows if slot >= 0]


def assert_same_tags(found, expected):
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    torch.testing.assert_close(
        torch.tensor([row[2] for row in found]), torch.tensor([row[2] for row in expected]), rtol=2e-4, atol=0
    )


@pytest.fixture
def written(monkeypatch):
    """What the last `generate` call wrote in every slot, before tags were merged: tokens and log-probabilities."""
    caught = {}

    def catch(tokens, log_probs, *args):
        caught.update(tokens=tokens, log_probs=log_probs)
        return rank_tags(tokens, log_probs, *args)

    monkeypatch.setattr(tag_generation, "rank_tags", catch)
    return caught


# Search


@BOTH
@pytest.mark.parametrize("pad_bias", [0.0, -2.0, 2.0])
def test_greedy_decoding_equals_the_slow_search_token_for_token(model, inputs, decoding, pad_bias):
    outputs = model.generate(**inputs, decoding=decoding, pad_bias=pad_bias)
    for index in range(4):
        expected = merged(write_slowly(model, example(inputs, index), decoding, pad_bias=pad_bias))
        assert_same_tags(tags_of(outputs, index), expected)


@BOTH
@pytest.mark.parametrize("length_penalty", [None, 1.0, -0.5])
def test_beam_search_equals_the_slow_search_token_for_token(model, inputs, decoding, length_penalty):
    """Finished hypotheses stay in the beam; it is ranked by summed log-probabilities over length^length_penalty."""
    outputs = model.generate(
        **inputs, decoding=decoding, num_beams=3, num_return_sequences=2, length_penalty=length_penalty
    )
    for index in range(4):
        expected = write_slowly(
            model, example(inputs, index), decoding, keep=2, num_beams=3, length_penalty=length_penalty or 0.0
        )
        assert_same_tags(tags_of(outputs, index), merged(expected))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 3}], ids=["greedy", "beams"])
def test_one_pass_shows_what_every_pad_bias_would_give(model, inputs, settings):
    widest = model.generate(**inputs, decoding="parallel", pad_bias=-3.0, output_slots=True, **settings)
    counts = set()
    for pad_bias in (-3.0, -1.0, -0.2, 0.0, 0.3, 1.0, 9.0):
        expected = model.generate(**inputs, decoding="parallel", pad_bias=pad_bias, threshold=0.0, **settings)
        found = widest.at_pad_bias(pad_bias, PAD)
        counts.add(int((expected.tag_scores > 0).sum()))
        assert torch.equal(found.tag_scores, expected.tag_scores) and torch.equal(found.slots, expected.slots)
        for index in range(4):
            assert tags_of(found, index) == tags_of(expected, index)
    assert len(counts) > 3, "the biases make a difference"


def test_the_examples_cover_empty_slots_and_tags_of_every_length(model, inputs):
    for decoding in ("parallel", "sequential"):
        rows = [write_slowly(model, example(inputs, index), decoding) for index in range(4)]
        counts = [len(row) for row in rows]
        assert len(set(counts)) > 1 and min(counts) < NUM_PROMPTS
        assert {len(tag) for row in rows for _, tag, _ in row} >= {1, 2, MAX_TAG_TOKENS}


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 2.0},
        {"do_sample": True, "num_return_sequences": 3, "pad_bias": 1.0},
    ],
)
def test_a_score_is_the_models_own_probability_of_the_tag_in_its_slot(model, inputs, decoding, settings, written):
    """Before pad_bias, processors and temperature, [SEP] included; what later slots see is each slot's first tag."""
    torch.manual_seed(0)
    settings = {"bad_words_ids": [[5]], "pad_bias": -1.0, "decoding": decoding} | settings
    model.generate(**inputs, **settings)
    for index in range(4):
        writer, context = SlowWriter(model, example(inputs, index)), []
        for slot in range(NUM_PROMPTS):
            rows = zip(written["tokens"][index, slot].tolist(), written["log_probs"][index, slot].tolist())
            tags = [(tuple(t for t in tokens if t != PAD), log_prob) for tokens, log_prob in rows]
            for tag, log_prob in tags:
                if not tag:
                    assert log_prob == -math.inf
                    continue
                seen = context if decoding == "sequential" else []
                own = [writer.logits(seen, slot, tag[:n]).log_softmax(-1)[t].item() for n, t in enumerate([*tag, SEP])]
                assert log_prob == pytest.approx(sum(own), abs=1e-4)
            context.append((slot, tags[0][0]))


@BOTH
def test_forward_gives_the_tags_of_a_matching_the_same_probabilities(model, inputs, decoding):
    """The training logits, read slot by slot, are those of the slow writer on the same tags."""
    torch.manual_seed(2)
    lengths = torch.tensor([1, 4, 2, 3, 1, 2])
    tokens = torch.randint(2, VOCABULARY, (6, MAX_TAG_TOKENS))
    labels = torch.tensor([[0, 1, 2], [3, 4, -100], [-100, 5, -100], [0, 4, 1]])
    with torch.no_grad():
        outputs = model(
            **inputs,
            tag_input_ids=tokens,
            tag_lengths=lengths,
            tag_features=torch.randn(6, 16),
            labels=labels,
            decoding=decoding,
        )
    log_probs, targets = outputs.logits.log_softmax(-1), outputs.targets.tolist()
    position = 0
    for index in range(4):
        writer, context = SlowWriter(model, example(inputs, index)), []
        for slot, label in enumerate(outputs.assignment[index].tolist()):
            tag = () if label < 0 else tuple(tokens[label, : lengths[label]].tolist())
            for place, target in enumerate([*tag, SEP] if tag else [PAD]):
                assert targets[position] == target
                own = writer.logits(context if decoding == "sequential" else [], slot, tag[:place]).log_softmax(-1)
                torch.testing.assert_close(log_probs[position], own, rtol=1e-4, atol=1e-5)
                position += 1
            context.append((slot, tag))
    assert position == len(targets)
    torch.testing.assert_close(
        outputs.generation_loss, torch.nn.functional.cross_entropy(outputs.logits, outputs.targets)
    )


# Sampling


@BOTH
def test_sampling_is_reproducible_under_a_seed(model, inputs, decoding):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, decoding=decoding, do_sample=True, num_return_sequences=3)

    first, second, other = sample(0), sample(0), sample(1)
    assert torch.equal(first.sequences, second.sequences) and torch.equal(first.tag_scores, second.tag_scores)
    assert first.sequences.shape != other.sequences.shape or not torch.equal(first.sequences, other.sequences)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 2}, {"pad_bias": -2.0}])
def test_samples_follow_the_processed_distribution(model, inputs, settings, written):
    """Of the first two tokens; the slot ends where [PAD] or [SEP] is drawn."""
    draws, slot = 4000, 3
    writer = SlowWriter(model, example(inputs, 0))

    def distribution(prefix):
        _, scores = writer.step([], slot, prefix, settings.get("pad_bias", 0.0))
        if "top_k" in settings:
            scores[scores < scores.topk(settings["top_k"]).values[-1]] = -torch.inf
        return (scores / settings.get("temperature", 1.0)).softmax(-1)

    expected = torch.zeros(VOCABULARY, VOCABULARY)
    first = distribution(())
    expected[PAD, PAD] = first[PAD]
    for token in range(2, VOCABULARY):
        second = distribution((token,))
        expected[token] = first[token] * second
        # [SEP] is not among a tag's tokens: its place is filled with [PAD].
        expected[token, [PAD, SEP]] = expected[token, [SEP, PAD]]

    torch.manual_seed(0)
    model.generate(**example(inputs, 0), do_sample=True, num_return_sequences=draws, **({"top_k": 0} | settings))
    drawn = torch.zeros(VOCABULARY, VOCABULARY)
    for tokens in written["tokens"][0, slot, :, :2].tolist():
        drawn[tuple(tokens)] += 1
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    assert not drawn[expected == 0].any()
    expected = draws * expected
    frequent = expected >= 5
    drawn, expected = (torch.cat([x[frequent], x[~frequent].sum()[None]]) for x in (drawn, expected))
    chi_square, freedom = ((drawn - expected) ** 2 / expected.clamp(min=1)).sum().item(), len(drawn) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_alternatives_that_are_pad_are_left_out_and_the_others_kept(model, inputs, written):
    torch.manual_seed(0)
    for decoding in ("parallel", "sequential"):
        model.generate(**inputs, decoding=decoding, do_sample=True, num_return_sequences=6)
        empty = (written["tokens"] == PAD).all(-1)
        assert (empty.any(-1) & ~empty.all(-1)).any(), "some slots have both"
        assert torch.equal(empty, written["log_probs"] == -torch.inf)


# What is kept


def test_threshold_and_max_tags_keep_the_most_probable(model, inputs):
    everything = model.generate(**inputs, pad_bias=-3.0)
    scores = everything.tag_scores
    threshold = scores[scores > 0].median().item()
    outputs = model.generate(**inputs, pad_bias=-3.0, threshold=threshold, max_tags=2)
    for index in range(4):
        expected = [row for row in tags_of(everything, index) if row[2] >= threshold][:2]
        assert tags_of(outputs, index) == expected
    assert outputs.sequences.shape[1] == 2


def test_a_tag_of_several_slots_is_listed_once_with_the_probability_that_one_of_them_writes_it():
    tokens = torch.tensor([[[[5, 6]], [[7, 0]], [[5, 6]], [[0, 0]]]])
    log_probs = torch.tensor([[[0.2], [0.3], [0.9], [0.0]]]).log()
    found = rank_tags(tokens, log_probs, 0.0, None, PAD)
    assert found.sequences.tolist() == [[[5, 6], [7, 0]]]
    assert found.slots.tolist() == [[2, 1]]
    torch.testing.assert_close(found.tag_scores, torch.tensor([[1 - 0.1 * 0.8, 0.3]]))


def test_a_tag_drawn_twice_in_one_slot_counts_once():
    tokens, log_probs = torch.tensor([[[[5], [5]], [[5], [6]]]]), torch.tensor([[[0.2, 0.2], [0.5, 0.1]]]).log()
    found = rank_tags(tokens, log_probs, 0.0, None, PAD)
    assert found.sequences.tolist() == [[[5], [6]]] and found.slots.tolist() == [[1, 1]]
    torch.testing.assert_close(found.tag_scores, torch.tensor([[1 - 0.8 * 0.5, 0.1]]))


def test_a_tag_whose_probability_is_below_the_smallest_float_is_still_listed():
    found = rank_tags(torch.tensor([[[[5]], [[6]]]]), torch.tensor([[[-300.0], [-200.0]]]), 0.0, None, 0)
    assert found.sequences.tolist() == [[[6], [5]]]
    assert found.slots.tolist() == [[1, 0]]
    assert found.tag_scores.tolist() == [[0, 0]]


@BOTH
def test_no_tag_at_all_is_an_empty_output(model, inputs, decoding):
    for settings in ({"pad_bias": 99.0}, {"threshold": 1.0}):
        outputs = model.generate(**inputs, decoding=decoding, **settings)
        assert outputs.sequences.eq(PAD).all() and outputs.slots.eq(-1).all() and outputs.tag_scores.eq(0).all()
        assert outputs.sequences.shape[:2] == outputs.slots.shape == outputs.tag_scores.shape == (4, 1)


def test_a_slot_is_written_where_its_margin_over_pad_exceeds_pad_bias(model, inputs, written):
    margins = model.generate(**inputs).pad_margins
    for pad_bias in (-1.0, 0.0, margins.median().item() + 1e-3):
        outputs = model.generate(**inputs, pad_bias=pad_bias)
        assert torch.equal(outputs.pad_margins, margins)
        assert torch.equal(written["tokens"][:, :, 0].ne(PAD).any(-1), margins > pad_bias)


@BOTH
def test_the_longest_tag_is_ended_by_force(model, inputs, decoding, written):
    outputs = model.generate(**inputs, decoding=decoding, suppress_tokens=[SEP], num_beams=2, pad_bias=-99.0)
    assert (written["tokens"] != PAD).all() and written["tokens"].shape[-1] == MAX_TAG_TOKENS
    assert written["log_probs"].isfinite().all()
    assert outputs.tag_scores[:, 0].gt(0).all()


# Tag vocabulary and processors

TAGS = [(2,), (2, 3), (4, 5, 6), (7, 7, 7, 7), (8, 2)]


@BOTH
@pytest.mark.parametrize("settings", [{}, {"num_beams": 4, "num_return_sequences": 4}, {"do_sample": True}])
def test_only_tags_of_the_vocabulary_are_written(model, inputs, decoding, settings):
    torch.manual_seed(0)
    outputs = model.generate(**inputs, decoding=decoding, tag_vocabulary=TAGS, pad_bias=-3.0, **settings)
    assert not outputs.tag_scores.isnan().any()
    tags = {tag for index in range(4) for tag, _, _ in tags_of(outputs, index)}
    assert tags and tags <= set(TAGS)


@BOTH
def test_search_in_a_vocabulary_equals_the_slow_search(model, inputs, decoding):
    processor = TagVocabularyLogitsProcessor(TAGS, PAD, SEP)
    settings = {"num_beams": 4, "pad_bias": -1.0}
    outputs = model.generate(**inputs, decoding=decoding, num_return_sequences=3, tag_vocabulary=processor, **settings)
    for index in range(4):
        expected = write_slowly(model, example(inputs, index), decoding, keep=3, process=processor, **settings)
        assert_same_tags(tags_of(outputs, index), merged(expected))


@BOTH
def test_a_beam_wider_than_the_vocabulary_lists_its_tags_and_no_others(model, inputs, decoding, written):
    outputs = model.generate(
        **inputs, decoding=decoding, tag_vocabulary=[(2, 3)], num_beams=5, num_return_sequences=5, pad_bias=-99.0
    )
    for index in range(4):
        assert [tag for tag, _, _ in tags_of(outputs, index)] == [(2, 3)]
    assert not written["log_probs"].isnan().any()
    assert written["log_probs"].isfinite().sum(-1).eq(1).all()


def test_a_vocabulary_may_come_padded_as_the_processor_encodes_it(model, inputs):
    padded = torch.tensor([[*tag, *[PAD] * (4 - len(tag))] for tag in TAGS])
    expected = model.generate(**inputs, tag_vocabulary=TAGS, pad_bias=-3.0)
    outputs = model.generate(**inputs, tag_vocabulary=padded, pad_bias=-3.0)
    assert torch.equal(outputs.sequences, expected.sequences) and torch.equal(outputs.tag_scores, expected.tag_scores)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([], "tag vocabulary is empty"),
        ([(2,), ()], "tag vocabulary holds an empty tag"),
        ([(2, 3, 4, 5, 6)], "max_tag_tokens=4"),
        ([(2, VOCABULARY)], f"token {VOCABULARY}"),
        ([(-1,)], "negative ids"),
        ([(2, SEP)], r"\[SEP\]"),
        ([(2, PAD, 3)], r"\[PAD\]"),
        ("red", "holds 'r'"),
        (["red"], "holds 'red'"),
        ([3, 4], "holds 3"),
    ],
)
def test_a_vocabulary_that_cannot_be_written_is_refused(model, inputs, tags, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, tag_vocabulary=tags)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_logits_processors_of_transformers_apply(model, inputs, decoding, settings):
    torch.manual_seed(0)
    free = model.generate(**inputs, decoding=decoding, pad_bias=-3.0)
    tokens = Counter(t for index in range(4) for tag, _, _ in tags_of(free, index) for t in tag)
    common, pair = tokens.most_common(1)[0][0], tags_of(free, 0)[0][0][:2]
    suppress = LogitsProcessorList([SuppressTokensLogitsProcessor([common])])
    for limits in ({"suppress_tokens": [common]}, {"bad_words_ids": [[common]]}, {"logits_processor": suppress}):
        outputs = model.generate(**inputs, decoding=decoding, pad_bias=-3.0, **limits, **settings)
        assert not outputs.sequences.eq(common).any()
    outputs = model.generate(
        **inputs, decoding=decoding, pad_bias=-3.0, bad_words_ids=[list(pair)], min_length=2, **settings
    )
    for index in range(4):
        for tag, _, _ in tags_of(outputs, index):
            assert len(tag) >= 2 and pair not in itertools.pairwise(tag)


@BOTH
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_tag_that_processors_leave_without_a_token_is_not_written(model, inputs, decoding, num_beams):
    """After 2 only 3 may follow, and 3 may not: where that wins the slot stays empty, for later slots too."""
    vocabulary, suppress = TagVocabularyLogitsProcessor([(2, 3), (4, 5), (7, 2, 3)], PAD, SEP), [3]
    process = LogitsProcessorList([vocabulary, SuppressTokensLogitsProcessor(suppress)])
    settings = {"decoding": decoding, "pad_bias": -2.0, "num_beams": num_beams}
    outputs = model.generate(
        **inputs, **settings, num_return_sequences=num_beams, tag_vocabulary=vocabulary, suppress_tokens=suppress
    )
    for index in range(4):
        expected = write_slowly(model, example(inputs, index), keep=num_beams, process=process, **settings)
        assert_same_tags(tags_of(outputs, index), merged(expected))
    assert any(
        not search_slot(SlowWriter(model, example(inputs, 0)), [], s, process=process) for s in range(NUM_PROMPTS)
    )


@BOTH
def test_samples_that_processors_leave_without_a_token_are_left_out(model, inputs, decoding, written):
    torch.manual_seed(0)
    outputs = model.generate(
        **inputs,
        decoding=decoding,
        tag_vocabulary=[(2, 3), (4, 5)],
        suppress_tokens=[3],
        pad_bias=-2.0,
        do_sample=True,
        num_return_sequences=4,
    )
    tags = {tag for index in range(4) for tag, _, _ in tags_of(outputs, index)}
    assert tags == {(4, 5)}
    assert not written["log_probs"].isnan().any()


@BOTH
@pytest.mark.parametrize("do_sample", [False, True])
def test_where_processors_forbid_everything_nothing_is_written(model, inputs, decoding, do_sample):
    outputs = model.generate(**inputs, decoding=decoding, suppress_tokens=list(range(VOCABULARY)), do_sample=do_sample)
    assert outputs.slots.eq(-1).all()


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": "serial"}, "decoding='serial'"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": "0.5"}, "threshold='0.5'"),
        ({"threshold": {"paralel": 0.5}}, "paralel"),
        ({"threshold": {"parallel": 2.0}}, "threshold=2.0"),
        ({"pad_bias": math.nan}, "pad_bias=nan"),
        ({"pad_bias": "-1"}, "pad_bias='-1'"),
        ({"max_tags": 0}, "max_tags=0"),
        ({"max_tags": -1}, "max_tags=-1"),
        ({"max_tags": 1.5}, "max_tags=1.5"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 1.5}, "num_beams=1.5"),
        ({"num_beams": VOCABULARY + 1}, "num_beams=13"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences=0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_k": -1, "do_sample": True}, "top_k"),
        ({"top_p": -0.5, "do_sample": True}, "top_p"),
        ({"numbeams": 2}, "numbeams"),
        ({"labels": torch.ones(4, 1)}, "labels"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"eos_token_id": 5}, "eos_token_id"),
    ],
)
def test_a_bad_setting_is_named(model, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **settings)


def test_settings_for_one_decoding_do_not_touch_the_other(model, inputs):
    settings = {"threshold": {"parallel": 0.0, "sequential": 1.0}, "pad_bias": {"parallel": -9.0, "sequential": 9.0}}
    config = GenerationConfig(**settings)
    assert model.generate(**inputs, generation_config=config, decoding="parallel").slots.ge(0).any()
    assert model.generate(**inputs, generation_config=config, decoding="sequential").slots.eq(-1).all()
    assert config.threshold == settings["threshold"], "the caller's object is left as it was"


def test_generation_config_is_saved_and_loaded_with_its_own_settings(model, inputs, tmp_path, monkeypatch):
    settings = {
        "threshold": {"parallel": 0.002, "sequential": 0.001},
        "pad_bias": {"parallel": -1.0, "sequential": -2.0},
        "decoding": "sequential",
        "max_tags": 3,
        "num_beams": 2,
    }
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**settings))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path)
    expected = model.generate(
        **inputs,
        decoding="sequential",
        threshold=0.001,
        pad_bias=-2.0,
        max_tags=3,
        num_beams=2,
        generation_config=GenerationConfig(),
    )
    for outputs in (model.generate(**inputs), loaded.generate(**inputs)):
        assert torch.equal(outputs.sequences, expected.sequences)
        assert torch.equal(outputs.tag_scores, expected.tag_scores)
    assert loaded.generate(**inputs, max_tags=1, num_beams=1).sequences.shape[1] == 1, "arguments override it"


def test_sampling_settings_without_do_sample_change_nothing(model, inputs):
    expected = model.generate(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model.generate(**inputs, temperature=9.0, top_k=1, top_p=0.1)
    assert torch.equal(outputs.sequences, expected.sequences) and torch.equal(outputs.tag_scores, expected.tag_scores)


def test_generate_leaves_every_module_in_the_mode_it_was_in(model, inputs):
    model.train()
    model.model.text_tower.eval()
    try:
        before = {name: module.training for name, module in model.named_modules()}
        outputs = model.generate(**inputs)
        with pytest.raises(ValueError):
            model.generate(frame_features=torch.zeros(1, 99, 6))
        assert {name: module.training for name, module in model.named_modules()} == before
    finally:
        model.eval()
    assert torch.equal(outputs.sequences, model.generate(**inputs).sequences), "dropout is off while it writes"


@BOTH
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tags_are_written_under_autocast(model, inputs, decoding, attention):
    model.set_attn_implementation(attention)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model.generate(**inputs, decoding=decoding, num_beams=2)
    finally:
        model.set_attn_implementation("sdpa")
    assert outputs.tag_scores.dtype == torch.float32
    assert outputs.tag_scores.isfinite().all() and outputs.slots.ge(0).any()


# Layouts


def test_slot_rows_put_ragged_slots_side_by_side_and_back():
    examples = torch.tensor([0, 0, 0, 2, 3, 3])
    rows = SlotRows(examples, batch=5)
    states = torch.arange(12.0).view(6, 2) + 1
    grid = rows.by_example(states)
    assert grid.shape == (5, 3, 2)
    expected = torch.zeros(5, 3, 2)
    for index, (i, place) in enumerate([(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]):
        expected[i, place] = states[index]
    assert torch.equal(grid, expected)
    assert torch.equal(rows.by_slot(grid), states)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_batch_equals_its_examples_one_by_one(model, inputs, decoding, settings):
    outputs = model.generate(**inputs, decoding=decoding, **settings)
    for index in range(4):
        alone = model.generate(**example(inputs, index), decoding=decoding, **settings)
        assert_same_tags(tags_of(outputs, index), tags_of(alone, 0))
        torch.testing.assert_close(outputs.pad_margins[index], alone.pad_margins[0], rtol=1e-4, atol=1e-5)


@BOTH
def test_unlikely_alternatives_are_given_up_and_the_others_stay(model, inputs, decoding):
    settings = {
        "decoding": decoding,
        "num_beams": 4,
        "num_return_sequences": 4,
        "pad_bias": -5.0,
        "output_slots": True,
    }
    everything = model.generate(**inputs, **settings)
    likely = model.generate(**inputs, **settings, min_beam_probability=0.02)

    def proposed(outputs, example, slot, floor):
        rows = zip(outputs.slot_tokens[example, slot].tolist(), outputs.slot_log_probs[example, slot].exp().tolist())
        return {tuple(t for t in tag if t != PAD): round(p, 5) for tag, p in rows if p >= floor}

    fewer = 0
    for example_index in range(4):
        for slot in range(NUM_PROMPTS):
            expected = proposed(everything, example_index, slot, 0.02)
            found = proposed(likely, example_index, slot, 0.02)
            assert found.items() == expected.items()
            fewer += len(proposed(everything, example_index, slot, 1e-12)) - len(
                proposed(likely, example_index, slot, 1e-12)
            )
    assert fewer > 0
    for floor in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="min_beam_probability"):
            model.generate(**inputs, min_beam_probability=floor)
