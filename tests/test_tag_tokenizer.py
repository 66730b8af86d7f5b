"""The tag tokenizer is lossless, and its words have the same tokens everywhere."""

import random

import pytest
from transformers import AutoTokenizer

from modeling_optsg.tokenization_optsg import train_tag_tokenizer

TAGS = ["arrow", "arrow left", "left arrow", "e-mail", "创意美食", "café", "don't"]
HARD_TAGS = [
    *TAGS,
    "photosynthesis",
    "[PAD]",
    "[SEP]",
    "[PAD] tag",
    "<s>",
    " leading",
    "trailing ",
    "double  space",
    "   ",
    "tab\tand\nline",
    "e - mail",
    "Ｆｕｌｌｗｉｄｔｈ　１２３",
    "e\u0301 and \u00e9",
    "👩‍👩‍👧‍👦 family",
    "🏳️‍🌈",
    "العربية",
    "हिन्दी",
    "ﷺ",
    "Ġ",
    "\u0000\u200b\ufeff",
    "\ufffd",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tag_tokenizer(TAGS)


def round_trip(tokenizer, tag):
    return tokenizer.decode(tokenizer(tag)["input_ids"], skip_special_tokens=True)


def test_pad_and_sep_are_ids_0_and_1(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.sep_token_id) == (0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["[PAD]", "[SEP]"]


@pytest.mark.parametrize("tag", HARD_TAGS)
def test_every_tag_is_decoded_exactly(tokenizer, tag):
    ids = tokenizer(tag)["input_ids"]
    assert not {0, 1} & set(ids)
    assert round_trip(tokenizer, tag) == tag


def test_random_text_is_decoded_exactly_from_unique_tokens(tokenizer):
    rng = random.Random(0)
    ranges = [(0x20, 0x7E), (0x20, 0x20), (0x0, 0x1F), (0xA0, 0x3000), (0x3000, 0xD7FF), (0xE000, 0xFFFF)]
    ranges += [(0x10000, 0x1FAFF)]
    tags = {"".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 12))) for _ in range(3000)}
    spellings = set()
    for tag in tags:
        assert round_trip(tokenizer, tag) == tag
        spellings.add(tuple(tokenizer(tag)["input_ids"]))
    assert len(spellings) == len(tags)


def test_a_word_has_the_same_tokens_anywhere_in_a_tag(tokenizer):
    (arrow,) = tokenizer("arrow")["input_ids"]
    assert tokenizer("arrow left")["input_ids"][0] == arrow
    assert tokenizer("left arrow")["input_ids"][-1] == arrow


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for tag in HARD_TAGS:
        assert loaded(tag)["input_ids"] == tokenizer(tag)["input_ids"]
        assert round_trip(loaded, tag) == tag


def test_frequent_tags_get_fewer_tokens():
    size_for_one_word = 258 + len("Ġapple") - 1
    often_apple = train_tag_tokenizer(["apple"] * 5 + ["zebra"], vocab_size=size_for_one_word)
    often_zebra = train_tag_tokenizer(["apple"] + ["zebra"] * 5, vocab_size=size_for_one_word)
    assert len(often_apple("apple")["input_ids"]) == len(often_zebra("zebra")["input_ids"]) == 1
    assert len(often_apple("zebra")["input_ids"]) > 1
    assert len(often_zebra("apple")["input_ids"]) > 1


def test_the_vocabulary_has_at_most_the_given_size():
    tags = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmn"]
    assert len(train_tag_tokenizer(tags, vocab_size=300)) == 300
    assert 258 < len(train_tag_tokenizer(["one tag"])) < 300


def test_tags_may_come_from_a_generator():
    assert train_tag_tokenizer(tag for tag in TAGS).get_vocab() == train_tag_tokenizer(TAGS).get_vocab()


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([], "no tags"),
        ("arrow", "expected an iterable of tags"),
        (["arrow", None], "training tag 1 is None"),
        (["arrow", "\ud800"], "training tag 1.*not valid Unicode"),
    ],
)
def test_invalid_training_tags_are_reported(tags, message):
    with pytest.raises(ValueError, match=message):
        train_tag_tokenizer(tags)


def test_a_vocabulary_too_small_for_the_bytes_is_rejected():
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tag_tokenizer(TAGS, vocab_size=100)
