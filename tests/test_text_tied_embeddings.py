"""Token and class embeddings that start from the text tower's features; tokens stay tied to them in training."""

import copy

import numpy as np
import pytest
import torch

from modeling_optsg.baselines.asymmetric_classifier import ASYForTagClassification
from modeling_optsg.baselines.configuration import ASYConfig
from modeling_optsg.training import (
    class_embeddings,
    copy_without_text_tying,
    initialize_classes_from_text,
    tie_tokens_to_text,
)
from modeling_optsg.training.text_tied_embeddings import text_directions


def test_directions_are_scaled_principal_components():
    torch.manual_seed(0)
    features = torch.randn(200, 6) * torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.1])
    features = features - features.mean(dim=0)
    projected = features @ text_directions(features, 4)
    assert projected.std().item() == pytest.approx(1.0, abs=0.01)
    covariance = projected.T @ projected / len(projected)
    deviations = covariance.diagonal().sqrt()
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), atol=1e-3, rtol=0)
    expected = torch.linalg.svdvals(features)[:4].sqrt()
    torch.testing.assert_close(deviations / deviations[0], expected / expected[0], atol=1e-3, rtol=0)
    # Components beyond the number of features are zero.
    assert (features @ text_directions(features, 8))[:, 6:].eq(0).all()


@pytest.fixture
def batch_of_one(tiny_processor):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return dict(tiny_processor(images=[image], titles=["a red square"], tags=[["red", "square"]]))


def test_tied_tokens_learn_together(make_model, tiny_processor, batch_of_one):
    model = make_model()
    tie_tokens_to_text(model, tiny_processor, 0.06)
    embedding = model.tag_decoder.token_embeddings
    tie = embedding.parametrizations.weight
    torch.testing.assert_close(embedding.weight, tie.original + tie[0].features @ tie[0].projection)
    # Tokens with a text start at its features, the others at random.
    texts = tie[0].features.any(dim=1)
    assert texts.any() and not texts.all()
    assert tie.original[texts].eq(0).all() and tie.original[~texts].ne(0).any(dim=1).all()
    model(**batch_of_one).loss.backward()
    assert tie.original.grad.ne(0).any() and tie[0].projection.grad.ne(0).any()


def test_a_copy_without_tying_gives_the_same_loss(make_model, tiny_processor, batch_of_one):
    model = make_model()
    tie_tokens_to_text(model, tiny_processor, 0.06)
    embedding = model.tag_decoder.token_embeddings
    before, expected = embedding.weight.detach().clone(), model(**batch_of_one).loss
    plain = copy_without_text_tying(model)
    torch.testing.assert_close(plain(**batch_of_one).loss, expected)
    assert plain.lm_head.weight is plain.tag_decoder.token_embeddings.weight
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in make_model().named_parameters()}
    # The model in training stays unchanged.
    torch.testing.assert_close(embedding.weight, before)
    assert model.tag_decoder.token_embeddings is embedding
    assert model.lm_head.weight is embedding.parametrizations.weight.original
    torch.testing.assert_close(model(**batch_of_one).loss, expected)


def test_a_copy_of_an_untied_model_is_equal(make_model):
    model = make_model()
    copied = copy_without_text_tying(model).state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in model.state_dict().items())


def test_classes_start_at_their_texts_and_examples_at_their_titles(tower_configs, tag_tokenizer):
    torch.manual_seed(0)
    config = ASYConfig(
        text_config=copy.deepcopy(tower_configs["bert"]),
        frame_feature_size=6,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        tag_vocab_size=len(tag_tokenizer),
        num_tag_classes=5,
    )
    model = ASYForTagClassification(config).eval()
    pooler, classifier = model.model.multimodal_encoder.evidence_pooler, model.tag_classifier
    assert class_embeddings(model) is classifier.class_embeddings
    before = pooler.title_projection.weight.clone()
    features = torch.randn(4, 16)
    initialize_classes_from_text(model, features, init_title=False)
    assert torch.equal(pooler.title_projection.weight, before)
    initialize_classes_from_text(model, features)
    centred = torch.nn.functional.layer_norm(features - features.mean(dim=0), (16,))
    # Unit vectors, in the space of the projected titles.
    expected = torch.nn.functional.normalize(centred @ pooler.title_projection.weight.T, dim=1)
    torch.testing.assert_close(classifier.class_embeddings.weight[:4], expected, atol=1e-4, rtol=1e-4)
    assert classifier.class_embeddings.weight[4].eq(0).all(), "the class without text"
    assert classifier.bias.eq(-5).all()
    copied = copy_without_text_tying(model).tag_classifier
    assert torch.equal(copied.class_embeddings.weight, classifier.class_embeddings.weight)


def test_class_embeddings_are_those_of_a_classifier(make_model):
    assert class_embeddings(make_model()) is None
    model = make_model(num_tag_classes=3)
    assert class_embeddings(model) is model.tag_classifier.class_embeddings
