"""Tag classifier: its loss, its label vocabulary, and its part in generation."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration
from modeling_optsg.tag_classifier import LabelVocabulary, asymmetric_loss

PAD = 0
TAGS = [[5], [6, 7], [8, 5, 9], [7], [10, 4]]
TAGS_PADDED = [tag + [-100] * (3 - len(tag)) for tag in TAGS]
FUSION_WEIGHTS = (1.0, 1.0, 0.0, 1.0, 0.0)


@pytest.fixture
def model(make_model):
    model = make_model(None, frame_feature_size=6, tag_vocab_size=12, num_prompts=3, max_tag_tokens=4)
    model.set_label_vocabulary(TAGS)
    with torch.no_grad():
        model.tag_classifier.bias.normal_()
    return model.eval()


def test_a_new_vocabulary_shares_the_configuration(make_model):
    model = make_model(None, frame_feature_size=6)
    model.set_label_vocabulary(TAGS)
    model.set_attn_implementation("eager")
    encoder = model.model.multimodal_encoder
    for attention in (encoder.layers[0].self_attention, encoder.evidence_pooler.attention_pooler.attention):
        assert attention.config._attn_implementation == "eager"


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {"frame_features": 3 * torch.randn(2, 2, 6)}


@torch.no_grad()
def reference_logits(model, inputs):
    """Computes classifier logits `[batch, tags]`, one tag and one example at a time."""
    classifier = model.tag_classifier
    pairs = list(zip(classifier.class_embeddings.weight, classifier.bias))
    vectors = model.model(**inputs).evidence.vectors
    return torch.stack([torch.stack([vector @ weight + bias for weight, bias in pairs]) for vector in vectors])


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
        for logit, is_present in zip(row, target_row):
            p = 1 / (1 + math.exp(-logit))
            shifted = max(p - 0.05, 0)
            total -= (1 - p) * math.log(p) if is_present else shifted**4 * math.log(1 - shifted)
    present = targets.nonzero(as_tuple=True)
    torch.testing.assert_close(asymmetric_loss(logits, present, 4.0, 1.0, 0.05), torch.tensor(total / 3))
    binary_cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 3
    torch.testing.assert_close(asymmetric_loss(logits, present, 0.0, 0.0, 0.0), binary_cross_entropy)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_leaving_out_easy_classes_changes_no_gradient(margin):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(6, 40, generator=generator) - 3).requires_grad_()
    is_present = torch.rand(6, 40, generator=generator) < 0.1
    p = logits.sigmoid()
    shifted = (p - margin).clamp(min=0)
    terms = torch.where(is_present, (1 - p) * p.log(), shifted**4 * (1 - shifted).log())
    assert margin == 0 or (shifted == 0).sum() > 100, "most classes are easy"
    expected = -terms.sum() / 6
    [expected_gradient] = torch.autograd.grad(expected, logits)
    loss = asymmetric_loss(logits, is_present.nonzero(as_tuple=True), 4.0, 1.0, margin)
    [gradient] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_the_asymmetric_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[-100.0, 100.0, 100.0, -100.0]], requires_grad=True)
    for margin in (0.0, 0.05):
        loss = asymmetric_loss(logits, (torch.tensor([0, 0]), torch.tensor([0, 1])), 4.0, 1.0, margin)
        [gradient] = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all() and loss > 99


@torch.no_grad()
def test_the_classifier_loss_covers_the_label_vocabulary(model, inputs):
    batch = inputs | {
        "labels": torch.tensor([[TAGS_PADDED[4], [-100] * 3], [TAGS_PADDED[4], TAGS_PADDED[3]]]),
        "tag_features": torch.randn(2, 2, 16),
    }
    outputs = model(**batch)
    present = torch.tensor([[0, 0, 0, 0, 1.0], [0, 0, 0, 1, 1]]).nonzero(as_tuple=True)
    expected = asymmetric_loss(reference_logits(model, inputs), present, 4.0, 1.0, 0.05)
    torch.testing.assert_close(outputs.classifier_loss, expected)
    weighted = model.config.classifier_loss_weight * outputs.classifier_loss
    torch.testing.assert_close(outputs.loss, outputs.generation_loss + outputs.alignment_loss + weighted)
    one_unknown = batch["labels"].clone()
    one_unknown[1, 1] = torch.tensor([11, 11, 11])
    present = torch.tensor([[0, 0, 0, 0, 1.0], [0, 0, 0, 0, 1]]).nonzero(as_tuple=True)
    expected = asymmetric_loss(reference_logits(model, inputs), present, 4.0, 1.0, 0.05)
    torch.testing.assert_close(model(**batch | {"labels": one_unknown}).classifier_loss, expected)
    unknown = torch.full((2, 2, 3), 11)
    assert model(**batch | {"labels": unknown}).classifier_loss == 0, "nothing is known of these tags"


@torch.no_grad()
def test_title_and_image_alone_have_losses_of_their_own(model):
    """The second example's image belongs to another example; the third has no title, the fourth no image."""
    torch.manual_seed(2)
    config, classifier = model.config, model.tag_classifier
    inputs = {"frame_features": torch.randn(4, 2, 6), "title_features": torch.randn(4, 3, 16)}
    inputs["frame_mask"] = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]])
    inputs["attention_mask"] = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    evidence = model.model(**inputs).evidence
    classes = [[4, 0], [0], [3, 4], [3, 0]]
    labels = torch.tensor([[TAGS_PADDED[own[0]], TAGS_PADDED[own[-1]]] for own in classes])
    labels[1, 1] = -100

    def loss(vectors, examples):
        targets = torch.zeros(len(examples), 5)
        for row, example in enumerate(examples):
            targets[row, classes[example]] = 1
        logits = vectors[examples] @ classifier.class_embeddings.weight.T + classifier.bias
        return asymmetric_loss(logits, targets.nonzero(as_tuple=True), 4.0, 1.0, 0.05) * len(examples) / 4

    mismatched = torch.tensor([False, True, False, False])
    whole = loss(evidence.vectors, [0, 1, 2, 3])
    titles, images = loss(evidence.title_vectors, [0, 1]), loss(evidence.image_vectors, [0, 1])
    config.title_loss_weight, config.image_loss_weight = 2.0, 0.25
    found = classifier(evidence, labels)
    torch.testing.assert_close(found, whole + 2.0 * titles + 0.25 * images)
    found = classifier(evidence, labels, mismatched)
    # The gate learns from the two examples with an image and a title.
    gate = torch.nn.functional.binary_cross_entropy_with_logits(evidence.match_logits[:2], torch.tensor([1.0, 0.0]))
    gate = gate * 2 / 4
    torch.testing.assert_close(found, whole + 2.0 * titles + 0.25 * loss(evidence.image_vectors, [0]) + gate)
    config.title_loss_weight = config.image_loss_weight = 0.0
    torch.testing.assert_close(classifier(evidence, labels, mismatched), whole + gate)


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


