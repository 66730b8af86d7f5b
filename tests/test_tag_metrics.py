"""The metrics of [`TagEvaluator`] equal plain loops written from their definitions."""

import json
import random

import pytest

from modeling_optsg import TagEvaluator
from modeling_optsg.evaluation.metrics import METRICS, metric_value, parse_metric

TRAIN_COUNTS = {f"tag{n}": n * n for n in range(1, 12)}


@pytest.fixture(scope="module")
def benchmark():
    """References and predictions of 60 examples; some tags are not training tags, some training tags no references."""
    generator = random.Random(0)
    tags = [f"tag{n}" for n in range(1, 15) if n != 4]
    references = [generator.sample(tags, generator.randint(0, 5)) for _ in range(60)]
    predictions = []
    for reference in references:
        wrong = generator.sample([*tags, "tag4", "unknown"], 3)
        predicted = {tag for tag in [*reference, *wrong] if generator.random() < 0.6}
        predictions.append([{"tag": tag, "score": generator.random()} for tag in sorted(predicted)])
    return references, predictions


def test_f1_by_frequency_equals_a_plain_loop(benchmark, evaluator):
    references, predictions = benchmark
    groups = evaluator.by_frequency(predictions, [1, 10, 50])
    assert [(group["from"], group["to"]) for group in groups] == [(1, 9), (10, 49), (50, None)]
    for group in groups:
        tags = [
            tag
            for tag in evaluator.evaluated_tags
            if group["from"] <= TRAIN_COUNTS[tag] <= (group["to"] or float("inf"))
        ]
        expected = []
        for tag in tags:
            predicted = [tag in {p["tag"] for p in row} for row in predictions]
            present = [tag in row for row in references]
            expected.append(f1(sum(a and b for a, b in zip(predicted, present)), sum(predicted), sum(present)))
        assert group["tags"] == len(tags) and group["f1"] == pytest.approx(100 * mean(expected), abs=0.01)
    whole = sum(group["tags"] * group["f1"] for group in groups) / sum(group["tags"] for group in groups)
    assert whole == pytest.approx(evaluator.score(predictions)["full_f1"], abs=0.02)
    with pytest.raises(ValueError, match="ascending order"):
        evaluator.by_frequency(predictions, [10, 1])


@pytest.fixture(scope="module")
def evaluator(benchmark):
    return TagEvaluator(benchmark[0], TRAIN_COUNTS, common_count=25)


def f1(found, predicted, present):
    precision, recall = found / predicted if predicted else 0, found / present if present else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def plain_score(references, predictions, threshold):
    predicted = [{p["tag"] for p in tags if p["score"] >= threshold} for tags in predictions]
    examples = list(zip(map(set, references), predicted))
    evaluated = {tag for tags in references for tag in tags} & TRAIN_COUNTS.keys()

    def tag_f1(tag):
        return f1(
            sum(tag in truth and tag in guess for truth, guess in examples),
            sum(tag in guess for _, guess in examples),
            sum(tag in truth for truth, _ in examples),
        )

    hits = sum(len(truth & guess) for truth, guess in examples)
    guesses, truths = sum(len(guess) for _, guess in examples), sum(len(truth) for truth, _ in examples)
    return {
        "full_f1": mean(tag_f1(tag) for tag in evaluated),
        "rare_f1": mean(tag_f1(tag) for tag in evaluated if TRAIN_COUNTS[tag] < 25),
        "common_f1": mean(tag_f1(tag) for tag in evaluated if TRAIN_COUNTS[tag] >= 25),
        "micro_precision": hits / guesses if guesses else 0,
        "micro_recall": hits / truths,
        "micro_f1": f1(hits, guesses, truths),
        "example_precision": mean(len(truth & guess) / len(guess) if guess else 0 for truth, guess in examples),
        "example_recall": mean(len(truth & guess) / len(truth) if truth else 0 for truth, guess in examples),
        "example_f1": mean(f1(len(truth & guess), len(guess), len(truth)) for truth, guess in examples),
        "novel_ratio": mean([tag not in TRAIN_COUNTS for _, guess in examples for tag in guess] or [0]),
    } | {"tags_per_example": guesses / len(examples) / 100}


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_every_metric_equals_a_plain_loop(benchmark, evaluator, threshold):
    metrics = evaluator.score(benchmark[1], threshold)
    expected = plain_score(*benchmark, threshold)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(100 * value, abs=0.0051), name


