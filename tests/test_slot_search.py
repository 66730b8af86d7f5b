"""Search inside slots against the reference search and the processed distribution."""

import math
from collections import Counter

import pytest
import torch
from reference_search import (
    BATCH_SIZE,
    BOTH_DECODINGS,
    MAX_TAG_TOKENS,
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
@pytest.mark.parametrize("pad_bias", [0.0, -2.0, 2.0])
def test_greedy_search_equals_the_reference(model, inputs, decoding, pad_bias):
    outputs = model.generate(**inputs, decoding=decoding, pad_bias=pad_bias)
    for index in range(BATCH_SIZE):
        expected = search_all_slots(model, select_example(inputs, index), decoding, pad_bias=pad_bias)
        assert_same_tags(tags_of(outputs, index), merge_slots(expected))


@BOTH_DECODINGS
@pytest.mark.parametrize("length_penalty", [None, 1.0, -0.5])
def test_beam_search_equals_the_reference(model, inputs, decoding, length_penalty):
    """Finished hypotheses stay in the beam, which is ranked by log-probability over length^length_penalty."""
    settings = {"decoding": decoding, "num_beams": 3, "num_return_sequences": 2}
    outputs = model.generate(**inputs, **settings, length_penalty=length_penalty)
    for index in range(BATCH_SIZE):
        example = select_example(inputs, index)
        expected = search_all_slots(model, example, **settings, length_penalty=length_penalty or 0.0)
        assert_same_tags(tags_of(outputs, index), merge_slots(expected))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_only_unfinished_hypotheses_reach_the_output_layer(model, inputs, num_beams, monkeypatch):
    """The reference search decodes each unfinished hypothesis by itself."""
    step, unfinished, rows = ReferenceDecoder.step, Counter(), []

    def count(self, context, slot, prefix, *args, **settings):
        unfinished[len(prefix)] += 1
        return step(self, context, slot, prefix, *args, **settings)

    monkeypatch.setattr(ReferenceDecoder, "step", count)
    for index in range(BATCH_SIZE):
        search_all_slots(model, select_example(inputs, index), "parallel", num_beams=num_beams)
    counting = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model.generate(**inputs, decoding="parallel", num_beams=num_beams)
    counting.remove()
    assert rows[0] == BATCH_SIZE * NUM_PROMPTS and 1 < len(rows) <= MAX_TAG_TOKENS + 1
    assert all(number <= unfinished[length] for length, number in enumerate(rows)), (rows, unfinished)


@BOTH_DECODINGS
def test_the_examples_have_empty_slots_and_tags_of_all_lengths(model, inputs, decoding):
    rows = [search_all_slots(model, select_example(inputs, index), decoding) for index in range(BATCH_SIZE)]
    counts = [len(row) for row in rows]
    assert len(set(counts)) > 1 and min(counts) < NUM_PROMPTS
    assert {len(tag) for row in rows for _, tag, _ in row} >= {1, 2, MAX_TAG_TOKENS}


@BOTH_DECODINGS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 2.0},
        {"do_sample": True, "num_return_sequences": 3, "pad_bias": 1.0},
    ],
)
def test_a_score_is_the_models_own_probability_of_the_tag(model, inputs, decoding, settings):
    """It includes [SEP] and precedes pad_bias, processors and temperature. Later slots see each slot's first tag."""
    torch.manual_seed(0)
    settings = {"bad_words_ids": [[5]], "pad_bias": -1.0, "decoding": decoding} | settings
    outputs = model.generate(**inputs, **settings, output_slots=True)
    for index in range(BATCH_SIZE):
        decoder, context = ReferenceDecoder(model, select_example(inputs, index)), []
        for slot in range(NUM_PROMPTS):
            rows = zip(outputs.slot_tokens[index, slot].tolist(), outputs.slot_log_probs[index, slot].tolist())
            tags = [(tuple(t for t in tokens if t != PAD), log_prob) for tokens, log_prob in rows]
            for tag, log_prob in tags:
                if not tag:
                    assert log_prob == -math.inf
                    continue
                seen = context if decoding == "sequential" else []
                expected = [
                    decoder.logits(seen, slot, tag[:length]).log_softmax(-1)[token].item()
                    for length, token in enumerate([*tag, SEP])
                ]
                assert log_prob == pytest.approx(sum(expected), abs=1e-4)
            context.append((slot, tags[0][0]))


@BOTH_DECODINGS
def test_training_logits_equal_those_of_generation(model, inputs, decoding):
    torch.manual_seed(2)
    lengths = torch.tensor([1, 4, 2, 3, 1, 2])
    tokens = torch.randint(2, TAG_VOCAB_SIZE, (6, MAX_TAG_TOKENS))
    tokens[torch.arange(MAX_TAG_TOKENS) >= lengths[:, None]] = -100
    tags = torch.tensor([[0, 1, 2], [3, 4, -100], [-100, 5, -100], [0, 4, 1]])
    labels = torch.where((tags >= 0)[..., None], tokens[tags.clamp(min=0)], -100)
    with torch.no_grad():
        features = torch.randn(6, 16)[tags.clamp(min=0)]
        outputs = model(**inputs, tag_features=features, labels=labels, decoding=decoding)
    log_probs, targets = outputs.logits.log_softmax(-1), outputs.targets.tolist()
    position = 0
    for index in range(BATCH_SIZE):
        decoder, context = ReferenceDecoder(model, select_example(inputs, index)), []
        for slot, label in enumerate(outputs.assignment[index].tolist()):
            tag = () if label < 0 else tuple(tokens[tags[index, label], : lengths[tags[index, label]]].tolist())
            for length, target in enumerate([*tag, SEP] if tag else [PAD]):
                assert targets[position] == target
                seen = context if decoding == "sequential" else []
                expected = decoder.logits(seen, slot, tag[:length]).log_softmax(-1)
                torch.testing.assert_close(log_probs[position], expected, rtol=1e-4, atol=1e-5)
                position += 1
            context.append((slot, tag))
    assert position == len(targets)
    loss = torch.nn.functional.cross_entropy(outputs.logits, outputs.targets)
    torch.testing.assert_close(outputs.generation_loss, loss)


