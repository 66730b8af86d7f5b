"""The processor: batches, titles, tags, decoding, saving and loading."""

import copy
import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_helpers import noise_image
from numbered_videos import numbered_frame, write_video
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from modeling_optsg.processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from modeling_optsg.tokenization_optsg import train_tag_tokenizer

LABEL_VOCABULARY = {"arrow": 3, "left": 2, "red square": 1, "e-mail": 1, "创意美食": 2, "家常菜": 1}
WORDS = ["a", "red", "square", "arrow", "left", "e", "-", "mail", "[", "]", "mask", "pad"]


@pytest.fixture(scope="module")
def text_tokenizer():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"红色方块创意美食家常菜"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=12,
        **{f"{name}_token": f"[{name.upper()}]" for name in names},
    )


@pytest.fixture(scope="module")
def tag_tokenizer():
    return train_tag_tokenizer(LABEL_VOCABULARY)


@pytest.fixture(scope="module")
def processor(text_tokenizer, tag_tokenizer):
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return OPTSGProcessor(
        image_processor, text_tokenizer, tag_tokenizer, num_frames=4, num_prompts=3, label_vocabulary=LABEL_VOCABULARY
    )


@pytest.fixture(scope="module")
def feature_processor(text_tokenizer, tag_tokenizer):
    return OPTSGFeatureProcessor(
        text_tokenizer, tag_tokenizer, num_frames=4, num_prompts=3, label_vocabulary=LABEL_VOCABULARY
    )


@pytest.fixture
def photo():
    return noise_image()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", 100, g="12", bf="2")


# Batches


