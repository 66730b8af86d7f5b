"""`Trainer` and `TagTrainer`: batches that launchers can divide, generated tags in evaluation, several processes."""

import copy
import functools
import json
import random

import numpy as np
import pytest
import torch
from accelerate.utils import concatenate, slice_tensors
from PIL import Image
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import AutoModel, Trainer, TrainingArguments

from modeling_optsg import OPTSGDataCollator, TagMetrics, TagTrainer
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.collator import TagTable

TAG_SETS = [
    ["red", "square"],
    ["blue"],
    ["red", "colour", "e-mail"],
    ["创意美食", "red"],
    ["家常菜", "blue"],
    ["colour"],
]
PROCESSES = 2
NO_DROPOUT = {
    "dropout": 0.0, "classifier_dropout": 0.0, "modality_dropout": 0.0, "pooled_title_ratio": 0.0,
    "parallel_ratio": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in TAG_SETS]
    titles = ["a red square", "blue", None, "dog", "green dog", "red"]
    rows = zip(images, titles, TAG_SETS, strict=True)
    return [{"image": image, "title": title, "tags": tags} for image, title, tags in rows]


@pytest.fixture(scope="module")
def make_any(tower_configs, tiny_processor):
    """Makes a small model of any type that is trained, without dropout."""

    def make(name="op-tsg", **config):
        spec, tags = MODEL_TYPES[name], list(tiny_processor.label_vocabulary)
        has_classes = name not in ("sequence", "open-book") and config.get("use_tag_classifier", True)
        settings = {
            "vision_config": tower_configs["vit"],
            "text_config": tower_configs["bert"],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_prompts": 4,
            "max_tag_tokens": 8,
            "alignment_size": 8,
            "tag_vocab_size": len(tiny_processor.tag_tokenizer),
            "num_tag_classes": len(tags) if has_classes else 0,
        }
        torch.manual_seed(0)
        settings |= NO_DROPOUT | dict(spec.config) | config
        model = spec.model(spec.model.config_class(**copy.deepcopy(settings)))
        if has_classes:
            model.set_label_vocabulary(tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"])
        for tower in (model.model.vision_tower, model.model.text_tower):
            tower.requires_grad_(False)
        return model

    return make


@pytest.fixture(scope="module")
def table(tiny_processor):
    tags = list(tiny_processor.label_vocabulary)
    ids = tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    return TagTable(tags, ids, torch.randn(len(tags), 16, generator=torch.Generator().manual_seed(0)))


# The layout of a batch


@pytest.mark.parametrize("settings", [{}, {"tag_table": True}, {"tag_table": True, "num_negatives": 4}])
def test_every_tensor_has_the_examples_first(tiny_processor, table, examples, settings):
    settings = settings | ({"tag_table": table} if settings else {})
    batch = OPTSGDataCollator(tiny_processor, **settings)([row | {"example_seed": 3} for row in examples])
    assert {len(tensor) for tensor in batch.values()} == {len(examples)}


@torch.no_grad()
@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name != "knn"])
def test_a_part_of_a_batch_equals_a_batch_of_the_part(make_any, tiny_processor, table, examples, name, with_table):
    """As `DataParallel` and the dispatcher of accelerate cut it."""
    model, collate = make_any(name).eval(), OPTSGDataCollator(tiny_processor, table if with_table else None)
    for part in (slice(0, 2), slice(2, 6), slice(5, 6)):
        cut = slice_tensors(collate(examples), part)
        torch.testing.assert_close(model(**cut).loss, model(**collate(examples[part])).loss, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_joined_batches_equal_one_batch(make_any, tiny_processor, table, examples):
    """The same tag has the same features in both; a negative of one may be a tag of the other."""
    model, collate = make_any().eval(), OPTSGDataCollator(tiny_processor, table, num_negatives=7)
    rows = [examples[index] for index in (0, 3, 4, 0, 3, 4)]
    joined = concatenate([collate(rows[:3]), collate(rows[3:])])
    torch.testing.assert_close(model(**joined).loss, model(**collate(rows)).loss, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_losses_equal_those_of_unique_candidates(make_any, tiny_processor, table, examples):
    """The alignment, computed with the candidates of the batch in any order, each once."""
    model = make_any().eval()
    batch = OPTSGDataCollator(tiny_processor, table)(examples)
    outputs = model(**batch)
    tags = sorted({tag for row in TAG_SETS for tag in row})
    width = max(map(len, TAG_SETS))
    labels = torch.tensor([[tags.index(t) for t in row] + [-100] * (width - len(row)) for row in TAG_SETS])
    features = table.features[[table.index[tag] for tag in tags]]
    expected = model.tag_alignment(outputs.order_prompts, features, labels)
    torch.testing.assert_close(outputs.alignment_loss, expected.loss, rtol=1e-6, atol=1e-6)
    for row, own, wanted in zip(TAG_SETS, outputs.assignment.tolist(), expected.assignment.tolist()):
        assert [None if i < 0 else row[i] for i in own] == [None if i < 0 else tags[i] for i in wanted]


# Evaluation


def arguments(folder, **more):
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **settings | more)


def test_metrics_of_generated_tags_choose_the_best_model(make_any, tiny_processor, table, examples, tmp_path):
    model = make_any()
    more = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    args = arguments(
        tmp_path, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=6, per_device_eval_batch_size=4,
        load_best_model_at_end=True, metric_for_best_model="full_f1", save_total_limit=1, **more,
    )  # fmt: skip
    trainer = TagTrainer(
        model,
        args,
        data_collator=OPTSGDataCollator(tiny_processor, table),
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=TagMetrics(tiny_processor),
        generate_kwargs={"pad_bias": -1.0},
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "eval_full_f1" in row]
    best = max(row["eval_full_f1"] for row in history)
    assert best > 20 and len(history) == 12
    assert trainer.state.best_metric == best
    metrics = trainer.evaluate()
    assert metrics["eval_full_f1"] == best and metrics["eval_loss"] > 0
    output = trainer.predict(examples)
    sequences, scores = output.predictions
    assert sequences.shape[::2] == (6, 8) and scores.shape == sequences.shape[:2]
    inputs = {name: value for name, value in examples[0].items() if name != "tags"}
    found = tiny_processor.batch_decode(model.generate(**trainer.data_collator([inputs]), pad_bias=-1.0))
    own = tiny_processor.batch_decode(sequences)[0]
    assert [tag["tag"] for tag in own][: len(found[0])] == [tag["tag"] for tag in found[0]]


@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name != "knn"])
def test_trainer_evaluates_every_model(make_any, tiny_processor, table, examples, tmp_path, name):
    collator = OPTSGDataCollator(tiny_processor, table)
    shared = {"data_collator": collator, "eval_dataset": examples}
    plain = Trainer(
        make_any(name), arguments(tmp_path, remove_unused_columns=False, per_device_eval_batch_size=4), **shared,
        compute_metrics=lambda prediction: {"labels": len(prediction.label_ids)},
    )  # fmt: skip
    generated = TagTrainer(
        make_any(name), arguments(tmp_path), **shared, compute_metrics=TagMetrics(tiny_processor)
    ).evaluate()
    assert plain.evaluate()["eval_labels"] == len(examples)
    assert 0 <= generated["eval_full_f1"] <= 100 and generated["eval_loss"] > 0


