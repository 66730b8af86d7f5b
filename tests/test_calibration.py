"""Fitting of decoding settings and fusion weights, and the reliability of probabilities."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from modeling_optsg import TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation.calibration import (
    LOGIT_ADJUSTMENTS,
    SLOT_WEIGHTS,
    fit_generation_config,
    logistic_regression,
    reliability,
)
from modeling_optsg.evaluation.prediction import predict_tags

EXAMPLES = [
    {"title": "a red square", "tags": ["red", "square"]},
    {"title": "blue", "tags": ["blue", "colour"]},
    {"title": "a dog", "tags": ["colour"]},
]


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
        model.tag_classifier.classifier.class_embeddings.weight.normal_()
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
    assert model.tag_classifier.classifier.bias.eq(-5).all() and model.config.num_tag_classes == 3


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