def test_images_videos_and_titles_mix_in_a_batch(processor, photo, video):
    short = [numbered_frame(0), numbered_frame(1)]
    batch = processor(
        images=[photo, None, None, None],
        videos=[None, video, short, None],
        titles=["a red square", None, "  ", "left"],
    )
    assert batch["pixel_values"].shape == (4, 4, 3, 32, 32)
    assert batch["frame_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert (batch["pixel_values"][batch["frame_mask"] == 0] == 0).all()
    assert torch.equal(batch["pixel_values"][0, :1], processor(images=photo)["pixel_values"][0])
    assert torch.equal(batch["pixel_values"][1], processor(videos=video)["pixel_values"][0])
    assert torch.equal(batch["pixel_values"][2, :2], processor(videos=[short])["pixel_values"][0])
    assert batch["attention_mask"].sum(1).tolist() == [5, 0, 0, 3]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_inputs_that_no_example_has_are_absent(processor, photo):
    assert set(processor(images=[photo, photo], titles=[None, ""])) == {"pixel_values", "frame_mask"}
    assert set(processor(images=[None, None], titles=["left", "red"])) == {"input_ids", "attention_mask"}


def test_a_single_example_needs_no_lists(processor, photo):
    single = processor(images=photo, titles="a red square", tags=["red square", "arrow"])
    listed = processor(images=[photo], titles=["a red square"], tags=[["red square", "arrow"]])
    assert set(single) == set(listed)
    assert all(torch.equal(single[name], listed[name]) for name in listed)


def test_numpy_arrays_on_request(processor, photo):
    batch = processor(images=photo, titles="left", tags=["left"], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in batch.values())
    with pytest.raises(ValueError, match="'tf'"):
        processor(titles="left", return_tensors="tf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no examples"),
        ({"images": []}, "no examples"),
        ({"images": [None, None], "titles": ["left", ""]}, "example 1 has neither an image nor a title"),
        ({"titles": ["left", None, "red"]}, "example 1 has neither an image nor a title"),
        ({"titles": ["left", "red"], "images": [None]}, "1 images, 2 titles"),
        ({"titles": ["left", "red"], "tags": [["left"]]}, "2 titles, 1 tags"),
        ({"titles": ["left", float("nan")]}, r"titles\[1\] is nan of type float"),
        ({"titles": ["left", "\ud800"]}, r"titles\[1\].*not valid Unicode"),
        ({"images": ["a.png"], "videos": ["a.mp4"]}, r"example 0 has images\[0\] and videos\[0\]"),
        ({"images": 7}, "images is of type int"),
        ({"titles": 7}, "titles is of type int"),
    ],
)
def test_an_invalid_batch_is_reported(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_frame_features_replace_pixels(feature_processor):
    short, long = np.ones((2, 5), dtype=np.float16), torch.arange(50.0).reshape(10, 5)
    batch = feature_processor(frame_features=[short, None, long], titles=[None, "left", "red"])
    assert batch["frame_features"].shape == (3, 4, 5)
    assert batch["frame_mask"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(batch["frame_features"][2], long[[1, 3, 6, 8]])
    assert torch.equal(batch["frame_features"][0, :2], torch.ones(2, 5))
    assert "pixel_values" not in batch
    tokens = feature_processor(frame_features=[torch.ones(2, 7, 5)])
    assert tokens["frame_features"].shape == (1, 2, 7, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_features": [np.ones((2, 5)), np.ones((2, 6))]}, r"different shapes \[\(5,\), \(6,\)\]"),
        ({"frame_features": [np.ones(5)]}, r"frame_features\[0\] has shape \[5\]"),
        ({"frame_features": [np.ones((0, 5))]}, r"frame_features\[0\] has shape \[0, 5\]"),
        ({"images": [Image.new("RGB", (8, 8))]}, r"images\[0\] is an image.*frame features only"),
        ({"images": ["a.png", None], "frame_features": [None, np.ones((2, 5))]}, "must not have both"),
        ({"images": ["a.png"], "frame_features": [np.ones((2, 5))]}, r"images\[0\] and frame_features\[0\]"),
    ],
)
def test_invalid_frame_features_are_reported(feature_processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_processor(**arguments)


# Titles


def test_titles_are_encoded_by_the_text_tokenizer(processor):
    titles = ["a red square", "红色方块", "e-mail"]
    expected = processor.tokenizer(titles, padding=True, return_tensors="pt")
    batch = processor(titles=titles)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert processor.tokenizer.unk_token_id not in batch["input_ids"]


def test_a_long_title_is_truncated(processor):
    assert processor(titles="red " * 50)["input_ids"].shape == (1, 12)


def test_a_tokenizer_without_a_limit_does_not_truncate(processor):
    endless = copy.deepcopy(processor)
    endless.tokenizer.model_max_length = int(1e30)
    assert endless(titles="red " * 50)["input_ids"].shape == (1, 52)


def test_a_special_token_in_a_title_is_text(processor):
    ids = processor(titles="a [MASK]")["input_ids"][0].tolist()
    assert processor.tokenizer.mask_token_id not in ids
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "[", "mask", "]", "[SEP]"]


# Tags


def test_tags_are_encoded_for_each_example(processor):
    tag_sets = [["arrow", "left", "arrow"], ["创意美食", "left", "e-mail"]]
    batch = processor(titles=["left", "创意"], tags=tag_sets)
    assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (2, 3, 16)
    tag_sets = [["arrow", "left"], ["创意美食", "left", "e-mail"]]
    decoded = [[tag["tag"] for tag in tags] for tags in processor.batch_decode(batch["labels"])]
    assert decoded == tag_sets
    assert (batch["labels"][0, 2] == -100).all(), "padding"
    text = processor.tokenizer([tag for tags in tag_sets for tag in tags], padding=True, return_tensors="pt")
    is_tag = (batch["labels"] >= 0).any(dim=-1)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[f"tag_text_{name}"][is_tag], text[name])
    assert not batch["tag_text_attention_mask"][~is_tag].any()


