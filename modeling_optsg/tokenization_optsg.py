"""The tag tokenizer: byte-level BPE, trained on the training tags and lossless in every language."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "[PAD]"
SEP_TOKEN = "[SEP]"


def train_tag_tokenizer(tags: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Train the tokenizer of the tag decoder.

    `decode(encode(tag))` returns every tag unchanged, whether it occurred in training or not: all 256 bytes are in the
    vocabulary, so there is no unknown token; spaces are not cleaned up; and a tag that contains a special token, such
    as `"[PAD]"`, is encoded as text. Encoding inserts a space before the tag, and decoding removes it, so that a word
    has the same tokens anywhere in a tag.

    The special tokens are `[PAD]` (id 0, the padding and the [PAD] tag) and `[SEP]` (id 1, the end of a tag). Encoding
    adds neither.

    Args:
        tags: The training tags. Repeat a tag for each of its occurrences, so that frequent tags get fewer tokens.
        vocab_size: Maximum size of the vocabulary, with special tokens and bytes. Few tags give a smaller one.

    Returns:
        A tokenizer that `AutoTokenizer` can load.

    Raises:
        ValueError: `tags` is empty or contains something other than text, or `vocab_size` is too small for the bytes.

    Example:

        >>> from modeling_optsg import train_tag_tokenizer
        >>> tokenizer = train_tag_tokenizer(["night sky", "sky", "家常菜"], vocab_size=300)
        >>> tokenizer.decode(tokenizer("家常菜")["input_ids"])
        '家常菜'
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    min_size = len(alphabet) + 2
    if vocab_size < min_size:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least {min_size}, for bytes and special tokens")
    if isinstance(tags, str):
        raise ValueError(f"tags is the text {tags!r}; expected an iterable of tags, such as [{tags!r}]")

    tokenizer = Tokenizer(models.BPE())
    # ByteLevel(add_prefix_space=True) adds no space to a tag that starts with one, so decoding would remove that one.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, SEP_TOKEN],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # The trainer, written in Rust, hides errors that its iterator raises.
    checked = list(_check_tags(tags))
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


def _check_tags(tags: Iterable[str]) -> Iterator[str]:
    for index, tag in enumerate(tags):
        if not isinstance(tag, str):
            raise ValueError(f"training tag {index} is {tag!r} of type {type(tag).__name__}; expected str")
        try:
            tag.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"training tag {index}, {tag!r}, is not valid Unicode text ({error.reason})") from error
        yield tag
