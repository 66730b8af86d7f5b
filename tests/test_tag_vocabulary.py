"""Generation under a tag vocabulary and under the logits processors of transformers."""

import itertools
from collections import Counter

import pytest
import torch
from reference_search import (
    BATCH_SIZE,
    BOTH_DECODINGS,
    NUM_PROMPTS,
    PAD,
    SEP,
    TAG_VOCAB_SIZE,
    ReferenceDecoder,
    assert_same_tags,
    make_slot_inputs,
    make_slot_model,
    merge_slots,
    search_all_slots,
    search_slot,
    select_example,
    tags_of,
)
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from modeling_optsg.tag_vocabulary import TagVocabularyLogitsProcessor

TAGS = [(2,), (2, 3), (4, 5, 6), (7, 7, 7, 7), (8, 2)]


@pytest.fixture(scope="module")
def model(make_model):
    return make_slot_model(make_model)


@pytest.fixture(scope="module")
def inputs():
    return make_slot_inputs()


def all_tags(outputs):
    return {tag for index in range(BATCH_SIZE) for tag, _, _ in tags_of(outputs, index)}


@BOTH_DECODINGS
@pytest.mark.parametrize("settings", [{}, {"num_beams": 4, "num_return_sequences": 4}, {"do_sample": True}])
def test_only_tags_of_the_vocabulary_are_generated(model, inputs, decoding, settings):
    torch.manual_seed(0)
    outputs = model.generate(**inputs, decoding=decoding, tag_vocabulary=TAGS, pad_bias=-3.0, **settings)
    assert not outputs.tag_scores.isnan().any()
    assert all_tags(outputs) and all_tags(outputs) <= set(TAGS)


@BOTH_DECODINGS
def test_search_in_a_vocabulary_equals_the_reference(model, inputs, decoding):
    processor = TagVocabularyLogitsProcessor(TAGS, PAD, SEP)
    settings = {"decoding": decoding, "num_beams": 4, "num_return_sequences": 3, "pad_bias": -1.0}
    outputs = model.generate(**inputs, **settings, tag_vocabulary=processor)
    for index in range(BATCH_SIZE):
        expected = search_all_slots(model, select_example(inputs, index), **settings, process=processor)
        assert_same_tags(tags_of(outputs, index), merge_slots(expected))


@BOTH_DECODINGS
def test_more_beams_than_tags_return_only_the_tags(model, inputs, decoding):
    settings = {"num_beams": 5, "num_return_sequences": 5, "pad_bias": -99.0, "output_slots": True}
    outputs = model.generate(**inputs, decoding=decoding, tag_vocabulary=[(2, 3)], **settings)
    for index in range(BATCH_SIZE):
        assert [tag for tag, _, _ in tags_of(outputs, index)] == [(2, 3)]
    assert not outputs.slot_log_probs.isnan().any()
    assert outputs.slot_log_probs.isfinite().sum(-1).eq(1).all()


def test_a_vocabulary_may_be_padded(model, inputs):
    padded = torch.tensor([[*tag, *[PAD] * (4 - len(tag))] for tag in TAGS])
    expected = model.generate(**inputs, tag_vocabulary=TAGS, pad_bias=-3.0)
    outputs = model.generate(**inputs, tag_vocabulary=padded, pad_bias=-3.0)
    assert torch.equal(outputs.sequences, expected.sequences) and torch.equal(outputs.tag_scores, expected.tag_scores)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([], "tag vocabulary is empty"),
        ([(2,), ()], "tag vocabulary contains an empty tag"),
        ([(2, 3, 4, 5, 6)], "a tag of 5 tokens.*max_tag_tokens=4"),
        ([(2, TAG_VOCAB_SIZE)], f"token {TAG_VOCAB_SIZE}.*tag_vocab_size={TAG_VOCAB_SIZE}"),
        ([(-1,)], "negative ids"),
        ([(2, SEP)], r"\[SEP\]"),
        ([(2, PAD, 3)], r"\[PAD\]"),
        ("red", "contains 'r'; expected token ids"),
        (["red"], "contains 'red'; expected token ids"),
        ([3, 4], "contains 3; expected token ids"),
    ],
)
def test_a_bad_vocabulary_is_reported(model, inputs, tags, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, tag_vocabulary=tags)


@BOTH_DECODINGS
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_logits_processors_of_transformers_apply(model, inputs, decoding, settings):
    torch.manual_seed(0)
    settings = {"decoding": decoding, "pad_bias": -3.0} | settings
    unconstrained = model.generate(**inputs, decoding=decoding, pad_bias=-3.0)
    tokens = Counter(t for index in range(BATCH_SIZE) for tag, _, _ in tags_of(unconstrained, index) for t in tag)
    common, pair = tokens.most_common(1)[0][0], tags_of(unconstrained, 0)[0][0][:2]
    suppress = LogitsProcessorList([SuppressTokensLogitsProcessor([common])])
    for constraint in ({"suppress_tokens": [common]}, {"bad_words_ids": [[common]]}, {"logits_processor": suppress}):
        outputs = model.generate(**inputs, **constraint, **settings)
        assert not outputs.sequences.eq(common).any()
    outputs = model.generate(**inputs, bad_words_ids=[list(pair)], min_length=2, **settings)
    for tag in all_tags(outputs):
        assert len(tag) >= 2 and pair not in itertools.pairwise(tag)


@BOTH_DECODINGS
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_slot_without_allowed_tokens_is_empty(model, inputs, decoding, num_beams):
    """After 2 only 3 is in the vocabulary, and 3 is suppressed. Later slots see an empty slot."""
    vocabulary, suppress = TagVocabularyLogitsProcessor([(2, 3), (4, 5), (7, 2, 3)], PAD, SEP), [3]
    process = LogitsProcessorList([vocabulary, SuppressTokensLogitsProcessor(suppress)])
    settings = {"decoding": decoding, "pad_bias": -2.0, "num_beams": num_beams, "num_return_sequences": num_beams}
    outputs = model.generate(**inputs, **settings, tag_vocabulary=vocabulary, suppress_tokens=suppress)
    for index in range(BATCH_SIZE):
        expected = search_all_slots(model, select_example(inputs, index), process=process, **settings)
        assert_same_tags(tags_of(outputs, index), merge_slots(expected))
    decoder = ReferenceDecoder(model, select_example(inputs, 0))
    assert any(not search_slot(decoder, [], slot, process=process) for slot in range(NUM_PROMPTS))


@BOTH_DECODINGS
def test_samples_without_allowed_tokens_are_dropped(model, inputs, decoding):
    torch.manual_seed(0)
    settings = {"pad_bias": -2.0, "do_sample": True, "num_return_sequences": 4, "output_slots": True}
    outputs = model.generate(
        **inputs, decoding=decoding, tag_vocabulary=[(2, 3), (4, 5)], suppress_tokens=[3], **settings
    )
    assert all_tags(outputs) == {(4, 5)}
    assert not outputs.slot_log_probs.isnan().any()


@BOTH_DECODINGS
@pytest.mark.parametrize("do_sample", [False, True])
def test_nothing_is_generated_if_all_tokens_are_suppressed(model, inputs, decoding, do_sample):
    suppress = list(range(TAG_VOCAB_SIZE))
    outputs = model.generate(**inputs, decoding=decoding, suppress_tokens=suppress, do_sample=do_sample)
    assert outputs.slots.eq(-1).all()