def test_tags_in_any_language_are_decoded_exactly(processor):
    tags = ["创意美食", "全新的标签", "🍜 soup", "[PAD]", "e-mail", " two  spaces"]
    long_tags = copy.deepcopy(processor)
    long_tags.max_tag_tokens = 64
    sequences = long_tags.encode_tags(tags)["tag_input_ids"][None]
    (decoded,) = processor.batch_decode(sequences)
    assert [entry["tag"] for entry in decoded] == tags
    assert [entry["novel"] for entry in decoded] == [False, True, True, True, False, True]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([[]], r"tags\[0\] is empty"),
        ([], r"tags\[0\] is empty"),
        ([["left"], None], r"tags\[1\] is None"),
        ([["left"], "red"], r"tags\[1\] is 'red'; expected the list"),
        (["left", 7], r"tags\[0\] holds 7 of type int"),
        ([["left", ""]], "tag '' is blank"),
        ([["left", " \t"]], "is blank"),
        ([["left", 7]], r"tags\[0\] holds 7 of type int"),
        ([["left", "\ud800"]], "not valid Unicode"),
        ([["x" * 40]], f"'{'x' * 40}' has 41 tokens, more than max_tag_tokens = 16"),
        ([["arrow", "left", "e-mail", "red square"]], r"tags\[0\] holds 4 tags, more than num_prompts = 3"),
    ],
)
def test_invalid_tags_are_reported(processor, tags, message):
    examples = len(tags) if tags and isinstance(tags[0], list) else 1
    with pytest.raises(ValueError, match=message):
        processor(titles=["left"] * examples, tags=tags)


def test_repeated_tags_count_once(processor):
    assert processor(titles="left", tags=["arrow", "left"] * 5)["labels"].shape == (1, 2, 16)


def test_a_tag_of_the_maximum_length_is_allowed(processor):
    tag = "x" * 15
    assert processor.encode_tags([tag])["tag_lengths"].tolist() == [16]


# Decoding


def test_decode_uses_the_tag_tokenizer(processor):
    (labels,) = processor(titles="left", tags=["创意美食"])["labels"]
    assert processor.decode(labels[0]) == processor.decode(labels[0].tolist()) == "创意美食"


def sequences_of(processor, *examples):
    ids = [[processor.tag_tokenizer(tag)["input_ids"] if tag else [] for tag in example] for example in examples]
    length = max(len(row) for example in ids for row in example) + 1
    return torch.tensor([[row + [0] * (length - len(row)) for row in example] for example in ids])


def test_decoded_tags_are_sorted_and_marked_as_novel(processor):
    sequences = sequences_of(processor, ["left", "", "new tag"], ["", "", ""])
    outputs = SimpleNamespace(sequences=sequences, tag_scores=torch.tensor([[0.25, 0.9, 0.75], [0.9, 0.9, 0.9]]))
    assert processor.batch_decode(outputs) == [
        [{"tag": "new tag", "score": 0.75, "novel": True}, {"tag": "left", "score": 0.25, "novel": False}],
        [],
    ]


def test_different_tokens_of_one_tag_are_merged(processor):
    whole = processor.tag_tokenizer("left")["input_ids"]
    letters = processor.tag_tokenizer.convert_tokens_to_ids(list("Ġleft"))
    assert whole != letters
    sequences = torch.tensor([[whole + [0] * (len(letters) - len(whole)), letters]])
    for scores in ([0.25, 0.75], [0.75, 0.25]):
        outputs = SimpleNamespace(sequences=sequences, tag_scores=torch.tensor([scores]))
        assert processor.batch_decode(outputs) == [[{"tag": "left", "score": 0.75, "novel": False}]]


def test_blank_tags_are_dropped_and_broken_bytes_decoded(processor):
    space = processor.tag_tokenizer.convert_tokens_to_ids("Ġ")
    half_character = processor.tag_tokenizer.convert_tokens_to_ids("å")
    decoded = processor.batch_decode(torch.tensor([[[space, space, 0], [space, half_character, 0]]]))
    assert decoded == [[{"tag": "\ufffd", "score": None, "novel": True}]]


def test_an_output_without_tags_gives_empty_lists(processor):
    empty = SimpleNamespace(sequences=torch.zeros(2, 0, 0, dtype=torch.long), tag_scores=torch.zeros(2, 0))
    assert processor.batch_decode(empty) == [[], []]


def test_outputs_of_a_wrong_shape_are_rejected(processor):
    with pytest.raises(ValueError, match=r"sequences have shape \(2, 3\)"):
        processor.batch_decode(torch.zeros(2, 3, dtype=torch.long))
    outputs = SimpleNamespace(sequences=torch.zeros(2, 3, 4, dtype=torch.long), tag_scores=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"tag_scores have shape \(2, 4\); expected \(2, 3\)"):
        processor.batch_decode(outputs)


