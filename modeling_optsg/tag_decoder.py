"""Tag decoder: generates the tag of each order prompt, token by token.

A slot is its order prompt, as a soft token, followed by its tag's tokens. Every token also carries its prompt and its
position within the slot. The prompt predicts the first token or [PAD]; the last token predicts [SEP]. [PAD] and [SEP]
are predicted but never read: a slot without tokens already says [PAD], and the next prompt already ends the tag.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from .layers import TransformerLayer
from .seeded_random import seeded_uniform


@dataclass
class SlotSequence:
    """The slots of a batch laid end to end, in prompt order. All tensors are `[batch, length]`.

    Args:
        input_ids: Token read at a position; undefined where `position` is 0.
        targets: Token to predict at a position, -100 at padding.
        slot: Prompt that the position belongs to.
        position: Position within the slot; 0 is the prompt itself.
        valid: False at the padding at the end.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    valid: torch.Tensor

    def attention_mask(self, parallel: torch.Tensor) -> torch.Tensor:
        """Build the self-attention mask.

        A position sees all earlier positions (sequential decoding), or those of its own slot (parallel decoding).

        Args:
            parallel: Boolean `[batch]`, which examples use parallel decoding.

        Returns:
            Boolean `[batch, 1, length, length]`, true where a position (row) sees another (column).
        """
        length = self.slot.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.slot.device).tril()
        same_slot = self.slot[:, :, None] == self.slot[:, None, :]
        return (causal & (same_slot | ~parallel[:, None, None]))[:, None]


def lay_out_slots(
    assignment: torch.Tensor,
    tag_input_ids: torch.Tensor,
    tag_lengths: torch.Tensor,
    pad_token_id: int,
    sep_token_id: int,
    pad_slots: bool | torch.Tensor = True,
) -> SlotSequence:
    """Build the decoder's inputs and targets from a matching.

    Args:
        assignment: `[batch, num_prompts]`, index of the tag in each slot, -1 for [PAD].
        tag_input_ids: `[tags, max length]`, tokens without [SEP], padded with anything.
        tag_lengths: `[tags]`, number of tokens of each tag.
        pad_token_id: Token of [PAD].
        sep_token_id: Token of [SEP].
        pad_slots: Which [PAD]-aligned slots to include, as their prompt alone: all, none, or those of a boolean
            `[batch, num_prompts]`.
    """
    batch, num_prompts = assignment.shape
    device = assignment.device
    has_tag = assignment >= 0
    lengths = torch.where(has_tag, tag_lengths[assignment.clamp(min=0)], 0)
    max_length = int(lengths.max())
    tokens = tag_input_ids[assignment.clamp(min=0)][..., :max_length]
    position = torch.arange(max_length + 1, device=device)

    targets = torch.full((batch, num_prompts, max_length + 1), -100, dtype=torch.long, device=device)
    targets[..., :max_length] = tokens
    targets = torch.where(position == lengths[..., None], sep_token_id, targets)
    targets[..., 0] = torch.where(has_tag, targets[..., 0], pad_token_id)
    input_ids = torch.cat([torch.full_like(targets[..., :1], pad_token_id), tokens], dim=-1)

    valid = ((position <= lengths[..., None]) & (has_tag | pad_slots)[..., None]).flatten(1)
    # A stable sort by validity closes the gaps and keeps slots and tokens in order.
    order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)[:, : int(valid.sum(dim=1).max())]
    slot = torch.arange(num_prompts, device=device)[:, None].expand(-1, max_length + 1).flatten().expand(batch, -1)
    position = position.expand(num_prompts, -1).flatten().expand(batch, -1)
    valid = valid.gather(1, order)
    return SlotSequence(
        input_ids=input_ids.flatten(1).gather(1, order),
        targets=targets.flatten(1).gather(1, order).masked_fill(~valid, -100),
        slot=slot.gather(1, order),
        position=position.gather(1, order),
        valid=valid,
    )