@pytest.fixture(scope="module")
def each_modality():
    """Examples with an image and a title, an image alone, and a title alone."""
    generator = torch.Generator().manual_seed(3)
    features = {"frame_features": (3, 2, 6), "title_features": (3, 4, 16)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in features.items()}
    inputs |= {"frame_mask": torch.tensor([[1, 1], [1, 1], [0, 0]])}
    return inputs | {"attention_mask": torch.tensor([[1] * 4, [0] * 4, [1] * 4])}


def test_each_modality_has_its_own_threshold(model, each_modality):
    settings = {"num_candidates": 5, "fusion_weights": FUSION_WEIGHTS, "pad_bias": -5.0}
    scores = model.generate(**each_modality, **settings).tag_scores
    # Between the second and the third tag of each example.
    middles = ((scores[:, 1] + scores[:, 2]) / 2).tolist()
    thresholds = dict(zip(("image+title", "image", "title"), middles))
    for threshold in (thresholds, {"parallel": thresholds}):
        found = model.generate(**each_modality, **settings, threshold=threshold)
        assert found.tag_scores.gt(0).sum(dim=1).tolist() == [2, 2, 2]
    # What is not given counts as for an image with a title.
    found = model.generate(**each_modality, **settings, threshold={"image+title": middles[0], "image": 1.0})
    expected = model.generate(**each_modality, **settings, threshold=middles[0]).tag_scores.gt(0).sum(dim=1)
    assert found.tag_scores.gt(0).sum(dim=1).tolist() == [2, 0, int(expected[2])]


def test_each_modality_is_tagged_in_half_precision(model, each_modality):
    # A trained model measures how familiar an image is.
    model.model.multimodal_encoder.evidence_pooler.standardizer.half_familiar_distance.fill_(1.0)
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in each_modality.items()}
    scores = model.to(torch.bfloat16).generate(**inputs, fusion_weights=FUSION_WEIGHTS, num_candidates=3).tag_scores
    assert scores[:, 0].gt(0).all()


def test_each_modality_has_its_own_fusion_weights(model, each_modality):
    inputs = each_modality
    names = ("image+title", "image", "title")
    by_modality = {
        "image+title": FUSION_WEIGHTS,
        "image": (0.5, 0.2, 1.0, 0.4, 2.0),
        "title": (0.1, 2.0, -1.0, 0.3, 0),
    }
    found = model.generate(**inputs, num_candidates=3, fusion_weights=by_modality)
    for index, name in enumerate(names):
        expected = model.generate(**inputs, num_candidates=3, fusion_weights=by_modality[name])
        for weights in (found, expected):
            assert weights.tag_scores[index].gt(0).any()
        scores = [outputs.tag_scores[index][outputs.tag_scores[index] > 0] for outputs in (found, expected)]
        torch.testing.assert_close(*scores)
        assert ranks_by_tag(found, index) == ranks_by_tag(expected, index)
    # What is not given is weighted as an image with a title is; decodings have weights of their own.
    whole = {"image+title": FUSION_WEIGHTS, "title": by_modality["title"]}
    found = model.generate(**inputs, num_candidates=3, fusion_weights={"parallel": whole})
    expected = model.generate(**inputs, num_candidates=3, fusion_weights=by_modality | {"image": FUSION_WEIGHTS})
    torch.testing.assert_close(found.tag_scores, expected.tag_scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion_weights": {"image+title": (1.0, 2.0)}}, "five numbers"),
        ({"fusion_weights": {"image": FUSION_WEIGHTS}}, r"expected 'image\+title'"),
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
    with pytest.raises(ValueError, match="fusion_weights need a tag classifier"):
        model.generate(**inputs, fusion_weights=FUSION_WEIGHTS)
    with pytest.raises(ValueError, match="use_tag_classifier=False"):
        model.set_label_vocabulary([[5]])
