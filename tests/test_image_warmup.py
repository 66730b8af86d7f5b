"""Image warm-up: image evidence and class embeddings are trained on cached features, once for all runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

from modeling_optsg.data.feature_cache import CachedFeatures
from modeling_optsg.training import OPTSGTrainingArguments, image_warmup, warm_up_image_evidence

TAGS = ["blue", "green", "red", "square"]
# Padded with -100.
TAG_TOKENS = torch.tensor([[5, -100], [6, 7], [8, -100], [9, -100]])
WIDTH = 6
POOLER = "model.multimodal_encoder.evidence_pooler"
IMAGE_LAYERS = {f"{POOLER}.image_{layer}.{name}" for layer in ("inner", "outer") for name in ("weight", "bias")}
TRAINED = IMAGE_LAYERS | {f"{POOLER}.log_scales", "tag_classifier.bias", "tag_classifier.class_embeddings.weight"}


@pytest.fixture(autouse=True)
def loggers():
    PartialState()  # which accelerate's loggers need


@pytest.fixture(scope="module")
def images():
    """64 images of four kinds, one for each tag."""
    generator = torch.Generator().manual_seed(0)
    kinds = 3 * torch.randn(len(TAGS), WIDTH, generator=generator)
    noise = 0.3 * torch.randn(64, WIDTH, generator=generator)
    return (kinds.repeat(16, 1) + noise).half().float()


@pytest.fixture(scope="module")
def tag_sets():
    return [[TAGS[index % len(TAGS)]] for index in range(64)]


@pytest.fixture(scope="module")
def examples(images, tag_sets):
    return cached_examples(images, tag_sets)


@pytest.fixture
def build(make_model, images):
    """Makes a model whose image standardizer is fitted, always the same one."""

    def make(**config):
        model = make_model(None, frame_feature_size=WIDTH, **config)
        if model.config.use_tag_classifier:
            torch.manual_seed(1)
            model.set_label_vocabulary([[token for token in row if token > 0] for row in TAG_TOKENS.tolist()])
            model.model.multimodal_encoder.evidence_pooler.standardizer.fit(images)
        return model

    return make


@pytest.fixture
def arguments(tmp_path):
    def make(**more):
        settings = {"image_warmup_epochs": 40, "learning_rate": 1e-2, "cache_dir": str(tmp_path / "cache")}
        return OPTSGTrainingArguments("run", dataset="rows", **settings | more)

    return make


@pytest.fixture
def count_trainings(monkeypatch):
    """Replaces the training by a counter."""
    calls = []
    monkeypatch.setattr(image_warmup, "_train", lambda *args: calls.append(args))
    return calls


def cached_examples(features, tag_sets):
    """Examples with image features; `None` stands for an example without an image."""
    columns = {"image_features": [None if row is None else np.float16(row).tobytes() for row in features]}
    columns["image_features_shape"] = [None if row is None else [len(row)] for row in features]
    return CachedFeatures(Dataset.from_dict(columns | {"tags": tag_sets}))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def cached_files(args):
    return [path for path in Path(args.cache_dir, "features").glob("*") if path.suffix == ".safetensors"]


@torch.no_grad()
def loss_and_accuracy(model, images):
    """Compute the classifier loss of images alone, and how many have the highest logit for their tag."""
    classes = torch.arange(len(images)) % len(TAGS)
    evidence = model.eval().model(frame_features=images[:, None, None], image_features=images).evidence
    loss = model.tag_classifier(evidence, TAG_TOKENS[classes][:, None])
    found = model.tag_classifier.logits(evidence).argmax(dim=1)
    return loss.item(), found.eq(classes).float().mean().item()


# Training


def test_a_warm_up_trains_the_image_evidence_alone(build, arguments, examples, images):
    model = build()
    before, (loss, accuracy) = snapshot(model), loss_and_accuracy(model, images)
    warm_up_image_evidence(model, arguments(), TAGS, examples, None)
    assert changed(before, model) == TRAINED
    title_scale, _ = model.state_dict()[f"{POOLER}.log_scales"]
    assert title_scale == before[f"{POOLER}.log_scales"][0], "the scale of titles stays"
    new_loss, new_accuracy = loss_and_accuracy(model, images)
    assert new_loss < loss / 3 and accuracy < 0.9 < new_accuracy
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_result_depends_on_the_seed_of_the_arguments(build, arguments, examples, tmp_path):
    def trained(random_state, **more):
        model = build()
        torch.manual_seed(random_state)
        state = torch.get_rng_state()
        warm_up_image_evidence(model, arguments(image_warmup_epochs=2, **more), TAGS, examples, None)
        assert torch.equal(torch.get_rng_state(), state), "the random numbers of the training stay the same"
        return snapshot(model)

    first = trained(0)
    again, other = build(), build()
    again.load_state_dict(trained(1, cache_dir=str(tmp_path / "another")))
    assert not changed(first, again)
    other.load_state_dict(trained(0, seed=1))
    assert changed(first, other) == TRAINED


def test_extra_images_are_trained_on_as_well(build, arguments, examples, images, tag_sets):
    parts = [cached_examples(images[rows], tag_sets[rows]) for rows in (slice(0, 24), slice(24, None))]
    whole, divided, part = build(), build(), build()
    args = arguments(image_warmup_epochs=2)
    warm_up_image_evidence(whole, args, TAGS, examples, None)
    warm_up_image_evidence(divided, args, TAGS, *parts)
    warm_up_image_evidence(part, args, TAGS, parts[0], None)
    assert not changed(snapshot(whole), divided)
    assert changed(snapshot(whole), part) == TRAINED


def test_tags_without_a_class_and_examples_without_images_are_ignored(build, arguments, examples, images, tag_sets):
    noisy_tags = [["novel", *tags, "another", *tags] for tags in tag_sets[:32]] + tag_sets[32:]
    extra_images, extra_tags = [*images[32:]], list(tag_sets[32:])
    for image, tags in ((images[0], ["novel"]), (images[1], []), (None, ["red"])):
        extra_images.insert(5, image)
        extra_tags.insert(5, tags)
    clean, noisy = build(), build()
    args = arguments(image_warmup_epochs=2)
    warm_up_image_evidence(clean, args, TAGS, examples, None)
    parts = cached_examples(images[:32], noisy_tags[:32]), cached_examples(extra_images, extra_tags)
    warm_up_image_evidence(noisy, args, TAGS, *parts)
    assert not changed(snapshot(clean), noisy)


# The cached file


def test_a_second_warm_up_loads_the_file(build, arguments, examples, monkeypatch):
    first, second = build(), build()
    warm_up_image_evidence(first, arguments(), TAGS, examples, None)
    monkeypatch.setattr(image_warmup, "_train", lambda *args: pytest.fail("it was trained again"))
    warm_up_image_evidence(second, arguments(), TAGS, examples, None)
    assert not changed(snapshot(first), second)
    assert len(cached_files(arguments())) == 1, "no partial file is left"


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 1},
        {"learning_rate": 2e-2},
        {"embedding_lr_multiplier": 0.5},
        {"image_warmup_epochs": 39},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_arguments_get_another_file(build, arguments, examples, count_trainings, more):
    for settings in ({}, more, {}, more):
        warm_up_image_evidence(build(), arguments(**settings), TAGS, examples, None)
    assert len(count_trainings) == len(cached_files(arguments())) == 2


def test_other_data_or_another_start_gets_another_file(build, arguments, examples, images, tag_sets, count_trainings):
    fewer = cached_examples(images[:32], tag_sets[:32])
    retagged = cached_examples(images, [["red"]] * len(images))
    refitted, moved = build(), build()
    refitted.model.multimodal_encoder.evidence_pooler.standardizer.mean.add_(1.0)
    torch.nn.init.ones_(moved.tag_classifier.class_embeddings.weight)
    for model, tags, *sources in (
        (build(), TAGS, examples, None),
        (build(), TAGS[::-1], examples, None),
        (build(), TAGS, fewer, None),
        (build(), TAGS, retagged, None),
        (build(), TAGS, examples, fewer),
        (build(classifier_dropout=0.1), TAGS, examples, None),
        (refitted, TAGS, examples, None),
        (moved, TAGS, examples, None),
    ):
        warm_up_image_evidence(model, arguments(), tags, *sources)
    assert len(count_trainings) == len(cached_files(arguments())) == 8


# No warm-up


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ({"image_warmup_epochs": 0}, {}),
        ({"classifier_checkpoint": "runs/asy"}, {}),
        ({}, {"use_tag_classifier": False}),
    ],
    ids=["no epochs", "trained before", "no classifier"],
)
def test_a_model_without_warm_up_stays_as_it_is(build, arguments, examples, count_trainings, more, config):
    model, args = build(**config), arguments(**more)
    before = snapshot(model)
    warm_up_image_evidence(model, args, TAGS, examples, None)
    assert not changed(before, model) and not count_trainings and not cached_files(args)