def test_label_smoothing_is_refused(make_any, tiny_processor, examples, tmp_path):
    args = arguments(tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False, max_steps=1)
    collator = OPTSGDataCollator(tiny_processor)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1.*leave it at 0"):
        TagTrainer(make_any(), args, data_collator=collator)
    for name in ("op-tsg", "asy", "model-g", "sequence"):
        with pytest.raises(ValueError, match="labels"):
            Trainer(make_any(name), args, data_collator=collator, train_dataset=examples).train()


def test_frozen_towers_stay_in_evaluation_mode(make_any, tmp_path):
    model = make_any().train()
    assert model.training and not model.model.vision_tower.training and not model.model.text_tower.training
    model.model.text_tower.requires_grad_(True)
    assert model.train().model.text_tower.training
    make_any().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in loaded.named_parameters() if ".pooler." in name}


# Several processes


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def _in_processes(work, folder, *args):
    """Call `work(rank, ...)` in two processes that communicate by gloo; return what the first one writes."""
    port = random.randrange(20_000, 60_000)
    multiprocessing.spawn(_start, (work, port, str(folder), *args), nprocs=PROCESSES)
    return json.loads((folder / "result.json").read_text())


def _start(rank, work, port, folder, *args):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    result = work(rank, *args)
    if rank == 0:
        with open(f"{folder}/result.json", "w") as file:
            json.dump(result, file, allow_nan=False)


