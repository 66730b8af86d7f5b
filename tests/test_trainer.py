"""`OPTSGTrainer` and `optsg train`: training from Python, callbacks, defaults for any number of examples."""

import json
import os
import signal
import threading

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from dataset_scripts.tagging_columns import with_tagging_columns
from modeling_optsg import (
    OPTSGDataCollator,
    OPTSGForTagGeneration,
    OPTSGProcessor,
    OPTSGTrainer,
    OPTSGTrainingArguments,
    TagEvaluator,
    fit_generation_config,
    prepare_for_fine_tuning,
)
from modeling_optsg.training.interruption import Interrupted
from optsg import main as optsg

COLOURS = ("red", "green", "blue")


def examples(number=12):
    images = [Image.new("RGB", (20, 20), COLOURS[index % 3]) for index in range(number)]
    tags = [[COLOURS[index % 3], f"place {index % 2}"] for index in range(number)]
    return Dataset.from_dict({"image": images, "tags": tags})


def arguments(folder, **more):
    more = {"num_train_epochs": 2, "train_batch_size": 4, "eval_steps": 2, "learning_rate": 1e-3} | more
    return OPTSGTrainingArguments(str(folder / "run"), cache_dir=str(folder / "cache"), **more)


@pytest.fixture
def loaded(tiny_checkpoint):
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    return {"model": model, "processing_class": OPTSGProcessor.from_pretrained(tiny_checkpoint)}


class Record(TrainerCallback):
    """Remembers the events and what they are told."""

    def __init__(self, stop_after=None):
        self.events, self.stop_after = [], stop_after

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("begin", state.global_step, state.max_steps))

    def on_step_end(self, args, state, control, model, **kwargs):
        assert isinstance(model, torch.nn.Module)
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step == self.stop_after

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("evaluate", state.global_step, metrics["eval_micro_f1"]))

    def on_log(self, args, state, control, logs, **kwargs):
        self.events.append(("log", state.global_step, logs["loss"]))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))


def test_a_model_is_fine_tuned_on_datasets_in_memory(loaded, tmp_path):
    record = Record()
    rows = examples()
    trainer = OPTSGTrainer(
        args=arguments(tmp_path), train_dataset=rows, eval_dataset=examples(6), callbacks=[record], **loaded
    )
    summary = trainer.train()
    assert summary["examples"] == {"train": 12, "validation": 6}
    assert record.events[0] == ("begin", 0, 6) and record.events[-1] == ("end", 6)
    assert [event[1] for event in record.events if event[0] == "step"] == [1, 2, 3, 4, 5, 6]
    evaluated = [event for event in record.events if event[0] == "evaluate"]
    assert [event[1] for event in evaluated] == [2, 4, 6]
    assert [event[2] for event in evaluated] == [row["validation"]["micro_f1"] for row in summary["history"]]
    # Afterwards, the trainer has the best checkpoint with its fitted settings.
    assert set(trainer.processing_class.label_vocabulary) == {*COLOURS, "place 0", "place 1"}
    assert trainer.model.generation_config.threshold["parallel"] is not None
    found = trainer.evaluate(examples(6))
    fitted = summary["fits"]["parallel"]["validation"]
    assert {name: found[name] for name in fitted} == pytest.approx(fitted, abs=0.01)
    assert 0 <= summary["nearest_neighbours"]["full_f1"] <= 100
    trainer.save_model(tmp_path / "copy")
    copied = OPTSGForTagGeneration.from_pretrained(tmp_path / "copy").generation_config
    assert copied.threshold == trainer.model.generation_config.threshold


def test_a_checkpoint_is_fine_tuned_on_the_examples_of_a_dataset(tiny_checkpoint, tmp_path):
    args = arguments(tmp_path, checkpoint=str(tiny_checkpoint))
    trainer = OPTSGTrainer(args=args, train_dataset=examples(30))
    assert trainer.train()["examples"] == {"train": 20, "validation": 10}
    # A finished run is not trained again.
    record = Record()
    again = OPTSGTrainer(args=args, train_dataset=examples(30), callbacks=[record])
    assert again.train()["fits"] and not record.events
    assert torch.equal(
        again.model.tag_decoder.token_embeddings.weight, trainer.model.tag_decoder.token_embeddings.weight
    )


