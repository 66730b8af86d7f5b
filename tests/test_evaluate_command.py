"""`optsg evaluate`: which examples it scores, what it compares them with, and what it prints and writes."""

import json
import shutil

import pytest
from accelerate import PartialState
from colour_folder import write_colour_folder
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import GenerationConfig

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGProcessor, OPTSGTrainingArguments, TagEvaluator, predict_tags
from modeling_optsg.baselines.configuration import OpenBookConfig
from modeling_optsg.baselines.registry import MODEL_TYPES, ONE_PROMPT, find_model_type
from modeling_optsg.data.feature_cache import CachedFeatures, cache_readable_examples, cache_tower_features
from modeling_optsg.evaluation.checkpoint_evaluation import (
    _decoding_settings,
    choose_splits,
    read_training_summary,
    result_lines,
)
from modeling_optsg.evaluation.knn_comparison import fit_knn, score_knn, validate_knn
from modeling_optsg.training import load_splits, load_streams
from optsg import main


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    write_colour_folder(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def evaluate(tiny_checkpoint, tmp_path, capsys):
    """Runs `optsg evaluate` on the tiny checkpoint; returns exit status, standard output, errors and the result."""

    def run(dataset, *more, model=tiny_checkpoint):
        output = tmp_path / "results/scores.json"
        output.unlink(missing_ok=True)
        arguments = [dataset, "--model", model, "--output", output, "--cache-dir", tmp_path / "features", *more]
        status = main(["evaluate", *map(str, arguments), "--dataset-dir", str(tmp_path / "hf")])
        out, err = capsys.readouterr()
        return status, out, err, json.loads(output.read_text(), parse_constant=pytest.fail) if output.exists() else {}

    return run


def remove(folder, *splits):
    for split in splits:
        shutil.rmtree(folder / split)


def with_summary(checkpoint, folder, **arguments):
    """Copies a checkpoint and adds a training summary with these arguments."""
    shutil.copytree(checkpoint, folder)
    (folder / "training_summary.json").write_text(json.dumps({"arguments": arguments}))
    return folder


# The examples


def dataset(**sizes):
    return DatasetDict(
        {
            name: Dataset.from_dict({"id": [f"{name}{row}" for row in range(size)], "tags": [["a"]] * size})
            for name, size in sizes.items()
        }
    )


def test_fitted_settings_are_those_of_the_decoding_as_generate_reads_them():
    by_modality = {"image+title": 0.2, "image": 0.3}
    for threshold, expected in (
        (0.4, 0.4),
        (by_modality, by_modality),
        ({"parallel": 0.1, "sequential": by_modality}, by_modality),
        ({"parallel": 0.1}, None),
    ):
        config = GenerationConfig(threshold=threshold, pad_bias=None)
        found = _decoding_settings(config, "sequential", [])
        assert found == ({} if expected is None else {"threshold": expected})
    config = GenerationConfig(threshold=0.2, neighbours=3)
    assert _decoding_settings(config, None, ["neighbours"]) == {"threshold": 0.2, "neighbours": 3}


def test_the_default_is_test_then_validation_then_the_set_aside_examples():
    for sizes, name, count in (
        ({"train": 20, "validation": 3, "test": 4}, "test", 4),
        ({"train": 20, "test": 4}, "test", 4),
        ({"train": 20, "validation": 3}, "validation", 3),
        ({"train": 20}, "validation", 7),
        ({"train": 200}, "validation", 20),
        ({"validation": 3}, "validation", 3),
    ):
        chosen = choose_splits(dataset(**sizes), "mine", None, {})
        assert (chosen.name, len(chosen.examples)) == (name, count)
        assert (chosen.train is None) == ("train" not in sizes) == (chosen.knn_left_out == "there is no train split")
    # kNN is fitted on examples that are set aside, too.
    chosen = choose_splits(dataset(train=20, test=4), "mine", "test", {"arguments": {"validation_ratio": 0.25}})
    assert (len(chosen.train), len(chosen.validation)) == (15, 5)
    assert not set(chosen.train["id"]) & set(chosen.validation["id"])


def test_a_split_is_chosen_by_its_name():
    splits = dataset(train=20, unseen=3)
    assert choose_splits(splits, "mine", "unseen", {}).examples["id"][0] == "unseen0"
    assert len(choose_splits(splits, "mine", "validation", {}).examples) == 7
    chosen = choose_splits(splits, "mine", "train", {})
    assert len(chosen.examples) == 20 and "the example itself" in chosen.knn_left_out
    with pytest.raises(ValueError, match="mine has no split test; choose one of train, unseen, validation"):
        choose_splits(splits, "mine", "test", {})
    with pytest.raises(ValueError, match="mine has no split test, validation or train; choose one of unseen"):
        choose_splits(dataset(unseen=3), "mine", None, {})
    with pytest.raises(ValueError, match="The train split has 1 examples: too few"):
        choose_splits(dataset(train=1), "mine", None, {})


@pytest.mark.parametrize("more", [{"seed": 5, "validation_ratio": 0.25}, {"train_ratio": 0.5}, {"streaming": True}])
def test_the_examples_are_set_aside_as_in_training(folder, tmp_path, more):
    PartialState()
    remove(folder, "validation", "test")
    more = {"validation_ratio": 0.3} | more
    args = OPTSGTrainingArguments(str(tmp_path / "run"), dataset=str(folder), **more)
    train, validation = load_streams(args)[1:] if args.streaming else load_splits(args)
    chosen = choose_splits(load_tagging_dataset(folder), "mine", None, {"arguments": args.public_arguments()})
    assert chosen.examples["id"][:] == chosen.validation["id"][:] == validation["id"][:]
    assert chosen.train["id"][:] == train["id"][:]
    assert f"{len(validation)} of its 16 training examples are set aside (seed {args.seed}" in chosen.notes[0]
    assert f"as in the training of the checkpoint on {folder}" in chosen.notes[0]
    assert len(chosen.notes) == 1 + (args.train_ratio < 1)


# The command


def test_a_folder_with_a_train_split_is_enough(evaluate, tiny_checkpoint, folder, tmp_path):
    remove(folder, "validation", "test")
    model = with_summary(tiny_checkpoint, tmp_path / "model", seed=3, validation_ratio=0.5, dataset="mine")
    status, out, _, result = evaluate(folder, model=model)
    assert status == 0
    assert (result["split"], result["examples"], result["seed"]) == ("validation", 8, 3)
    assert set(result["validation"]) == {"parallel", "sequential"}
    assert "(seed 3), as in the training of the checkpoint on mine" in out
    # Every image is there twice, and both are set aside or none. The titles name the colours.
    knn = result["knn"]
    assert knn["full_f1"] > 50 and "validation" not in knn and knn["neighbours"] <= 8
    assert out.splitlines()[-1] == f"Full F1: your model {result['validation']['parallel']['full_f1']:.1f} " + (
        f"(parallel), nearest neighbours {knn['full_f1']:.1f}"
    )
    assert "has changed since" not in out
    summary = {"arguments": {"seed": 3, "dataset": "old/data"}, "examples": {"validation": 3}}
    (model / "training_summary.json").write_text(json.dumps(summary))
    assert f"set 3 examples aside. {folder} has changed since" in evaluate(folder, model=model)[1]
    (model / "training_summary.json").unlink()
    status, out, _, _ = evaluate(folder, model=model)
    assert status == 0 and "has no training_summary.json and may have been trained on them" in out


def test_without_a_train_split_the_label_vocabulary_separates_tags(evaluate, tiny_checkpoint, folder):
    remove(folder, "train", "validation")
    status, out, _, result = evaluate(folder)
    assert status == 0 and result["split"] == "test" and result["knn"] is None
    vocabulary = OPTSGProcessor.from_pretrained(tiny_checkpoint).label_vocabulary
    references = [row["tags"] for row in load_tagging_dataset(folder, split="test")]
    assert result["evaluated_tags"] == len({tag for tags in references for tag in tags} & vocabulary.keys()) == 2
    assert "has no train split: rare and common tags are those of the label vocabulary" in out
    assert "nearest neighbours are left out: there is no train split" in out


def test_metrics_over_no_tags_are_none(evaluate, folder):
    remove(folder, "train", "validation")
    lines = [json.loads(line) for line in (folder / "test/metadata.jsonl").read_text().splitlines()]
    rows = [json.dumps(row | {"tags": ["unknown"]}) for row in lines]
    (folder / "test/metadata.jsonl").write_text("\n".join(rows))
    status, out, _, result = evaluate(folder)
    metrics = result["test"]["parallel"]
    assert status == 0 and result["evaluated_tags"] == 0 and metrics["micro_f1"] == 0
    assert {metrics[name] for name in ("full_f1", "rare_f1", "common_f1")} == {None}
    assert "your model – (parallel)" in out
    (folder / "test/metadata.jsonl").write_text("\n".join(json.dumps(row | {"tags": []}) for row in lines))
    status, _, err, result = evaluate(folder)
    assert status == 2 and not result and "data, split test: The references have no tags" in err


def test_unreadable_examples_are_left_out_and_listed(evaluate, folder):
    for split, number in (("train", 2), ("test", 1), ("test", 3)):
        (folder / split / f"{number}.png").write_bytes(b"not an image")
    status, out, _, result = evaluate(folder, "--max-unreadable", "2")
    assert status == 0 and result["examples"] == 6
    assert {split: len(reasons) for split, reasons in result["unreadable_examples"].items()} == {"test": 2, "train": 1}
    assert all("is not an image" in reason for reason in result["unreadable_examples"]["test"].values())
    assert "Split test: 2 unreadable examples left out" in out
    status, _, err, result = evaluate(folder, "--max-unreadable", "1")
    assert status == 2 and not result and "Split test: 2 examples cannot be read, more than 1" in err


def test_wrong_arguments_and_checkpoints_are_reported(evaluate, tiny_checkpoint, towers, folder, tmp_path):
    assert "has no split tset; choose one of test, train, validation" in evaluate(folder, "--split", "tset")[2]
    status, _, err, _ = evaluate(folder, model=towers / "text")
    assert status == 2 and "model_type='bert' of config.json is not a model of this package" in err
    status, _, err, _ = evaluate(folder, model=tmp_path / "nothing")
    assert status == 2 and "nothing" in err
    with pytest.raises(SystemExit):
        evaluate(folder, "--max-unreadable", "-1")
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), "--model", str(tiny_checkpoint), "--output", str(tmp_path)])
    broken = with_summary(tiny_checkpoint, tmp_path / "model")
    (broken / "training_summary.json").write_text("{")
    with pytest.raises(ValueError, match="training_summary.json is not valid JSON"):
        read_training_summary(str(broken))
    assert read_training_summary(str(tiny_checkpoint)) == {}