def test_full_is_the_weighted_mean_of_rare_and_common(benchmark, evaluator):
    common = sum(TRAIN_COUNTS[tag] >= 25 for tag in evaluator.evaluated_tags)
    rare = len(evaluator.evaluated_tags) - common
    assert rare > 1 and common > 1
    metrics = evaluator.score(benchmark[1], 0.3)
    weighted = (rare * metrics["rare_f1"] + common * metrics["common_f1"]) / (rare + common)
    assert metrics["full_f1"] == pytest.approx(weighted, abs=0.011)


def test_evaluated_tags_are_training_tags_with_a_reference(benchmark, evaluator):
    references = {tag for tags in benchmark[0] for tag in tags}
    assert evaluator.evaluated_tags == sorted(references & TRAIN_COUNTS.keys())
    assert TagEvaluator([["a", "b"]], {"a": 1, "b": 0, "c": 5}).evaluated_tags == ["a"], "b is not a training tag"


def test_perfect_and_empty_predictions(benchmark, evaluator):
    references = [tags for tags in benchmark[0] if tags]
    evaluator = TagEvaluator(references, TRAIN_COUNTS, common_count=25)
    perfect = evaluator.score([[{"tag": tag, "score": 1.0} for tag in tags] for tags in references])
    nothing = evaluator.score([[] for _ in references])
    for name in ("full_f1", "rare_f1", "common_f1", "micro_f1", "example_f1"):
        assert (perfect[name], nothing[name]) == (100, 0)
    assert nothing["micro_precision"] == nothing["novel_ratio"] == nothing["tags_per_example"] == 0


def test_the_average_over_no_tags_is_none():
    evaluator = TagEvaluator([["a"]], {"a": 30})
    metrics = evaluator.score([[{"tag": "a", "score": 1.0}]])
    assert metrics["common_f1"] == 100 and metrics["rare_f1"] is None and set(metrics) == set(METRICS)
    json.dumps(metrics, allow_nan=False)
    for metric in ("rare_f1", "full_f1+rare_f1", "full_f1@rare_f1>=5"):
        with pytest.raises(ValueError, match="no evaluated tag is rare"):
            evaluator.check_metric(metric)
    evaluator.check_metric("common_f1+micro_f1@micro_f1>=5")


@pytest.mark.parametrize(
    "metric, message",
    [
        ("full", "'full' is not a metric; expected one of full_f1"),
        ("full_f1+", "'' is not a metric"),
        ("full_f1@micro>=5", "'micro' is not a metric"),
        ("full_f1@micro_f1>=x", "needs a number after micro_f1>="),
        ("full_f1@micro_f1", "needs a number after micro_f1>="),
        ("full_f1@micro_f1>=nan", "needs a number after micro_f1>="),
    ],
)
def test_wrong_metrics_are_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        parse_metric(metric)


def test_equally_good_thresholds_are_told_apart():
    # Tag c is not a training tag: it counts for micro F1 only.
    predictions = [[{"tag": "a", "score": 0.9}, {"tag": "c", "score": 0.3}], [{"tag": "b", "score": 0.7}]]
    threshold, metrics = TagEvaluator([["a"], ["b"]], {"a": 1, "b": 1}).best_threshold(predictions, "full_f1")
    # All thresholds up to 0.7 have the same Full F1, and those above 0.3 the best micro F1. The largest is 0.7.
    assert (threshold, metrics["micro_f1"]) == (0.7, 100)


