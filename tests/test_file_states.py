"""Replaced images and videos: their features are computed again, and a training run with them is not resumed."""

import os

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset
from PIL import Image

from dataset_scripts import load_tagging_dataset
from dataset_scripts.file_states import hash_file_states
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.training import OPTSGTrainingArguments, examples_fingerprint, load_streams

METADATA = '{"file_name": "1.png", "tags": ["red"]}\n{"file_name": "2.png", "tags": ["blue"]}\n'


@pytest.fixture(params=["metadata", "captions"])
def folder(request, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for number, colour in (("1", "red"), ("2", "blue")):
        path = root / f"{number}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        path.write_bytes(path.read_bytes().ljust(200, b"\0"))
        if request.param == "captions":
            (root / f"{number}.txt").write_text(colour)
    if request.param == "metadata":
        (root / "metadata.jsonl").write_text(METADATA)
    return root


def replace_keeping_time(path):
    before = path.stat()
    Image.effect_noise((32, 32), 90).convert("RGB").save(path)
    assert path.stat().st_size != before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_keeping_size(path):
    before, content = path.stat(), path.with_name("2.png").read_bytes()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


REPLACE = (replace_keeping_time, replace_keeping_size)


@pytest.mark.parametrize("replace", REPLACE, ids=lambda replace: replace.__name__)
def test_the_features_of_a_replaced_image_are_computed_again(folder, tiny_model, tiny_processor, tmp_path, replace):
    def features():
        rows = load_tagging_dataset(folder, split="train")
        examples = CachedFeatures(cache_tower_features(rows, tiny_model.model, tiny_processor, tmp_path / "cache"))
        return [example["image_features"] for example in examples]

    first, files = features(), set((tmp_path / "cache").iterdir())
    np.testing.assert_array_equal(first, features())
    assert set((tmp_path / "cache").iterdir()) == files
    replace(folder / "1.png")
    changed = features()
    assert not np.array_equal(changed[0], first[0]) and np.array_equal(changed[1], first[1])


@pytest.mark.parametrize("replace", REPLACE, ids=lambda replace: replace.__name__)
def test_a_training_with_a_replaced_image_has_another_fingerprint(folder, tmp_path, replace):
    PartialState()

    def fingerprint(folder):
        rows = load_tagging_dataset(folder, split="train")
        return examples_fingerprint(rows.select([1]), rows.select([0]))

    first = fingerprint(folder)
    assert fingerprint(folder) == first
    folder = folder.rename(tmp_path / "moved")
    assert fingerprint(folder) == first, "the folder itself may be moved"
    replace(folder / "1.png")
    assert fingerprint(folder) != first


def test_streamed_validation_examples_have_the_fingerprint_of_their_files(folder, tmp_path, monkeypatch):
    PartialState()
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    args = OPTSGTrainingArguments(str(tmp_path / "run"), dataset=str(folder), streaming=True, validation_ratio=0.9)
    validation = load_streams(args)[2]
    assert load_streams(args)[2]._fingerprint == validation._fingerprint
    for path in folder.glob("*.png"):
        os.utime(path, ns=(0, 1))
    assert load_streams(args)[2]._fingerprint != validation._fingerprint


def test_content_and_files_elsewhere_have_no_state(folder, tmp_path, monkeypatch):
    content = (folder / "1.png").read_bytes()
    features = datasets.Features({"image": datasets.Image(), "video": datasets.List(datasets.Image())})
    images = [{"bytes": content, "path": "1.png"}, {"bytes": content, "path": None}]
    rows = Dataset.from_dict({"image": images, "video": [None, [{"bytes": content, "path": None}]]}, features=features)
    monkeypatch.chdir(folder)
    assert hash_file_states(rows) == ""
    features = datasets.Features({"image": datasets.Image()})
    paths = ["zip://1.png::a.zip", None, str(tmp_path / "missing.png")]
    assert hash_file_states(Dataset.from_dict({"image": paths}, features=features)) == ""
    assert hash_file_states(Dataset.from_dict({"title": ["a"]})) == ""
    assert hash_file_states(Dataset.from_dict({"image": [*paths, str(folder / "1.png")]}, features=features))