def test_every_model_type_is_found_by_its_configuration():
    for name, spec in MODEL_TYPES.items():
        assert find_model_type(spec.model.config_class(frame_feature_size=8, **spec.config)) == name
    assert find_model_type(OpenBookConfig(frame_feature_size=8, **ONE_PROMPT, num_book_examples=3)) == "open-book"


# kNN


@pytest.fixture
def cached(tiny_model, tiny_processor, tmp_path):
    def cache(titles, tags, colours=None):
        columns = {} if colours is None else {"image": [Image.new("RGB", (20, 20), colour) for colour in colours]}
        rows = Dataset.from_dict(columns | {"title": titles, "tags": tags})
        return cache_readable_examples(rows, tiny_model.model, tiny_processor, tmp_path / "features")[0]

    return cache


TITLES = ["a red square", "blue", "green dog", "e mail", "red", "a square"]
TAGS = [["red", "square"], ["blue", "colour"], ["dog"], ["e-mail"], ["red", "colour"], ["square"]]


def test_knn_is_fitted_on_the_examples_that_it_is_validated_on(cached, tiny_model, tiny_processor):
    train, validation = cached(TITLES, TAGS), cached(TITLES[::-1], TAGS[:3] + TAGS[:3])
    evaluator = TagEvaluator(validation.dataset["tags"], {"red": 30, "square": 2, "blue": 1, "colour": 2, "dog": 1})
    found = validate_knn(tiny_model, tiny_processor, train, validation, evaluator, progress=False)
    knn = fit_knn(tiny_model, tiny_processor, train)

    def score(examples, evaluator, **settings):
        return evaluator.score(predict_tags(knn, tiny_processor, examples, progress=False, **settings))

    settings = {name: found[name] for name in ("neighbours", "image_weight", "threshold")}
    metrics = score(validation, evaluator, **settings)
    assert {name: found[name] for name in metrics} == metrics
    best = max(
        score(validation, evaluator, neighbours=neighbours, image_weight=0.2, threshold=step / 50)["full_f1"]
        for neighbours in (3, 5, 6)
        for step in range(50)
    )
    assert found["full_f1"] == best > 0
    # On other examples, the settings stay those of validation.
    test = cached(TITLES, TAGS)
    test_evaluator = TagEvaluator(TAGS, evaluator.train_counts)
    scored = score_knn(tiny_model, tiny_processor, train, validation, evaluator, test, test_evaluator, progress=False)
    assert {name: scored[name] for name in settings} == settings
    assert {name: scored[name] for name in metrics} == score(test, test_evaluator, **settings)
    assert scored["validation"] == metrics


