"""The transformer layer that the encoder, the prompts and the decoder are built of."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attention_weights(query, key, attention_mask, scaling) -> torch.Tensor:
    """`[batch, heads, queries, keys]`, each row adding up to 1. `attention_mask` is boolean, true where allowed."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    return weights.softmax(dim=-1, dtype=torch.float32)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, with the weights returned."""
    weights = attention_weights(query, key, attention_mask, scaling).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class MultiHeadAttention(nn.Module):
    """Multi-head attention in three steps (`queries`, `keys_values`, `attend`), so that a decoder can keep the keys
    and values it has computed once."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)

    def queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` -> `[batch, heads, length, width / heads]`."""
        return self._split_heads(self.q_proj(hidden_states))

    def keys_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, length, width]` -> two of `[batch, heads, length, width / heads]`."""
        return self._split_heads(self.k_proj(hidden_states)), self._split_heads(self.v_proj(hidden_states))

    def attend(
        self, query, key, value, attention_mask=None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query: `[batch, heads, queries, width / heads]`; `key`, `value` likewise over the keys.
            attention_mask: boolean, broadcastable to `[batch, heads, queries, keys]`, true where allowed.
            output_attentions: make the weights a second time where the implementation keeps them to itself (sdpa,
                flash); the output stays that implementation's own.

        Returns:
            The output `[batch, queries, width]` and, with eager attention or `output_attentions`, the weights
            `[batch, heads, queries, keys]`.
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_size**-0.5,
            is_causal=False,
        )
        if weights is None and output_attentions:
            weights = attention_weights(query, key, attention_mask, self.head_size**-0.5).to(value.dtype)
        return self.out_proj(output.flatten(2)), weights

    def forward(self, hidden_states, source=None, attention_mask=None, output_attentions: bool = False):
        key, value = self.keys_values(hidden_states if source is None else source)
        return self.attend(self.queries(hidden_states), key, value, attention_mask, output_attentions)


class FeedForward(nn.Sequential):
    def __init__(self, config):
        super().__init__(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )


class TransformerLayer(GradientCheckpointingLayer):
    """Pre-norm layer: self-attention, cross-attention to a memory if asked for, feed-forward."""

    def __init__(self, config, cross_attention: bool = False):
        super().__init__()
        self.self_norm = nn.LayerNorm(config.hidden_size)
        self.self_attention = MultiHeadAttention(config)
        if cross_attention:
            self.cross_norm = nn.LayerNorm(config.hidden_size)
            self.cross_attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states, attention_mask=None, memory=None, memory_mask=None, output_attentions: bool = False
    ):
        """
        Args:
            hidden_states: `[batch, length, width]`.
            attention_mask: boolean, broadcastable to `[batch, heads, length, length]`.
            memory: `[batch, memory length, width]` for the cross-attention.
            memory_mask: boolean, broadcastable to `[batch, heads, length, memory length]`.
            output_attentions: return the cross-attention's weights whatever the implementation.

        Returns:
            `[batch, length, width]` and the cross-attention's weights `[batch, heads, length, memory length]` (`None`
            unless asked for or attention is eager).
        """
        attended, _ = self.self_attention(self.self_norm(hidden_states), attention_mask=attention_mask)
        hidden_states = hidden_states + self.dropout(attended)
        cross_weights = None
        if memory is not None:
            attended, cross_weights = self.cross_attention(
                self.cross_norm(hidden_states), memory, memory_mask, output_attentions
            )
            hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        return hidden_states, cross_weights


def pool_tokens(tokens: torch.Tensor | None, mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """The mean of an example's real tokens.

    Args:
        tokens: `[batch, length, width]`; mask: `[batch, length]`, all real when left out.

    Returns:
        `[batch, width]`; zero for an example without any.
    """
    if tokens is None:
        return None
    if mask is None:
        return tokens.float().mean(dim=1)
    weights = mask.float()[..., None]
    return (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