def test_a_sweep_equals_the_score_at_every_threshold(benchmark, evaluator):
    thresholds = [0.0, 0.1, 0.45, 0.7, 1.0]
    assert evaluator.sweep(benchmark[1], thresholds) == [evaluator.score(benchmark[1], t) for t in thresholds]


@pytest.mark.parametrize("metric", ["full_f1", "micro_f1", "micro_precision"])
@pytest.mark.parametrize("steps", [50, 7])
def test_the_best_threshold_is_the_best_of_the_grid(benchmark, evaluator, metric, steps):
    threshold, metrics = evaluator.best_threshold(benchmark[1], metric, steps)
    grid = {round(top * step / steps, 4) for step in range(steps) for top in (1, 0.1)}
    assert threshold in grid and metrics == evaluator.score(benchmark[1], threshold)
    best = max(evaluator.score(benchmark[1], t)[metric] for t in grid)
    assert metrics[metric] == best


def test_the_metrics_are_those_of_the_rounded_threshold():
    """1 / 7 is a threshold of the grid; it is rounded up, above the score of a prediction."""
    evaluator = TagEvaluator([["a"], ["b"]], {"a": 1, "b": 30})
    predictions = [[{"tag": "a", "score": 1 / 7}, {"tag": "b", "score": 0.142}], [{"tag": "b", "score": 0.5}]]
    threshold, metrics = evaluator.best_threshold(predictions, "micro_precision", steps=7)
    assert metrics == evaluator.score(predictions, threshold)


def test_invalid_input_is_reported(evaluator, benchmark):
    with pytest.raises(ValueError, match="59 predictions for 60 reference examples"):
        evaluator.score(benchmark[1][1:])
    twice = [[{"tag": "tag1", "score": 0.5}, {"tag": "tag1", "score": 0.4}], *benchmark[1][1:]]
    with pytest.raises(ValueError, match="'tag1' is listed twice for example 0"):
        evaluator.score(twice)
    with pytest.raises(ValueError, match="'tag1' of example 0 has the score None"):
        evaluator.score([[{"tag": "tag1", "score": None}], *benchmark[1][1:]])
    with pytest.raises(ValueError, match="'tag1' of example 0 has the score nan"):
        evaluator.score([[{"tag": "tag1", "score": float("nan")}], *benchmark[1][1:]])
    with pytest.raises(ValueError, match="metric_for_best_model='full' is not a metric.*full_f1"):
        evaluator.best_threshold(benchmark[1], "full")
    with pytest.raises(ValueError, match="The references have no tags"):
        TagEvaluator([[], []], {"b": 3})


def test_without_evaluated_tags_only_full_f1_is_unknown():
    evaluator = TagEvaluator([["a", "c"], []], {"b": 3})
    metrics = evaluator.score([[{"tag": "a", "score": 0.5}], [{"tag": "b", "score": 0.5}]])
    assert {name for name, value in metrics.items() if value is None} == {"full_f1", "rare_f1", "common_f1"}
    assert (metrics["micro_f1"], metrics["example_f1"], metrics["novel_ratio"]) == (50.0, 33.33, 50.0)
    for metric in ("full_f1", "micro_f1"):
        with pytest.raises(ValueError, match="No reference tag is a training tag"):
            evaluator.check_metric(metric)
    with pytest.raises(ValueError, match="No reference tag is a training tag"):
        evaluator.best_threshold([[], []], "full_f1")


def test_a_metric_may_have_a_floor():
    metrics = {"full_f1": 40.0, "micro_f1": 51.0}
    assert metric_value(metrics, "full_f1+micro_f1") == 45.5
    assert metric_value(metrics, "full_f1@micro_f1>=51") == 40.0
    below = [metric_value({"full_f1": 90.0, "micro_f1": micro}, "full_f1@micro_f1>=51") for micro in (50.0, 20.0)]
    assert 0.0 > below[0] > below[1]
    with pytest.raises(ValueError, match="'macro' is not a metric"):
        metric_value(metrics, "full_f1@macro>=3")
