"""Training and validation examples: splits, streams, and examples that are left out."""

import shutil

import datasets
import pytest
from accelerate import PartialState
from colour_folder import LONG_TAG, write_colour_folder
from datasets import Dataset

from modeling_optsg.training import OPTSGTrainingArguments, load_splits, load_streams, without_untrainable_tags


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
    with pytest.raises(ValueError, match="No training example has a tag"):
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
