"""Videos whose frames are lists of images: loading, tensors, cached features, predictions and export."""

import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from test_column_names import image_bytes

from dataset_scripts import load_tagging_dataset, undecoded
from dataset_scripts.export_card import new_card
from dataset_scripts.parquet_export import write_parquet
from modeling_optsg import OPTSGDataCollator, OPTSGProcessor
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.pipeline_optsg import TagGenerationPipeline
from modeling_optsg.training import trainer
from modeling_optsg.training.streaming import open_stream_shards

datasets.disable_progress_bars()

COLOURS = [["red", "lime", "blue"], ["white"], ["red", "blue", "red", "blue", "lime", "white"]]
FRAMES = List(Image(decode=False))


@pytest.fixture
def load(tmp_path):
    """Writes lists of images to a Parquet file and loads them."""

    def write_and_load(column="frames", streaming=False, others=None, **names):
        frames = [[image_bytes(colour) for colour in colours] for colours in COLOURS]
        columns = {"id": ["a", "b", "c"], "title": ["x", "y", "z"], "tags": [["red"], ["blue"], ["red"]]}
        features = {"id": Value("string"), "title": Value("string"), "tags": List(Value("string"))}
        for name, feature in (others or {}).items():
            black = image_bytes("black")
            columns[name], features[name] = [black if feature == Image() else [black]] * 3, feature
        columns[column], features[column] = frames, List(Image())
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(columns, Features(features)).to_parquet(str(tmp_path / "data/train.parquet"))
        options = {"split": "train", "streaming": streaming, "cache_dir": tmp_path / "cache", **names}
        return load_tagging_dataset(tmp_path / "data", **options)

    return write_and_load


def expected(processor):
    return processor(
        videos=[[image_bytes(colour) for colour in colours] for colours in COLOURS], titles=["x", "y", "z"]
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "column, names",
    [
        ("frames", {}),
        ("images", {}),
        ("image", {}),
        ("video", {}),
        ("shots", {"video_column": "shots"}),
        ("shots", {"image_column": "shots"}),
    ],
)
def test_lists_of_images_become_videos(load, tiny_processor, column, names, streaming):
    rows = load(column, streaming, **names)
    assert rows.features["video"] == FRAMES and (column == "video" or column not in rows.features)
    rows = list(rows)
    assert [len(row["video"]) for row in rows] == [3, 1, 6]
    assert rows[0]["video"][1]["bytes"] == image_bytes("lime")["bytes"]
    batch = OPTSGDataCollator(tiny_processor)([{**row, "tags": row["tags"]} for row in rows])
    reference = expected(tiny_processor)
    # At most four frames of the third video.
    assert batch["frame_mask"].sum(1).tolist() == [3, 1, 4]
    assert torch.equal(batch["pixel_values"], reference["pixel_values"])


def test_a_column_of_images_is_used_before_lists(load, caplog):
    rows = load("images", others={"image": Image()})
    assert rows.features["image"] == Image() and "video" not in rows.features
    rows = load("images", others={"image": Image()}, video_column="images")
    assert rows.features["video"] == FRAMES and "image" not in rows.features
    assert "columns not used, because others are named: image" in caplog.text
    with pytest.raises(ValueError, match="images and frames are both videos"):
        load("images", others={"frames": FRAMES}, image_column="images", video_column="frames")


def test_frames_are_cached_like_other_videos(load, tiny_model, tiny_processor, tmp_path):
    rows = load()
    cached = CachedFeatures(cache_tower_features(rows, tiny_model.model, tiny_processor, tmp_path / "features"))
    batch = expected(tiny_processor)
    with torch.no_grad():
        features = tiny_model.model.encode_frames(batch["pixel_values"], batch["frame_mask"]).frame_features
    for index, length in enumerate([3, 1, 4]):
        found = cached[index]["frame_features"]
        assert len(found) == length and "video" not in cached[index]
        np.testing.assert_allclose(found, features[index, :length].numpy(), rtol=1e-2, atol=1e-2)


def test_unreadable_frames_are_reported(load, tiny_model, tiny_processor, tmp_path):
    rows = load()
    broken = [[{"bytes": b"no image", "path": None}], [], rows[2]["video"]]
    rows = rows.remove_columns("video").add_column("video", broken, feature=FRAMES)
    cached = cache_tower_features(rows, tiny_model.model, tiny_processor, tmp_path / "features", max_unreadable=2)
    first, second, third = cached["unreadable"]
    assert "is not an image that can be read" in first and "has no frames" in second and third is None


def test_the_pipeline_tags_frames(load, tiny_model, tiny_processor):
    tiny_model.generation_config.pad_bias = -5.0
    tag = TagGenerationPipeline(model=tiny_model, processor=tiny_processor)
    frames = [[image_bytes(colour) for colour in colours] for colours in COLOURS]
    reference = [tag({"frames": own, "title": title}) for own, title in zip(frames, "xyz", strict=True)]
    rows = load()
    assert list(tag(rows)) == reference
    decoded = rows.cast_column("video", List(Image())).rename_column("video", "frames")
    assert list(tag(decoded)) == reference


def test_streams_of_frames_are_divided(load):
    rows = undecoded(load(streaming=True))
    shards, texts = open_stream_shards(rows, load(streaming=True, texts_only=True), 2, "data")
    assert texts["id"][:] == ["a", "b", "c"]
    assert [len(row["video"]) for shard in shards for row in shard] == [3, 1, 6]


def test_exported_frames_load_again(load, tmp_path):
    rows = datasets.DatasetDict(train=load())
    write_parquet(rows, tmp_path / "out", new_card("mine", rows, None, None), max_shard_size=1)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    again = load_tagging_dataset(tmp_path / "out", cache_dir=tmp_path / "again")["train"]
    assert again.features["video"] == FRAMES and again[2]["video"] == rows["train"][2]["video"]


@pytest.mark.parametrize("streaming", [False, True])
def test_training_uses_frames_and_one_hot_columns(towers, tmp_path, streaming):
    frames = [[image_bytes(colour) for colour in colours] for colours in COLOURS] * 4
    columns = {"id": list("abcdefghijkl"), "shots": frames, "is_red": [1, 0, 1] * 4, "is_blue": [0, 1, 1] * 4}
    integers = dict.fromkeys(("is_red", "is_blue"), Value("int64"))
    rows = Dataset.from_dict(columns, Features(id=Value("string"), shots=List(Image()), **integers))
    for split in ("train", "validation"):
        rows.to_parquet(str(tmp_path / f"data/{split}.parquet"))
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}
    given = {
        "dataset": tmp_path / "data",
        "dataset_dir": tmp_path / "datasets",
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "vision_tower": towers / "vision",
        "text_tower": towers / "text",
        "tag_vocab_size": 260,
        "config_overrides": json.dumps(small),
        "train_batch_size": 4,
        "num_train_epochs": 1,
        "num_negatives": 0,
        "video_column": "shots",
        "tags_column": "is_*",
        "streaming": streaming,
    }

    trainer.main([str(word) for name, value in given.items() for word in (f"--{name}", value)])
    summary = json.loads((tmp_path / "run/training_summary.json").read_text())
    assert summary["examples"] == {"train": 12, "validation": 12}
    assert summary["arguments"]["tags_column"] == "is_*"
    assert set(OPTSGProcessor.from_pretrained(tmp_path / "run").label_vocabulary) == {"red", "blue"}
