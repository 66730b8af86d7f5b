"""The vocabulary of tag tokens: its embeddings, its output layer, and how both are resized."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layers import OutputLayer, compute_columns
from .tag_classifier import LabelVocabulary


class TagTokensMixin:
    """For models with a `tag_decoder` and an `lm_head`. Place it before `PreTrainedModel` among the base classes."""

    _tied_weights_keys = {"lm_head.weight": "tag_decoder.token_embeddings.weight"}

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the tag decoder."""
        return self.tag_decoder.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the tag decoder."""
        self.tag_decoder.token_embeddings = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the vocabulary of tag tokens: the token embeddings of the tag decoder, and the output layer.

        The text tower has another tokenizer and keeps its embeddings. The tag classifier compares whole tags and
        keeps its classes.

        Args:
            new_num_tokens: Size of the new vocabulary, such as `len(processor.tag_tokenizer)`.
            pad_to_multiple_of: See [`PreTrainedModel.resize_token_embeddings`].
            mean_resizing: See [`PreTrainedModel.resize_token_embeddings`].

        Returns:
            The token embeddings.

        Raises:
            ValueError: A removed token is [PAD], [SEP] or a token of the label vocabulary.
        """
        config = self.config
        used = [config.tag_pad_token_id, config.tag_sep_token_id]
        used += [int(m.tokens.max()) for m in self.modules() if isinstance(m, LabelVocabulary) and m.tokens.numel()]
        if new_num_tokens is not None and new_num_tokens <= max(used):
            raise ValueError(
                f"new_num_tokens={new_num_tokens} would remove token {max(used)}, which [PAD], [SEP] or the label "
                f"vocabulary has; keep at least {max(used) + 1} tokens."
            )
        # The library would store the new size in the text tower's configuration.
        text_vocab_size = config.text_config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        config.text_config.vocab_size = text_vocab_size
        config.tag_vocab_size = embeddings.num_embeddings
        return embeddings

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: object, **kwargs: object) -> nn.Linear:
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if type(old_lm_head) is not OutputLayer or resized is old_lm_head:
            return resized
        output_layer = OutputLayer(resized.in_features, resized.out_features, device="meta")
        output_layer.weight, output_layer.bias = resized.weight, resized.bias
        return output_layer

    def token_logits(self, hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the logits of tag tokens.

        Args:
            hidden_states: `[..., hidden_size]` of the tag decoder.
            tokens: `[columns]`, the tokens to compute logits of. By default, the whole vocabulary.

        Returns:
            `[..., columns]`.
        """
        embeddings = self.tag_decoder.token_embeddings
        if self.config.tie_word_embeddings and parametrize.is_parametrized(embeddings):
            # The embeddings are text-initialised. The output layer's own weight is only their offset.
            rows = torch.arange(embeddings.num_embeddings, device=hidden_states.device) if tokens is None else tokens
            return self.lm_head(hidden_states, tokens, weight=embeddings(rows))
        return self.lm_head(hidden_states) if tokens is None else compute_columns(self.lm_head, hidden_states, tokens)
