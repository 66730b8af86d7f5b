"""The tag tokenizer: byte-level BPE trained on the training tags, lossless in every language."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "[PAD]"
SEP_TOKEN = "[SEP]"


def train_tag_tokenizer(tags: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Trains the tokenizer the tag decoder writes with.

    Every tag, seen in training or not, comes back from `decode(encode(tag))` character for character: there is no
    unknown token (all 256 bytes are in the vocabulary), no clean-up of spaces, and a tag that spells a special token,
    such as `"[PAD]"`, is read as text. One space is put before the tag and taken away again, so that a word has the
    same tokens wherever in a tag it stands.

    The special tokens are `[PAD]` (id 0: filler, and the pre-defined [PAD] tag) and `[SEP]` (id 1: ends a tag).
    Encoding adds neither.

    Args:
        tags: the training tags, once per occurrence, so that frequent tags get short spellings.
        vocab_size: the largest vocabulary to make, special tokens and bytes included. Few tags give a smaller one.

    Returns:
        A tokenizer that `AutoTokenizer` loads.

    Raises:
        ValueError: `tags` is empty or holds something that is not text, or `vocab_size` has no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; the bytes and the special tokens alone need {smallest}")
    if isinstance(tags, str):
        raise ValueError(f"tags is the text {tags!r}; expected an iterable of tags, such as [{tags!r}]")

    tokenizer = Tokenizer(models.BPE())
    # Not ByteLevel(add_prefix_space=True): that skips a tag which already starts with a space, and would lose it.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, SEP_TOKEN],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # The trainer runs in Rust, which would hide an error raised inside its iterator.
    checked = list(_checked(tags))
    if not checked:
        raise ValueError("there are no tags to train a tag tokenizer on")
    tokenizer.train_from_iterator(checked, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        sep_token=SEP_TOKEN,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _checked(tags: Iterable[str]) -> Iterator[str]:
    for index, tag in enumerate(tags):
        if not isinstance(tag, str):
            raise ValueError(f"training tag {index} is {tag!r} of type {type(tag).__name__}; expected str")
        try:
            tag.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"training tag {index}, {tag!r}, is not valid Unicode text ({error.reason})") from error
        yield tag