def test_knn_is_fitted_to_images_alone_and_to_titles_alone(cached, tiny_model, tiny_processor):
    # A title has one wrong neighbour for each right one, and an image none.
    titles, colours = ["red", "blue", "red", "green dog"] * 5, ["red", "blue", "black", "white"] * 5
    train = cached(titles, [["red"], ["blue"], ["square"], ["colour"]] * 5, colours)
    validation = cached(titles[:4], [["red"], ["blue"], ["square"], ["red", "colour"]], colours[:4])
    test = cached(titles[:2], [["red"], ["colour"]], colours[:2])
    counts = {"red": 5, "blue": 5, "square": 5, "colour": 5}
    evaluator, test_evaluator = (
        TagEvaluator(part.dataset["tags"], counts, common_count=3) for part in (validation, test)
    )
    found = validate_knn(tiny_model, tiny_processor, train, validation, evaluator, progress=False)
    scored = score_knn(tiny_model, tiny_processor, train, validation, evaluator, test, test_evaluator, progress=False)
    knn = fit_knn(tiny_model, tiny_processor, train)
    for modality in ("image", "title"):
        kwargs = {"modalities": (modality,), "progress": False}
        own = found["modalities"][modality]
        settings = {name: own[name] for name in ("neighbours", "threshold")}
        best = {}
        for neighbours in (3, 5, 8, 10, 15):
            tags = predict_tags(knn, tiny_processor, validation, neighbours=neighbours, threshold=0.0, **kwargs)
            best[neighbours] = evaluator.best_threshold(tags)[1]["full_f1"]
        assert own["full_f1"] == best[own["neighbours"]] == max(best.values()) > 0
        metrics = evaluator.score(predict_tags(knn, tiny_processor, validation, **settings, **kwargs))
        assert own == metrics | settings
        tags = predict_tags(knn, tiny_processor, test, **settings, **kwargs)
        assert scored["modalities"][modality] == test_evaluator.score(tags) | settings | {"validation": metrics}
    assert found["modalities"]["image"]["full_f1"] > found["modalities"]["title"]["full_f1"]


