"""The summary and the model card of a fine-tuned checkpoint say what it was made from."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, OPTSGTrainer, OPTSGTrainingArguments
from modeling_optsg.book import BookQueries, TagBook, save_book
from modeling_optsg.book.votes import VECTOR_SOURCES
from modeling_optsg.hub import write_model_card
from modeling_optsg.hub.model_card import METRICS, write_training_card
from modeling_optsg.training import origin
from modeling_optsg.training.origin import describe_origin

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_prompts": 3}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ROWS = [{"title": f"a {colour} square", "tags": [colour, "square"]} for colour in ("red", "blue", "green") * 3]


def train(folder, given=None, **arguments):
    """Train for one epoch on 6 of `ROWS`, and return the folder."""
    settings = {"cache_dir": str(folder.parent / "cache"), "num_train_epochs": 1, "eval_steps": 0.99}
    args = OPTSGTrainingArguments(str(folder), num_negatives=1, **settings | arguments)
    data = {"train_dataset": Dataset.from_list(ROWS[:6]), "eval_dataset": Dataset.from_list(ROWS[6:])}
    model, processor = given or (None, None)
    OPTSGTrainer(model=model, processing_class=processor, args=args, **data).train()
    return folder


def read_summary(folder):
    return json.loads((folder / "training_summary.json").read_text(), parse_constant=pytest.fail)


def read_card(folder):
    write_training_card(folder, "org/mine")
    card = ModelCard.load(folder / "README.md")
    assert "None" not in card.content and "nan" not in card.content.lower()
    return card


@pytest.fixture(scope="module")
def trained(towers, tmp_path_factory):
    """A checkpoint from towers, and one that was fine-tuned from it."""
    root = tmp_path_factory.mktemp("trained")
    names = {"vision_tower": str(towers / "vision"), "text_tower": str(towers / "text"), "tag_vocab_size": 260}
    more = {"config_overrides": json.dumps(SMALL), "dataset": "org/squares", "train_text_layers": 1}
    train(root / "first", **names, **more)
    train(root / "second", checkpoint=str(root / "first"), train_batch_size=4, num_train_epochs=2)
    return root


def test_a_summary_names_the_towers_of_the_checkpoint(trained, towers):
    expected = {
        "vision": {"name": str(towers / "vision"), "model_type": "vit", "trained": False},
        "text": {"name": str(towers / "text"), "model_type": "bert", "trained": True},
    }
    first, second = read_summary(trained / "first"), read_summary(trained / "second")
    assert first["towers"] == second["towers"] == expected, "the first training trained the text tower"
    assert (first["checkpoint"], second["checkpoint"]) == (None, str(trained / "first"))
    assert second["arguments"]["vision_tower"] is None and second["base_models"] == first["base_models"] == []


def test_the_towers_of_a_given_model_are_those_of_its_folder(trained, tmp_path):
    model = OPTSGForTagGeneration.from_pretrained(trained / "second")
    folder = train(tmp_path / "third", (model, OPTSGProcessor.from_pretrained(trained / "second")))
    summary = read_summary(folder)
    assert summary["towers"] == read_summary(trained / "second")["towers"]
    assert summary["checkpoint"] == str(trained / "second") and summary["arguments"]["checkpoint"] is None
    # No command line trains a model object.
    text = read_card(folder).text
    assert "It was fine-tuned from the checkpoint `second`." in text and "train.py" not in text


def test_a_summary_has_the_batch_size_and_the_epochs_that_were_used(trained, caplog):
    first, second = (read_summary(trained / name)["arguments"] for name in ("first", "second"))
    # The batch size is chosen as 8, but there are only 6 examples.
    assert (first["train_batch_size"], first["num_train_epochs"]) == (6, 1)
    assert (second["train_batch_size"], second["num_train_epochs"]) == (4, 2)
    assert "trained for 2 epochs with 4 examples per step" in read_card(trained / "second").text


def test_a_finished_run_with_fewer_examples_than_a_batch_is_found_again(tiny_checkpoint, tmp_path, caplog):
    train(tmp_path / "run", checkpoint=str(tiny_checkpoint), train_batch_size=64)
    assert read_summary(tmp_path / "run")["arguments"]["train_batch_size"] == 6
    with caplog.at_level("INFO"):
        train(tmp_path / "run", checkpoint=str(tiny_checkpoint), train_batch_size=64)
    assert "is finished" in caplog.text
    with pytest.raises(ValueError, match=r"train_batch_size 6 \(now 3\)"):
        train(tmp_path / "run", checkpoint=str(tiny_checkpoint), train_batch_size=3)


def test_a_card_names_checkpoint_towers_and_examples(trained, towers):
    card = read_card(trained / "second")
    assert "were trained on\n6 examples.\n" in card.text
    assert "It was fine-tuned from the checkpoint `first`." in card.text
    assert "The vision tower, for images, is `vision` (frozen)." in card.text
    assert "is `text` (trained)." in card.text
    assert str(towers.parent) not in card.content and str(trained) not in card.content
    # The examples were passed as an object, so the default of `dataset` would be wrong.
    assert card.data.base_model is None and card.data.datasets is None and "icon" not in card.content
    assert read_card(trained / "first").data.datasets == ["org/squares"]


def test_a_card_has_the_fitted_metrics_and_those_of_the_neighbours(trained, tmp_path):
    folder = shutil.copytree(trained / "second", tmp_path / "copy")
    summary, card = read_summary(folder), read_card(folder)
    fits, knn = summary["fits"], summary["nearest_neighbours"]
    rows = {way: fit["validation"] for way, fit in fits.items()} | {"kNN vote": knn}
    for name, metrics in rows.items():
        cells = " | ".join("–" if metrics[metric] is None else str(metrics[metric]) for metric in METRICS)
        assert f"| {name} | {cells} |" in card.text
    # None of the few tags is common.
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = fits["parallel"]["validation"]
    assert found == {name: expected[name] for name in ("full_f1", "rare_f1", "micro_f1")}
    assert expected["common_f1"] is None
    (folder / "training_summary.json").write_text(json.dumps(summary | {"nearest_neighbours": None}))
    assert "kNN" not in read_card(folder).text


def test_a_card_says_what_a_book_publishes(trained, tmp_path):
    folder = shutil.copytree(trained / "second", tmp_path / "copy")
    sentence = "It publishes their ids, titles, tags, groups and feature vectors"
    without = read_card(folder).text
    assert "book" not in without
    queries = BookQueries({name: torch.ones(1, 2) for name in VECTOR_SOURCES}, ["a"])
    examples = Dataset.from_dict({"id": ["a"], "title": ["a"], "tags": [["red"]], "group": ["a"]})
    save_book(TagBook(examples, queries, "model"), folder / "index")
    text = read_card(folder).text
    assert sentence in text.split("## Use and limits")[1].split("## Metrics")[0]
    # Nothing else depends on the book.
    lines = [line for line in text.splitlines() if sentence not in line]
    assert list(filter(None, lines)) == list(filter(None, without.splitlines()))
    shutil.rmtree(folder / "index")
    assert read_card(folder).text == without


@pytest.fixture
def describe(tiny_model, monkeypatch):
    """Describe a training run from towers or from a checkpoint with a given summary."""

    def run(summary=None, checkpoint=None, **arguments):
        monkeypatch.setattr(origin, "read_training_summary", lambda name: summary or {})
        return describe_origin(
            OPTSGTrainingArguments("run", checkpoint=checkpoint, **arguments), tiny_model, checkpoint
        )

    return run


def test_base_models_are_names_on_the_hub(describe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    assert describe()["base_models"] == [MINILM]
    assert describe(vision_tower="google/vit", text_tower=str(tmp_path))["base_models"] == ["google/vit"]
    assert describe(vision_tower="runs/a", text_tower="bert-base-uncased")["base_models"] == ["bert-base-uncased"]
    assert describe(checkpoint="org/optsg")["base_models"] == ["org/optsg"]
    # A folder has no name on the Hub, but what it was made from has.
    assert describe({"base_models": ["org/optsg"]}, "runs/a")["base_models"] == ["org/optsg"]
    assert describe({"arguments": {"text_tower": "all-minilm-l6-v2"}}, "runs/a")["base_models"] == [MINILM]
    assert describe({}, "runs/a")["base_models"] == []
    assert describe({}, "/deleted/folder")["base_models"] == []


def test_what_is_not_known_about_a_checkpoint_is_left_out(describe, trained, tmp_path):
    origin = describe({}, "org/optsg")
    assert origin["towers"]["vision"] == {"name": None, "model_type": "vit", "trained": None}
    folder = shutil.copytree(trained / "second", tmp_path / "copy")
    (folder / "training_summary.json").write_text(json.dumps(read_summary(folder) | origin))
    write_model_card(folder, name="org/mine", dataset_name=None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["org/optsg"] and "from the checkpoint `org/optsg`" in card.text
    assert "The vision tower, for images, is that of the checkpoint, of the type `vit`." in card.text


def test_the_first_phase_says_whether_the_text_tower_was_trained(describe):
    was_frozen = {"towers": {"text": {"name": "bert", "trained": False}}}
    for summary, trained in (({}, True), (was_frozen, False)):
        towers = describe(summary, classifier_checkpoint="runs/asy")["towers"]
        assert towers["text"]["trained"] == trained and towers["vision"]["trained"] is False
