"""Room 4: writes each order prompt's tag, token by token.

A slot is laid out as its order prompt (a soft token) followed by its tag's tokens; every token also carries its prompt
and its place within the slot. The position of the prompt predicts the first token or [PAD], the last token predicts
[SEP]. [PAD] and [SEP] are predicted but never read: that a slot holds no tokens already says [PAD], and the next
prompt already says that the tag has ended.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .layers import TransformerLayer
from .seeded_random import seeded_uniform


@dataclass
class SlotSequence:
    """The slots of a batch laid end to end, in prompt order. All tensors are `[batch, length]`.

    Args:
        input_ids: token read at a position; only meaningful where `position > 0`.
        targets: token to predict there, -100 at filler positions.
        slot: the prompt the position belongs to.
        position: place within the slot; 0 is the prompt itself.
        valid: false at the filler at the end.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    valid: torch.Tensor

    def attention_mask(self, parallel: torch.Tensor) -> torch.Tensor:
        """Who sees whom: all earlier positions (sequential) or those of the same slot (parallel).

        Args:
            parallel: `[batch]`, boolean, which mask an example uses.

        Returns:
            Boolean `[batch, 1, length, length]`, true where a position (row) sees another (column).
        """
        length = self.slot.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.slot.device).tril()
        same_slot = self.slot[:, :, None] == self.slot[:, None, :]
        return (causal & (same_slot | ~parallel[:, None, None]))[:, None]


def lay_out_slots(
    assignment, tag_input_ids, tag_lengths, pad_token_id, sep_token_id, empty_slots: bool | torch.Tensor = True
) -> SlotSequence:
    """The decoder's inputs and targets for a matching.

    Args:
        assignment: `[batch, num_prompts]`, index of the tag in each slot, -1 for [PAD].
        tag_input_ids: `[tags, longest tag]`, without [SEP], anything beyond a tag's length.
        tag_lengths: `[tags]`, tokens of each tag.
        pad_token_id, sep_token_id: ids of [PAD] and [SEP].
        empty_slots: whether a [PAD]-aligned slot is laid out too, as its prompt alone: all or none of them, or those
            of a boolean `[batch, num_prompts]`.
    """
    batch, num_prompts = assignment.shape
    device = assignment.device
    is_tag = assignment >= 0
    lengths = torch.where(is_tag, tag_lengths[assignment.clamp(min=0)], 0)
    longest = int(lengths.max())
    tokens = tag_input_ids[assignment.clamp(min=0)][..., :longest]
    position = torch.arange(longest + 1, device=device)

    targets = torch.full((batch, num_prompts, longest + 1), -100, dtype=torch.long, device=device)
    targets[..., :longest] = tokens
    targets = torch.where(position == lengths[..., None], sep_token_id, targets)
    targets[..., 0] = torch.where(is_tag, targets[..., 0], pad_token_id)
    input_ids = torch.cat([torch.full_like(targets[..., :1], pad_token_id), tokens], dim=-1)

    valid = ((position <= lengths[..., None]) & (is_tag | empty_slots)[..., None]).flatten(1)
    # A stable sort by validity closes the gaps and keeps slots and tokens in order.
    order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)[:, : int(valid.sum(dim=1).max())]
    slot = torch.arange(num_prompts, device=device)[:, None].expand(-1, longest + 1).flatten().expand(batch, -1)
    position = position.expand(num_prompts, -1).flatten().expand(batch, -1)
    valid = valid.gather(1, order)
    return SlotSequence(
        input_ids=input_ids.flatten(1).gather(1, order),
        targets=targets.flatten(1).gather(1, order).masked_fill(~valid, -100),
        slot=slot.gather(1, order),
        position=position.gather(1, order),
        valid=valid,
    )