def choose_pad_slots(
    is_pad: torch.Tensor, ratio: float, seeds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample some of the [PAD] slots, because there are many and they have the same target.

    Args:
        is_pad: Boolean `[batch, num_prompts]`, which slots are [PAD]-aligned.
        ratio: Ratio of them to sample, at least one per example.
        seeds: See [`seeded_uniform`].

    Returns:
        The sampled slots, boolean `[batch, num_prompts]`, and the number of slots that each represents, `[batch]`.
    """
    if ratio >= 1:
        return is_pad, torch.ones(len(is_pad), device=is_pad.device)
    count = is_pad.sum(dim=1)
    num_sampled = (count * ratio).round().clamp(min=1).minimum(count)
    draws = seeded_uniform("pad slots", tuple(is_pad.shape), seeds, is_pad.device)
    rank = draws.masked_fill(~is_pad, 2.0).argsort(dim=1).argsort(dim=1)
    return is_pad & (rank < num_sampled[:, None]), count / num_sampled.clamp(min=1)


class SlotRows:
    """Maps between two layouts of many slots: one row per slot, and one row per example with its slots side by side.

    In the second layout the slots of an example share its memory, so that the memory is not copied for each slot.

    Args:
        examples: `[slots]`, ascending, the example of each slot.
        batch: Number of examples.
    """

    def __init__(self, examples: torch.Tensor, batch: int):
        counts = torch.bincount(examples, minlength=batch)
        first = counts.cumsum(0) - counts
        self.batch = batch
        self.max_slots = int(counts.max())
        rank = torch.arange(examples.shape[0], device=examples.device) - first[examples]
        self.index = examples * self.max_slots + rank
        # Then both layouts are the same, and nothing is copied.
        self.is_full = len(examples) == batch * self.max_slots

    def by_example(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rearrange `[slots, width]` to `[batch, max slots, width]`, with zeros where an example has fewer slots."""
        if self.is_full:
            return hidden_states.unflatten(0, (self.batch, self.max_slots))
        grid = hidden_states.new_zeros(self.batch * self.max_slots, hidden_states.shape[-1])
        return grid.index_copy_(0, self.index, hidden_states).unflatten(0, (self.batch, self.max_slots))

    def by_slot(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Invert [`by_example`]."""
        hidden_states = hidden_states.flatten(0, 1)
        return hidden_states if self.is_full else hidden_states[self.index]


class TagDecoder(nn.Module):
    """Causal self-attention over the slots and cross-attention to the memory.

    Args:
        config: The model's configuration.
        max_slot_tokens: Maximum number of tokens of a slot. Defaults to `max_tag_tokens`.
    """

    def __init__(self, config: PreTrainedConfig, max_slot_tokens: int | None = None):
        super().__init__()
        self.config = config
        self.token_embeddings = nn.Embedding(config.tag_vocab_size, config.hidden_size)
        # Position 0 is the prompt.
        self.positions = nn.Embedding((max_slot_tokens or config.max_tag_tokens) + 1, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(config, cross_attention=True) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def embed(self, prompts: torch.Tensor, position: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeds positions of slots.

        Args:
            prompts: `[..., hidden_size]`, the prompt of the slot that each position belongs to.
            position: `[...]`, position within the slot. At 0 the token is not read.
            input_ids: `[...]`.
        """
        tokens = self.token_embeddings(input_ids) * (position > 0)[..., None]
        # Prompts are normalised to entries of about 1. Embeddings tied to an output layer are far smaller; without the
        # factor they would drown in the prompt, and the second token of a tag would hardly know the first.
        return self.dropout(prompts + self.config.hidden_size**0.5 * (tokens + self.positions(position)))

    def forward(
        self,
        order_prompts: torch.Tensor,
        sequence: SlotSequence,
        parallel: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Decode all positions at once, with the true previous tokens.

        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            sequence: The slots, from [`lay_out_slots`].
            parallel: Boolean `[batch]`, which examples use the parallel attention mask.
            memory: `[batch, memory length, hidden_size]`.
            memory_mask: Boolean `[batch, memory length]`.

        Returns:
            `[batch, length, hidden_size]`.
        """
        prompts = order_prompts.gather(1, sequence.slot[..., None].expand(-1, -1, order_prompts.shape[-1]))
        hidden_states = self.embed(prompts, sequence.position, sequence.input_ids)
        attention_mask = sequence.attention_mask(parallel)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, attention_mask, memory, memory_mask[:, None, None, :])
        return self.norm(hidden_states)

    def cache_memory(self, memory: torch.Tensor) -> DynamicCache:
        """Compute each layer's keys and values of the memory, `[batch, heads, memory length, head size]`, once."""
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            cache.update(*layer.cross_attention.keys_values(memory), index)
        return cache

    def step(
        self,
        hidden_states: torch.Tensor,
        cache: DynamicCache,
        cache_mask: torch.Tensor | None,
        rows: SlotRows,
        memory_cache: DynamicCache,
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Decode one more position of many slots.

        Args:
            hidden_states: `[slots, hidden_size]`, from [`embed`].
            cache: Keys and values of what each slot sees before this position. Extended in place.
            cache_mask: Boolean `[slots, cached length + 1]`, or `None` if all of it is visible.
            rows: Which example each slot belongs to.
            memory_cache: From [`cache_memory`].
            memory_mask: Boolean `[batch, memory length]`.

        Returns:
            `[slots, hidden_size]`.
        """
        if cache_mask is not None:
            cache_mask = cache_mask[:, None, None, :]
        memory_mask = memory_mask[:, None, None, :]
        for index, (layer, memory_layer) in enumerate(zip(self.layers, memory_cache.layers, strict=True)):
            normed, attention = layer.self_norm(hidden_states), layer.self_attention
            key, value = cache.update(*attention.keys_values(normed[:, None]), index)
            if key.shape[2] == 1:
                # The first position sees only itself.
                mixed = value.flatten(1)
            else:
                mixed = attention.mix_values(attention.queries(normed[:, None]), key, value, cache_mask)[0][:, 0]
            hidden_states = hidden_states + attention.out_proj(mixed)

            attention = layer.cross_attention
            queries = attention.split_heads(rows.by_example(attention.q_proj(layer.cross_norm(hidden_states))))
            mixed, _ = attention.mix_values(queries, memory_layer.keys, memory_layer.values, memory_mask)
            hidden_states = hidden_states + attention.out_proj(rows.by_slot(mixed))
            hidden_states = hidden_states + layer.feed_forward(layer.feed_forward_norm(hidden_states))
        return self.norm(hidden_states)
