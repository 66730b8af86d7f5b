"""The example as a whole: its logits, its loss over all train tags, and what it adds to the slots' tags."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.tag_classifier import asymmetric_loss
from modeling_optsg.tag_ranking import MIN_SLOT_PROBABILITY, ClassifierEvidence, rank_tags

PAD = 0
TAGS = [[5], [6, 7], [8, 5, 9], [7], [10, 4]]


@pytest.fixture
def model(make_model):
    model = make_model(None, frame_feature_size=6, tag_vocab_size=12, num_prompts=3, max_tag_tokens=4)
    model.set_label_vocabulary(TAGS)
    with torch.no_grad():
        model.tag_classifier.classifier.bias.normal_()
    return model.eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {"frame_features": 3 * torch.randn(2, 2, 6)}


def logits_by_hand(model, summary):
    """`[batch, tags]`, a tag and an example at a time."""
    classifier = model.tag_classifier.classifier
    scale = classifier.logit_scale.exp()
    pairs = list(zip(classifier.class_embeddings.weight, classifier.bias))
    return torch.stack(
        [
            torch.stack([scale * F.normalize(example, dim=0) @ weight + bias for weight, bias in pairs])
            for example in summary
        ]
    )


def test_the_loss_is_over_all_train_tags(model, inputs):
    batch = inputs | {
        "tag_input_ids": torch.tensor([[7, 11], [10, 4]]),
        "tag_lengths": torch.tensor([1, 2]),
        "tag_features": torch.randn(2, 16),
        "labels": torch.tensor([[1, -100], [1, 0]]),
    }
    with torch.no_grad():
        logits = logits_by_hand(model, model.model(**inputs).classifier_pooler)
        outputs = model(**batch, tag_ids=torch.tensor([3, 4]))
        present = torch.tensor([[0, 0, 0, 0, 1.0], [0, 0, 0, 1, 1]])
        torch.testing.assert_close(outputs.classifier_loss, asymmetric_loss(logits, present, 4.0, 1.0, 0.05))
        total = (
            outputs.generation_loss
            + outputs.alignment_loss
            + model.config.classifier_loss_weight * outputs.classifier_loss
        )
        torch.testing.assert_close(outputs.loss, total)
        # Where the classes of the batch's tags are not said, there is nothing to compare with.
        assert model(**batch).classifier_loss is None
    with pytest.raises(ValueError, match="class 9; this model has 5"):
        model(**batch, tag_ids=torch.tensor([9, 1]))


def test_the_slots_and_the_example_are_weighed_in_logits():
    tokens = torch.tensor([[[[5, 6]], [[7, 0]], [[5, 6]], [[0, 0]]]])
    log_probs = torch.tensor([[[0.2], [0.3], [0.9], [0.0]]]).log()
    evidence = ClassifierEvidence(
        logits=torch.tensor([[2.0, 3.0, -4.0]]),
        classes={(5, 6): 0, (9, 4, 8): 1, (3,): 2},
        num_candidates=torch.tensor([[[5, 6, 0], [9, 4, 8]]]),
        weights=(0.5, 2.0, -1.0, 1.5, -0.5),
    )
    found = rank_tags(tokens, log_probs, 0.0, None, PAD, evidence)

    def expected(probability, logit):
        probability = max(probability, MIN_SLOT_PROBABILITY)
        slots = math.log(probability / (1 - probability))
        # Of a novel tag the example as a whole says nothing.
        total = 0.5 * slots + 2 * logit - 1 if logit is not None else 1.5 * slots - 0.5
        return 1 / (1 + math.exp(-total))

    scores = {(9, 4, 8): expected(0, 3.0), (5, 6): expected(0.92, 2.0), (7,): expected(0.3, None)}
    ranked = sorted(scores, key=lambda tag: -scores[tag])
    assert [tuple(t for t in row if t != PAD) for row in found.sequences[0].tolist()] == ranked
    torch.testing.assert_close(found.tag_scores[0], torch.tensor([scores[tag] for tag in ranked]))
    by_tag = dict(
        zip(ranked, zip(found.slots[0].tolist(), found.slot_scores[0].tolist(), found.classifier_logits[0].tolist()))
    )
    assert by_tag[9, 4, 8] == (-1, 0.0, 3.0)
    assert by_tag[7,] == pytest.approx((1, 0.3, 0.0))
    assert by_tag[5, 6] == pytest.approx((2, 0.92, 2.0))


def written(outputs, index):
    tags = outputs.sequences[index].tolist()
    return {tuple(t for t in tag if t != PAD): place for place, tag in enumerate(tags) if any(tag)}


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_proposals_are_the_train_tags_that_suit_an_example_best(model, inputs, decoding):
    plain = model.generate(**inputs, decoding=decoding)
    outputs = model.generate(**inputs, decoding=decoding, num_candidates=2, fusion_weights=(1.0, 0.5, 0.0, 1.0, 0.0))
    with torch.no_grad():
        logits = logits_by_hand(model, model.model(**inputs).classifier_pooler)
    for index in range(2):
        best = {tuple(TAGS[tag]) for tag in logits[index].topk(2).indices.tolist()}
        assert set(written(outputs, index)) == set(written(plain, index)) | best
        for tag, place in written(outputs, index).items():
            slot_score = outputs.slot_scores[index, place].item()
            own = written(plain, index).get(tag)
            assert slot_score == pytest.approx(0 if own is None else plain.tag_scores[index, own].item())
            assert (outputs.slots[index, place] == -1) == (own is None)
            if list(tag) in TAGS:
                expected = logits[index, TAGS.index(list(tag))].item()
                assert outputs.classifier_logits[index, place].item() == pytest.approx(expected, abs=1e-4)


def test_what_constrains_tokens_has_no_proposals(model, inputs):
    weights = {"num_candidates": 5, "fusion_weights": (1.0, 1.0, 0.0, 1.0, 0.0)}
    outputs = model.generate(**inputs, tag_vocabulary=[[5]], **weights)
    assert all(set(written(outputs, index)) <= {(5,)} for index in range(2))
    outputs = model.generate(**inputs, suppress_tokens=[5, 7], **weights)
    assert not {5, 7} & {token for index in range(2) for tag in written(outputs, index) for token in tag}


def test_one_pass_shows_every_pad_bias_with_proposals_too(model, inputs):
    settings = {"num_candidates": 3, "fusion_weights": (0.7, 0.6, -0.2, 0.9, -0.1)}
    widest = model.generate(**inputs, pad_bias=-5.0, output_slots=True, **settings)
    for pad_bias in (-5.0, 0.0, 2.0):
        expected = model.generate(**inputs, pad_bias=pad_bias, **settings)
        found = widest.at_pad_bias(pad_bias, PAD)
        for name in ("tag_scores", "slot_scores", "classifier_logits"):
            torch.testing.assert_close(found[name], expected[name])
        assert [written(found, i) for i in range(2)] == [written(expected, i) for i in range(2)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fusion_weights": (1.0, 2.0)}, "five numbers"),
        ({"fusion_weights": (1.0, 2.0, float("nan"), 1.0, 0.0)}, "fusion_weights=nan"),
        ({"num_candidates": -1, "fusion_weights": (1.0, 1.0, 0.0, 1.0, 0.0)}, "num_candidates=-1"),
        ({"num_candidates": 5}, "need fusion_weights"),
    ],
)
def test_bad_settings_are_named(model, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **settings)


def test_a_model_without_it_takes_no_weights(make_model, inputs):
    model = make_model(None, frame_feature_size=6, use_tag_classifier=False)
    with pytest.raises(ValueError, match="use_tag_classifier"):
        model.generate(**inputs, fusion_weights=(1.0, 1.0, 0.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="use_tag_classifier=false"):
        model.set_label_vocabulary([[5]])


def test_the_train_tags_are_saved_with_the_model(model, inputs, tmp_path):
    settings = {"num_candidates": 3, "fusion_weights": [0.7, 0.6, -0.2, 0.9, -0.1]}
    expected = model.generate(**inputs, **settings)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path).generate(**inputs)
    torch.testing.assert_close(loaded.tag_scores, expected.tag_scores)
    assert torch.equal(loaded.sequences, expected.sequences)