def test_knn_repeats_the_tags_of_equal_titles(cached, tiny_model, tiny_processor):
    train = cached(TITLES[:3] * 3, TAGS[:3] * 3)
    evaluator = TagEvaluator(TAGS[:3], {tag: 3 for tags in TAGS for tag in tags})
    found = validate_knn(
        tiny_model, tiny_processor, train, cached(TITLES[:3], TAGS[:3]), evaluator, "micro_f1", progress=False
    )
    assert (found["neighbours"], found["micro_f1"], found["full_f1"], found["common_f1"]) == (3, 100, 100, None)


def test_knn_needs_features_and_tags(cached, tiny_model, tiny_processor, tmp_path):
    rows = Dataset.from_dict({"title": ["red"], "tags": [["red"]]})
    raw = CachedFeatures(cache_tower_features(rows, tiny_model.model, tiny_processor, tmp_path, titles=False))
    with pytest.raises(ValueError, match="have a column title, but no title_features"):
        fit_knn(tiny_model, tiny_processor, raw)
    with pytest.raises(ValueError, match="No training example has a tag"):
        fit_knn(tiny_model, tiny_processor, cached(["red"], [[]]))


def test_the_lines_show_what_is_left_out():
    metrics = dict.fromkeys(("full_f1", "rare_f1", "common_f1", "micro_f1", "tags_per_example"), 74.06)
    result = {"checkpoint": "runs/mine", "model_type": "asy", "dataset": "mine", "split": "test", "examples": 1200}
    result |= {"evaluated_tags": 7, "notes": [], "unreadable_examples": {}, "test": {"only": metrics}}
    lines = result_lines(result | {"knn": metrics | {"full_f1": 70.9, "common_f1": None}})
    assert lines == [
        "runs/mine (asy) on mine, split test: 1,200 examples, 7 evaluated tags",
        "                    Full F1  Rare F1  Common F1  Micro F1  tags per example",
        "only                   74.1     74.1       74.1      74.1              74.1",
        "nearest neighbours     70.9     74.1          –      74.1              74.1",
        "Full F1: your model 74.1, nearest neighbours 70.9",
    ]
