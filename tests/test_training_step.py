"""Training steps: a tiny model overfits ten examples, and `transformers.Trainer` trains it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_optsg import OPTSGDataCollator, OPTSGProcessor, train_tag_tokenizer

# Titles and tags. Examples without a title differ in their images.
EXAMPLES = [
    ("a red square", ["red", "square"]),
    ("a blue square", ["blue", "square", "colour"]),
    ("green dog", ["green", "pet", "animal", "dog"]),
    ("创意美食", ["创意美食", "家常菜"]),
    ("红色方块", ["红色", "方块", "red"]),
    ("家常菜", ["美食"]),
    (None, ["e-mail", "letter"]),
    (None, ["letter", "家常菜", "🍜 soup"]),
    ("e - mail", ["e-mail"]),
    ("blue dog", ["dog", "blue", "pet"]),
]


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in EXAMPLES]
    # The last example has no image.
    return [
        {"image": image if index < 9 else None, "title": title, "tags": tags}
        for index, (image, (title, tags)) in enumerate(zip(images, EXAMPLES))
    ]


@pytest.fixture(scope="module")
def processor(tiny_processor, text_tokenizer):
    tags = [tag for _, example_tags in EXAMPLES for tag in example_tags]
    return OPTSGProcessor(
        tiny_processor.image_processor,
        text_tokenizer,
        train_tag_tokenizer(tags, vocab_size=320),
        num_prompts=4,
        max_tag_tokens=8,
        label_vocabulary=dict.fromkeys(tags, 1),
    )


@pytest.fixture
def make_trainable(make_model, processor):
    """Make a model with a deterministic loss: no dropout of any kind."""

    def make(**config):
        settings = {
            "tag_vocab_size": len(processor.tag_tokenizer),
            "initializer_range": 0.02,
            "dropout": 0.0,
            "modality_dropout": 0.0,
            **config,
        }
        model = make_model(**settings)
        for module in model.modules():
            # Also in the towers.
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    return make


def test_ten_examples_are_overfitted_in_both_decodings(make_trainable, processor, examples):
    model = make_trainable(hidden_size=48, intermediate_size=96, num_decoder_layers=1, alignment_size=24)
    batch = OPTSGDataCollator(processor)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=250)
    torch.manual_seed(0)
    model.train()
    history = []
    for _ in range(250):
        outputs = model(**batch)
        optimizer.zero_grad()
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        history.append([outputs.generation_loss.item(), outputs.alignment_loss.item()])
    first, last = np.mean(history[:5], axis=0), np.mean(history[-5:], axis=0)
    assert (last < 0.25 * first).all()

    inputs = {name: batch[name] for name in ("pixel_values", "frame_mask", "input_ids", "attention_mask")}
    for decoding in ("parallel", "sequential"):
        for settings in ({}, {"num_beams": 3}):
            predictions = processor.batch_decode(model.generate(**inputs, decoding=decoding, **settings))
            for example, tags in zip(examples, predictions):
                assert {tag["tag"] for tag in tags} == set(example["tags"])
                assert all(tag["score"] > 0.5 and not tag["novel"] for tag in tags)


def test_the_loss_falls_with_images_or_titles_alone(make_trainable, processor, examples):
    for column in ("image", "title"):
        rows = [{column: example[column], "tags": example["tags"]} for example in examples if example[column]][:6]
        model, batch = make_trainable(), OPTSGDataCollator(processor)(rows)
        tower = model.model.vision_tower if column == "image" else model.model.text_tower
        before = [parameter.clone() for parameter in tower.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()
        losses = []
        for _ in range(12):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert any(not torch.equal(old, new) for old, new in zip(before, tower.parameters()))


class Examples(Dataset):
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def make_trainer(model, processor, examples, folder, **arguments):
    defaults = {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=Examples(examples),
        eval_dataset=Examples(examples),
        data_collator=OPTSGDataCollator(processor),
    )


def test_trainer_trains_evaluates_and_saves(make_trainable, processor, examples, tmp_path):
    model = make_trainable()
    trainer = make_trainer(
        model, processor, examples, tmp_path, max_steps=6, per_device_train_batch_size=5, learning_rate=3e-3
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    metrics = trainer.evaluate()
    with torch.no_grad():
        batch = OPTSGDataCollator(processor)(examples[:8])
        model.eval()
        expected = [model(**OPTSGDataCollator(processor)(part)).loss for part in (examples[:8], examples[8:])]
    assert metrics["eval_loss"] == pytest.approx((8 * expected[0] + 2 * expected[1]).item() / 10, rel=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, expected[0])


def test_trainer_averages_over_accumulated_batches(make_trainable, processor, examples, tmp_path):
    """Two equal batches, accumulated, change the weights like one of them."""
    updates = []
    for steps in (1, 2):
        model = make_trainable(parallel_ratio=1.0)
        before = model.lm_head.weight.detach().clone()
        make_trainer(
            model,
            processor,
            [examples[0]] * 2 * steps,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        ).train()
        updates.append(model.lm_head.weight.detach() - before)
    assert updates[0].abs().max() > 1e-4
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-3, atol=1e-6)