def _train_by_ddp(rank, models, batches):
    distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for name, model in models.items():
        wrapped = DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            # The processes have different modalities.
            loss = wrapped(**batches[(rank + step) % len(batches)]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not missing, (name, missing)
    distributed.destroy_process_group()
    return list(models)


@pytest.mark.slow
def test_a_loop_with_ddp_needs_no_unused_parameters(make_any, tiny_processor, table, examples, tmp_path):
    words = {"image_word_labels": ["dog", "cat"], "image_word_feature_size": 16, "image_word_pooling": "mean"}
    models = {name: make_any(name) for name in MODEL_TYPES if name != "knn"}
    models |= {"image words": make_any(**words, num_image_words=2), "book reader": make_any(book_evidence_size=3)}
    models["no classifier"] = make_any(use_tag_classifier=False)
    collate = OPTSGDataCollator(tiny_processor, table)
    parts = (("image", "tags"), ("title", "tags"), ("image", "title", "tags"))
    batches = [collate([{name: row[name] for name in part} for row in examples[:2]]) for part in parts]
    assert _in_processes(_train_by_ddp, tmp_path, models, batches) == list(models)


def _train_by_trainer(rank, folder, model, collator, rows, metrics, streamed, processes=PROCESSES):
    args = arguments(
        folder, max_steps=6, learning_rate=3e-3, logging_steps=1, per_device_train_batch_size=6 // processes,
        per_device_eval_batch_size=2, train_sampling_strategy="sequential", eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer = TagTrainer(
        model, args, data_collator=collator, eval_dataset=rows[:5], compute_metrics=metrics,
        train_dataset=Stream(rows * 6) if streamed else rows,
    )  # fmt: skip
    trainer.train()
    # Stock `Trainer` evaluates under several processes too.
    plain = Trainer(
        model, arguments(folder, remove_unused_columns=False, per_device_eval_batch_size=2),
        data_collator=collator, eval_dataset=rows[:5], compute_metrics=lambda p: {"examples": len(p.label_ids)},
    ).evaluate()  # fmt: skip
    history = trainer.state.log_history
    return {
        "losses": [row["loss"] for row in history if "loss" in row],
        "full_f1": [row["eval_full_f1"] for row in history if "eval_full_f1" in row],
        "examples": plain["eval_examples"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("with_table", [True, False])
def test_the_losses_do_not_depend_on_the_launcher(make_any, tiny_processor, table, examples, tmp_path, with_table):
    # All training tags are negatives, whatever the process draws.
    collator = (
        OPTSGDataCollator(tiny_processor, table, num_negatives=99) if with_table else OPTSGDataCollator(tiny_processor)
    )
    metrics = TagMetrics(tiny_processor)
    train = functools.partial(_train_by_trainer, 0, tmp_path, processes=1)
    expected = train(make_any(), collator, examples, metrics, False)
    assert expected["losses"][-1] < expected["losses"][0]
    found = [train(make_any(), collator, examples, metrics, True)]
    for streamed in (False, True):
        shared = (str(tmp_path), make_any(), collator, examples, metrics, streamed)
        found.append(_in_processes(_train_by_trainer, tmp_path, *shared))
    for own in found:
        assert own["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert own["full_f1"] == pytest.approx(expected["full_f1"], abs=1.0)
        assert own["examples"] == expected["examples"] == 5