def test_a_second_training_starts_from_the_checkpoint_again(tiny_checkpoint, tmp_path):
    args = arguments(tmp_path, checkpoint=str(tiny_checkpoint), resume_from_checkpoint="never")
    trainer = OPTSGTrainer(args=args, train_dataset=examples())
    losses = [trainer.train()["history"][0]["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_a_finished_run_on_other_examples_is_refused(tiny_checkpoint, loaded, tmp_path):
    args = arguments(tmp_path, checkpoint=str(tiny_checkpoint))
    OPTSGTrainer(args=args, train_dataset=examples(12)).train()
    with pytest.raises(ValueError, match="belongs to a run with other training or validation examples"):
        OPTSGTrainer(args=args, train_dataset=examples(15)).train()
    args = arguments(tmp_path / "given")
    OPTSGTrainer(args=args, train_dataset=examples(12), **loaded).train()
    with torch.no_grad():
        loaded["model"].lm_head.bias += 1
    with pytest.raises(ValueError, match="belongs to a run with other training or validation examples"):
        OPTSGTrainer(args=args, train_dataset=examples(12), **loaded).train()


def test_a_model_is_needed_before_it_is_evaluated_or_saved(tmp_path):
    trainer = OPTSGTrainer(args=arguments(tmp_path), train_dataset=examples())
    for call in (trainer.evaluate, trainer.save_model):
        with pytest.raises(ValueError, match=r"There is no model yet; call train\(\) first"):
            call()


def test_tags_of_datasets_in_memory_may_be_text_in_a_named_column(loaded, tmp_path, caplog):
    train = Dataset.from_dict({"caption": ["a", "b"], "words": ["red car, bus", "boat|sea"], "tags": [["no"], ["no"]]})
    validation = Dataset.from_dict({"caption": ["c"], "words": ["green, rock|pop"]})
    args = arguments(tmp_path, title_column="caption", tags_column="words")
    trainer = OPTSGTrainer(args=args, train_dataset=train, eval_dataset=validation, **loaded)
    _, rows, evaluated = trainer._load_examples()
    # Two texts contain a comma, and two contain |.
    assert rows["tags"] == [["red car, bus"], ["boat", "sea"]] and evaluated["tags"] == [["green, rock", "pop"]]
    assert rows["title"] == ["a", "b"] and "such as 'red car, bus'" in caplog.text
    assert trainer.evaluate(validation).keys() >= {"micro_f1"}
    trainer.args.tag_separator = ","
    assert trainer._load_examples()[1]["tags"] == [["red car", "bus"], ["boat|sea"]]
    usual = Dataset.from_dict({"id": ["1"], "title": ["c"], "tags": [["green"]]})
    assert trainer.evaluate(usual).keys() >= {"micro_f1"}
    with pytest.raises(ValueError, match="eval_dataset has no column 'caption', which title_column names"):
        trainer.evaluate(Dataset.from_dict({"title": ["c"], "words": ["green"]}))
    trainer.train_dataset = train.select([])
    with pytest.raises(ValueError, match="train_dataset has no examples"):
        trainer._load_examples()
    with pytest.raises(ValueError, match="train_dataset: the tags in the column tags are text; give the separator"):
        with_tagging_columns(Dataset.from_dict({"title": ["c"], "tags": ["red car"]}), "train_dataset")


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_run_deletes_what_an_earlier_run_left(loaded, tmp_path, resume):
    for name in ("adapter/text_tower", "book"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("adapter/text_tower/weights", "book/rows.json", "training_summary.json", "notes.txt"):
        (tmp_path / "run" / name).write_text("{}")
    args = arguments(tmp_path, num_train_epochs=3, save_steps=2, eval_steps=100, resume_from_checkpoint=resume)
    with pytest.raises(Interrupted):
        OPTSGTrainer(args=args, train_dataset=examples(), callbacks=[StopSignalAt(3)], **loaded).train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"notes.txt", "state", "training_log.jsonl"}


def test_early_stopping_ends_a_training(loaded, tmp_path):
    # The learning rate is so small that no validation improves on the first one.
    args = arguments(tmp_path, learning_rate=1e-12, num_train_epochs=10, eval_steps=1)
    stop = EarlyStoppingCallback(early_stopping_patience=3)
    summary = OPTSGTrainer(args=args, train_dataset=examples(), callbacks=[stop], **loaded).train()
    assert [row["step"] for row in summary["history"]] == [1, 2, 3, 4]


class StopSignalAt(TrainerCallback):
    """Interrupts the training after a step, as SIGTERM would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_callbacks_continue_where_a_run_was_stopped(tiny_checkpoint, tmp_path):
    """The patience of early stopping is counted across an interruption."""
    more = {"checkpoint": str(tiny_checkpoint), "learning_rate": 1e-12, "num_train_epochs": 10, "eval_steps": 1}

    def train(folder, *callbacks):
        stop = EarlyStoppingCallback(early_stopping_patience=3)
        return OPTSGTrainer(
            args=arguments(folder, **more), train_dataset=examples(), callbacks=[stop, *callbacks]
        ).train()

    with pytest.raises(Interrupted):
        train(tmp_path, StopSignalAt(2))
    assert json.loads((tmp_path / "run/state/status.json").read_text())["status"] == "interrupted"
    assert [row["step"] for row in train(tmp_path)["history"]] == [1, 2, 3, 4]


def test_a_callback_can_stop_at_any_step(loaded, tmp_path):
    args = arguments(tmp_path, eval_steps=100)
    summary = OPTSGTrainer(args=args, train_dataset=examples(), callbacks=[Record(stop_after=3)], **loaded).train()
    assert [row["step"] for row in summary["history"]] == [3]


def test_a_training_in_a_thread(loaded, tmp_path):
    found = []
    trainer = OPTSGTrainer(args=arguments(tmp_path), train_dataset=examples(), **loaded)
    thread = threading.Thread(target=lambda: found.append(trainer.train()))
    thread.start()
    thread.join()
    assert found[0]["fits"]


def test_contradicting_arguments(loaded, tmp_path):
    def make(args, **more):
        return OPTSGTrainer(args=args, **more)

    with pytest.raises(ValueError, match="Give both a model and its processing_class, or neither"):
        make(arguments(tmp_path), model=loaded["model"])
    with pytest.raises(ValueError, match="is a OPTSGForTagGeneration; that is not possible with checkpoint='other'"):
        make(arguments(tmp_path, checkpoint="other"), **loaded)
    with pytest.raises(ValueError, match="not possible with model_type='asy'"):
        make(arguments(tmp_path, model_type="asy"), **loaded)
    with pytest.raises(ValueError, match="An eval_dataset needs a train_dataset"):
        make(arguments(tmp_path), eval_dataset=examples())
    with pytest.raises(ValueError, match="The train_dataset is a list; give a datasets.Dataset"):
        make(arguments(tmp_path), train_dataset=[{"tags": ["a"]}])
    with pytest.raises(ValueError, match="The eval_dataset has no examples"):
        make(arguments(tmp_path), train_dataset=examples(), eval_dataset=examples(6).select([]))
    with pytest.raises(ValueError, match="--dataset is missing"):
        make(arguments(tmp_path)).train()
    with pytest.raises(ValueError, match="A train_dataset cannot be streamed"):
        make(arguments(tmp_path, streaming=True), train_dataset=examples())


@pytest.mark.parametrize(
    "number, batch_size, steps",
    [(3, 3, 70), (9, 8, 120), (45, 8, 270), (180, 16, 506), (900, 64, 506), (19000, 64, 2969)],
)
def test_batch_size_and_epochs_suit_the_number_of_examples(number, batch_size, steps):
    args = OPTSGTrainingArguments("run").for_examples(number)
    assert args.train_batch_size == batch_size
    assert round(args.num_train_epochs * number / min(batch_size, number)) == pytest.approx(steps, abs=1)
    given = OPTSGTrainingArguments("run", num_train_epochs=1, train_batch_size=5).for_examples(number)
    assert (given.num_train_epochs, given.train_batch_size) == (1, 5)


def test_the_command_trains_and_says_how_good_the_neighbours_are(tiny_checkpoint, tmp_path, capfd, caplog):
    rows = examples(200)
    for index, row in enumerate(rows):
        folder = tmp_path / "data" / row["tags"][0]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    words = [tmp_path / "data", "--checkpoint", tiny_checkpoint, "--output_dir", tmp_path / "run"]
    words += ["--cache_dir", tmp_path / "cache", "--num_train_epochs", 1]
    with caplog.at_level("INFO"):
        assert optsg(["train", *map(str, words)]) == 0
    assert "your model" in caplog.text and "nearest neighbours" in caplog.text
    assert "train            180         0     3" in caplog.text
    # Progress bars do not end their lines.
    printed = capfd.readouterr()
    assert len(caplog.text.splitlines()) + printed.out.count("\n") + printed.err.count("\n") < 60
    assert optsg(["train", "no such folder", "--output_dir", str(tmp_path / "other")]) == 2
    assert "optsg train: 'no such folder' is not a benchmark" in capfd.readouterr().err
    with pytest.raises(SystemExit) as exit:
        optsg(["train", "--output_dir", "x", "--epochs", "3"])
    assert exit.value.code == 2
    assert "optsg train: error: unrecognized arguments: --epochs 3" in capfd.readouterr().err


@pytest.mark.parametrize("number", [4, 12])
def test_one_tag_on_every_example(tiny_checkpoint, tmp_path, number):
    """With four examples, one of them is for validation."""
    rows = Dataset.from_dict({"image": examples(number)["image"], "tags": [["photo"]] * number})
    args = arguments(tmp_path, checkpoint=str(tiny_checkpoint))
    trainer = OPTSGTrainer(args=args, train_dataset=rows)
    summary = trainer.train()
    assert summary["examples"]["validation"] == {4: 2, 12: 4}[number]
    json.dumps(summary, allow_nan=False)
    found = trainer.evaluate(rows)
    assert found["full_f1"] == 100 and found["common_f1"] is None and found["tags_per_example"] < 3


def test_few_examples_without_common_tags_are_refused(tiny_checkpoint, tmp_path):
    rows = Dataset.from_dict({"image": examples(6)["image"], "tags": [[f"tag {index}"] for index in range(6)]})
    trainer = OPTSGTrainer(args=arguments(tmp_path, checkpoint=str(tiny_checkpoint)), train_dataset=rows)
    with pytest.raises(ValueError, match="training tag"):
        trainer.train()


def test_a_broken_file_is_left_out(tiny_checkpoint, tmp_path):
    for index, row in enumerate(examples(12)):
        folder = tmp_path / "data" / row["tags"][0]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    (tmp_path / "data/red/broken.heic").write_bytes(b"not an image")
    args = arguments(tmp_path, checkpoint=str(tiny_checkpoint), dataset=str(tmp_path / "data"))
    summary = OPTSGTrainer(args=args).train()
    assert list(summary["unreadable_examples"]) == ["red/broken.heic"]
    assert sum(summary["examples"].values()) == 12
    assert set(OPTSGProcessor.from_pretrained(args.output_dir).label_vocabulary) == set(COLOURS)


def test_transformers_trainer_gives_a_good_model(tmp_path, loaded):
    """With the tag classifier and fitted settings."""
    model, processor, rows = loaded["model"], loaded["processing_class"], examples(24)
    tag_table = prepare_for_fine_tuning(model, processor, rows["tags"])
    assert set(tag_table.tags) == set(processor.label_vocabulary) == {*COLOURS, "place 0", "place 1"}
    assert model.config.num_tag_classes == 5
    before = {name: weight.clone() for name, weight in model.model.vision_tower.state_dict().items()}
    args = TrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=3e-3, per_device_train_batch_size=8, remove_unused_columns=False,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collator = OPTSGDataCollator(processor, tag_table)
    Trainer(model, args, data_collator=collator, train_dataset=rows).train()
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.vision_tower.state_dict().items())
    evaluator = TagEvaluator(rows["tags"], processor.label_vocabulary)
    for decoding in ("parallel", "sequential"):
        fit = fit_generation_config(model, processor, rows, evaluator, decoding=decoding, progress=False)
        # Colours can be seen, places cannot.
        assert fit["validation"]["full_f1"] > 70
    with pytest.raises(ValueError, match="No training example has a tag"):
        prepare_for_fine_tuning(model, processor, [[], []])