class SlotRows:
    """Which example each of many slots belongs to, and the two layouts that follow: one row a slot, or one row an example
    with its slots side by side. The second lets the slots of an example share its memory instead of copying it.

    Args:
        examples: `[slots]`, ascending, the example of each slot.
        batch: number of examples.
    """

    def __init__(self, examples: torch.Tensor, batch: int):
        counts = torch.bincount(examples, minlength=batch)
        first = counts.cumsum(0) - counts
        self.examples = examples
        self.batch = batch
        self.widest = int(counts.max())
        self.place = examples * self.widest + torch.arange(examples.shape[0], device=examples.device) - first[examples]

    def by_example(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[slots, width]` -> `[batch, most slots of an example, width]`, zeros where an example has fewer."""
        grid = hidden_states.new_zeros(self.batch * self.widest, hidden_states.shape[-1])
        return grid.index_copy_(0, self.place, hidden_states).unflatten(0, (self.batch, self.widest))

    def by_slot(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The inverse of [`by_example`]."""
        return hidden_states.flatten(0, 1)[self.place]


class TagDecoder(nn.Module):
    """Causal self-attention over the slots and cross-attention to the memory.

    Args:
        max_slot_tokens: most tokens of a slot, `max_tag_tokens` if not given.
    """

    def __init__(self, config, max_slot_tokens: int | None = None):
        super().__init__()
        self.config = config
        self.token_embeddings = nn.Embedding(config.tag_vocab_size, config.hidden_size)
        # One more place than the longest slot has tokens: the prompt's.
        self.positions = nn.Embedding((max_slot_tokens or config.max_tag_tokens) + 1, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(config, cross_attention=True) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def embed(self, prompts: torch.Tensor, position: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeds positions of slots.

        Args:
            prompts: `[..., hidden_size]`, the prompt of the slot each position belongs to.
            position: `[...]`, place within the slot; at 0 the token is not read.
            input_ids: `[...]`.
        """
        tokens = self.token_embeddings(input_ids) * (position > 0)[..., None]
        # Prompts come normalised, a unit an entry; embeddings tied to an output layer are far smaller, and unscaled
        # they drown in the prompt: the second token of a tag would hardly know the first.
        return self.dropout(prompts + self.config.hidden_size**0.5 * (tokens + self.positions(position)))

    def forward(self, order_prompts, sequence: SlotSequence, parallel, memory, memory_mask) -> torch.Tensor:
        """
        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            sequence: the slots as laid out by [`lay_out_slots`].
            parallel: `[batch]`, boolean, which attention mask an example uses.
            memory: `[batch, memory length, hidden_size]`; memory_mask: `[batch, memory length]`, boolean.

        Returns:
            `[batch, length, hidden_size]`.
        """
        prompts = order_prompts.gather(1, sequence.slot[..., None].expand(-1, -1, order_prompts.shape[-1]))
        hidden_states = self.embed(prompts, sequence.position, sequence.input_ids)
        attention_mask = sequence.attention_mask(parallel)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, attention_mask, memory, memory_mask[:, None, None, :])
        return self.norm(hidden_states)

    def memory_keys_values(self, memory: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values of the memory, `[batch, heads, memory length, width / heads]`: once an example."""
        return [layer.cross_attention.keys_values(memory) for layer in self.layers]

    def step(self, hidden_states, self_cache, self_mask, rows, memory_keys_values, memory_mask) -> torch.Tensor:
        """One more position of many slots at once, with cached keys and values.

        Args:
            hidden_states: `[slots, hidden_size]`, from [`embed`].
            self_cache: for each layer the keys and values of what each slot sees before this position, two of
                `[slots, heads, seen, width / heads]`, or `None` at the start. Extended in place.
            self_mask: boolean `[slots, seen + 1]`, or `None` if all of it is visible.
            rows: which example each slot belongs to.
            memory_keys_values: from [`memory_keys_values`].
            memory_mask: `[batch, memory length]`, boolean.

        Returns:
            `[slots, hidden_size]`.
        """
        if self_mask is not None:
            self_mask = self_mask[:, None, None, :]
        hidden_states = hidden_states[:, None]
        for index, (layer, (memory_key, memory_value)) in enumerate(zip(self.layers, memory_keys_values)):
            normed = layer.self_norm(hidden_states)
            key, value = layer.self_attention.keys_values(normed)
            if self_cache[index] is not None:
                key = torch.cat([self_cache[index][0], key], dim=2)
                value = torch.cat([self_cache[index][1], value], dim=2)
            self_cache[index] = (key, value)
            attended, _ = layer.self_attention.attend(layer.self_attention.queries(normed), key, value, self_mask)
            hidden_states = hidden_states + attended

            queries = layer.cross_attention.queries(rows.by_example(layer.cross_norm(hidden_states)[:, 0]))
            attended, _ = layer.cross_attention.attend(
                queries, memory_key, memory_value, memory_mask[:, None, None, :]
            )
            hidden_states = hidden_states + rows.by_slot(attended)[:, None]
            hidden_states = hidden_states + layer.feed_forward(layer.feed_forward_norm(hidden_states))
        return self.norm(hidden_states)[:, 0]


def choose_empty_slots(
    empty: torch.Tensor, share: float, seeds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A share of each example's empty slots, one at least, that stand for all of them.

    Args:
        empty: `[batch, num_prompts]`, which slots are; share: of them; seeds: see [`seeded_uniform`].

    Returns:
        Those chosen, boolean `[batch, num_prompts]`, and how many each stands for, `[batch]`.
    """
    if share >= 1:
        return empty, torch.ones(len(empty), device=empty.device)
    count = empty.sum(dim=1)
    chosen = (count * share).round().clamp(min=1).minimum(count)
    draws = seeded_uniform("empty slots", tuple(empty.shape), seeds, empty.device)
    rank = draws.masked_fill(~empty, 2.0).argsort(dim=1).argsort(dim=1)
    return empty & (rank < chosen[:, None]), count / chosen.clamp(min=1)
