"""Search inside slots: generates one or more tags for each of many slots."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessorList

from .tag_decoder import SlotRows, TagDecoder


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """Return a new cache with the given rows of `cache`, which stays as it was."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


class SlotContext:
    """Keys and values of generated slots, which later slots see in sequential decoding.

    Args:
        cache: Keys and values `[rows, heads, length, head size]` per layer; a row is a slot or an example.
        mask: Boolean `[rows, length]`, true where something was generated.
    """

    def __init__(self, cache: DynamicCache, mask: torch.Tensor):
        self.cache = cache
        self.mask = mask

    @classmethod
    def empty_like(cls, cache: DynamicCache, rows: int, length: int) -> "SlotContext":
        """Make a context with space for `length` positions per row."""
        context = cls(DynamicCache(), torch.zeros(rows, length, dtype=torch.bool, device=cache.layers[0].keys.device))
        for index, layer in enumerate(cache.layers):
            shape = (rows, layer.keys.shape[1], length, layer.keys.shape[3])
            context.cache.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), index)
        return context

    def store(self, rows: torch.Tensor, lengths: torch.Tensor, cache: DynamicCache, start: int) -> None:
        """Store a prompt and its first `lengths` tokens.

        Args:
            rows: Rows to write.
            lengths: Tokens of each row's tag.
            cache: Keys and values of these rows.
            start: First position of `cache` to store; earlier ones belong to earlier slots.
        """
        for own, new in zip(self.cache.layers, cache.layers, strict=True):
            length = new.keys.shape[2] - start
            own.keys[rows, :, :length] = new.keys[:, :, start:]
            own.values[rows, :, :length] = new.values[:, :, start:]
        positions = torch.arange(self.mask.shape[1], device=self.mask.device)
        self.mask[rows] = positions <= lengths[:, None]

    def trim(self) -> None:
        """Remove positions at the end that no row uses."""
        unused = self.mask.shape[1] - int(self.mask.sum(dim=1).max())
        self.cache.crop(-unused)
        self.mask = self.mask[:, : self.mask.shape[1] - unused]

    def scatter(self, rows: torch.Tensor, num_rows: int) -> "SlotContext":
        """Move the context's rows to `rows` among `num_rows`; nothing was generated in the other rows."""
        scattered = SlotContext(DynamicCache(), self.mask.new_zeros(num_rows, self.mask.shape[1]))
        scattered.mask[rows] = self.mask
        for index, layer in enumerate(self.cache.layers):
            key, value = (
                states.new_zeros(num_rows, *states.shape[1:]).index_copy_(0, rows, states)
                for states in (layer.keys, layer.values)
            )
            scattered.cache.update(key, value, index)
        return scattered

    def append(self, other: "SlotContext") -> None:
        """Append the next slot of the same rows."""
        for index, layer in enumerate(other.cache.layers):
            self.cache.update(layer.keys, layer.values, index)
        self.mask = torch.cat([self.mask, other.mask], dim=1)


@dataclass(frozen=True)
class SlotSearchSettings:
    """Settings of one `generate` call that every slot shares.

    Args:
        processors: Logits processors; they see a slot's own tokens.
        pad_bias: Added to the logit of [PAD].
        num_hypotheses: Beams or samples per slot.
        do_sample: Sample instead of searching.
        length_penalty: Exponent of the length that beams are divided by.
        min_log_probability: A beam after the first is dropped once its log-probability falls below this.
        keep_context: Return the [`SlotContext`] of the best hypotheses.
    """

    processors: LogitsProcessorList
    pad_bias: float
    num_hypotheses: int
    do_sample: bool
    length_penalty: float
    min_log_probability: float
    keep_context: bool


@dataclass
class SlotCandidates:
    """What the slots generated.

    Args:
        tokens: `[slots, hypotheses, max length]`, padded with [PAD].
        log_probs: `[slots, hypotheses]`, the model's own log-probabilities, -inf where nothing was generated.
        pad_margins: `[slots]`, the best first token's logit minus that of [PAD].
        context: Context of the best hypotheses, if it was asked for.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    pad_margins: torch.Tensor
    context: SlotContext | None = None


@dataclass
class _Hypotheses:
    """Hypotheses of the slots that are not done, `[slots * hypotheses, ...]` each.

    `log_probs` are the model's own; `ranking` is the same under the processed scores, which beams are ranked by. Both
    are -inf for a hypothesis that is not a tag. `finished` says that [SEP] was generated, or that it is not a tag.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    ranking: torch.Tensor
    finished: torch.Tensor
    lengths: torch.Tensor
    cache: DynamicCache

    def select(self, slots: torch.Tensor, rows: torch.Tensor) -> "_Hypotheses":
        names = ("tokens", "log_probs", "ranking", "finished", "lengths")
        selected = {name: getattr(self, name)[rows] for name in names}
        return _Hypotheses(slots=self.slots[slots], cache=select_rows(self.cache, rows), **selected)


