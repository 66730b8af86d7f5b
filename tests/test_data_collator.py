"""The data collator: inputs, tags, negatives, retrieved tags, and errors."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from modeling_optsg import OPTSGDataCollator
from modeling_optsg.data.collator import TagTable

TAGS = ["red", "blue", "colour", "square", "e-mail", "创意美食", "家常菜"]


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tag_table(tiny_processor):
    torch.manual_seed(0)
    ids = tiny_processor.tag_tokenizer(TAGS, add_special_tokens=False)["input_ids"]
    return TagTable(TAGS, ids, torch.randn(len(TAGS), 16).half())


@pytest.fixture
def collate(tiny_processor):
    return OPTSGDataCollator(tiny_processor)


def assert_same_batch(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# Inputs


def test_raw_examples_are_processed(collate, tiny_processor, image):
    examples = [
        {"image": image, "title": "a red square", "tags": ["red", "square", "red"]},
        {"image": None, "title": "创意美食", "tags": ["创意美食"]},
        {"image": image, "title": None, "tags": ["blue", "red"]},
    ]
    expected = tiny_processor(
        images=[image, None, image],
        titles=["a red square", "创意美食", None],
        tags=[["red", "square"], ["创意美食"], ["blue", "red"]],
    )
    assert_same_batch(collate(examples), dict(expected))
    del examples[1]["image"], examples[2]["title"]
    assert_same_batch(collate(examples), dict(expected))


def test_inputs_of_later_examples_are_not_lost(collate, image):
    batch = collate([{"title": "red"}, {"title": "blue", "image": image}, {"video": [image, image]}])
    assert batch["frame_mask"].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert batch["attention_mask"].any(1).tolist() == [True, True, False]


def test_examples_without_tags_give_a_batch_for_generation(collate, image):
    assert collate([{"image": image}]).keys() == {"pixel_values", "frame_mask"}


def test_precomputed_features_are_padded_and_masked(collate):
    frames = [np.ones((2, 3, 16), np.float16), None, np.full((1, 3, 16), 2.0, np.float16)]
    titles = [None, torch.ones(4, 16), np.ones((2, 16))]
    batch = collate([{"frame_features": f, "title_features": t, "tags": ["red"]} for f, t in zip(frames, titles)])
    assert batch["frame_features"].shape == (3, 2, 3, 16) and batch["frame_features"].dtype == torch.float32
    assert batch["frame_mask"].tolist() == [[1, 1], [0, 0], [1, 0]]
    assert batch["frame_features"][2].sum() == 2 * 3 * 16
    assert batch["title_features"].shape == (3, 4, 16)
    assert batch["attention_mask"].int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_image_features_and_mismatches_are_stacked(collate):
    features = np.arange(8, dtype=np.float32).reshape(2, 4)
    frames = np.zeros((1, 2, 3), np.float32)
    batch = collate(
        [
            {"frame_features": frames, "image_features": features[0], "is_mismatched": False, "title": "red"},
            {"frame_features": None, "image_features": None, "title": "blue"},
            {"frame_features": frames, "image_features": features[1], "is_mismatched": True, "title": "dog"},
        ]
    )
    assert batch["image_features"].tolist() == [features[0].tolist(), [0.0] * 4, features[1].tolist()]
    assert batch["is_mismatched"].tolist() == [False, False, True]
    batch = collate([{"frame_features": frames, "title": "red"}])
    assert "image_features" not in batch and "is_mismatched" not in batch


def test_one_vector_per_frame_is_one_token_per_frame(collate):
    batch = collate([{"frame_features": np.ones((2, 16))}, {"frame_features": np.ones((1, 16))}])
    assert batch["frame_features"].shape == (2, 2, 1, 16)


@pytest.mark.parametrize("title", [None, "", "  "])
def test_features_and_raw_inputs_of_two_towers_mix(collate, tiny_processor, image, title):
    """One tower is frozen and the other one is trained; an example may lack either input."""
    frames = np.ones((1, 5, 16), np.float16)
    batch = collate(
        [
            {"frame_features": frames, "title": title, "tags": ["red"]},
            {"frame_features": None, "title": "a red square", "tags": ["blue", "square"]},
        ]
    )
    title_ids = tiny_processor(titles="a red square")["input_ids"][0]
    assert batch["frame_mask"].int().tolist() == [[1], [0]]
    assert batch["attention_mask"].tolist() == [[0] * len(title_ids), [1] * len(title_ids)]
    assert torch.equal(batch["input_ids"][1], title_ids)
    assert (batch["labels"] >= 0).any(dim=-1).tolist() == [[True, False], [True, True]]

    batch = collate([{"image": image, "title_features": None}, {"title_features": np.ones((3, 16))}])
    assert batch["frame_mask"].tolist() == [[1], [0]] and batch["attention_mask"].int().sum(1).tolist() == [0, 3]
    assert torch.equal(batch["pixel_values"][0], tiny_processor(images=image)["pixel_values"][0])


def test_a_title_with_features_is_not_encoded_again(collate):
    example = {"frame_features": np.ones((1, 16)), "title": "red", "title_features": np.ones((2, 16))}
    assert collate([example]).keys() == {"frame_features", "frame_mask", "title_features", "attention_mask"}


def test_blank_titles_are_missing_titles(collate):
    batch = collate([{"frame_features": np.ones((1, 16)), "title": "", "title_features": None}] * 2)
    assert batch.keys() == {"frame_features", "frame_mask"}


# Tags


def test_a_tag_table_gives_the_same_tokens_as_the_processor(tiny_processor, tag_table):
    examples = [{"title": "red", "tags": ["blue", "e-mail"]}, {"title": "blue", "tags": ["家常菜", "blue", "red"]}]
    known = OPTSGDataCollator(tiny_processor, tag_table)(examples)
    spelled = OPTSGDataCollator(tiny_processor)(examples)
    for name in ("labels", "input_ids", "attention_mask"):
        assert torch.equal(known[name], spelled[name]), name
    for row, example in zip(known["tag_features"], examples, strict=True):
        own = [TAGS.index(tag) for tag in example["tags"]]
        assert torch.equal(row[: len(own)], tag_table.features[own].float()) and not row[len(own) :].any()
    assert "tag_text_input_ids" not in known


@pytest.mark.parametrize("num_negatives", [2, 5, 100])
def test_negatives_follow_the_tags_of_the_examples(tiny_processor, tag_table, num_negatives):
    collate = OPTSGDataCollator(tiny_processor, tag_table, num_negatives=num_negatives, seed=1)
    seen = Counter()
    for _ in range(30):
        batch = collate([{"title": "red", "tags": ["blue", "e-mail"]}])
        names = [tag["tag"] for tag in tiny_processor.batch_decode(batch["negative_input_ids"])[0]]
        assert torch.equal(batch["negative_features"][0], tag_table.features[[TAGS.index(n) for n in names]].float())
        assert batch["labels"].shape == (1, 2, 8) and not {"blue", "e-mail"} & set(names)
        assert min(num_negatives, 7) - 2 <= len(names) <= num_negatives
        seen.update(names)
    assert len(seen) == 5, "every other tag is drawn"


def test_too_many_tags_are_sampled_and_counted(collate, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        example = {"title": "red", "tags": [*TAGS, "red"]}
        batches = [collate([example, {"title": "blue", "tags": ["red"]}]) for _ in range(40)]
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert all((batch["labels"] >= 0).any(dim=-1).sum(dim=1).tolist() == [4, 1] for batch in batches)
    assert collate.oversized_examples == 40
    [warning] = [record.getMessage() for record in caplog.records if "more than the 4 prompts" in record.getMessage()]
    assert "7 tags" in warning
    chosen = Counter(tuple(ids) for batch in batches for ids in batch["labels"][0].tolist())
    assert len(chosen) >= len(TAGS), "every tag is drawn"


def test_sampling_is_reproducible_with_a_seed(tiny_processor, tag_table):
    example = {"title": "red", "tags": TAGS}

    def draws(seed):
        collate = OPTSGDataCollator(tiny_processor, tag_table, num_negatives=2, seed=seed)
        return [collate([example])["negative_features"] for _ in range(3)]

    same, other = draws(0), draws(1)
    assert all(torch.equal(a, b) for a, b in zip(same, draws(0)))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(same, other))


def test_workers_and_epochs_sample_differently(tiny_processor):
    collate = OPTSGDataCollator(tiny_processor)
    loader = DataLoader([{"title": "red", "tags": TAGS}] * 4, batch_size=1, collate_fn=collate, num_workers=2)
    torch.manual_seed(0)
    epochs = [[batch["labels"].tolist() for batch in loader] for _ in range(2)]
    # The two workers make batches 0 and 1.
    assert epochs[0][0] != epochs[0][1], "two workers"
    assert epochs[0] != epochs[1], "two epochs"
    torch.manual_seed(0)
    again = [batch["labels"].tolist() for batch in loader]
    assert again == epochs[0], "reproducible with torch's seed"


def test_seeds_of_examples_decide_their_tags_and_the_negatives(tiny_processor, tag_table):
    examples = [{"title": "red", "tags": TAGS, "example_seed": seed} for seed in (3, 4)]
    collate = OPTSGDataCollator(tiny_processor, tag_table, num_negatives=2, seed=0)
    collate([{"title": "red", "tags": TAGS}])
    assert_same_batch(collate(examples), OPTSGDataCollator(tiny_processor, tag_table, 2, seed=1)(examples))
    assert collate(examples)["example_seeds"].tolist() == [3, 4]


def test_tokens_of_retrieved_tags_are_padded(collate, tiny_processor):
    batch = collate([{"title": "red", "book_input_ids": [5, 1, 7, 1]}, {"title": "red", "book_input_ids": []}])
    pad = tiny_processor.tag_tokenizer.pad_token_id
    assert batch["book_input_ids"].tolist() == [[5, 1, 7, 1], [pad] * 4]
    assert batch["book_mask"].tolist() == [[True] * 4, [False] * 4]


# Errors


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"title": "red", "tags": ["red"]}, {"title": "blue", "tags": []}], r"Example 1 .* tags=\[\]"),
        ([{"title": "red", "tags": ["red"]}, {"title": "blue"}], "Example 1 .* tags=None"),
        ([{"title": "red"}, {"title": "blue", "tags": ["blue"]}], "Example 0 .* tags=None"),
        ([{"title": "red", "tags": "red"}], "Example 0 .* tags='red'"),
        ([{"title": "red", "tags": ["red", " "]}], "tag ' ' is blank"),
        ([{"title": "red", "tags": ["red " * 20]}], "max_tag_tokens = 8"),
        ([{"title": "red"}, {"title": ""}], "example 1 has neither an image nor a title"),
        ([{"tags": ["red"]}], "there are no examples"),
        (
            [{"frame_features": np.ones((1, 16))}, {"image": Image.new("RGB", (8, 8))}],
            "Example 1 .* no frame_features, which other examples have",
        ),
        ([{"title_features": np.ones((1, 16))}, {"title": "blue"}], "Example 1 .* title='blue' but no title_features"),
        ([{"frame_features": np.ones((1, 16))}, {"frame_features": np.ones((1, 5))}], r"\(1, 5\), \(1, 16\)"),
    ],
)
def test_invalid_examples_are_reported(collate, examples, message):
    with pytest.raises(ValueError, match=message):
        collate(examples)


def test_a_tag_outside_the_table_is_reported(tiny_processor, tag_table):
    with pytest.raises(ValueError, match=r"lacks \['green'\]"):
        OPTSGDataCollator(tiny_processor, tag_table)([{"title": "red", "tags": ["red", "green"]}])


def test_negatives_need_a_table(tiny_processor):
    with pytest.raises(ValueError, match="num_negatives=5 needs a tag_table"):
        OPTSGDataCollator(tiny_processor, num_negatives=5)
