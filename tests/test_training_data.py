"""Training and validation examples: splits, streams, and examples that are left out."""

import shutil

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from colour_folder import LONG_TAG, write_colour_folder
from datasets import Dataset

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGModel
from modeling_optsg.training import (
    OPTSGTrainingArguments,
    load_extra_images,
    load_splits,
    load_streams,
    without_untrainable_tags,
)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Without it, `datasets` sleeps for five seconds whenever a stream is not read to its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_colour_folder(root)
    return root


def arguments(dataset, output, **more):
    return OPTSGTrainingArguments(str(output), dataset=str(dataset), dataset_dir=str(output / "datasets"), **more)


def test_untrainable_tags_and_examples_are_left_out(tiny_processor, caplog):
    PartialState()  # which accelerate's loggers need
    rows = {"tags": [["red", LONG_TAG], [], ["left", "right", "red", "blue", "green"]]}
    kept = without_untrainable_tags(Dataset.from_dict(rows), tiny_processor)
    assert kept["tags"] == [["red"], ["left", "right", "red", "blue", "green"]]
    for message in (
        "1 of 6 training tags are longer",
        "1 of 3 training examples have no tags",
        "more than num_prompts=4",
    ):
        assert message in caplog.text
    with pytest.raises(ValueError, match="No training example has a tag.*as lists or as text.*--tags_column"):
        without_untrainable_tags(Dataset.from_dict({"tags": [[], []]}), tiny_processor)


def test_the_same_streamed_examples_are_set_aside_each_time(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "data/train")

    def streams(ratio):
        return load_streams(arguments(tmp_path / "data", tmp_path, streaming=True, validation_ratio=ratio))

    shards, train, validation = streams(0.3)
    ids = [row["id"] for rows in shards for row in rows]
    assert ids == train["id"][:] and len(train["tags"]) == len(ids)
    assert len(validation) and not set(ids) & set(validation["id"]) and len(ids) + len(validation) == 16
    again = streams(0.3)[2]
    assert again["id"][:] == validation["id"][:] and again._fingerprint == validation._fingerprint
    assert again.cache_files and streams(0.6)[2]._fingerprint != again._fingerprint
    assert validation[0]["image"]["path"] or validation[0]["image"]["bytes"]
    with pytest.raises(ValueError, match="no example is left for validation; give a larger --validation_ratio"):
        streams(1e-9)


def test_examples_of_a_stream_of_several_files_need_ids(tmp_path):
    (tmp_path / "data").mkdir()
    paths = [tmp_path / f"data/train-{number:05d}-of-00004.parquet" for number in range(4)]
    for number, path in enumerate(paths):
        rows = {"title": [f"t{number}{row}" for row in range(10)], "tags": [[f"{number}-{row}"] for row in range(10)]}
        Dataset.from_dict(rows).to_parquet(path)
    args = arguments(tmp_path / "data", tmp_path, streaming=True, validation_ratio=0.25)
    with pytest.raises(ValueError, match="several files need an `id`"):
        load_streams(args)
    for number, path in enumerate(paths):
        rows = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf"))
        rows.add_column("id", [str(10 * number + row) for row in range(10)]).to_parquet(path)
    shards, train, validation = load_streams(args)
    shuffled = {row["id"] for rows in shards for row in rows.shuffle(seed=3, buffer_size=5)}
    assert shuffled == set(train["id"]) and not shuffled & set(validation["id"]) and len(validation)


def test_train_ratio_chooses_the_same_examples_for_any_seed(folder, tmp_path):
    def titles(ratio, seed):
        return load_splits(arguments(folder, tmp_path, train_ratio=ratio, seed=seed))[0]["title"][:]

    assert titles(0.25, 0) == titles(0.25, 1) and len(titles(0.25, 0)) == 4
    assert set(titles(0.25, 0)) <= set(titles(1.0, 0)) and len(titles(1.0, 0)) == 16


# Extra images


@pytest.fixture
def load_extras(tiny_model, tiny_processor, tmp_path):
    """Loads extra images for the tiny model."""
    PartialState()

    def load(name, train=None, **more):
        args = OPTSGTrainingArguments(
            "run", extra_images=name, dataset_dir=str(tmp_path / "datasets"), cache_dir=str(tmp_path / "cache"), **more
        )
        return load_extra_images(train, tiny_model, tiny_processor, args)

    return load


