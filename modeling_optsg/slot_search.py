"""Search inside slots: generates one or more tags for each of many slots."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessorList

from .score_bound import ScoreBound
from .tag_decoder import SlotRows, TagDecoder

# Tokens of a block, of which only the largest score is compared first.
BLOCK = 64


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
        bound: Drops hypotheses that cannot reach the threshold; `None` to keep all.
    """

    processors: LogitsProcessorList
    pad_bias: float
    num_hypotheses: int
    do_sample: bool
    length_penalty: float
    min_log_probability: float
    keep_context: bool
    bound: ScoreBound | None = None


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
    """The hypotheses of all slots, `[slots, hypotheses]` each. Their tokens are `[slots, hypotheses, max tokens]`.

    `log_probs` are the model's own, -inf for a hypothesis that is not a tag; `ranking` is the same under the processed
    scores, which beams are ranked by. `finished` says that [SEP] was generated, or that it is not a tag.
    The keys and values of a hypothesis are row `cache_row` of the cache of step `cache_step`.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    ranking: torch.Tensor
    finished: torch.Tensor
    lengths: torch.Tensor
    cache_row: torch.Tensor
    cache_step: torch.Tensor

    def unfinished(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slot and column of each hypothesis that is not finished."""
        return (~self.finished).nonzero(as_tuple=True)

    def drop(self, where: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """Mark some hypotheses as not a tag."""
        self.log_probs[where] = -torch.inf
        # A dropped beam must not rank before others, which would then be returned in its place.
        self.ranking[where] = -torch.inf
        self.finished[where] = True


@dataclass
class _NextTokens:
    """Scores of the next token of some hypotheses.

    Args:
        logits: `[rows, vocabulary]`, the model's own, -inf for tokens that are impossible here.
        normalizer: `[rows]`. The log-probability of a token is its logit minus this.
        scores: `[rows, vocabulary]`, processed logits, by which tokens are chosen. The same tensor as `logits` without
            processors.
        score_normalizer: `[rows]`, -inf where no token is possible.
        pad_scores: `[rows]`, the processed logits of [PAD] as the first token.
    """

    logits: torch.Tensor
    normalizer: torch.Tensor
    scores: torch.Tensor
    score_normalizer: torch.Tensor
    pad_scores: torch.Tensor | None = None

    def look_up(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of tokens `[rows, n]`: those that rank hypotheses, and the model's own."""
        ranking = self.scores.gather(1, tokens) - self.score_normalizer[:, None]
        return (
            ranking.masked_fill(self.score_normalizer.isneginf()[:, None], -torch.inf),
            self.logits.gather(1, tokens) - self.normalizer[:, None],
        )


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
        self.use_beams = not settings.do_sample and self.width > 1

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
        pad_bias = self.settings.pad_bias if pad_bias is None else pad_bias
        hypotheses, cache, pad_margins = self._start(prompts, examples, context, pad_bias)
        caches = [cache]
        extend = self._extend_beams if self.use_beams else self._extend_each
        for length in range(1, self.max_tokens + 1):
            slots, columns = hypotheses.unfinished()
            if self.settings.bound is not None and len(slots):
                slots, columns = self._drop_hopeless(hypotheses, slots, columns, examples, length)
            if not len(slots):
                break
            # Only these are decoded, and only their keys and values are copied.
            cache = select_rows(caches[-1], hypotheses.cache_row[slots, columns])
            tokens = hypotheses.tokens[slots, columns, :length]
            logits = self._decode(prompts[slots], examples[slots], tokens, cache, context)
            extend(hypotheses, slots, columns, self._score(logits, tokens), length)
            caches = [*caches, cache] if self.settings.keep_context else [cache]
        tokens = hypotheses.tokens.masked_fill(hypotheses.log_probs.isneginf()[..., None], self.pad)
        max_length = max(int((tokens != self.pad).sum(dim=-1).max()), 1) if tokens.numel() else 1
        found = SlotCandidates(tokens[..., :max_length], hypotheses.log_probs, pad_margins)
        if self.settings.keep_context:
            found.context = self._keep_context(hypotheses, caches, context)
        return found

    def _decode(
        self,
        prompts: torch.Tensor,
        examples: torch.Tensor,
        tokens: torch.Tensor,
        cache: DynamicCache,
        context: SlotContext | None,
    ) -> torch.Tensor:
        """Decode the last of `tokens` `[rows, length]`, or the prompt if there are none, and extend `cache` by it."""
        length, mask = tokens.shape[1], None
        if context is not None:
            mask = torch.cat([context.mask[examples], context.mask.new_ones(len(examples), length + 1)], dim=1)
        last = tokens[:, -1] if length else torch.zeros_like(examples)
        embedded = self.decoder.embed(prompts, torch.full_like(examples, length), last)
        rows = SlotRows(examples, len(self.memory_mask))
        hidden_states = self.decoder.step(embedded, cache, mask, rows, self.memory_cache, self.memory_mask)
        return self.lm_head(hidden_states).float()

    def _score(
        self, logits: torch.Tensor, tokens: torch.Tensor, pad_scores: torch.Tensor | None = None
    ) -> _NextTokens:
        """Process the logits `[rows, vocabulary]` after `tokens` `[rows, length]`, and overwrite them.

        Args:
            pad_scores: `[rows]`, logits of [PAD] for the first token. A later token is never [PAD].
        """
        # A tag has at least one token.
        impossible = [self.pad] if pad_scores is None else [self.pad, self.sep]
        removed = logits[:, impossible]
        logits[:, impossible] = -torch.inf
        score_normalizer = _log_normalizer(logits)
        normalizer = torch.cat([removed, score_normalizer[:, None]], dim=1).logsumexp(dim=-1)
        scores = logits
        if tokens.shape[1] == self.max_tokens:
            score_normalizer = logits[:, self.sep].clone()
            scores = torch.full_like(logits, -torch.inf)
            scores[:, self.sep] = score_normalizer
        elif self.settings.processors:
            scores = logits.clone()
            if pad_scores is not None:
                scores[:, self.pad] = pad_scores
            scores = self.settings.processors(tokens, scores)
            if pad_scores is not None:
                pad_scores = scores[:, self.pad].clone()
                scores[:, self.pad] = -torch.inf
            score_normalizer = _log_normalizer(scores)
        return _NextTokens(logits, normalizer, scores, score_normalizer, pad_scores)

    def _start(
        self, prompts: torch.Tensor, examples: torch.Tensor, context: SlotContext | None, pad_bias: float
    ) -> tuple[_Hypotheses, DynamicCache, torch.Tensor]:
        """Decode the prompts and choose the first tokens. Slots in which [PAD] wins are finished."""
        cache = DynamicCache() if context is None else select_rows(context.cache, examples)
        no_tokens = examples.new_empty(len(examples), 0)
        logits = self._decode(prompts, examples, no_tokens, cache, context)
        pad_logits = logits[:, self.pad].clone()
        next_tokens = self._score(logits, no_tokens, pad_logits + pad_bias)
        if self.settings.do_sample:
            # Where processors forbid even [PAD], nothing can be generated.
            nothing = next_tokens.score_normalizer.isneginf() & next_tokens.pad_scores.isneginf()
            pad_scores = next_tokens.pad_scores.masked_fill(nothing, 0.0)
            scores = next_tokens.scores.index_copy(1, examples.new_tensor([self.pad]), pad_scores[:, None])
            tokens = torch.multinomial(scores.softmax(dim=-1), self.width, replacement=True)
            is_tag = tokens != self.pad
        else:
            values, tokens = _largest(next_tokens.scores, self.width)
            is_tag = (values[:, :1] > next_tokens.pad_scores[:, None]) & ~values.isneginf()
        ranking, log_probs = next_tokens.look_up(tokens)
        if self.settings.do_sample:
            ranking = torch.zeros_like(ranking)
        hypotheses = _Hypotheses(
            tokens=torch.full((*tokens.shape, self.max_tokens), self.pad, device=tokens.device),
            log_probs=log_probs,
            ranking=ranking,
            finished=torch.zeros_like(is_tag),
            lengths=torch.ones_like(tokens),
            cache_row=torch.arange(len(tokens), device=tokens.device)[:, None].repeat(1, self.width),
            cache_step=torch.zeros_like(tokens),
        )
        hypotheses.tokens[..., 0] = tokens
        hypotheses.drop(~is_tag if self.settings.do_sample else ~is_tag | self._is_too_unlikely(log_probs))
        return hypotheses, cache, logits.amax(dim=-1) - pad_logits

    def _drop_hopeless(
        self,
        hypotheses: _Hypotheses,
        slots: torch.Tensor,
        columns: torch.Tensor,
        examples: torch.Tensor,
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop unfinished hypotheses whose tags cannot reach the threshold, and return slot and column of the rest."""
        tokens, log_probs = hypotheses.tokens[slots, columns, :length], hypotheses.log_probs[slots, columns]
        kept = self.settings.bound.can_reach(examples[slots], tokens, log_probs)
        # They keep their ranking and so their places in the beam, so that the others are those of the exact search.
        hypotheses.log_probs[slots[~kept], columns[~kept]] = -torch.inf
        hypotheses.finished[slots[~kept], columns[~kept]] = True
        return slots[kept], columns[kept]

    def _extend_each(
        self,
        hypotheses: _Hypotheses,
        slots: torch.Tensor,
        columns: torch.Tensor,
        next_tokens: _NextTokens,
        length: int,
    ) -> None:
        """Continue each unfinished hypothesis by itself: greedy search or sampling."""
        stuck = next_tokens.score_normalizer.isneginf()
        if self.settings.do_sample:
            # What stuck hypotheses choose is not read, but there must be something to choose.
            scores = next_tokens.scores.masked_fill(stuck[:, None], 0.0)
            chosen = torch.multinomial(scores.softmax(dim=-1), 1)
        else:
            chosen = next_tokens.scores.argmax(dim=-1, keepdim=True)
        log_probs, chosen = next_tokens.look_up(chosen)[1][:, 0], chosen[:, 0]
        where, rows = (slots, columns), torch.arange(len(slots), device=slots.device)
        finished = stuck | (chosen == self.sep)
        hypotheses.log_probs[where] += log_probs
        hypotheses.finished[where] = finished
        hypotheses.lengths[where] += ~finished
        hypotheses.cache_row[where], hypotheses.cache_step[where] = rows, length
        if length < self.max_tokens:
            hypotheses.tokens[slots, columns, length] = chosen.masked_fill(finished, self.pad)
        hypotheses.drop((slots[stuck], columns[stuck]))

    def _extend_beams(
        self,
        hypotheses: _Hypotheses,
        slots: torch.Tensor,
        columns: torch.Tensor,
        next_tokens: _NextTokens,
        length: int,
    ) -> None:
        """Choose the best continuations among all beams of each slot that has unfinished ones.

        The candidates of a beam are its best tokens other than [SEP], and [SEP], which adds no length. A finished beam
        has one candidate, itself, under [SEP].
        """
        sep = torch.full_like(slots, self.sep)[:, None]
        ended = next_tokens.look_up(sep)
        next_tokens.scores[:, self.sep] = -torch.inf
        _, tokens = _largest(next_tokens.scores, self.width)
        following = next_tokens.look_up(tokens)
        ranking, log_probs = (torch.cat(parts, dim=1) for parts in zip(following, ended, strict=True))
        ranking = ranking + hypotheses.ranking[slots, columns][:, None]

        open_slots, place = slots.unique_consecutive(return_inverse=True)
        own = {name: value[open_slots] for name, value in vars(hypotheses).items()}
        cells, number = place * self.width + columns, ranking.shape[1]
        all_ranking = ranking.new_full((own["ranking"].numel(), number), -torch.inf)
        all_ranking[:, -1] = own["ranking"].masked_fill(~own["finished"], -torch.inf).flatten()
        all_ranking[cells] = ranking
        all_tokens = tokens.new_full(all_ranking.shape, self.sep).index_copy_(0, cells, torch.cat([tokens, sep], 1))
        all_log_probs = torch.zeros_like(all_ranking).index_copy_(0, cells, log_probs)
        penalised = all_ranking
        if self.settings.length_penalty:
            lengths = (own["lengths"].view(-1, 1) + 1).repeat(1, number)
            lengths[:, -1] -= 1
            penalised = all_ranking / lengths**self.settings.length_penalty
        best = penalised.view(len(open_slots), -1).topk(self.width, dim=-1).indices
        parents = best // number
        ranking, chosen, log_probs = (
            values.view(len(open_slots), -1).gather(1, best) for values in (all_ranking, all_tokens, all_log_probs)
        )
        new = {name: value.gather(1, parents) for name, value in own.items() if name != "tokens"}
        rows = torch.zeros_like(all_tokens[:, 0]).index_copy_(0, cells, torch.arange(len(cells), device=cells.device))
        parent_rows = rows.view(len(open_slots), -1).gather(1, parents)
        new["cache_row"] = torch.where(new["finished"], new["cache_row"], parent_rows)
        new["cache_step"] = new["cache_step"].masked_fill(~new["finished"], length)
        new["ranking"] = ranking
        new["log_probs"] += log_probs
        new["finished"] |= chosen == self.sep
        new["lengths"] += ~new["finished"]
        new["tokens"] = own["tokens"].gather(1, parents[..., None].expand(-1, -1, self.max_tokens))
        if length < self.max_tokens:
            new["tokens"][..., length] = chosen.masked_fill(new["finished"], self.pad)
        beams = _Hypotheses(**new)
        # Stuck, or taken into a beam for want of possible continuations.
        beams.drop(ranking.isneginf() | self._is_too_unlikely(beams.log_probs))
        for name, value in vars(beams).items():
            getattr(hypotheses, name)[open_slots] = value

    def _is_too_unlikely(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Return which hypotheses of `[slots, hypotheses]` fall below `min_log_probability`; never the first."""
        is_lower_beam = torch.arange(log_probs.shape[1], device=log_probs.device) > 0
        is_unlikely = (log_probs < self.settings.min_log_probability) & ~log_probs.isneginf()
        return is_lower_beam & is_unlikely

    def _keep_context(
        self, hypotheses: _Hypotheses, caches: list[DynamicCache], context: SlotContext | None
    ) -> SlotContext:
        """Return the context of the first hypothesis of each slot, which is the best beam."""
        # The current slot begins where the context of earlier slots ends.
        start = 0 if context is None else context.mask.shape[1]
        kept = SlotContext.empty_like(caches[0], len(hypotheses.lengths), self.max_tokens + 1)
        lengths = hypotheses.lengths[:, 0].masked_fill(hypotheses.log_probs[:, 0].isneginf(), 0)
        for step, cache in enumerate(caches):
            slots = (hypotheses.cache_step[:, 0] == step).nonzero()[:, 0]
            if len(slots):
                rows = select_rows(cache, hypotheses.cache_row[slots, 0])
                kept.store(slots, lengths[slots], rows, start)
        kept.trim()
        return kept


def _log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    """Compute `logits.logsumexp(dim=-1)` of `[rows, vocabulary]`. On a CPU `log_softmax` is faster, and more exact."""
    largest = logits.amax(dim=-1)
    return torch.where(largest.isneginf(), largest, largest - logits.log_softmax(dim=-1).amax(dim=-1))


def _largest(scores: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `scores.topk(number, dim=-1)` of `[rows, vocabulary]`, by way of the maxima of blocks.

    `topk` handles one number after the other, while maxima are vectorised.
    """
    number, blocks = min(number, scores.shape[1]), scores.shape[1] // BLOCK
    if blocks <= number:
        return scores.topk(number, dim=-1)
    inside = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best = inside.amax(dim=-1).topk(number, dim=-1, sorted=False).indices
    tokens = (best[..., None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, scores.shape[1], device=scores.device)
    tokens = torch.cat([tokens, rest.expand(len(scores), -1)], dim=1)
    values, index = scores.gather(1, tokens).topk(number, dim=-1)
    return values, tokens.gather(1, index)