@BOTH_DECODINGS
def test_a_tag_of_maximum_length_ends_without_sep(model, inputs, decoding):
    settings = {"decoding": decoding, "suppress_tokens": [SEP], "num_beams": 2, "pad_bias": -99.0}
    outputs = model.generate(**inputs, **settings, output_slots=True)
    assert (outputs.slot_tokens != PAD).all() and outputs.slot_tokens.shape[-1] == MAX_TAG_TOKENS
    assert outputs.slot_log_probs.isfinite().all()
    assert outputs.tag_scores[:, 0].gt(0).all()


@BOTH_DECODINGS
def test_min_beam_probability_drops_only_less_probable_beams(model, inputs, decoding):
    settings = {"decoding": decoding, "num_beams": 4, "num_return_sequences": 4, "pad_bias": -5.0}
    all_beams = model.generate(**inputs, **settings, output_slots=True)
    probable_beams = model.generate(**inputs, **settings, output_slots=True, min_beam_probability=0.02)

    def beams(outputs, index, slot, min_probability):
        rows = zip(outputs.slot_tokens[index, slot].tolist(), outputs.slot_log_probs[index, slot].exp().tolist())
        return {tuple(t for t in tag if t != PAD): round(p, 5) for tag, p in rows if p >= min_probability}

    num_dropped = 0
    for index in range(BATCH_SIZE):
        for slot in range(NUM_PROMPTS):
            assert beams(probable_beams, index, slot, 0.02) == beams(all_beams, index, slot, 0.02)
            num_dropped += len(beams(all_beams, index, slot, 1e-12)) - len(beams(probable_beams, index, slot, 1e-12))
    assert num_dropped > 0


# Sampling


@BOTH_DECODINGS
def test_sampling_is_reproducible_under_a_seed(model, inputs, decoding):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, decoding=decoding, do_sample=True, num_return_sequences=3)

    first, second, other = sample(0), sample(0), sample(1)
    assert torch.equal(first.sequences, second.sequences) and torch.equal(first.tag_scores, second.tag_scores)
    assert first.sequences.shape != other.sequences.shape or not torch.equal(first.sequences, other.sequences)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 2}, {"pad_bias": -2.0}])
def test_samples_follow_the_processed_distribution(model, inputs, settings):
    """Compares the first two tokens of one slot with a chi-square test."""
    num_samples, slot = 4000, 3
    example = select_example(inputs, 0)
    decoder = ReferenceDecoder(model, example)

    def distribution(prefix):
        _, scores = decoder.step([], slot, prefix, settings.get("pad_bias", 0.0))
        if "top_k" in settings:
            scores[scores < scores.topk(settings["top_k"]).values[-1]] = -torch.inf
        return (scores / settings.get("temperature", 1.0)).softmax(-1)

    expected = torch.zeros(TAG_VOCAB_SIZE, TAG_VOCAB_SIZE)
    first = distribution(())
    expected[PAD, PAD] = first[PAD]
    for token in range(2, TAG_VOCAB_SIZE):
        expected[token] = first[token] * distribution((token,))
        # The tokens of a tag do not include [SEP]; its position holds [PAD].
        expected[token, [PAD, SEP]] = expected[token, [SEP, PAD]]
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)

    torch.manual_seed(0)
    sampling = {"do_sample": True, "num_return_sequences": num_samples, "top_k": 0} | settings
    outputs = model.generate(**example, **sampling, output_slots=True)
    counts = torch.zeros(TAG_VOCAB_SIZE, TAG_VOCAB_SIZE)
    for tokens in outputs.slot_tokens[0, slot, :, :2].tolist():
        counts[tuple(tokens)] += 1
    assert not counts[expected == 0].any()
    expected = num_samples * expected
    frequent = expected >= 5
    counts, expected = (torch.cat([x[frequent], x[~frequent].sum()[None]]) for x in (counts, expected))
    chi_square, freedom = ((counts - expected) ** 2 / expected.clamp(min=1)).sum().item(), len(counts) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@BOTH_DECODINGS
def test_pad_samples_are_dropped_and_other_samples_kept(model, inputs, decoding):
    torch.manual_seed(0)
    outputs = model.generate(**inputs, decoding=decoding, do_sample=True, num_return_sequences=6, output_slots=True)
    is_empty = (outputs.slot_tokens == PAD).all(-1)
    assert (is_empty.any(-1) & ~is_empty.all(-1)).any(), "some slots have both"
    assert torch.equal(is_empty, outputs.slot_log_probs == -torch.inf)
