"""Parts of result files."""

import platform

import pytest

from modeling_optsg import TagEvaluator
from modeling_optsg.evaluation.calibration import reliability
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import best_fit, environment, novel_hits, score_modalities


def test_the_environment_names_versions_machine_and_commit(tmp_path, monkeypatch):
    found = environment()
    assert found.keys() == {"python", "versions", "machine", "commit"}
    assert found["python"] == platform.python_version() and {"torch", "transformers"} <= found["versions"].keys()
    monkeypatch.chdir(tmp_path)
    assert environment()["commit"] is None, "outside a repository"
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None, "without git"


def test_novel_hits_are_novel_tags_in_the_ground_truth():
    predictions = [
        [{"tag": "a", "score": 0.9, "novel": True}, {"tag": "b", "score": 0.8, "novel": False}],
        [{"tag": "a", "score": 0.7, "novel": True}],
    ]
    assert novel_hits(predictions, [["a", "b"], ["c"]]) == {"predicted": 2, "exact_hits": 1}
    with pytest.raises(ValueError):
        novel_hits(predictions, [["a"]])


def test_the_best_fit_has_the_given_settings():
    tried = [
        {"slot_weight": weight, "pad_bias": bias, "validation": {"full_f1": full, "micro_f1": micro}}
        for weight, bias, full, micro in [(0.0, 0.0, 30, 60), (0.0, -1.0, 35, 40), (1.0, 0.0, 90, 90)]
    ]
    assert best_fit(tried, "full_f1", slot_weight=0.0) is tried[1]
    assert best_fit(tried, "full_f1@micro_f1>=50", slot_weight=0.0) is tried[0]
    assert best_fit(tried, "full_f1", slot_weight=0.0, pad_bias=0.0) is tried[0]
    assert best_fit(tried, "full_f1") is tried[2]
    assert best_fit(tried, "full_f1", slot_weight=0.5) is None


def test_modalities_are_scored_together_and_alone(tiny_model, tiny_processor):
    examples = [{"title": "a red square"}, {"title": "blue"}]
    evaluator = TagEvaluator([["red"], ["blue"]], tiny_processor.label_vocabulary, common_count=8)
    scores = score_modalities(tiny_model, tiny_processor, examples, evaluator, progress=False, pad_bias=-5.0)
    expected = evaluator.score(predict_tags(tiny_model, tiny_processor, examples, progress=False, pad_bias=-5.0))
    errors = [scores[name].pop("expected_calibration_error") for name in ("image+title", "title")]
    unfiltered = predict_tags(tiny_model, tiny_processor, examples, progress=False, pad_bias=-5.0, threshold=0.0)
    assert errors == [reliability(unfiltered, [["red"], ["blue"]])["expected_calibration_error"]] * 2
    assert scores["image+title"] == scores["title"] == expected
    assert expected["tags_per_example"] > 0 and scores["image"]["tags_per_example"] == 0
