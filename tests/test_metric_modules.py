"""`tag_f1` and `tag_gain` as `evaluate` loads them."""

import random
import threading
import time
from pathlib import Path

import evaluate
import pytest

METRICS = Path(__file__).parents[1] / "metrics"
PREDICTIONS = [["arrow", "left", "weblink"], ["cat"], []]
REFERENCES = [["arrow", "back", "weblink"], ["cat", "pet"], ["pet"]]
TRAIN_COUNTS = {"arrow": 40, "left": 12, "back": 3, "cat": 5, "pet": 30, "tree": 9}


@pytest.fixture
def load(tmp_path, monkeypatch):
    def load(name, **settings):
        return evaluate.load(str(METRICS / name), cache_dir=str(tmp_path), **settings)

    return load


def test_tag_f1_by_hand(load):
    metrics = load("tag_f1").compute(
        predictions=PREDICTIONS, references=REFERENCES, train_counts=TRAIN_COUNTS, ks=[1, 2]
    )
    # arrow 1, back 0, cat 1, pet 0; arrow and pet are common.
    assert (metrics["full_f1"], metrics["rare_f1"], metrics["common_f1"]) == (50, 50, 50)
    assert metrics["evaluated_tags"] == 4
    assert metrics["micro_precision"] == 75 and metrics["micro_recall"] == 50 and metrics["micro_f1"] == 60
    assert metrics["precision_at_1"] == pytest.approx(66.67) and metrics["precision_at_2"] == pytest.approx(33.33)
    assert metrics["recall_at_1"] == pytest.approx(100 * (1 / 3 + 1 / 2) / 3, abs=0.01)
    assert metrics["tags_per_example"] == pytest.approx(4 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("full", "rare", "common"),
    [(25.3, 19.0, 40.9), (36.7, 34.2, 42.9), (39.1, 37.2, 43.6)],
    ids=["ASY", "Open-Book", "OP-TSG"],
)
def test_full_is_the_weighted_mean_of_rare_and_common(load, full, rare, common):
    """Rows of Table 4 of the supplement, over the 4042 rare and 1627 common tags of Pexel-tagging.

    Predictions with the Rare and Common F1 of a row must give its Full F1.
    """
    assert (4042 * rare + 1627 * common) / 5669 == pytest.approx(full, abs=0.1)
    counts = {f"rare {n}": 1 for n in range(4042)} | {f"common {n}": 25 for n in range(1627)}
    found = {f"rare {n}" for n in range(round(40.42 * rare))} | {f"common {n}" for n in range(round(16.27 * common))}
    tags = list(counts)
    references = [tags[start : start + 10] for start in range(0, len(tags), 10)]
    predictions = [[tag for tag in row if tag in found] for row in references]
    metrics = load("tag_f1").compute(predictions=predictions, references=references, train_counts=counts)
    assert metrics["evaluated_tags"] == 5669
    assert metrics["full_f1"] == pytest.approx(full, abs=0.1)
    assert metrics["rare_f1"] == pytest.approx(rare, abs=0.05)
    assert metrics["common_f1"] == pytest.approx(common, abs=0.05)


def test_batches_give_the_same_as_one_call(load):
    whole = load("tag_f1").compute(predictions=PREDICTIONS, references=REFERENCES, train_counts=TRAIN_COUNTS)
    metric = load("tag_f1")
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute(train_counts=TRAIN_COUNTS) == whole


def test_two_processes_give_the_same_as_one(load):
    whole = load("tag_f1").compute(predictions=PREDICTIONS, references=REFERENCES, train_counts=TRAIN_COUNTS)
    parts = {}

    def work(rank):
        metric = load("tag_f1", num_process=2, process_id=rank, experiment_id="both", keep_in_memory=False)
        metric.add_batch(predictions=PREDICTIONS[rank::2], references=REFERENCES[rank::2])
        parts[rank] = metric.compute(train_counts=TRAIN_COUNTS)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert parts[1] is None and parts[0] == whole


def test_a_large_benchmark_takes_less_than_a_second(load):
    generator = random.Random(0)
    tags = [f"tag {n}" for n in range(28_000)]
    predictions, references = ([generator.sample(tags, 8) for _ in range(5000)] for _ in range(2))
    metric = load("tag_f1")
    metric.add_batch(predictions=predictions, references=references)
    before = time.perf_counter()
    metric.compute(train_counts=dict.fromkeys(tags, 30))
    assert time.perf_counter() - before < 1


