"""`generate`: thresholds, pad bias, batches, precision, and the model's mode."""

import pytest
import torch
from reference_search import (
    BATCH_SIZE,
    BOTH_DECODINGS,
    PAD,
    assert_same_tags,
    make_slot_inputs,
    make_slot_model,
    select_example,
    tags_of,
)


@pytest.fixture(scope="module")
def model(make_model):
    return make_slot_model(make_model)


@pytest.fixture(scope="module")
def inputs():
    return make_slot_inputs()


@BOTH_DECODINGS
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_batch_equals_its_examples_one_by_one(model, inputs, decoding, settings):
    outputs = model.generate(**inputs, decoding=decoding, **settings)
    for index in range(BATCH_SIZE):
        alone = model.generate(**select_example(inputs, index), decoding=decoding, **settings)
        assert_same_tags(tags_of(outputs, index), tags_of(alone, 0))
        torch.testing.assert_close(outputs.pad_margins[index], alone.pad_margins[0], rtol=1e-4, atol=1e-5)


def test_threshold_and_max_tags_keep_the_most_probable_tags(model, inputs):
    all_tags = model.generate(**inputs, pad_bias=-3.0)
    scores = all_tags.tag_scores
    threshold = scores[scores > 0].median().item()
    outputs = model.generate(**inputs, pad_bias=-3.0, threshold=threshold, max_tags=2)
    for index in range(BATCH_SIZE):
        expected = [row for row in tags_of(all_tags, index) if row[2] >= threshold][:2]
        assert tags_of(outputs, index) == expected
    assert outputs.sequences.shape[1] == 2


@BOTH_DECODINGS
@pytest.mark.parametrize("settings", [{"pad_bias": 99.0}, {"threshold": 1.0}])
def test_examples_without_tags_give_an_empty_output(model, inputs, decoding, settings):
    outputs = model.generate(**inputs, decoding=decoding, **settings)
    assert outputs.sequences.eq(PAD).all() and outputs.slots.eq(-1).all() and outputs.tag_scores.eq(0).all()
    assert outputs.sequences.shape[:2] == outputs.slots.shape == outputs.tag_scores.shape == (BATCH_SIZE, 1)


def test_a_slot_has_a_tag_where_its_pad_margin_exceeds_pad_bias(model, inputs):
    margins = model.generate(**inputs).pad_margins
    for pad_bias in (-1.0, 0.0, margins.median().item() + 1e-3):
        outputs = model.generate(**inputs, pad_bias=pad_bias, output_slots=True)
        assert torch.equal(outputs.pad_margins, margins)
        assert torch.equal(outputs.slot_tokens[:, :, 0].ne(PAD).any(-1), margins > pad_bias)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 3}], ids=["greedy", "beams"])
def test_at_pad_bias_equals_generate_with_that_pad_bias(model, inputs, settings):
    lowest = model.generate(**inputs, decoding="parallel", pad_bias=-3.0, output_slots=True, **settings)
    num_tags = set()
    for pad_bias in (-3.0, -1.0, -0.2, 0.0, 0.3, 1.0, 9.0):
        expected = model.generate(**inputs, decoding="parallel", pad_bias=pad_bias, threshold=0.0, **settings)
        actual = lowest.at_pad_bias(pad_bias, PAD)
        num_tags.add(int((expected.tag_scores > 0).sum()))
        assert torch.equal(actual.tag_scores, expected.tag_scores) and torch.equal(actual.slots, expected.slots)
        for index in range(BATCH_SIZE):
            assert tags_of(actual, index) == tags_of(expected, index)
    assert len(num_tags) > 3, "the biases make a difference"


def test_generate_restores_the_mode_of_every_module(model, inputs):
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
    assert torch.equal(outputs.sequences, model.generate(**inputs).sequences), "dropout is off in generation"


@BOTH_DECODINGS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_works_under_autocast(model, inputs, decoding, attention):
    model.set_attn_implementation(attention)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model.generate(**inputs, decoding=decoding, num_beams=2)
    finally:
        model.set_attn_implementation("sdpa")
    assert outputs.tag_scores.dtype == torch.float32
    assert outputs.tag_scores.isfinite().all() and outputs.slots.ge(0).any()
