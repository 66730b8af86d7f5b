"""Restricts generation to a given vocabulary of tags."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import LogitsProcessor, PreTrainedConfig, ProcessorMixin


class TagVocabularyLogitsProcessor(LogitsProcessor):
    """Restricts a slot to the tags of a given vocabulary and [PAD].

    The tags are stored as a prefix tree over their tokens.

    Args:
        tags: Token ids of each allowed tag, without [SEP]. [PAD] at the end is padding.
        pad_token_id: Token of [PAD].
        sep_token_id: Token of [SEP].

    Raises:
        ValueError: There are no tags, a tag is empty, or a tag is not a sequence of token ids.
    """

    def __init__(self, tags: Iterable[Sequence[int]], pad_token_id: int, sep_token_id: int):
        if isinstance(tags, Mapping) or not isinstance(tags, Iterable):
            raise ValueError(f"tag_vocabulary is of type {type(tags).__name__}; expected the token ids of tags.")
        next_tokens = defaultdict(set)
        next_tokens[()].add(pad_token_id)
        for tag in tags:
            tag = self._to_token_ids(tag, pad_token_id, sep_token_id)
            for length, token in enumerate(tag):
                next_tokens[tag[:length]].add(token)
            next_tokens[tag].add(sep_token_id)
        if len(next_tokens) == 1:
            raise ValueError("The tag vocabulary is empty; leave tag_vocabulary out to allow every tag.")
        self.next_tokens = {prefix: torch.tensor(sorted(tokens)) for prefix, tokens in next_tokens.items()}
        self.max_length = max(map(len, next_tokens))
        self.max_token_id = max(map(max, next_tokens.values()))

    @classmethod
    def from_tags(
        cls, tags: Iterable[str], processor: ProcessorMixin, config: PreTrainedConfig
    ) -> "TagVocabularyLogitsProcessor":
        """Build the vocabulary from tags as text, in the letter case of the label vocabulary.

        Args:
            tags: The allowed tags.
            processor: The model's [`OPTSGProcessor`].
            config: The model's configuration.

        Raises:
            ValueError: `tags` is not a list of tags, or a tag cannot be encoded.
        """
        if isinstance(tags, str | Mapping) or not isinstance(tags, Iterable):
            raise ValueError(f"tag_vocabulary is a {type(tags).__name__}; expected a list of tags.")
        tags = list(tags)
        if wrong := [tag for tag in tags if not isinstance(tag, str)]:
            raise ValueError(f"tag_vocabulary contains {wrong[0]!r}, a {type(wrong[0]).__name__}; expected a str.")
        tokens = processor.encode_tags(processor.match_vocabulary_case(tags))["tag_input_ids"]
        return cls(tokens.tolist(), config.tag_pad_token_id, config.tag_sep_token_id)

    @staticmethod
    def _to_token_ids(tag: Sequence[int], pad_token_id: int, sep_token_id: int) -> tuple[int, ...]:
        try:
            tokens = [int(token) for token in tag] if not isinstance(tag, str) else None
        except (TypeError, ValueError):
            tokens = None
        if tokens is None:
            raise ValueError(
                f"The tag vocabulary contains {tag!r}; expected token ids, as `processor.encode_tags` makes them."
            )
        while tokens and tokens[-1] == pad_token_id:
            tokens.pop()
        if not tokens:
            raise ValueError("The tag vocabulary contains an empty tag.")
        if min(tokens) < 0 or pad_token_id in tokens or sep_token_id in tokens:
            raise ValueError(
                f"The tag vocabulary contains {tokens}: a tag must contain neither [PAD]={pad_token_id} nor "
                f"[SEP]={sep_token_id} nor negative ids."
            )
        return tuple(tokens)

    def check_fits(self, config: PreTrainedConfig) -> None:
        """Check that a model can generate all tags of the vocabulary.

        Raises:
            ValueError: A tag is too long for the model, or has a token that the model does not have.
        """
        if self.max_length > config.max_tag_tokens:
            raise ValueError(
                f"tag_vocabulary contains a tag of {self.max_length} tokens; this model generates at most "
                f"max_tag_tokens={config.max_tag_tokens}."
            )
        if self.max_token_id >= config.tag_vocab_size:
            raise ValueError(
                f"tag_vocabulary contains token {self.max_token_id}; this model has tag_vocab_size="
                f"{config.tag_vocab_size}. Was it made with another tokenizer?"
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masks tokens that do not continue a tag of the vocabulary.

        Args:
            input_ids: `[slots, length]`, the tokens of each slot so far.
            scores: `[slots, tag_vocab_size]`.
        """
        if input_ids.shape[1] == 0:
            prefixes, inverse = [()], torch.zeros(len(scores), dtype=torch.long)
        else:
            prefixes, inverse = torch.unique(input_ids, dim=0, return_inverse=True)
            prefixes = [tuple(prefix) for prefix in prefixes.tolist()]
        allowed = torch.zeros(len(prefixes), scores.shape[1], dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            # A prefix outside the tree belongs to a hypothesis with probability 0.
            allowed[row, self.next_tokens.get(prefix, torch.empty(0, dtype=torch.long))] = True
        return scores.masked_fill(~allowed[inverse.to("cpu")].to(scores.device), -float("inf"))