@pytest.fixture(scope="module")
def configurations(tmp_path_factory):
    """A folder of Parquet files with two configurations, "own" and "more"."""
    root = tmp_path_factory.mktemp("configurations")
    lines = ["---", "configs:"]
    for index, name in enumerate(("own", "more")):
        rows = {"title": [name] * (index + 2), "tags": [[f"tag of {name}"]] * (index + 2)}
        rows["image"] = [np.full((8, 8, 3), 40 * row, np.uint8) for row in range(index + 2)]
        features = datasets.Features(
            title=datasets.Value("string"), tags=datasets.List(datasets.Value("string")), image=datasets.Image()
        )
        (root / name).mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(root / name / "train.parquet")
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/*.parquet"]
    (root / "README.md").write_text("\n".join([*lines, "---"]))
    return root


def test_extra_images_are_those_of_the_training_split(load_extras, tiny_model, tiny_processor, folder):
    extras = load_extras(str(folder))
    rows = load_tagging_dataset(folder, split="train")
    assert len(extras) == len(rows) == 16
    tiny_model.eval()
    for index in (0, 1, 15):
        example, row = extras[index], rows[index]
        assert (example["title"], example["tags"]) == (row["title"], row["tags"])
        assert "image" not in example and "title_features" not in example, "titles are compared as text"
        expected = tiny_model.model.encode_frames(tiny_processor(images=row["image"])["pixel_values"])
        for name in ("image_features", "frame_features"):
            found = getattr(expected, name)[0].detach().numpy()
            np.testing.assert_allclose(example[name], found, rtol=2e-3, atol=2e-3)


def test_extra_images_pass_the_vision_tower_once(load_extras, folder, monkeypatch):
    first = load_extras(str(folder))
    monkeypatch.setattr(OPTSGModel, "encode_text", lambda *args: pytest.fail("titles are not encoded"))
    monkeypatch.setattr(OPTSGModel, "encode_frames", lambda *args: pytest.fail("the vision tower was run again"))
    second = load_extras(str(folder))
    assert first.dataset._fingerprint == second.dataset._fingerprint
    np.testing.assert_array_equal(first[3]["image_features"], second[3]["image_features"])


def test_extra_images_may_come_from_a_configuration(load_extras, configurations, tmp_path):
    for name, number in (("own", 2), ("more", 3)):
        extras = load_extras(f"{configurations}:{name}")
        assert len(extras) == number
        assert {(example["title"], *example["tags"]) for example in extras} == {(name, f"tag of {name}")}
        assert len({example["image_features"].tobytes() for example in extras}) == number
    assert list((tmp_path / "datasets").rglob("*.arrow")), "they are prepared in dataset_dir"


def test_copies_are_further_extra_images(load_extras, folder, configurations):
    train = load_tagging_dataset(folder, split="train")
    extras = load_extras(f"{configurations}:more", train, num_image_copies=2)
    assert len(extras) == 3 + 2 * 16 and extras.dataset["title"][3:] == 2 * train["title"][:]
    copies = [extras[index]["image_features"].tobytes() for index in range(3, 35)]
    own = load_extras(str(folder))
    assert len({*copies, *(own[index]["image_features"].tobytes() for index in range(16))}) > 32
    assert len(load_extras(None, train, num_image_copies=1)) == 16


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_dataset_there_are_no_extra_images(load_extras, name):
    assert load_extras(name) is None


def test_unreadable_extra_images_are_left_out(load_extras, folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/train/5.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="1 examples cannot be read, more than 0"):
        load_extras(str(tmp_path / "data"), max_unreadable=0)
    assert len(load_extras(str(tmp_path / "data"), max_unreadable=1)) == 15
    assert "1 of 16 examples cannot be read and are left out" in caplog.text


def test_a_missing_dataset_of_extra_images_is_reported(load_extras, folder, configurations, tmp_path):
    with pytest.raises(FileNotFoundError, match="'no_such_name' is not a benchmark, a local folder or"):
        load_extras("no_such_name")
    with pytest.raises(ValueError, match="'drawings' is not one of default, more_drawings, unseen"):
        load_extras("icon_tagging:drawings")
    with pytest.raises(ValueError, match="a folder of images or videos takes no further arguments; got config_name"):
        load_extras(f"{folder}:more")
    with pytest.raises(ValueError, match="neither"):
        load_extras(f"{configurations}:neither")
    shutil.copytree(folder / "test", tmp_path / "data/test")
    with pytest.raises(ValueError, match=r"has the splits \['test'\]; cannot read 'train'"):
        load_extras(str(tmp_path / "data"))