@dataclass
class _Choice:
    """The next token of every hypothesis, and which hypothesis it continues."""

    parents: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    ranking: torch.Tensor


class SlotSearch:
    """Generates the tags of slots with greedy search, beam search or sampling inside each slot.

    Args:
        decoder: The tag decoder.
        lm_head: The output layer over the tag vocabulary.
        settings: What to search for.
        memory: `[batch, memory length, hidden_size]`.
        memory_mask: Boolean `[batch, memory length]`.
    """

    def __init__(
        self,
        decoder: TagDecoder,
        lm_head: nn.Module,
        settings: SlotSearchSettings,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
    ):
        self.decoder, self.lm_head, self.settings = decoder, lm_head, settings
        self.memory_cache, self.memory_mask = decoder.cache_memory(memory), memory_mask
        self.pad, self.sep = decoder.config.tag_pad_token_id, decoder.config.tag_sep_token_id
        self.max_tokens = decoder.config.max_tag_tokens
        self.width = settings.num_hypotheses

    def run(
        self,
        prompts: torch.Tensor,
        examples: torch.Tensor,
        context: SlotContext | None = None,
        pad_bias: float | None = None,
    ) -> SlotCandidates:
        """Generate the tag of each slot.

        Args:
            prompts: `[slots, hidden_size]`.
            examples: `[slots]`, ascending, the example of each slot.
            context: What earlier slots generated, one row per example.
            pad_bias: Used instead of the settings'.
        """
        device = prompts.device
        found = SlotCandidates(
            tokens=torch.full((len(prompts), self.width, self.max_tokens), self.pad, device=device),
            log_probs=torch.full((len(prompts), self.width), -torch.inf, device=device),
            pad_margins=torch.empty(0, device=device),
        )
        pad_bias = self.settings.pad_bias if pad_bias is None else pad_bias
        hypotheses = self._start(prompts, examples, context, pad_bias, found)
        for length in range(1, self.max_tokens + 1):
            if len(hypotheses.slots) == 0:
                break
            hypotheses = self._extend(hypotheses, length, prompts, examples, context)
            hypotheses = self._collect_done(hypotheses, found, context)
        max_length = max(int((found.tokens != self.pad).sum(dim=-1).max()), 1) if found.tokens.numel() else 1
        found.tokens = found.tokens[..., :max_length]
        if found.context is not None:
            found.context.trim()
        return found

    def _start(
        self,
        prompts: torch.Tensor,
        examples: torch.Tensor,
        context: SlotContext | None,
        pad_bias: float,
        found: SlotCandidates,
    ) -> _Hypotheses:
        """Decode the prompts and choose the first tokens. Slots in which [PAD] wins are done."""
        zeros = torch.zeros_like(examples)
        cache = DynamicCache() if context is None else select_rows(context.cache, examples)
        mask = self._cache_mask(context, examples, 1)
        rows = SlotRows(examples, len(self.memory_mask))
        embedded = self.decoder.embed(prompts, zeros, zeros)
        hidden_states = self.decoder.step(embedded, cache, mask, rows, self.memory_cache, self.memory_mask)
        logits = self.lm_head(hidden_states).float()
        model_log_probs = logits.log_softmax(dim=-1)
        scores, found.pad_margins = self._first_scores(logits, pad_bias)
        if self.settings.keep_context:
            found.context = SlotContext.empty_like(cache, len(prompts), self.max_tokens + 1)
            found.context.store(
                torch.arange(len(prompts), device=prompts.device), zeros, cache, self._start_of(context)
            )

        if self.settings.do_sample:
            first = torch.multinomial(scores.softmax(dim=-1), self.width, replacement=True)
            ranking = torch.zeros(first.shape, device=prompts.device)
            alive = (first != self.pad).any(dim=1)
        else:
            alive = scores.argmax(dim=-1) != self.pad
            scores[:, self.pad] = -torch.inf
            ranking, first = scores.log_softmax(dim=-1).topk(self.width, dim=-1)
        first, ranking = first[alive], ranking[alive].flatten()
        log_probs = model_log_probs[alive].gather(1, first).flatten()
        not_a_tag = (first.flatten() == self.pad) | ranking.isneginf()
        if not self.settings.do_sample:
            not_a_tag |= self._is_too_unlikely(log_probs)
        slots = alive.nonzero().flatten()
        return _Hypotheses(
            slots=slots,
            tokens=first.reshape(-1, 1),
            log_probs=log_probs.masked_fill(not_a_tag, -torch.inf),
            ranking=ranking.masked_fill(not_a_tag, -torch.inf),
            finished=not_a_tag,
            lengths=torch.ones_like(first.flatten()),
            cache=select_rows(cache, slots.repeat_interleave(self.width)),
        )

    def _first_scores(self, logits: torch.Tensor, pad_bias: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply `pad_bias` and the processors to the first tokens' logits, and compute the margins over [PAD]."""
        logits[:, self.sep] = -torch.inf
        pad_logits = logits[:, self.pad].clone()
        logits[:, self.pad] = -torch.inf
        pad_margins = logits.amax(dim=-1) - pad_logits
        logits[:, self.pad] = pad_logits + pad_bias
        scores = self.settings.processors(logits.new_empty(len(logits), 0, dtype=torch.long), logits)
        # Where processors forbid even [PAD], nothing can be generated.
        scores[:, self.pad] = scores[:, self.pad].masked_fill(scores.isneginf().all(dim=-1), 0.0)
        return scores, pad_margins

    def _extend(
        self,
        hypotheses: _Hypotheses,
        length: int,
        prompts: torch.Tensor,
        examples: torch.Tensor,
        context: SlotContext | None,
    ) -> _Hypotheses:
        """Decode one more token of every hypothesis that is not finished."""
        active = (~hypotheses.finished).nonzero().flatten()
        slots = hypotheses.slots.repeat_interleave(self.width)[active]
        cache = select_rows(hypotheses.cache, active)
        embedded = self.decoder.embed(prompts[slots], torch.full_like(slots, length), hypotheses.tokens[active, -1])
        hidden_states = self.decoder.step(
            embedded,
            cache,
            self._cache_mask(context, examples[slots], length + 1),
            SlotRows(examples[slots], len(self.memory_mask)),
            self.memory_cache,
            self.memory_mask,
        )
        _append_last_position(hypotheses.cache, cache, active, len(hypotheses.finished))
        logits = self.lm_head(hidden_states).float()
        model_log_probs = logits.log_softmax(dim=-1)
        logits[:, self.pad] = -torch.inf
        if length == self.max_tokens:
            sep_logits = logits[:, self.sep].clone()
            scores = logits.fill_(-torch.inf)
            scores[:, self.sep] = sep_logits
        else:
            scores = self.settings.processors(hypotheses.tokens[active], logits)
        return self._choose(hypotheses, active, scores, model_log_probs)

    def _choose(
        self, hypotheses: _Hypotheses, active: torch.Tensor, scores: torch.Tensor, model_log_probs: torch.Tensor
    ) -> _Hypotheses:
        """Append the next tokens.

        Args:
            hypotheses: All hypotheses.
            active: `[active]`, indices of those that are not finished.
            scores: `[active, vocabulary]`, processed logits.
            model_log_probs: `[active, vocabulary]`.
        """
        stuck = scores.isneginf().all(dim=-1)
        # What stuck hypotheses choose is not read, but there must be something to choose.
        scores = scores.masked_fill(stuck[:, None], 0.0)
        use_beams = not self.settings.do_sample and self.width > 1
        continue_ = self._continue_beams if use_beams else self._continue_single
        choice = continue_(hypotheses, active, scores, model_log_probs, stuck)
        was_finished = hypotheses.finished[choice.parents]
        log_probs = hypotheses.log_probs[choice.parents] + torch.where(was_finished, 0.0, choice.log_probs)
        # Stuck, or taken into a beam for want of possible continuations.
        impossible, ranking = choice.ranking.isneginf(), choice.ranking
        if use_beams:
            impossible |= self._is_too_unlikely(log_probs)
            # A dropped beam must not rank before others, which would then be returned in its place.
            ranking = ranking.masked_fill(impossible, -torch.inf)
        finished = was_finished | impossible | (choice.tokens == self.sep)
        tokens = choice.tokens.masked_fill(finished, self.pad)[:, None]
        return _Hypotheses(
            slots=hypotheses.slots,
            tokens=torch.cat([hypotheses.tokens[choice.parents], tokens], dim=1),
            log_probs=log_probs.masked_fill(impossible, -torch.inf),
            ranking=ranking,
            finished=finished,
            lengths=hypotheses.lengths[choice.parents] + (~finished).long(),
            cache=select_rows(hypotheses.cache, choice.parents),
        )

    def _continue_single(
        self,
        hypotheses: _Hypotheses,
        active: torch.Tensor,
        scores: torch.Tensor,
        model_log_probs: torch.Tensor,
        stuck: torch.Tensor,
    ) -> _Choice:
        """Continue each hypothesis by itself: greedy search or sampling."""
        if self.settings.do_sample:
            chosen = torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]
        else:
            chosen = scores.argmax(dim=-1)
        log_probs = torch.zeros_like(hypotheses.log_probs)
        log_probs[active] = model_log_probs.gather(1, chosen[:, None])[:, 0]
        return _Choice(
            parents=torch.arange(len(hypotheses.finished), device=scores.device),
            tokens=torch.full_like(hypotheses.lengths, self.sep).index_copy_(0, active, chosen),
            log_probs=log_probs,
            ranking=hypotheses.ranking.index_fill(0, active[stuck], -torch.inf),
        )

    def _continue_beams(
        self,
        hypotheses: _Hypotheses,
        active: torch.Tensor,
        scores: torch.Tensor,
        model_log_probs: torch.Tensor,
        stuck: torch.Tensor,
    ) -> _Choice:
        """Choose the best continuations among all beams of each slot.

        The candidates of a beam are its best tokens other than [SEP], and [SEP], which adds no length. A finished beam
        has one candidate, itself, under [SEP].
        """
        num_slots, width = len(hypotheses.slots), self.width
        following = scores.log_softmax(dim=-1)
        ended = following[:, self.sep].clone()
        following[:, self.sep] = -torch.inf
        following, tokens = following.topk(min(width, following.shape[1]), dim=-1)
        following = torch.cat([following, ended[:, None]], dim=-1)
        following = (hypotheses.ranking[active, None] + following).masked_fill(stuck[:, None], -torch.inf)
        num_candidates = following.shape[1]
        ranking = following.new_full((num_slots * width, num_candidates), -torch.inf)
        ranking[:, -1] = hypotheses.ranking.masked_fill(~hypotheses.finished, -torch.inf)
        ranking[active] = following
        candidates = tokens.new_full((num_slots * width, num_candidates), self.sep)
        candidates[active, :-1] = tokens
        log_probs = ranking.new_zeros(ranking.shape)
        log_probs[active] = model_log_probs.gather(1, candidates[active])
        lengths = (hypotheses.lengths[:, None] + 1).repeat(1, num_candidates)
        lengths[:, -1] -= 1
        best = (ranking / lengths**self.settings.length_penalty).view(num_slots, -1).topk(width, dim=-1).indices
        first_row = torch.arange(num_slots, device=scores.device)[:, None] * width
        parents, index = (first_row + best // num_candidates).flatten(), (best % num_candidates).flatten()
        return _Choice(parents, candidates[parents, index], log_probs[parents, index], ranking[parents, index])

    def _is_too_unlikely(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Return which hypotheses fall below `min_log_probability`; never the first of a slot."""
        is_lower_beam = torch.arange(len(log_probs), device=log_probs.device) % self.width > 0
        return is_lower_beam & (log_probs < self.settings.min_log_probability)

    def _collect_done(
        self, hypotheses: _Hypotheses, found: SlotCandidates, context: SlotContext | None
    ) -> _Hypotheses:
        """Move slots whose hypotheses are all finished to `found`, and return the others."""
        done = hypotheses.finished.view(-1, self.width).all(dim=1)
        if not done.any():
            return hypotheses
        slots, rows = hypotheses.slots[done], done.repeat_interleave(self.width)
        tokens = hypotheses.tokens[rows].view(len(slots), self.width, -1)[..., : self.max_tokens]
        log_probs = hypotheses.log_probs[rows].view(len(slots), self.width)
        found.tokens[slots, :, : tokens.shape[-1]] = tokens.masked_fill(log_probs.isneginf()[..., None], self.pad)
        found.log_probs[slots] = log_probs
        if found.context is not None:
            # Later slots see the first hypothesis of a slot, which is the best beam.
            best = done.nonzero().flatten() * self.width
            lengths = torch.where(hypotheses.log_probs[best].isneginf(), 0, hypotheses.lengths[best])
            found.context.store(slots, lengths, select_rows(hypotheses.cache, best), self._start_of(context))
        return hypotheses.select(~done, ~rows)

    @staticmethod
    def _start_of(context: SlotContext | None) -> int:
        """Return the first position of the current slot in the cache."""
        return 0 if context is None else context.mask.shape[1]

    @staticmethod
    def _cache_mask(context: SlotContext | None, examples: torch.Tensor, own_length: int) -> torch.Tensor | None:
        if context is None:
            return None
        return torch.cat([context.mask[examples], context.mask.new_ones(len(examples), own_length)], dim=1)


def _append_last_position(cache: DynamicCache, longer: DynamicCache, rows: torch.Tensor, num_rows: int) -> None:
    """Append the last position of `longer`, which has only some rows of `cache`; the other rows get zeros."""
    for index, layer in enumerate(longer.layers):
        last = (states[:, :, -1:] for states in (layer.keys, layer.values))
        key, value = (states.new_zeros(num_rows, *states.shape[1:]).index_copy_(0, rows, states) for states in last)
        cache.update(key, value, index)
