"""Tag classifier: its loss, its label vocabulary, and its part in generation."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration
from modeling_optsg.tag_classifier import LabelVocabulary, asymmetric_loss

PAD = 0
TAGS = [[5], [6, 7], [8, 5, 9], [7], [10, 4]]
FUSION_WEIGHTS = (1.0, 1.0, 0.0, 1.0, 0.0)


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


@torch.no_grad()
def reference_logits(model, inputs):
    """Computes classifier logits `[batch, tags]`, one tag and one example at a time."""
    classifier = model.tag_classifier.classifier
    scale = classifier.logit_scale.exp()
    pairs = list(zip(classifier.class_embeddings.weight, classifier.bias))
    pooled = model.model(**inputs).classifier_pooler_output
    return torch.stack(
        [
            torch.stack([scale * F.normalize(example, dim=0) @ weight + bias for weight, bias in pairs])
            for example in pooled
        ]
    )


def ranks_by_tag(outputs, index):
    tags = outputs.sequences[index].tolist()
    return {tuple(t for t in tag if t != PAD): rank for rank, tag in enumerate(tags) if any(tag)}


# Loss


def test_asymmetric_loss_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, generator=generator)
    targets = (torch.rand(3, 5, generator=generator) < 0.4).float()
    total = 0.0
    for row, target_row in zip(logits.tolist(), targets.tolist()):
        for logit, present in zip(row, target_row):
            p = 1 / (1 + math.exp(-logit))
            shifted = max(p - 0.05, 0)
            total -= (1 - p) * math.log(p) if present else shifted**4 * math.log(1 - shifted)
    torch.testing.assert_close(asymmetric_loss(logits, targets, 4.0, 1.0, 0.05), torch.tensor(total / 3))
    binary_cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 3
    torch.testing.assert_close(asymmetric_loss(logits, targets, 0.0, 0.0, 0.0), binary_cross_entropy)


@torch.no_grad()
def test_the_classifier_loss_covers_the_label_vocabulary(model, inputs):
    batch = inputs | {
        "tag_input_ids": torch.tensor([[7, 11], [10, 4]]),
        "tag_lengths": torch.tensor([1, 2]),
        "tag_features": torch.randn(2, 16),
        "labels": torch.tensor([[1, -100], [1, 0]]),
    }
    outputs = model(**batch, tag_ids=torch.tensor([3, 4]))
    targets = torch.tensor([[0, 0, 0, 0, 1.0], [0, 0, 0, 1, 1]])
    expected = asymmetric_loss(reference_logits(model, inputs), targets, 4.0, 1.0, 0.05)
    torch.testing.assert_close(outputs.classifier_loss, expected)
    weighted = model.config.classifier_loss_weight * outputs.classifier_loss
    torch.testing.assert_close(outputs.loss, outputs.generation_loss + outputs.alignment_loss + weighted)
    assert model(**batch).classifier_loss is None, "without tag_ids there are no targets"
    with pytest.raises(ValueError, match="class 9; this model has 5"):
        model(**batch, tag_ids=torch.tensor([9, 1]))


# Label vocabulary


@pytest.mark.parametrize(
    ("input_ids", "counts", "message"),
    [
        ([[5]], None, "1 tags for 2 classes; set num_tag_classes=1"),
        ([[5], [5]], None, "same tag"),
        ([[5], []], None, "1 to max_tag_tokens=16"),
        ([[5], [6] * 17], None, "1 to max_tag_tokens=16"),
        ([[5], [6]], [3], "1 counts for 2 classes"),
        ([[5], [6]], [3, 0], "at least 1"),
    ],
)
def test_an_invalid_label_vocabulary_is_reported(tower_configs, input_ids, counts, message):
    config = OPTSGConfig(text_config=tower_configs["bert"].to_dict(), frame_feature_size=6, num_tag_classes=2)
    with pytest.raises(ValueError, match=message):
        LabelVocabulary(config).set_tags(input_ids, counts)


def test_the_label_vocabulary_is_saved_with_the_model(model, inputs, tmp_path):
    settings = {"num_candidates": 3, "fusion_weights": [0.7, 0.6, -0.2, 0.9, -0.1]}
    expected = model.generate(**inputs, **settings)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path).generate(**inputs)
    torch.testing.assert_close(loaded.tag_scores, expected.tag_scores)
    assert torch.equal(loaded.sequences, expected.sequences)


# Generation


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_candidates_are_the_tags_with_the_highest_logits(model, inputs, decoding):
    without = model.generate(**inputs, decoding=decoding)
    outputs = model.generate(**inputs, decoding=decoding, num_candidates=2, fusion_weights=(1.0, 0.5, 0.0, 1.0, 0.0))
    logits = reference_logits(model, inputs)
    for index in range(2):
        candidates = {tuple(TAGS[tag]) for tag in logits[index].topk(2).indices.tolist()}
        generated = ranks_by_tag(without, index)
        assert set(ranks_by_tag(outputs, index)) == set(generated) | candidates
        for tag, rank in ranks_by_tag(outputs, index).items():
            slot_score = without.tag_scores[index, generated[tag]].item() if tag in generated else 0
            assert outputs.slot_scores[index, rank].item() == pytest.approx(slot_score)
            assert (outputs.slots[index, rank] == -1) == (tag not in generated)
            if list(tag) in TAGS:
                expected = logits[index, TAGS.index(list(tag))].item()
                assert outputs.classifier_logits[index, rank].item() == pytest.approx(expected, abs=1e-4)


def test_constrained_generation_has_no_classifier_candidates(model, inputs):
    settings = {"num_candidates": 5, "fusion_weights": FUSION_WEIGHTS}
    outputs = model.generate(**inputs, tag_vocabulary=[[5]], **settings)
    assert all(set(ranks_by_tag(outputs, index)) <= {(5,)} for index in range(2))
    outputs = model.generate(**inputs, suppress_tokens=[5, 7], **settings)
    assert not {5, 7} & {token for index in range(2) for tag in ranks_by_tag(outputs, index) for token in tag}


def test_at_pad_bias_equals_generate_with_candidates_too(model, inputs):
    settings = {"num_candidates": 3, "fusion_weights": (0.7, 0.6, -0.2, 0.9, -0.1)}
    lowest = model.generate(**inputs, pad_bias=-5.0, output_slots=True, **settings)
    for pad_bias in (-5.0, 0.0, 2.0):
        expected = model.generate(**inputs, pad_bias=pad_bias, **settings)
        actual = lowest.at_pad_bias(pad_bias, PAD)
        for name in ("tag_scores", "slot_scores", "classifier_logits"):
            torch.testing.assert_close(actual[name], expected[name])
        assert [ranks_by_tag(actual, i) for i in range(2)] == [ranks_by_tag(expected, i) for i in range(2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion_weights": (1.0, 2.0)}, "five numbers"),
        ({"fusion_weights": (1.0, 2.0, float("nan"), 1.0, 0.0)}, "fusion_weights=nan"),
        ({"num_candidates": -1, "fusion_weights": FUSION_WEIGHTS}, "num_candidates=-1"),
        ({"num_candidates": 5}, "num_candidates=5 needs fusion_weights"),
    ],
)
def test_invalid_fusion_settings_are_reported(model, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **settings)


def test_a_model_without_classifier_rejects_its_settings(make_model, inputs):
    model = make_model(None, frame_feature_size=6, use_tag_classifier=False)
    with pytest.raises(ValueError, match="must have a tag classifier"):
        model.generate(**inputs, fusion_weights=FUSION_WEIGHTS)
    with pytest.raises(ValueError, match="use_tag_classifier=False"):
        model.set_label_vocabulary([[5]])