def test_normalisation_ignores_case_and_width(load):
    arguments = {"predictions": [["Ｃａｔ ", "cat"]], "references": [["CAT"]], "train_counts": {"cat": 3, "CAT": 30}}
    plain = load("tag_f1").compute(**arguments)
    assert plain["full_f1"] == 0 and plain["micro_precision"] == 0
    normalized = load("tag_f1").compute(**arguments, normalize=True)
    assert normalized["full_f1"] == 100 and normalized["common_f1"] == 100 and normalized["tags_per_example"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": [["cat", "cat"], ["cat"], []]}, "'cat' twice for example 0"),
        ({"references": [["pet"], ["cat", "cat"], []]}, "references list 'cat' twice for example 1"),
        ({"predictions": PREDICTIONS[:2]}, "Mismatch|2 predictions for 3"),
        ({"train_counts": {"nothing": 1}}, "nothing to average"),
        ({"ks": [0]}, "ks="),
    ],
)
def test_invalid_input_is_reported(load, change, message):
    arguments = {"predictions": PREDICTIONS, "references": REFERENCES, "train_counts": TRAIN_COUNTS} | change
    with pytest.raises(ValueError, match=message):
        load("tag_f1").compute(**arguments)


def test_the_two_metrics_can_be_combined(load):
    pairs = {"predictions": PREDICTIONS, "references": REFERENCES}
    gain = load("tag_gain").compute(**pairs, label_vocabulary=list(TRAIN_COUNTS))
    f1 = load("tag_f1").compute(**pairs, train_counts=TRAIN_COUNTS)
    combined = evaluate.combine([load("tag_f1"), load("tag_gain")])
    found = combined.compute(**pairs, train_counts=TRAIN_COUNTS, label_vocabulary=list(TRAIN_COUNTS))
    assert found.items() >= {**f1, **gain}.items() - {("novel_ratio", gain["novel_ratio"])}
    assert found["tag_f1_novel_ratio"] == found["tag_gain_novel_ratio"] == gain["novel_ratio"]
    for metric in ("tag_f1", "tag_gain"):
        with pytest.raises((ValueError, TypeError), match="labels"):
            load(metric).compute(**pairs, train_counts=TRAIN_COUNTS, label_vocabulary=["cat"], labels=["cat"])


def test_tag_gain_by_exact_match(load):
    metrics = load("tag_gain").compute(
        predictions=PREDICTIONS, references=REFERENCES, label_vocabulary=list(TRAIN_COUNTS)
    )
    assert metrics == {
        "tag_gain": round(100 / 6, 3),
        "novel_ratio": 25.0,
        "novel_pairs": 1,
        "relevant_pairs": 1,
        "reference_pairs": 6,
        "unjudged_pairs": 0,
    }


def test_tag_gain_by_verdicts(load, tmp_path):
    path = tmp_path / "verdicts.csv"
    path.write_text("example,tag,verdict\nx,weblink,no\ny,kitten,YES\n", encoding="utf-8")
    predictions = [["weblink"], ["kitten", "lion"], []]
    arguments = {"references": REFERENCES, "label_vocabulary": list(TRAIN_COUNTS), "ids": ["x", "y", "z"]}
    metrics = load("tag_gain").compute(predictions=predictions, verdicts=str(path), **arguments)
    assert (metrics["novel_pairs"], metrics["relevant_pairs"], metrics["unjudged_pairs"]) == (3, 1, 1)
    for row, message in (
        ("w,a,yes", "'w'"),
        ("x,a,perhaps", "perhaps"),
        ("x,weblink,yes", "both yes and no"),
        ("x,a", "no verdict"),
    ):
        bad = tmp_path / "bad.csv"
        bad.write_text("example,tag,verdict\nx,weblink,no\n" + row + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load("tag_gain").compute(predictions=predictions, verdicts=str(bad), **arguments)


def test_verdicts_that_differ_after_normalisation_are_reported(load, tmp_path):
    path = tmp_path / "verdicts.csv"
    path.write_text("example,tag,verdict\nx,Kitten,yes\nx,kitten,no\n", encoding="utf-8")
    arguments = {"predictions": [["kitten"]], "references": [["cat"]], "label_vocabulary": ["cat"], "ids": ["x"]}
    assert load("tag_gain").compute(**arguments, verdicts=str(path))["relevant_pairs"] == 0
    with pytest.raises(ValueError, match="both yes and no for 'kitten'"):
        load("tag_gain").compute(**arguments, verdicts=str(path), normalize=True)
