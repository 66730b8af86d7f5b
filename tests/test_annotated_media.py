"""CREATE-tagging and Pexel-tagging are built from files in the released layout."""

import gzip
import json
import logging
import os

import datasets
import h5py
import numpy as np
import pytest
import torch
from numbered_videos import number_of, write_video
from PIL import Image

from dataset_scripts import frame_features, load_tagging_dataset
from dataset_scripts.create_tagging import CreateTagging
from dataset_scripts.frame_features import read_frame_features
from modeling_optsg.video_utils import read_frames


def annotation(index, **changes):
    own = {"vid": f"v{index}", "ann_title": f" 夏日凉面{index}", "ann_caption": "…", "raw_title": f"原标题 {index}"}
    return own | {"tag": ["美食", "凉面", f"标签{index}"], "category": index % 3} | changes


def write(path, examples):
    path.write_text(json.dumps(examples, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def create(tmp_path):
    folder = tmp_path / "create"
    (folder / "features").mkdir(parents=True)
    write(folder / "create_210k_train.json", [annotation(index) for index in range(6)])
    write(folder / "create_210k_test.json", [annotation(index) for index in (6, 7)])
    for index in range(8):
        np.save(folder / "features" / f"v{index}.npy", np.full((2 + index % 2, 4), index, np.float16))
    return folder


@pytest.fixture
def load(tmp_path):
    return lambda name="create_tagging", **kwargs: load_tagging_dataset(name, cache_dir=tmp_path / "cache", **kwargs)


def test_annotations_and_features_become_rows(create, load):
    dataset = load(data_dir=str(create))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 6, "test": 2}
    row = dataset["train"][3]
    assert (row["id"], row["title"], row["category"]) == ("v3", "夏日凉面3", 0)
    assert row["tags"] == ["美食", "凉面", "标签3"]
    assert np.array_equal(row["frame_features"], np.full((3, 4), 3.0))
    assert load(data_dir=str(create), title="raw")["train"][0]["title"] == "原标题 0"
    without = load(data_dir=str(create), visual="none")["train"]
    assert without.column_names == ["id", "title", "tags", "category"]


def test_a_stream_gives_the_same_rows(create, load):
    expected = load(data_dir=str(create), split="train")
    assert list(load(data_dir=str(create), split="train", streaming=True)) == list(expected)


def test_a_changed_annotation_file_is_not_served_from_the_cache(create, load):
    assert len(load(data_dir=str(create), split="train")) == 6
    write(create / "create_210k_train.json", [annotation(index) for index in range(3)])
    assert load(data_dir=str(create), split="train")["id"] == ["v0", "v1", "v2"]


def test_changed_features_are_not_served_from_the_cache(create, load):
    assert load(data_dir=str(create), split="train")[1]["frame_features"][0][0] == 1.0
    np.save(create / "features/v1.npy", np.full((5, 4), 9, np.float16))
    assert load(data_dir=str(create), split="train")[1]["frame_features"][4][0] == 9.0


def test_pretraining_files_have_compressed_lines_and_raw_titles(create, load):
    lines = "".join(json.dumps({"vid": f"p{n}", "raw_title": "标题", "tag": ["美食"]}) + "\n" for n in range(5))
    (create / "create_3m_pretrain.json.gz").write_bytes(gzip.compress(lines.encode()))
    rows = load(config_name="create_3m", data_dir=str(create), visual="none", split="train")
    assert len(rows) == 5 and rows[0]["title"] == "标题" and "category" not in rows[0]
    with pytest.raises(ValueError, match="annotated"):
        load(config_name="create_3m", data_dir=str(create), title="annotated")
    with pytest.raises(FileNotFoundError, match="create_10m_pretrain.json"):
        load(config_name="create_10m", data_dir=str(create))


def test_videos_and_images_are_found_by_the_example_id(create, load, tmp_path):
    (create / "videos").mkdir()
    for index in range(8):
        write_video(create / "videos" / f"v{index}.mp4", 10 + index)
    # Of videos and features, the videos are the default.
    assert load(data_dir=str(create), split="train")[0]["video"]["path"].endswith("videos/v0.mp4")
    videos = [row["video"]["path"] for row in load(data_dir=str(create), split="test")]
    assert [[number_of(frame) for frame in read_frames(video, 2)] for video in videos] == [[4, 12], [4, 12]]
    pexel = tmp_path / "pexel"
    (pexel / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(pexel / "images/p0.png")
    write(pexel / "pexel_train.json", [{"id": "p0", "title": "a red square", "tag": ["red"]}])
    row = load("pexel_tagging", data_dir=str(pexel), split="train")[0]
    assert row["image"].getpixel((0, 0)) == (255, 0, 0) and row["tags"] == ["red"]


def test_unusable_examples_and_tags_are_left_out_and_counted(create, tmp_path, caplog):
    outside = tmp_path / "outside.npy"
    np.save(outside, np.ones((2, 4)))
    os.symlink(outside, create / "features/link.npy")
    np.save(create / "features/wide.npy", np.ones((2, 5)))
    np.save(create / "features/nan.npy", np.full((2, 4), np.nan))
    (create / "features/broken.npy").write_bytes(b"no array")
    examples = [
        annotation(0),
        annotation(0, ann_title="again"),
        annotation(1, tag=["  ", 7, "美食", "美食 "]),
        annotation(2, tag=[]),
        annotation(3, tag=[""]),
        annotation(4, vid=None),
        *(annotation(5, vid=vid) for vid in ("gone", "wide", "nan", "broken", "link", "../features/v5")),
    ]
    write(create / "create_210k_train.json", examples)
    builder = CreateTagging(data_dir=str(create), cache_dir=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
    assert rows["id"] == ["v0", "v1"] and rows[1]["tags"] == ["美食"]
    assert builder.left_out["train"] == {
        "examples with a repeated vid": 1,
        "examples without tags": 2,
        "examples without vid": 1,
        "tags that are not text": 1,
        "empty tags": 2,
        "repeated tags": 1,
        "examples without a file in features/": 1,
        "examples whose features are not 4 wide like most": 1,
        "examples whose features cannot be read": 2,
        "examples whose file links out of features/": 1,
        "examples whose id is not a file name": 1,
    }
    assert "1 examples whose id is not a file name" in caplog.text
    kept = CreateTagging(data_dir=str(create), missing="keep", cache_dir=str(tmp_path / "cache"))
    kept.download_and_prepare()
    assert len(kept.as_dataset(split="train")) == 8
    assert kept.left_out["train"]["frame_features of examples without a file in features/"] == 1


def test_damaged_feature_files_and_invalid_values_are_left_out(create, tmp_path, caplog):
    features = create / "features"
    np.save(features / "v0.npy", np.ones((2, 7)))  # Another width than the others.
    for name in ("v1", "v2", "v3", "v4"):
        (features / f"{name}.npy").unlink()
    np.savez(features / "v1.npz", np.ones((2, 4)))
    (features / "v1.npz").write_bytes((features / "v1.npz").read_bytes()[:60])
    with h5py.File(features / "v2.h5", "w"):
        pass
    with h5py.File(features / "v3.h5", "w") as archive:
        archive.create_group("a")["inner"] = np.ones((2, 4))
        archive["features"] = np.ones((2, 4))
    torch.save(torch.nn.Parameter(torch.ones(2, 4)), features / "v4.pt")
    os.rename(features / "v7.npy", features / "v7.NPY")
    np.save(features / "17.npy", np.ones((2, 4)))
    odd = json.dumps(
        [
            *(annotation(index) for index in range(6)),
            annotation(6, category=2**31),
            annotation(7, category=True, tag=["美食", "\ud83d"]),
            annotation(8, vid=17),
            annotation(10, vid="\ud83d"),
        ]
    )
    (create / "create_210k_train.json").write_text(odd, encoding="utf-8")
    builder = CreateTagging(data_dir=str(create), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
    assert rows["id"] == ["v3", "v4", "v5", "v6", "v7", "17"]
    assert rows["category"][3:5] == [None, None] and rows[4]["tags"] == ["美食"]
    left_out = {
        "examples whose features are not 4 wide like most": 1,
        "examples whose features cannot be read": 2,
        "examples without vid": 1,
        "tags that are not text": 1,
    }
    assert builder.left_out["train"] == left_out
    # Loading from the cache reports the same counts.
    again = CreateTagging(data_dir=str(create), cache_dir=str(tmp_path / "cache"))
    caplog.clear()
    again.download_and_prepare()
    assert again.left_out["train"] == left_out and "1 examples without vid" in caplog.text


def test_files_that_are_not_videos_are_left_out_and_counted(create, tmp_path):
    (create / "videos").mkdir()
    write_video(create / "videos/v0.mp4", 4)
    (create / "videos/v1.mp4").write_bytes(b"not a video at all")
    (create / "videos/v2.mp4").write_bytes((create / "videos/v0.mp4").read_bytes()[:200])
    Image.new("RGB", (8, 8)).save(create / "videos/v3.webm", "JPEG")
    os.symlink(create / "videos/v0.mp4", create / "videos/v4.mp4")
    os.symlink(create / "features/v5.npy", create / "videos/v5.mp4")
    builder = CreateTagging(data_dir=str(create), cache_dir=str(tmp_path / "cache"), visual="video")
    write(create / "create_210k_test.json", [annotation(0)])
    builder.download_and_prepare()
    assert builder.as_dataset(split="train")["id"] == ["v0", "v3", "v4"]
    assert builder.left_out["train"] == {
        "examples whose video cannot be opened": 2,
        "examples whose file links out of videos/": 1,
    }
    unchecked = CreateTagging(data_dir=str(create), visual="video", check_media=False, cache_dir=str(tmp_path / "c"))
    unchecked.download_and_prepare()
    assert unchecked.as_dataset(split="train").num_rows == 5


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, FileNotFoundError, "give data_dir"),
        ({"data_dir": "nowhere"}, FileNotFoundError, "is not a folder"),
        ({"visual": "video"}, FileNotFoundError, "videos"),
        ({"visual": "sound"}, ValueError, "visual='sound'"),
        ({"missing": "guess"}, ValueError, "missing='guess'"),
        ({"title": "none"}, ValueError, "title='none'"),
    ],
)
def test_invalid_arguments_are_named_in_the_error(create, load, arguments, error, message):
    if arguments:
        arguments = {"data_dir": str(create)} | arguments
    with pytest.raises(error, match=message):
        load(**arguments)


def test_a_truncated_annotation_file_is_named_in_the_error(create, tmp_path):
    text = (create / "create_210k_train.json").read_text(encoding="utf-8")
    (create / "create_210k_train.json").write_text(text[: len(text) // 2], encoding="utf-8")
    builder = CreateTagging(data_dir=str(create), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
        builder.download_and_prepare()
    assert "create_210k_train.json, after" in f"{caught.value}{caught.value.__cause__}"


def test_feature_files_of_every_format_give_the_same_array(tmp_path):
    expected = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "a.npy", expected)
    np.savez(tmp_path / "a.npz", features=expected)
    torch.save(torch.from_numpy(expected).half(), tmp_path / "a.pt")
    with h5py.File(tmp_path / "a.h5", "w") as archive:
        archive["features"] = expected
    for suffix in ("npy", "npz", "pt", "h5"):
        assert np.array_equal(read_frame_features(tmp_path / f"a.{suffix}"), expected)
    torch.save({"not": os.system}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="safe to load"):
        read_frame_features(tmp_path / "code.pt")
    np.save(tmp_path / "flat.npy", expected[0])
    with pytest.raises(ValueError, match=r"\[frames, width\]"):
        read_frame_features(tmp_path / "flat.npy")


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "zip.pt", "h5", "chunks.h5"])
def test_feature_files_with_too_many_values_are_rejected_by_their_header(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(frame_features, "MAX_VALUES", 1000)
    monkeypatch.setattr(frame_features, "MAX_TENSOR_BYTES", 20_000)
    path, array = tmp_path / f"a.{kind}", np.ones((40, 100), dtype=np.float32)
    if kind == "npy":
        np.save(path, array)
        # Only the header says that there are so many values.
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "npz":
        np.savez_compressed(path, features=array)
    elif kind == "pt":
        torch.save(torch.ones(1, 1).expand(40, 100), path)
    elif kind == "zip.pt":
        torch.save(torch.ones(400, 100), path)
    else:
        with h5py.File(path, "w") as archive:
            settings = {"chunks": (40, 100), "maxshape": (None, None)} if kind == "chunks.h5" else {}
            shape = (2, 3) if kind == "chunks.h5" else array.shape
            archive.create_dataset("features", shape, "f4", fillvalue=1, **settings)
    with pytest.raises(ValueError, match="more than 1,000 values|more than the limit 20,000"):
        read_frame_features(path)
