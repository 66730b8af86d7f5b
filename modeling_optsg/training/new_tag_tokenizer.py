"""A new tag tokenizer for a checkpoint that is fine-tuned on tags in another script."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.layers import OutputLayer
from modeling_optsg.processing_optsg import OPTSGProcessor
from modeling_optsg.tokenization_optsg import train_tag_tokenizer

from .text_tied_embeddings import tie_tokens_to_text

logger = get_logger(__name__)

# A checkpoint keeps its tag tokenizer if at most this ratio of the tags is too long, ...
MAX_LONG_RATIO = 0.1
# ... and at most this ratio has characters without a token, which are spelled in bytes.
MAX_UNKNOWN_RATIO = 0.5


@dataclasses.dataclass(frozen=True)
class TagCoverage:
    """How well a tag tokenizer fits the tags of a dataset.

    Args:
        long: Ratio of tags with more than `max_tag_tokens` tokens, which the model cannot generate.
        unknown: Ratio of tags with a character without a token, or an unknown token.
    """

    long: float
    unknown: float

    @classmethod
    def measure(
        cls, tag_tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], max_tag_tokens: int
    ) -> "TagCoverage":
        """Measure the ratios.

        Args:
            tag_tokenizer: A tag tokenizer.
            tags: The different tags of a dataset.
            max_tag_tokens: Maximum number of tokens of a tag.
        """
        texts = [tag_tokenizer.decode([token]) for token in range(len(tag_tokenizer))]
        # Bytes that are only a part of a character.
        unknown = {token for token, text in enumerate(texts) if "\N{REPLACEMENT CHARACTER}" in text}
        unknown |= {tag_tokenizer.unk_token_id} - {None}
        encoded = tag_tokenizer(list(tags), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return cls(
            sum(len(ids) > max_tag_tokens for ids in encoded) / len(encoded),
            sum(not unknown.isdisjoint(ids) for ids in encoded) / len(encoded),
        )

    @property
    def is_sufficient(self) -> bool:
        """Whether the tokenizer can be kept."""
        return self.long <= MAX_LONG_RATIO and self.unknown <= MAX_UNKNOWN_RATIO


def train_better_tag_tokenizer(
    processor: OPTSGProcessor, tags: Iterable[str], vocab_size: int | None = None
) -> PreTrainedTokenizerBase | None:
    """Train a new tag tokenizer if that of a checkpoint does not fit the tags, and log this.

    Args:
        processor: Processor of the checkpoint.
        tags: The training tags, repeated for each of their occurrences.
        vocab_size: Maximum size of the new vocabulary. Default: the size of the checkpoint's.

    Returns:
        The new tokenizer, or `None` if the checkpoint's is sufficient or no worse than a new one.
    """
    tags = list(tags)
    different = sorted(set(tags))
    old = TagCoverage.measure(processor.tag_tokenizer, different, processor.max_tag_tokens)
    if old.is_sufficient:
        return None
    tag_tokenizer = train_tag_tokenizer(tags, vocab_size or len(processor.tag_tokenizer))
    new = TagCoverage.measure(tag_tokenizer, different, processor.max_tag_tokens)
    if new.long + new.unknown >= old.long + old.unknown:
        # For example, the tags are whole sentences.
        return None
    logger.info(
        f"The tag tokenizer of the checkpoint does not fit {len(different)} training tags: {old.long:.0%} are too "
        f"long, and {old.unknown:.0%} have characters that it spells in bytes. A new one of {len(tag_tokenizer)} "
        f"tokens is trained ({new.long:.0%} and {new.unknown:.0%})."
    )
    return tag_tokenizer


def replace_tag_tokenizer(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, tag_tokenizer: PreTrainedTokenizerBase, init_std: float
) -> None:
    """Give a model another tag tokenizer, with new token embeddings and a new output layer.

    Args:
        model: A model with a `tag_decoder` and an `lm_head`.
        processor: Its processor.
        tag_tokenizer: The new tag tokenizer.
        init_std: Standard deviation of the text-initialised embeddings. 0 initialises them randomly.
    """
    config, device = model.config, model.device
    processor.tag_tokenizer = tag_tokenizer
    config.tag_vocab_size = len(tag_tokenizer)
    embeddings = nn.Embedding(config.tag_vocab_size, config.hidden_size, device=device)
    lm_head = OutputLayer(config.hidden_size, config.tag_vocab_size, device=device)
    with torch.no_grad():
        for weight in (embeddings.weight, lm_head.weight):
            weight.normal_(std=config.initializer_range)
        lm_head.bias.zero_()
    model.tag_decoder.token_embeddings, model.lm_head = embeddings, lm_head
    model.tie_weights()
    if init_std:
        tie_tokens_to_text(model.eval(), processor, init_std)
