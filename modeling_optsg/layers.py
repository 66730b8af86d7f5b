"""The transformer layer shared by multimodal encoder, prompt encoder and tag decoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Compute softmax attention weights in float32.

    Args:
        query: `[batch, heads, queries, head size]`.
        key: `[batch, heads, keys, head size]`.
        attention_mask: Boolean, broadcastable to `[batch, heads, queries, keys]`, true where attention is allowed.
        scaling: Factor of the dot products.

    Returns:
        `[batch, heads, queries, keys]`; each row sums to 1.
    """
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    return weights.softmax(dim=-1, dtype=torch.float32)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention in plain torch, in the interface of `ALL_ATTENTION_FUNCTIONS`."""
    weights = attention_weights(query, key, attention_mask, scaling).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def pool_tokens(tokens: torch.Tensor | None, mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """Average the real tokens of each example.

    Args:
        tokens: `[batch, length, width]`, or `None`.
        mask: `[batch, length]`, true for real tokens. By default all are real.

    Returns:
        `[batch, width]`, zero for an example without real tokens; `None` without `tokens`.
    """
    if tokens is None:
        return None
    if mask is None:
        return tokens.float().mean(dim=1)
    weights = mask.float()[..., None]
    return (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Float32Buffers(nn.Module):
    """A module whose own buffers keep 32 bits when a model is cast to half precision.

    16 bits are not enough for statistics. Loading in half precision does not cast a module, so models also list such
    buffers in `_keep_in_fp32_modules_strict`.
    """

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        own = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in own.items():
            cast = self._buffers[name]
            if cast is not None and cast.is_floating_point() and cast.dtype != before.dtype:
                self._buffers[name] = before.to(cast.device)
        return self


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of the weights of a module that does not hold 8-bit weights alone."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """L2-normalise vectors `[..., width]`. In float16 the guard against a division by 0 would be rounded to 0."""
    return nn.functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)


class OutputLayer(nn.Linear):
    """Linear layer that can compute some of its outputs, which is faster in training with sampled classes."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        columns: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute outputs `[..., columns]` from `[..., width]`.

        Args:
            hidden_states: `[..., width]`.
            columns: `[columns]`, indices of the outputs. By default, all outputs.
            weight: `[columns, width]`, used instead of the layer's own weight.
        """
        bias = self.bias
        if columns is not None and bias is not None:
            bias = bias[columns]
        if weight is None:
            weight = self.weight if columns is None else self.weight[columns]
        return F.linear(hidden_states, weight, bias)


def compute_columns(layer: nn.Module, hidden_states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Compute some outputs `[..., columns]` of an [`OutputLayer`], or of the adapter around it."""
    if type(layer) is OutputLayer:
        return layer(hidden_states, columns)
    # An adapter adds to all outputs of the layer inside it.
    return layer(hidden_states)[..., columns]


class Standardizer(Float32Buffers):
    """Standardises features with the mean and standard deviation of the training examples, in 32 bits."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit_moments(self, features: torch.Tensor) -> None:
        """Fit mean and scale to `[examples, width]`."""
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(features.std(dim=0, correction=0) + 1e-3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Standardise `[batch, width]`."""
        return self.standardize(features)

    def standardize(self, features: torch.Tensor) -> torch.Tensor:
        """Standardise `[batch, width]`. Classes with another `forward` build on it."""
        return (features.float() - self.mean.float()) / self.scale.float()


class MultiHeadAttention(nn.Module):
    """Multi-head attention in three steps, so that a decoder can cache keys and values.

    The steps are [`queries`], [`keys_values`] and [`attend`].
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Split `[batch, length, width]` into heads `[batch, heads, length, head size]`."""
        return hidden_states.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)

    def queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project `[batch, length, width]` to queries `[batch, heads, length, head size]`."""
        return self.split_heads(self.q_proj(hidden_states))

    def keys_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project `[batch, length, width]` to keys and values, each `[batch, heads, length, head size]`."""
        return self.split_heads(self.k_proj(hidden_states)), self.split_heads(self.v_proj(hidden_states))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend and project the result.

        Args:
            query: `[batch, heads, queries, head size]`.
            key: `[batch, heads, keys, head size]`.
            value: `[batch, heads, keys, head size]`.
            attention_mask: Boolean, broadcastable to `[batch, heads, queries, keys]`, true where attention is allowed.
            output_attentions: Compute the weights separately if the implementation (sdpa, flash) does not return
                them. The output stays that of the implementation.

        Returns:
            The output `[batch, queries, width]`, and with eager attention or `output_attentions` the weights
            `[batch, heads, queries, keys]`.
        """
        mixed, weights = self.mix_values(query, key, value, attention_mask)
        if weights is None and output_attentions:
            weights = attention_weights(query, key, attention_mask, self.head_size**-0.5).to(value.dtype)
        return self.out_proj(mixed), weights

    def mix_values(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do the same as [`attend`], without the output projection."""
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
        return output.flatten(2), weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` to `source`, or to itself; see [`attend`]."""
        key, value = self.keys_values(hidden_states if source is None else source)
        return self.attend(self.queries(hidden_states), key, value, attention_mask, output_attentions)


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )


class TransformerLayer(GradientCheckpointingLayer):
    """Pre-norm layer: self-attention, optional cross-attention to a memory, feed-forward."""

    def __init__(self, config: PreTrainedConfig, cross_attention: bool = False):
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
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the layer.

        Args:
            hidden_states: `[batch, length, width]`.
            attention_mask: Boolean, broadcastable to `[batch, heads, length, length]`.
            memory: `[batch, memory length, width]` for the cross-attention.
            memory_mask: Boolean, broadcastable to `[batch, heads, length, memory length]`.
            output_attentions: Return the weights of the cross-attention with any attention implementation.

        Returns:
            `[batch, length, width]`, and the weights of the cross-attention `[batch, heads, length, memory length]`
            (`None` unless asked for or attention is eager).
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
