"""The fit of the weights by which the slots and the example as a whole speak for a tag."""

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
)
from modeling_optsg.evaluation.prediction import predict_tags

EXAMPLES = [
    {"title": "a red square", "tags": ["red", "square"]},
    {"title": "blue", "tags": ["blue", "colour"]},
    {"title": "a dog", "tags": ["colour"]},
]


def test_a_logistic_regression_finds_the_weights_the_targets_were_drawn_with():
    random = np.random.default_rng(0)
    inputs = random.normal(size=20_000)
    targets = (random.random(20_000) < expit(1.7 * inputs - 0.8)).astype(float)
    assert logistic_regression(inputs, targets) == pytest.approx([1.7, -0.8], abs=0.06)
    assert logistic_regression(inputs[:0], targets[:0]).tolist() == [1, -1]


def test_the_metrics_of_the_fit_are_those_of_the_settings_it_leaves(make_model, tiny_processor):
    model = make_model(num_prompts=4)
    tags = sorted(tiny_processor.label_vocabulary)
    ids = tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    model.set_label_vocabulary(ids, [tiny_processor.label_vocabulary[tag] for tag in tags])
    with torch.no_grad():
        model.tag_classifier.classifier.class_embeddings.weight.normal_()
    MODEL_TYPES["op-tsg"].set_search(model, num_return_sequences=3, num_candidates=4)
    assert model.generation_config.num_beams == 3 and model.generation_config.num_candidates == 4
    evaluator = TagEvaluator([example["tags"] for example in EXAMPLES], tiny_processor.label_vocabulary)
    settings = {"decoding": "parallel", "objective": "micro_f1", "grid": {"pad_bias": (0.0, -3.0)}}
    fit = fit_generation_config(model, tiny_processor, EXAMPLES, evaluator, **settings)
    tried = [(row["slot_weight"], row["logit_adjustment"]) for row in fit["tried"]]
    assert tried[: len(SLOT_WEIGHTS)] == [(share, 0.0) for share in SLOT_WEIGHTS] and len(tried) == len(set(tried))
    # What slots alone say is not adjusted.
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


def test_a_model_that_is_told_its_tags_anew_forgets_what_it_learned_of_others(make_model, tiny_processor):
    model = make_model().train()
    model.set_label_vocabulary([[5], [6, 7]])
    assert model.tag_classifier.training
    with pytest.raises(ValueError, match="the same tag"):
        model.set_label_vocabulary([[5], [5], [6]])
    # A refused list changes nothing.
    assert model.config.num_tag_classes == len(model.tag_classifier.label_vocabulary) == 2
    model.set_label_vocabulary([[8], [9], [10]])
    assert model.tag_classifier.label_vocabulary.index() == {(8,): 0, (9,): 1, (10,): 2}
    assert model.tag_classifier.classifier.bias.eq(-5).all() and model.config.num_tag_classes == 3
