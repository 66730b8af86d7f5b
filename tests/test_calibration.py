"""Fitting of decoding settings and fusion weights, and the reliability of probabilities."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from modeling_optsg import TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation import calibration
from modeling_optsg.evaluation.calibration import (
    LOGIT_ADJUSTMENTS,
    SLOT_WEIGHTS,
    fit_generation_config,
    fit_modality,
    logistic_regression,
    reliability,
)
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.generation_settings import MODALITIES

EXAMPLES = [
    {"title": "a red square", "tags": ["red", "square"]},
    {"title": "blue", "tags": ["blue", "colour"]},
    {"title": "a dog", "tags": ["colour"]},
]
MODALITY_FIT = {"decoding": "parallel", "grid": {"pad_bias": (-3.0,)}, "progress": False}


def test_a_logistic_regression_finds_the_true_weights():
    random = np.random.default_rng(0)
    inputs = random.normal(size=20_000)
    targets = (random.random(20_000) < expit(1.7 * inputs - 0.8)).astype(float)
    assert logistic_regression(inputs, targets) == pytest.approx([1.7, -0.8], abs=0.06)
    assert logistic_regression(inputs[:0], targets[:0]).tolist() == [1, -1]


def test_the_stored_settings_give_the_metrics_of_the_fit(make_model, tiny_processor):
    model = make_model(num_prompts=4)
    tags = sorted(tiny_processor.label_vocabulary)
    ids = tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    model.set_label_vocabulary(ids, [tiny_processor.label_vocabulary[tag] for tag in tags])
    with torch.no_grad():
        model.tag_classifier.class_embeddings.weight.normal_()
    MODEL_TYPES["op-tsg"].set_search(model, num_return_sequences=3, num_candidates=4)
    assert model.generation_config.num_beams == 3 and model.generation_config.num_candidates == 4
    evaluator = TagEvaluator([example["tags"] for example in EXAMPLES], tiny_processor.label_vocabulary)
    settings = {"decoding": "parallel", "metric_for_best_model": "micro_f1", "grid": {"pad_bias": (0.0, -3.0)}}
    fit = fit_generation_config(model, tiny_processor, EXAMPLES, evaluator, **settings)
    tried = [(row["slot_weight"], row["logit_adjustment"]) for row in fit["tried"]]
    assert tried[: len(SLOT_WEIGHTS)] == [(weight, 0.0) for weight in SLOT_WEIGHTS] and len(tried) == len(set(tried))
    # The logit adjustment does not affect the slots.
    assert (1.0, LOGIT_ADJUSTMENTS[1]) not in tried
    best = fit["slot_weight"], fit["logit_adjustment"]
    assert best[0] == 1 or {(best[0], adjustment) for adjustment in LOGIT_ADJUSTMENTS} <= set(tried)
    assert {row["pad_bias"] for row in fit["tried"]} == {-3.0}
    assert fit["validation"]["micro_f1"] == max(row["validation"]["micro_f1"] for row in fit["tried"]) > 0
    settings = model.generation_config
    assert settings.fusion_weights == {"parallel": fit["fusion_weights"]}
    assert settings.logit_adjustment == {"parallel": fit["logit_adjustment"]}
    assert (settings.threshold, settings.pad_bias) == ({"parallel": fit["threshold"]}, {"parallel": -3.0})
    found = evaluator.score(predict_tags(model, tiny_processor, EXAMPLES, decoding="parallel"))
    assert found["micro_f1"] == pytest.approx(fit["validation"]["micro_f1"], abs=0.5)


@pytest.fixture(scope="module")
def examples():
    """Examples with a title and frame features."""
    random = np.random.default_rng(3)
    titles = ["a red square", "blue", "a dog", "green mail", "red dog", "a blue square", "mail", "green"]
    tag_sets = [["red", "square"], ["blue", "colour"], ["colour"], ["e-mail"]]
    tag_sets += [["red", "colour"], ["blue", "square"], ["e-mail", "colour"], ["colour", "square"]]
    return [
        {"title": title, "frame_features": 3 * random.normal(size=(1, 3, 6)).astype(np.float32), "tags": tags}
        for title, tags in zip(titles, tag_sets, strict=True)
    ]


@pytest.fixture
def classifying_model(make_model, tiny_processor):
    """A model for frame features whose tag classifier knows the training tags."""
    model = make_model(None, frame_feature_size=6)
    tags = sorted(tiny_processor.label_vocabulary)
    ids = tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    torch.manual_seed(2)
    model.set_label_vocabulary(ids, [tiny_processor.label_vocabulary[tag] for tag in tags])
    with torch.no_grad():
        model.tag_classifier.class_embeddings.weight.normal_()
    MODEL_TYPES["op-tsg"].set_search(model, num_return_sequences=2, num_candidates=len(tags))
    return model


@pytest.fixture
def evaluator(examples, tiny_processor):
    return TagEvaluator([example["tags"] for example in examples], tiny_processor.label_vocabulary)


def columns(examples, *names):
    return [{name: example[name] for name in (*names, "tags")} for example in examples]


def predict_alone(model, processor, examples, modality, threshold=None):
    """Predict tags from one modality, with the stored settings but for the threshold."""
    settings = {"decoding": "parallel", "modalities": (modality,), "threshold": threshold, "max_tags": 1000}
    return predict_tags(model, processor, examples, progress=False, **settings)


def test_each_modality_is_fitted_to_its_own_predictions(classifying_model, tiny_processor, examples, evaluator):
    # No settings fulfil the condition, which leads to the settings with the most tags.
    metric = "micro_f1@tags_per_example>=20000"
    fit = fit_generation_config(
        classifying_model, tiny_processor, examples, evaluator, metric_for_best_model=metric, **MODALITY_FIT
    )
    for name in ("fusion_weights", "threshold"):
        stored = getattr(classifying_model.generation_config, name)
        assert stored == {"parallel": fit[name]} and tuple(fit[name]) == MODALITIES
    assert len({tuple(weights) for weights in fit["fusion_weights"].values()}) == 3
    for modality in ("image", "title"):
        all_tags = predict_alone(classifying_model, tiny_processor, examples, modality, threshold=0.0)
        # The condition is meant for examples with both modalities.
        threshold, metrics = evaluator.best_threshold(all_tags, "micro_f1")
        assert fit["threshold"][modality] == threshold
        assert evaluator.best_threshold(all_tags, metric)[0] < threshold
        predicted = predict_alone(classifying_model, tiny_processor, examples, modality)
        assert evaluator.score(predicted) == pytest.approx(metrics)


@pytest.mark.parametrize("modality", ["image", "title"])
def test_a_modality_has_the_slot_weight_with_the_best_metric(monkeypatch, modality):
    """Slots and classifier are equally sure of synthetic candidates, so both together are best."""
    random, calls = np.random.default_rng(0), []
    correct = random.random((100, 4)) < 0.5
    slot_logits, classifier_logits = (3 * correct - 1.5 + 2 * random.normal(size=(100, 4)) for _ in range(2))
    tags, is_novel = [*"abcd"], np.zeros(400, dtype=bool)

    def find(*args, **kwargs):
        calls.append(kwargs)
        logits = slot_logits.ravel(), classifier_logits.ravel(), np.zeros(400)
        return calibration._Candidates([tags] * 100, *logits, is_novel, correct.ravel().astype(float))

    monkeypatch.setattr(calibration, "_find_candidates", find)
    references = [[tag for tag, is_correct in zip(tags, row) if is_correct] for row in correct]
    args = (None, None, references, TagEvaluator(references, dict.fromkeys(tags, 1)), "micro_f1", modality)
    settings = {"logit_adjustment": 0.2, "pad_bias": -3.0}
    fit = fit_modality(*args, settings, decoding="parallel")
    assert calls == [{"modalities": (modality,), "pad_bias": -3.0, "decoding": "parallel"}]
    values = {}
    for slot_weight in SLOT_WEIGHTS:
        monkeypatch.setattr(calibration, "SLOT_WEIGHTS", (slot_weight,))
        values[slot_weight] = fit_modality(*args, settings)["validation"]["micro_f1"]
    assert fit["slot_weight"] == max(values, key=values.get) and 0 < fit["slot_weight"] < 1
    assert fit["validation"]["micro_f1"] == max(values.values()) > max(values[0.0], values[1.0]) + 2
    assert fit["logit_adjustment"] == 0.2, "the adjustment is that of examples with both"


@pytest.mark.parametrize(("missing", "column"), [("image", "title"), ("title", "frame_features")])
def test_a_modality_without_examples_has_the_settings_of_both(
    classifying_model, tiny_processor, examples, evaluator, missing, column
):
    fit = fit_generation_config(
        classifying_model, tiny_processor, columns(examples, column), evaluator, **MODALITY_FIT
    )
    for name in ("fusion_weights", "threshold"):
        assert tuple(fit[name]) == MODALITIES and fit[name][missing] == fit[name]["image+title"]
        assert getattr(classifying_model.generation_config, name) == {"parallel": fit[name]}
    # They are stored for examples of this kind as well.
    both = predict_tags(classifying_model, tiny_processor, examples, decoding="parallel", progress=False)
    assert any(both) and any(predict_alone(classifying_model, tiny_processor, examples, missing))


def test_examples_without_a_modality_do_not_change_its_fit(classifying_model, tiny_processor, examples, evaluator):
    """The tags of an example without a title are not missed by the fit for titles."""
    titles_only = [{"title": example["title"], "tags": example["tags"]} for example in examples]
    images_only = columns(examples, "frame_features")
    settings = {"logit_adjustment": 0.0, "pad_bias": -3.0}
    fits = []
    for rows, references in (
        (titles_only, evaluator.references),
        ([*titles_only, *images_only], [*evaluator.references, *evaluator.references]),
    ):
        own = TagEvaluator(references, evaluator.train_counts)
        args = (classifying_model, tiny_processor, rows, own, "full_f1", "title")
        fits.append(fit_modality(*args, settings, decoding="parallel", progress=False))
    for fit in fits:
        fit |= {"full_f1": fit.pop("validation")["full_f1"]}
    assert fits[0] == fits[1] and fits[0]["full_f1"] > 0


def test_a_new_label_vocabulary_resets_the_classifier(make_model, tiny_processor):
    model = make_model().train()
    model.set_label_vocabulary([[5], [6, 7]])
    assert model.tag_classifier.training
    with pytest.raises(ValueError, match="the same tag"):
        model.set_label_vocabulary([[5], [5], [6]])
    # A rejected vocabulary changes nothing.
    assert model.config.num_tag_classes == len(model.tag_classifier.label_vocabulary) == 2
    model.set_label_vocabulary([[8], [9], [10]])
    assert model.tag_classifier.label_vocabulary.class_index() == {(8,): 0, (9,): 1, (10,): 2}
    assert model.tag_classifier.bias.eq(-5).all() and model.config.num_tag_classes == 3


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_one_pass_fits_the_same_as_one_pass_per_pad_bias(make_model, tiny_processor, decoding, monkeypatch):
    references = [example["tags"] for example in EXAMPLES]
    evaluator = TagEvaluator(references, tiny_processor.label_vocabulary, common_count=5)
    grid = {"pad_bias": (0.0, -1.0, -3.0)}
    settings = {"decoding": decoding, "metric_for_best_model": "micro_f1", "grid": grid}
    model = make_model(use_tag_classifier=False)
    fit = fit_generation_config(model, tiny_processor, EXAMPLES, evaluator, **settings)
    assert [row["pad_bias"] for row in fit["tried"]] == [0.0, -1.0, -3.0]
    assert model.generation_config.pad_bias == {decoding: fit["pad_bias"]}
    monkeypatch.setattr(type(model), "independent_decodings", ())
    assert fit_generation_config(model, tiny_processor, EXAMPLES, evaluator, **settings) == fit


def test_reliability_compares_probabilities_with_the_ground_truth():
    predictions = [
        [{"tag": "a", "score": 0.95}, {"tag": "b", "score": 0.91}, {"tag": "c", "score": 0.04}],
        [{"tag": "a", "score": 1.0}, {"tag": "d", "score": 0.02}],
    ]
    assert reliability(predictions, [["a", "d"], ["a"]]) == {
        "table": [
            {"from": 0.0, "to": 0.1, "tags": 2, "mean_probability": 3.0, "correct": 0.0},
            {"from": 0.9, "to": 1.0, "tags": 3, "mean_probability": 95.3, "correct": 66.7},
        ],
        # (2 · 3.0 + 3 · 28.6) / 5
        "expected_calibration_error": 18.36,
    }


def test_reliability_without_predictions_is_empty():
    assert reliability([[], []], [["a"], ["b"]]) == {"table": [], "expected_calibration_error": 0.0}