def test_tags_get_the_case_of_the_label_vocabulary(text_tokenizer, tag_tokenizer):
    counts = {"Apple": 1, "apple": 3, "NASA": 2, "red": 1}
    processor = OPTSGFeatureProcessor(text_tokenizer, tag_tokenizer, label_vocabulary=counts)
    # A training tag stays; of "Apple" and "apple" the more frequent one is used.
    assert processor.match_vocabulary_case(["APPLE", "nasa", "Apple", "New", "nasa", "RED"]) == [
        "apple",
        "NASA",
        "Apple",
        "New",
        "red",
    ]


# Construction, saving and loading


@pytest.mark.parametrize("setting", ["num_frames", "num_prompts", "max_tag_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_settings_must_be_positive_integers(processor, setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        OPTSGProcessor(processor.image_processor, processor.tokenizer, processor.tag_tokenizer, **{setting: value})


def test_a_text_tokenizer_is_not_a_tag_tokenizer(processor):
    with pytest.raises(ValueError, match="expected 0 and 1"):
        OPTSGProcessor(processor.image_processor, processor.tokenizer, processor.tokenizer)


def test_a_component_of_the_wrong_type_is_rejected(processor):
    with pytest.raises(TypeError, match="image_processor"):
        OPTSGProcessor(processor.tokenizer, processor.tokenizer, processor.tag_tokenizer)


def assert_equal_batches(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def example(photo):
    return {
        "images": [photo, None],
        "titles": ["a [red] square", "红色方块"],
        "tags": [["red square"], ["创意美食", "[PAD]"]],
    }


def test_saving_and_loading_changes_nothing(processor, photo, tmp_path):
    processor.save_pretrained(tmp_path / "first")
    loaded = OPTSGProcessor.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    loaded = OPTSGProcessor.from_pretrained(str(tmp_path / "second"))
    assert_equal_batches(loaded(**example(photo)), processor(**example(photo)))
    assert loaded.label_vocabulary == LABEL_VOCABULARY
    assert (loaded.num_frames, loaded.num_prompts, loaded.max_tag_tokens) == (4, 3, 16)
    assert OPTSGProcessor.from_pretrained(tmp_path / "first", num_frames=2).num_frames == 2
    assert OPTSGProcessor.from_pretrained(tmp_path / "first", label_vocabulary={"one": 1}).label_vocabulary == {
        "one": 1
    }


def test_the_label_vocabulary_has_a_readable_file(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert "创意美食" in (tmp_path / "label_vocabulary.json").read_text(encoding="utf-8")
    assert "label_vocabulary" not in json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert "label_vocabulary" not in repr(processor)


def test_a_missing_label_vocabulary_is_reported(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "label_vocabulary.json").unlink()
    with pytest.raises(OSError, match="label_vocabulary.json"):
        OPTSGProcessor.from_pretrained(tmp_path)


def test_a_processor_can_be_pickled(processor, photo):
    restored = pickle.loads(pickle.dumps(processor))
    assert_equal_batches(restored(**example(photo)), processor(**example(photo)))


def test_model_input_names_contain_all_inputs(processor, photo):
    assert set(processor(images=photo, titles="left")) < set(processor.model_input_names)


REMOTE_LOAD = """
import sys, torch
from transformers import AutoProcessor
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(titles=["红色方块"], tags=[["创意美食"]])
    print(type(processor).__name__, processor.batch_decode(batch["labels"])[0])
assert "modeling_optsg" not in sys.modules
"""


def test_saved_folders_load_without_the_package(processor, feature_processor, tmp_path, monkeypatch):
    monkeypatch.setattr(OPTSGProcessor, "_auto_class", None)
    OPTSGProcessor.register_for_auto_class()
    processor.save_pretrained(tmp_path / "images")
    feature_processor.save_pretrained(tmp_path / "features")
    script = tmp_path / "load.py"
    script.write_text(REMOTE_LOAD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "images"), str(tmp_path / "features")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    tags = [{"tag": "创意美食", "score": None, "novel": False}]
    assert done.stdout.splitlines() == [f"OPTSGProcessor {tags}", f"OPTSGFeatureProcessor {tags}"]
