"""The cache of tower features and the tag table."""

import copy
import threading

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Images

from modeling_optsg import OPTSGDataCollator, OPTSGModel
from modeling_optsg.data import feature_cache
from modeling_optsg.data.checksums import record_checksum
from modeling_optsg.data.feature_cache import CachedFeatures, build_tag_table, cache_tower_features, without_unreadable


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return [Images.fromarray(image) for image in pixels]


def rows(images):
    return Dataset.from_dict(
        {
            "image": [images[0], None, images[1], images[2]],
            "title": ["a red square", "创意美食", "", None],
            "tags": [["red"], ["创意美食"], ["blue"], ["red", "blue"]],
        },
        features=Features({"image": Image(), "title": Value("string"), "tags": List(Value("string"))}),
    )


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of each tower."""
    counts = {"encode_frames": 0, "encode_text": 0}

    def counting(name, method):
        def call(*args, **kwargs):
            counts[name] += 1
            return method(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(OPTSGModel, name, counting(name, getattr(OPTSGModel, name)))
    return counts


def cached(dataset, model, processor, folder, **settings):
    return CachedFeatures(cache_tower_features(dataset, model.model, processor, folder, **settings))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_cached_features_equal_the_outputs_of_the_towers(tiny_model, tiny_processor, images, tmp_path, batch_size):
    examples = cached(rows(images), tiny_model, tiny_processor, tmp_path, batch_size=batch_size)
    for index, example in enumerate(examples):
        source = rows(images)[index]
        assert example["tags"] == source["tags"] and "image" not in example
        if source["image"] is None:
            assert example["frame_features"] is None and example["image_features"] is None
        else:
            pixels = tiny_processor(images=source["image"])["pixel_values"]
            expected = tiny_model.model.encode_frames(pixels)
            for name in ("frame_features", "image_features"):
                found = getattr(expected, name)[0].detach().numpy()
                np.testing.assert_allclose(example[name], found, rtol=2e-3, atol=2e-3)
        if not source["title"]:
            assert example["title_features"] is None
        else:
            expected = tiny_model.model.encode_text(**tiny_processor(titles=source["title"]))[0].detach().numpy()
            np.testing.assert_allclose(example["title_features"], expected, rtol=2e-3, atol=2e-3)


def test_the_loss_is_the_same_with_cached_features(tiny_model, tiny_processor, images, tmp_path):
    collate = OPTSGDataCollator(tiny_processor)
    raw = [dict(row) for row in rows(images)]
    with torch.no_grad():
        expected = tiny_model(**collate(raw))
        for frames in (True, False):
            for titles in (True, False):
                examples = cached(rows(images), tiny_model, tiny_processor, tmp_path, frames=frames, titles=titles)
                actual = tiny_model(**collate([examples[index] for index in range(len(examples))]))
                torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-2, atol=1e-2)


def tag_table(dataset, model, processor, folder):
    return build_tag_table(["red", "blue"], model.model, processor, folder)


@pytest.mark.parametrize("compute", [cached, tag_table])
def test_two_trainings_share_a_cache(tiny_model, tiny_processor, images, tmp_path, monkeypatch, compute):
    """While one process has a file without a checksum, another waits instead of deleting the file."""
    results, errors, others, recorded = [], [], [], []

    def run():
        try:
            results.append(compute(rows(images), tiny_model, tiny_processor, tmp_path))
        except Exception as error:
            errors.append(error)

    def record(path):
        recorded.append(path)
        if not others:
            others.append(threading.Thread(target=run))
            others[0].start()
            others[0].join(0.3)
        record_checksum(path)

    monkeypatch.setattr(feature_cache, "record_checksum", record)
    run()
    others[0].join()
    assert not errors and len(results) == 2 and len(recorded) == len(set(recorded)), "each file is computed once"


def test_a_second_call_reads_the_file(tiny_model, tiny_processor, images, tmp_path, calls):
    first = cached(rows(images), tiny_model, tiny_processor, tmp_path)
    assert all(calls.values())
    calls.update(dict.fromkeys(calls, 0))
    second = cached(rows(images), tiny_model, tiny_processor, tmp_path)
    assert not any(calls.values()) and len(list(tmp_path.glob("towers-*.arrow"))) == 2
    for one, other in zip(first, second, strict=True):
        for name in ("frame_features", "image_features", "title_features"):
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("change", ["flip a bit", "cut"])
def test_a_damaged_block_is_reported_and_computed_again(
    tiny_model, tiny_processor, images, tmp_path, calls, caplog, change
):
    first = cached(rows(images), tiny_model, tiny_processor, tmp_path)
    tags = build_tag_table(["red"], tiny_model.model, tiny_processor, tmp_path)
    expected = [dict(example) for example in first]
    damaged = sorted(path for path in tmp_path.iterdir() if path.suffix in (".arrow", ".npy"))
    del first
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content if change == "flip a bit" else content[:-100])
    calls.update(dict.fromkeys(calls, 0))
    second = cached(rows(images), tiny_model, tiny_processor, tmp_path)
    again = build_tag_table(["red"], tiny_model.model, tiny_processor, tmp_path)
    assert all(calls.values()) and torch.equal(again.features, tags.features)
    assert all(f"{path} is computed again" in caplog.text for path in damaged) and len(damaged) == 3
    for one, other in zip(expected, second, strict=True):
        for name in ("frame_features", "image_features", "title_features"):
            np.testing.assert_array_equal(one[name], other[name])


def test_images_and_videos_of_one_dataset_are_both_encoded(tiny_model, tiny_processor, images, tmp_path):
    features = Features({"image": Image(), "video": List(Image(decode=False)), "title": Value("string")})
    frames = Dataset.from_dict({"video": [images[1:]]}, features=Features({"video": List(Image())}))
    frames = frames.cast_column("video", features["video"])[0]["video"]
    columns = {"image": [images[0], None, None], "video": [None, frames, None], "title": ["a", "b", "red"]}
    examples = cached(Dataset.from_dict(columns, features=features), tiny_model, tiny_processor, tmp_path)
    batch = tiny_processor(images=[images[0], None], videos=[None, frames])
    with torch.no_grad():
        expected = tiny_model.model.encode_frames(batch["pixel_values"], batch["frame_mask"]).frame_features
    for index, length in enumerate((1, 2)):
        assert not examples[index].keys() & {"image", "video"}
        found = torch.from_numpy(examples[index]["frame_features"])
        torch.testing.assert_close(found, expected[index, :length], atol=2e-2, rtol=2e-2)
    assert examples[2]["frame_features"] is None
    assert OPTSGDataCollator(tiny_processor)(list(examples))["frame_mask"].sum(1).tolist() == [1, 2, 0]


def change_vision_weights(model, processor):
    torch.nn.init.zeros_(next(model.model.vision_tower.parameters()))


def change_text_weights(model, processor):
    torch.nn.init.zeros_(next(model.model.text_tower.parameters()))


def change_statistics(model, processor):
    model.model.vision_tower.stem.norm.running_mean += 1


def change_image_normalisation(model, processor):
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]


def change_frames(model, processor):
    processor.num_frames = 2


def change_title_length(model, processor):
    processor.tokenizer.model_max_length = 4


CHANGES = {
    change_vision_weights: "encode_frames",
    change_text_weights: "encode_text",
    change_statistics: "encode_frames",
    change_image_normalisation: "encode_frames",
    change_frames: "encode_frames",
    change_title_length: "encode_text",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_weights_or_settings_get_a_new_file(make_model, tiny_processor, images, tmp_path, calls, change):
    model, processor = make_model("efficientnet_lite"), copy.deepcopy(tiny_processor)
    cached(rows(images), model, processor, tmp_path)
    calls.update(dict.fromkeys(calls, 0))
    with torch.no_grad():
        change(model, processor)
    cached(rows(images), model, processor, tmp_path)
    assert [name for name, count in calls.items() if count] == [CHANGES[change]], "the other tower is not run again"
    assert len(list(tmp_path.glob("towers-*.arrow"))) == 3


def test_an_interrupted_call_is_resumed(tiny_model, tiny_processor, images, tmp_path, calls, monkeypatch):
    whole = cached(rows(images), tiny_model, tiny_processor, tmp_path / "whole")
    calls.update(dict.fromkeys(calls, 0))
    encode = OPTSGModel.encode_text

    def interrupted(*args):
        if calls["encode_text"] == 1:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OPTSGModel, "encode_text", interrupted)
        cached(rows(images), tiny_model, tiny_processor, tmp_path, block_size=1)
    done = len(list(tmp_path.glob("towers-*.arrow")))
    assert len(whole) < done < 2 * len(whole), "all images and some of the titles"
    calls.update(dict.fromkeys(calls, 0))
    again = cached(rows(images), tiny_model, tiny_processor, tmp_path, block_size=1)
    assert calls["encode_frames"] == 0 and calls["encode_text"] <= 2 * len(whole) - done
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one["frame_features"], other["frame_features"])


def test_unreadable_images_are_dropped_up_to_a_limit(tiny_model, tiny_processor, images, tmp_path):
    dataset = rows(images).cast_column("image", Image(decode=False))
    broken = dataset.map(
        lambda row, index: {"image": {"bytes": b"not an image", "path": None} if index == 1 else row["image"]},
        with_indices=True,
        features=dataset.features,
    )
    model = tiny_model.model
    with pytest.raises(ValueError, match="1 examples cannot be read, more than 0, such as"):
        cache_tower_features(broken, model, tiny_processor, tmp_path)
    features = cache_tower_features(broken, model, tiny_processor, tmp_path, max_unreadable=1)
    assert [reason is None for reason in features["unreadable"]] == [index != 1 for index in range(len(dataset))]
    PartialState()
    kept, features, reasons = without_unreadable(broken, features)
    assert list(reasons) == ["1"] and "is not an image" in reasons["1"]
    assert kept["title"] == features["title"] == [t for index, t in enumerate(dataset["title"]) if index != 1]
    expected = cached(dataset, tiny_model, tiny_processor, tmp_path / "whole")
    np.testing.assert_allclose(CachedFeatures(features)[0]["frame_features"], expected[0]["frame_features"], atol=1e-3)


def test_unreadable_images_are_tried_again(tiny_model, tiny_processor, images, tmp_path, calls):
    """The rows do not change, as when a plugin for their file format is installed."""
    names = ["a", "b", "c", "d", "e"]
    features = Features({"id": Value("string"), "image": Image()})
    dataset = Dataset.from_dict({"id": names, "image": [f"{tmp_path}/{name}.png" for name in names]}, features)
    files = [tmp_path / f"{name}.png" for name in names]

    def reasons(limit):
        settings = {"block_size": 4, "batch_size": 2, "max_unreadable": limit}
        found = cache_tower_features(dataset, tiny_model.model, tiny_processor, tmp_path / "cache", **settings)
        return [name for name, reason in zip(names, found["unreadable"], strict=True) if reason], found

    for index in (0, 2):
        images[index].save(files[index])
    for path in (files[1], files[3], files[4]):
        path.write_bytes(b"not an image")
    assert reasons(3)[0] == ["b", "d", "e"]
    images[1].save(files[1])
    found, first = reasons(2)
    assert found == ["d", "e"]
    calls.update(dict.fromkeys(calls, 0))
    with pytest.raises(ValueError, match="2 examples cannot be read, more than 1"):
        reasons(1)
    images[2].save(files[4])
    found, second = reasons(1)
    assert found == ["d"] and second["image_features"][4] == first["image_features"][2]
    assert calls["encode_frames"] == 1, "readable images are not encoded again"
    images[0].save(files[3])
    found, last = reasons(1)
    assert found == []
    expected = [0, 1, 2, 0, 2]
    assert last["image_features"][:] == [last["image_features"][index] for index in expected]
    np.testing.assert_allclose(
        CachedFeatures(last.remove_columns("unreadable"))[1]["frame_features"],
        tiny_model.model.encode_frames(tiny_processor(images=images[1])["pixel_values"]).frame_features[0].detach(),
        rtol=2e-3,
        atol=2e-3,
    )
    names = sorted(path.name.partition(".arrow")[2] for path in (tmp_path / "cache").iterdir())
    names = [name for name in names if name != ".lock"]
    assert names == ["", "", ".sha256", ".sha256"], "no partial files are left"


def test_other_rows_get_a_new_file(tiny_model, tiny_processor, images, tmp_path):
    cached(rows(images), tiny_model, tiny_processor, tmp_path)
    fewer = cached(rows(images).select([0, 2]), tiny_model, tiny_processor, tmp_path)
    assert len(fewer) == 2 and len(list(tmp_path.glob("towers-*.arrow"))) == 4


def test_inputs_of_a_trained_tower_stay_raw(tiny_model, tiny_processor, images, tmp_path, calls):
    examples = cached(rows(images), tiny_model, tiny_processor, tmp_path, frames=False)
    assert calls["encode_frames"] == 0 and "frame_features" not in examples[0]
    assert tiny_processor(images=examples[0]["image"])["frame_mask"].tolist() == [[1]]
    examples = cached(rows(images), tiny_model, tiny_processor, tmp_path, titles=False)
    assert "title_features" not in examples[0] and examples[0]["title"] == "a red square"


def test_a_tag_table_has_the_text_features_of_every_tag(tiny_model, tiny_processor, tmp_path, calls):
    tags = ["red", "创意美食", "e-mail", "blue", "a square"]
    table = build_tag_table(tags, tiny_model.model, tiny_processor, tmp_path, batch_size=2)
    encoded = tiny_processor.encode_tags(tags)
    expected = tiny_model.model.embed_tags(encoded["tag_text_input_ids"], encoded["tag_text_attention_mask"])
    torch.testing.assert_close(table.features.float(), expected.detach(), rtol=2e-3, atol=2e-3)
    lengths = encoded["tag_lengths"].tolist()
    assert table.input_ids == [row[:n] for row, n in zip(encoded["tag_input_ids"].tolist(), lengths)]
    assert table.index == {tag: index for index, tag in enumerate(tags)}

    calls.update(dict.fromkeys(calls, 0))
    again = build_tag_table(tags, tiny_model.model, tiny_processor, tmp_path)
    assert calls["encode_text"] == 0 and torch.equal(again.features, table.features)
    change_text_weights(tiny_model, tiny_processor)
    changed = build_tag_table(tags, tiny_model.model, tiny_processor, tmp_path)
    assert calls["encode_text"] > 0 and not torch.equal(changed.features, table.features)
    suffixes = sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert suffixes == [".npy", ".npy", ".sha256", ".sha256"], "no partial files are left"


def test_encoding_does_not_change_the_mode_of_any_module(tiny_model, tiny_processor, images, tmp_path):
    tiny_model.train()
    tiny_model.model.text_tower.eval()
    before = {name: module.training for name, module in tiny_model.named_modules()}
    cached(rows(images), tiny_model, tiny_processor, tmp_path)
    build_tag_table(["red"], tiny_model.model, tiny_processor, tmp_path)
    assert {name: module.training for name, module in tiny_model.named_modules()} == before
