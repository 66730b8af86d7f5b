"""Training examples with other images: of the same title, of another example, changed copies, and random changes."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

from modeling_optsg import OPTSGDataCollator, OPTSGTrainer, OPTSGTrainingArguments
from modeling_optsg.base_models import OPTSGModel
from modeling_optsg.data.feature_cache import CachedFeatures
from modeling_optsg.training import AugmentedImages, image_changes
from modeling_optsg.training.image_changes import (
    ImageChangingCollator,
    change_frames,
    change_image,
    changed_copies,
    is_photograph,
)

TITLES = ["Home", "star outline", "mic", "mic off", None, ""]
EXTRA_TITLES = ["home filled", "HOME", "star", "mic off filled", None, "", "other"]


def named_images(name, titles, tag):
    """Examples whose images are only names, such as "own 3"."""
    columns = {"image": [f"{name} {index}" for index in range(len(titles))], "title": titles}
    columns |= {"tags": [[tag]] * len(titles), "image_features": [b"\0\0"] * len(titles)}
    return CachedFeatures(Dataset.from_dict(columns | {"image_features_shape": [[1]] * len(titles)}))


def test_only_images_with_cached_features_are_replaced():
    raw = CachedFeatures(Dataset.from_dict({"image": ["a", "b"], "title": ["x", "y"], "tags": [["t"]] * 2}))
    dataset = AugmentedImages(raw, raw, extra_image_ratio=1.0, mismatch_ratio=1.0)
    drawn = [dataset[index, seed] for index in range(2) for seed in range(20)]
    assert [example["image"] for example in drawn] == ["a"] * 20 + ["b"] * 20
    assert not any(example["is_mismatched"] for example in drawn)


@pytest.fixture(scope="module")
def examples():
    return named_images("own", TITLES, "t")


@pytest.fixture(scope="module")
def extras():
    return named_images("extra", EXTRA_TITLES, "x")


def test_the_image_of_an_example_follows_from_its_seed(examples, extras):
    ratios = {"extra_image_ratio": 0.5, "mismatch_ratio": 0.3}
    pairs = [(index, seed) for index in range(6) for seed in range(30)]
    first, second = (AugmentedImages(examples, extras, **ratios) for _ in range(2))
    expected = [first[pair] for pair in pairs]
    assert [second[pair] for pair in reversed(pairs)] == expected[::-1]
    assert len({example["image"] for example in expected}) > 6
    for (index, seed), example in zip(pairs, expected, strict=True):
        assert (example["example_index"], example["example_seed"]) == (index, seed)
        assert (example["title"], example["tags"]) == (TITLES[index], ["t"]), "only the image is replaced"


def test_extra_images_have_the_same_title(examples, extras):
    dataset = AugmentedImages(examples, extras, extra_image_ratio=1.0)
    found = [{dataset[index, seed]["image"] for seed in range(40)} for index in range(6)]
    # Words of a style do not count, except that a struck-through drawing is another title.
    assert found == [{"extra 0", "extra 1"}, {"extra 2"}, {"own 2"}, {"extra 3"}, {"own 4"}, {"own 5"}]
    assert not any(dataset[index, 0]["is_mismatched"] for index in range(6))


def test_only_examples_with_a_title_are_mismatched(examples):
    dataset = AugmentedImages(examples, mismatch_ratio=1.0)
    for index, title in enumerate(TITLES):
        drawn = [dataset[index, seed] for seed in range(60)]
        assert all(example["is_mismatched"] == bool(title) for example in drawn)
        images = {example["image"] for example in drawn}
        assert len(images) > 3 if title else images == {f"own {index}"}


def test_the_ratios_are_those_of_extra_and_mismatched_images(examples, extras):
    dataset = AugmentedImages(examples, extras, extra_image_ratio=0.5, mismatch_ratio=0.2)
    drawn = [dataset[0, seed] for seed in range(2000)]
    mismatched = Counter(example["is_mismatched"] for example in drawn)[True] / 2000
    assert mismatched == pytest.approx(0.2, abs=0.03)
    extra = sum(example["image"].startswith("extra") for example in drawn) / 2000
    assert extra == pytest.approx(0.5 * 0.8, abs=0.04)


def test_all_features_of_an_image_are_replaced_together():
    columns = {"title": [f"t{index}" for index in range(5)], "tags": [["t"]] * 5}
    for name in ("frame_features", "image_features", "title_features"):
        columns[name] = [np.float16(index).tobytes() for index in range(5)]
        columns[f"{name}_shape"] = [[1]] * 5
    examples = CachedFeatures(Dataset.from_dict(columns))
    dataset = AugmentedImages(examples, mismatch_ratio=1.0)
    drawn = [dataset[2, seed] for seed in range(30)]
    found = {tuple(float(example[f"{name}_features"][0]) for name in ("frame", "image", "title")) for example in drawn}
    assert found >= {(index, index, 2) for index in (0, 1, 3, 4)} and all(frame == image for frame, image, _ in found)


@pytest.mark.parametrize(("title", "other"), [("创意 3", "家常菜 3"), ("mic", "mic-off"), ("дом a", "кот a")])
def test_images_of_other_titles_are_not_extra_images(title, other):
    dataset = AugmentedImages(named_images("own", [title], "t"), named_images("extra", [other], "x"), 1.0)
    assert dataset[0, 0]["image"] == "own 0"


# Changed copies


@pytest.fixture
def drawing():
    image = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(image).rectangle((25, 15, 34, 24), fill="red")
    return image


def test_a_changed_image_keeps_size_and_colours(drawing):
    copies = [change_image(drawing, np.random.default_rng(seed)) for seed in range(40)]
    assert all(copy.size == drawing.size and copy.mode == "RGB" for copy in copies)
    again = change_image(drawing, np.random.default_rng(3))
    assert again.tobytes() == copies[3].tobytes() and len({copy.tobytes() for copy in copies}) == 40
    areas, centres = [], []
    for copy in copies:
        assert copy.getpixel((0, 0)) == (255, 255, 255), "the background fills what is uncovered"
        red = np.asarray(copy)[..., 1] < 128
        assert (np.asarray(copy)[..., 0] >= 250).all(), "red and white stay"
        areas.append(red.sum() / 100)
        centres.append(np.argwhere(red).mean(axis=0))
    # Strokes are a pixel thinner or thicker on each side, and the drawing is 0.75 to 1.2 times as large.
    assert 0.75**2 * 0.64 * 0.8 < min(areas) < 0.6 and 1.6 < max(areas) < 1.2**2 * 1.44 * 1.15
    shifts = np.abs(np.array(centres) - (19.5, 29.5))
    assert (shifts <= (0.08 * 40 + 1, 0.08 * 60 + 1)).all() and (shifts.max(axis=0) > (2, 3)).all()


def test_copies_of_training_examples_differ_and_are_kept(drawing, tmp_path, monkeypatch):
    rows = Dataset.from_dict({"title": ["a", "b", "c"], "image": [drawing, drawing, None]}).cast_column(
        "image", ImageFeature()
    )
    first, second = (changed_copies(rows, number, tmp_path / "cache") for number in range(2))
    found = [image.tobytes() for copy in (first, second) for image in copy["image"][:2]]
    assert len(set(found)) == 4 and drawing.tobytes() not in found
    assert first["title"][:] == ["a", "b", "c"] and first[2]["image"] is None
    monkeypatch.setattr(image_changes, "change_image", lambda *args: pytest.fail("it was changed again"))
    assert changed_copies(rows, 1, tmp_path / "cache")[1]["image"].tobytes() == found[3]
    with pytest.raises(ValueError, match="--num_image_copies needs a dataset with images"):
        changed_copies(rows.remove_columns("image"), 0, tmp_path)


# Random changes while the vision tower is trained


@pytest.fixture
def photograph():
    """A grey ramp with noise: no colour is frequent."""
    noise = np.random.default_rng(0).integers(-20, 20, (40, 60, 3))
    return Image.fromarray((np.linspace(40, 210, 60)[None, :, None] + noise).astype(np.uint8))


def test_drawings_and_photographs_are_told_apart(drawing, photograph):
    assert is_photograph(photograph) and not is_photograph(drawing)
    # Compression gives the background of a drawing several similar colours.
    noise = np.random.default_rng(0).integers(-3, 4, (*drawing.size[::-1], 3))
    compressed = np.clip(np.asarray(drawing) + noise, 0, 255).astype(np.uint8)
    assert not is_photograph(Image.fromarray(compressed))


def test_colours_of_photographs_change_and_those_of_drawings_stay(drawing, photograph):
    ratios, centre = [], (slice(10, 30), slice(15, 45))
    for seed in range(40):
        (changed,) = change_frames([photograph], seed)
        assert changed.size == photograph.size
        ratios.append(np.asarray(changed)[centre].mean() / np.asarray(photograph)[centre].mean())
        corner = np.asarray(change_frames([drawing], seed)[0])[0, 0]
        assert corner.tolist() == [255, 255, 255]
    assert 0.7 < min(ratios) < 0.9 and 1.1 < max(ratios) < 1.3


def test_uncovered_parts_of_a_photograph_get_its_mean_colour(photograph, monkeypatch):
    monkeypatch.setattr(image_changes, "MAX_COLOUR_CHANGE", 0.0)
    mean = np.asarray(photograph).mean(axis=(0, 1))
    # Half as large, so that the corners are uncovered.
    monkeypatch.setattr(image_changes, "SCALES", (0.5, 0.5))
    (changed,) = change_frames([photograph], 0)
    for corner in ((0, 0), (0, 39), (59, 0), (59, 39)):
        assert np.abs(np.array(changed.getpixel(corner)) - mean).max() <= 1


def test_frames_of_a_video_are_changed_alike(photograph, drawing):
    frames = [photograph, drawing, photograph]
    first, second, third = change_frames(frames, 7)
    assert first.tobytes() == third.tobytes() != second.tobytes()
    assert second.tobytes() == change_image(drawing, np.random.default_rng([7, 1]), True).tobytes()


def test_large_images_are_reduced_before_they_are_changed(photograph):
    (changed,) = change_frames([photograph.resize((4000, 2100))], 0)
    assert changed.size == (2000, 1050)


@pytest.fixture
def collators(tiny_processor):
    collate = OPTSGDataCollator(tiny_processor)
    return collate, ImageChangingCollator(collate)


def test_the_change_follows_from_the_seed_of_the_example(collators, photograph):
    plain, changing = collators
    example = {"image": photograph, "title": "a", "tags": ["bus"]}
    by_seed = [changing([{**example, "example_seed": seed}])["pixel_values"] for seed in (1, 2, 1)]
    unchanged = plain([{**example, "example_seed": 1}])["pixel_values"]
    assert by_seed[0].equal(by_seed[2]) and not by_seed[0].equal(by_seed[1]) and not by_seed[0].equal(unchanged)
    # In a batch with others, and at another position.
    batch = [{**example, "example_seed": 2}, {"title": "b", "tags": ["bus"], "example_seed": 3}]
    batch += [{**example, "example_seed": 1}]
    found = changing(batch)
    assert found["pixel_values"][2].equal(by_seed[0][0]) and found["frame_mask"][:, 0].tolist() == [True, False, True]
    assert found["pixel_values"].shape == plain(batch)["pixel_values"].shape


def test_videos_are_changed_and_features_are_not(collators, photograph):
    plain, changing = collators
    video = {"video": [photograph] * 3, "tags": ["bus"], "example_seed": 1}
    frames, unchanged = (collate([video])["pixel_values"][0] for collate in (changing, plain))
    assert len(frames) == len(unchanged) and all(frame.equal(frames[0]) for frame in frames)
    assert not frames.equal(unchanged)
    features = {"frame_features": np.ones((2, 16), np.float32), "tags": ["bus"], "example_seed": 1}
    assert changing([features])["frame_features"].equal(plain([features])["frame_features"])


def test_an_unreadable_image_is_named(collators, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="broken.png"):
        collators[1]([{"image": str(tmp_path / "broken.png"), "tags": ["bus"], "example_seed": 1}])


@pytest.mark.parametrize("augment_images", [True, False])
def test_training_images_change_in_each_epoch(augment_images, towers, photograph, tmp_path, monkeypatch):
    rows = [{"image": photograph, "title": "a", "tags": ["bus", "car"]}] * 2
    rows = Dataset.from_list(rows).cast_column("image", ImageFeature())
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}
    args = OPTSGTrainingArguments(
        str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), vision_tower=str(towers / "vision"),
        text_tower=str(towers / "text"), tag_vocab_size=260, max_tag_tokens=12, config_overrides=json.dumps(small),
        num_train_epochs=2, train_batch_size=2, eval_steps=1, image_words="none", train_vision_tower=True,
        augment_images=augment_images,
    )  # fmt: skip
    seen = {True: [], False: []}
    encode_frames = OPTSGModel.encode_frames

    def record(self, pixel_values, frame_mask=None):
        seen[self.training] += [pixels.detach().numpy().tobytes() for pixels in pixel_values]
        return encode_frames(self, pixel_values, frame_mask)

    trainer = OPTSGTrainer(args=args, train_dataset=rows, eval_dataset=rows)
    monkeypatch.setattr(OPTSGModel, "encode_frames", record)
    trainer.train()
    assert len(seen[True]) == 4 and len(set(seen[True])) == (4 if augment_images else 1)
    (unchanged,) = OPTSGDataCollator(trainer.processing_class)([{"image": photograph}])["pixel_values"].numpy()
    assert unchanged.tobytes() in seen[False], "validation images are not changed"
    assert (unchanged.tobytes() in seen[True]) is not augment_images
