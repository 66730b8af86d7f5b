"""Order-prompted `generate`: every prompt's tag, written slot after slot or all slots at once."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from .tag_decoder import SlotRows

DECODINGS = ("parallel", "sequential")

# What of `GenerationConfig` means something where every slot writes one tag; the rest would be ignored silently.
SEARCH_SETTINGS = (
    "num_beams length_penalty num_return_sequences do_sample temperature top_k top_p top_h min_p typical_p "
    "epsilon_cutoff eta_cutoff min_length min_new_tokens exponential_decay_length_penalty repetition_penalty "
    "no_repeat_ngram_size bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens renormalize_logits "
    "remove_invalid_values"
).split()


@dataclass
class OPTSGGenerateOutput(ModelOutput):
    """
    Args:
        sequences: `[batch, most tags of an item, longest tag]`, tag tokens without [SEP], filled up with
            `tag_pad_token_id`; an item's tags by falling probability.
        tag_scores: `[batch, most tags of an item]`, each tag's probability, 0 where there is none.
        slots: `[batch, most tags of an item]`, the prompt that wrote the tag, -1 where there is none.
        pad_margins: `[batch, num_prompts]`, in each slot the logit of the best first token less that of [PAD]: with
            greedy search or beams the slot is written where this exceeds `pad_bias`.
        slot_tokens, slot_log_probs: with `output_slots`, what every slot proposes before `threshold` and `max_tags`:
            `[batch, num_prompts, alternatives, longest tag]` and `[batch, num_prompts, alternatives]`, -inf where it
            proposes nothing.
        prompt_attentions: with eager attention, one `[batch, heads, num_prompts, memory length]` a prompt layer.
    """

    sequences: torch.Tensor | None = None
    tag_scores: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    pad_margins: torch.Tensor | None = None
    slot_tokens: torch.Tensor | None = None
    slot_log_probs: torch.Tensor | None = None
    prompt_attentions: tuple[torch.Tensor, ...] | None = None

    def at_pad_bias(self, pad_bias: float, pad_token_id: int, max_tags: int | None = None) -> "OPTSGGenerateOutput":
        """What `generate` would have returned with this `pad_bias`, at least the one it was called with, and a
        `threshold` of 0, where slots do not see one another: a slot is then written or not, and the same if written.
        Needs `output_slots`."""
        dropped = (self.pad_margins <= pad_bias)[..., None]
        sequences, tag_scores, slots = collect_tags(
            self.slot_tokens, self.slot_log_probs.masked_fill(dropped, -torch.inf), 0.0, max_tags, pad_token_id
        )
        return OPTSGGenerateOutput(
            sequences=sequences, tag_scores=tag_scores, slots=slots, pad_margins=self.pad_margins
        )


class TagVocabularyLogitsProcessor(LogitsProcessor):
    """Lets a slot write only tags of a given vocabulary (a prefix tree over their tokens), or [PAD].

    Args:
        tags: token ids of each allowed tag, without [SEP]; [PAD] at the end is filler.
        pad_token_id, sep_token_id: ids of [PAD] and [SEP].

    Raises:
        ValueError: there are no tags, or one is empty or not made of token ids.
    """

    def __init__(self, tags: Iterable[Sequence[int]], pad_token_id: int, sep_token_id: int):
        following = defaultdict(set)
        following[()].add(pad_token_id)
        for tag in tags:
            tag = self._token_ids(tag, pad_token_id, sep_token_id)
            for length, token in enumerate(tag):
                following[tag[:length]].add(token)
            following[tag].add(sep_token_id)
        if len(following) == 1:
            raise ValueError("The tag vocabulary is empty; leave tag_vocabulary out to allow every tag.")
        self.following = {prefix: torch.tensor(sorted(tokens)) for prefix, tokens in following.items()}
        self.longest = max(map(len, following))
        self.largest_token = max(map(max, following.values()))

    @staticmethod
    def _token_ids(tag, pad_token_id: int, sep_token_id: int) -> tuple[int, ...]:
        try:
            tokens = [int(token) for token in tag] if not isinstance(tag, str) else None
        except (TypeError, ValueError):
            tokens = None
        if tokens is None:
            raise ValueError(
                f"The tag vocabulary holds {tag!r}; expected the token ids `processor.encode_tags` makes."
            )
        while tokens and tokens[-1] == pad_token_id:
            tokens.pop()
        if not tokens:
            raise ValueError("The tag vocabulary holds an empty tag.")
        if min(tokens) < 0 or pad_token_id in tokens or sep_token_id in tokens:
            raise ValueError(
                f"The tag vocabulary holds {tokens}: a tag has neither [PAD]={pad_token_id} nor [SEP]={sep_token_id} "
                "in it, nor negative ids."
            )
        return tuple(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 0:
            prefixes, inverse = [()], torch.zeros(len(scores), dtype=torch.long)
        else:
            prefixes, inverse = torch.unique(input_ids, dim=0, return_inverse=True)
            prefixes = [tuple(prefix) for prefix in prefixes.tolist()]
        allowed = torch.zeros(len(prefixes), scores.shape[1], dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            # A prefix outside the tree belongs to a hypothesis that is already impossible.
            allowed[row, self.following.get(prefix, torch.empty(0, dtype=torch.long))] = True
        return scores.masked_fill(~allowed[inverse.to("cpu")].to(scores.device), -float("inf"))


@dataclass
class SlotSearch:
    """What to look for in a slot: the settings of one `generate` call that every slot shares."""

    processors: LogitsProcessorList
    pad_bias: float
    hypotheses: int
    sample: bool
    length_penalty: float


@dataclass
class SlotState:
    """The hypotheses of the slots that are still being written, `[slots * hypotheses, ...]` each.

    Args:
        tokens: `[slots * hypotheses, written]`.
        log_probs: the model's own log-probability of what is written; -inf for a hypothesis that is no tag, because
            it drew [PAD] or because processors left it without a token.
        ranking: the same under the processed scores, by which beams are ranked.
        finished: whether [SEP] has been written, or the hypothesis is no tag.
        lengths: tokens written, [SEP] not counted.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    ranking: torch.Tensor
    finished: torch.Tensor
    lengths: torch.Tensor
    cache: list = field(default_factory=list)


class OrderPromptGenerationMixin(GenerationMixin):
    """`generate` for models with a `tag_decoder` that writes one tag an order prompt."""

    # The decodings in which no slot sees another, so that `at_pad_bias` holds.
    independent_decodings = ("parallel",)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        decoding: str | None = None,
        threshold: float | None = None,
        pad_bias: float | None = None,
        max_tags: int | None = None,
        tag_vocabulary: Iterable[Sequence[int]] | TagVocabularyLogitsProcessor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        output_slots: bool = False,
        **kwargs,
    ) -> OPTSGGenerateOutput:
        """Writes each item's tags.

        A slot whose first token is [PAD] is empty; any other slot writes one tag. A tag's score is the model's own
        probability of writing it in its slot: the product of its tokens' probabilities, [SEP] among them, before
        `pad_bias`, processors or temperature. A tag that several slots write is listed once, with the probability that
        at least one of them does.

        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            decoding: "sequential", slots in order, each seeing those before it (the paper's); or "parallel", all slots
                at once, each seeing only itself. The two have the same weights.
            threshold: tags with a smaller probability are left out.
            pad_bias: added to the logit of [PAD]; a negative value makes the model write more tags. Where [PAD] wins,
                no threshold brings a tag back.
            max_tags: at most so many tags an item, the most probable ones.
            tag_vocabulary: token ids of the only tags allowed (`processor.encode_tags` makes them), or a
                [`TagVocabularyLogitsProcessor`] built from them once.
            logits_processor: processors of `transformers`; they see a slot's own tokens as `input_ids`.
            generation_config: instead of the model's. `threshold` and `pad_bias` there are a number or one for each
                decoding, as in `{"parallel": 0.3, "sequential": 0.2}`.
            output_slots: return what every slot proposes too.
            kwargs: `num_beams` (beam search inside each slot), `do_sample` with `temperature`, `top_k`, `top_p`, …,
                `num_return_sequences` (alternatives a slot), `length_penalty` (0 unless given), and the other
                `SEARCH_SETTINGS`, fields of `GenerationConfig`.

        Raises:
            ValueError: an unknown setting, one out of range, or a tag vocabulary this model cannot write.
        """
        config = copy.deepcopy(generation_config if generation_config is not None else self.generation_config)
        own = {"decoding": decoding, "threshold": threshold, "pad_bias": pad_bias, "max_tags": max_tags}
        for name, value in own.items():
            setattr(config, name, value if value is not None else getattr(config, name, None))
        if unknown := kwargs.keys() - set(SEARCH_SETTINGS):
            raise ValueError(
                f"generate() does not know {sorted(unknown)}; it takes {sorted([*own, *SEARCH_SETTINGS])}."
            )
        config.update(**kwargs)
        length_penalty = config.length_penalty or 0.0
        config.update(**config._get_default_generation_params(), defaults_only=True)
        decoding = config.decoding or "parallel"
        if decoding not in DECODINGS:
            raise ValueError(f"decoding={decoding!r} must be one of {DECODINGS}.")
        threshold, pad_bias = (_number_for_decoding(config, name, decoding) for name in ("threshold", "pad_bias"))
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is a probability and must lie between 0 and 1.")
        for name in ("max_tags", "num_beams", "num_return_sequences"):
            if (value := getattr(config, name)) is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        if config.num_beams > self.config.tag_vocab_size:
            raise ValueError(f"num_beams={config.num_beams} exceeds tag_vocab_size={self.config.tag_vocab_size}.")
        if config.num_beams > 1 and config.do_sample:
            raise ValueError(
                f"num_beams={config.num_beams} with do_sample=True: sample, or search with beams, not both."
            )
        if not config.do_sample and config.num_return_sequences > config.num_beams:
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences} needs at least as many num_beams "
                f"(now {config.num_beams}), or do_sample=True."
            )

        device = self.lm_head.weight.device
        config._eos_token_tensor = torch.tensor([self.config.tag_sep_token_id], device=device)
        processors = self._get_logits_processor(
            config, input_ids_seq_length=0, logits_processor=logits_processor, device=device
        )
        if tag_vocabulary is not None:
            if not isinstance(tag_vocabulary, TagVocabularyLogitsProcessor):
                tag_vocabulary = TagVocabularyLogitsProcessor(
                    tag_vocabulary, self.config.tag_pad_token_id, self.config.tag_sep_token_id
                )
            if tag_vocabulary.longest > self.config.max_tag_tokens:
                raise ValueError(
                    f"tag_vocabulary holds a tag of {tag_vocabulary.longest} tokens; this model writes at most "
                    f"max_tag_tokens={self.config.max_tag_tokens}."
                )
            if tag_vocabulary.largest_token >= self.config.tag_vocab_size:
                raise ValueError(
                    f"tag_vocabulary holds token {tag_vocabulary.largest_token}; this model has tag_vocab_size="
                    f"{self.config.tag_vocab_size}. Was it made with another tokenizer?"
                )
            processors.insert(0, tag_vocabulary)
        search = SlotSearch(
            processors=processors,
            pad_bias=pad_bias,
            hypotheses=config.num_return_sequences if config.do_sample else config.num_beams,
            sample=config.do_sample,
            length_penalty=length_penalty,
        )

        with evaluation_mode(self):
            outputs = self.model(
                pixel_values=pixel_values,
                frame_features=frame_features,
                frame_mask=frame_mask,
                input_ids=input_ids,
                title_features=title_features,
                attention_mask=attention_mask,
            )
            write = self._write_parallel if decoding == "parallel" else self._write_sequential
            tokens, log_probs, pad_margins = write(outputs, search)
        keep = config.num_return_sequences
        sequences, tag_scores, slots = collect_tags(
            tokens[:, :, :keep], log_probs[:, :, :keep], threshold, config.max_tags, self.config.tag_pad_token_id
        )
        return OPTSGGenerateOutput(
            sequences=sequences,
            tag_scores=tag_scores,
            slots=slots,
            pad_margins=pad_margins,
            slot_tokens=tokens[:, :, :keep] if output_slots else None,
            slot_log_probs=log_probs[:, :, :keep] if output_slots else None,
            prompt_attentions=outputs.prompt_attentions,
        )

    def _write_parallel(self, outputs, search: SlotSearch):
        batch, num_prompts, _ = outputs.order_prompts.shape
        items = torch.arange(batch, device=outputs.memory.device).repeat_interleave(num_prompts)
        memory = self.tag_decoder.memory_keys_values(outputs.memory)
        tokens, log_probs, pad_margins, _ = self._write_slots(
            outputs.order_prompts.flatten(0, 1), items, memory, outputs.memory_mask, search
        )
        shape = (batch, num_prompts)
        return tokens.unflatten(0, shape), log_probs.unflatten(0, shape), pad_margins.unflatten(0, shape)

    def _write_sequential(self, outputs, search: SlotSearch):
        batch, num_prompts, _ = outputs.order_prompts.shape
        items = torch.arange(batch, device=outputs.memory.device)
        memory = self.tag_decoder.memory_keys_values(outputs.memory)
        context = None
        written = []
        for slot in range(num_prompts):
            *result, slot_context = self._write_slots(
                outputs.order_prompts[:, slot], items, memory, outputs.memory_mask, search, context
            )
            written.append(result)
            context = slot_context if context is None else context.followed_by(slot_context)
        longest = max(tokens.shape[-1] for tokens, _, _ in written)
        pad = self.config.tag_pad_token_id
        tokens = [torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=pad) for t, _, _ in written]
        return (
            torch.stack(tokens, dim=1),
            torch.stack([log_probs for _, log_probs, _ in written], dim=1),
            torch.stack([pad_margins for _, _, pad_margins in written], dim=1),
        )

    def _write_slots(self, prompts, items, memory, memory_mask, search: SlotSearch, context=None):
        """Writes one tag (and its alternatives) for each slot, all at once.

        Args:
            prompts: `[slots, hidden_size]`; items: `[slots]`, ascending, the item of each.
            memory: each layer's keys and values of the memory; memory_mask: `[batch, memory length]`.
            context: what was written in earlier slots, [`SlotContext`] by item, or `None`.

        Returns:
            tokens `[slots, hypotheses, longest]` filled up with [PAD], the model's log-probabilities
            `[slots, hypotheses]` (-inf where nothing is written), the margin over [PAD] `[slots]`, and the
            [`SlotContext`] of the best hypotheses.
        """
        decoder, config, device = self.tag_decoder, self.config, prompts.device
        pad, sep, width = config.tag_pad_token_id, config.tag_sep_token_id, search.hypotheses
        count, batch, seen = len(prompts), memory_mask.shape[0], 0 if context is None else context.mask.shape[1]
        out_tokens = torch.full((count, width, config.max_tag_tokens), pad, device=device)
        out_log_probs = torch.full((count, width), -torch.inf, device=device)

        # The prompts themselves: one row a slot, whatever the number of hypotheses.
        rows = SlotRows(items, batch)
        cache = [None] * len(decoder.layers) if context is None else context.of_items(items)
        mask = None if context is None else torch.cat([context.mask[items], context.mask.new_ones(count, 1)], dim=1)
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        hidden_states = decoder.step(decoder.embed(prompts, zeros, zeros), cache, mask, rows, memory, memory_mask)
        logits = self.lm_head(hidden_states).float()
        model_log_probs = logits.log_softmax(dim=-1)
        logits[:, sep] = -torch.inf
        pad_logits = logits[:, pad].clone()
        logits[:, pad] = -torch.inf
        pad_margins = logits.amax(dim=-1) - pad_logits
        logits[:, pad] = pad_logits + search.pad_bias
        scores = search.processors(zeros.new_empty(count, 0), logits)
        # Where processors forbid even [PAD], nothing is left to write.
        scores[:, pad] = scores[:, pad].masked_fill(scores.isneginf().all(dim=-1), 0.0)

        every = torch.arange(count, device=device)
        local = SlotContext.empty(cache, config.max_tag_tokens + 1)
        local.store(every, zeros, cache, seen)
        if search.sample:
            first = torch.multinomial(scores.softmax(dim=-1), width, replacement=True)
            ranking = torch.zeros(count, width, device=device)
            alive = (first != pad).any(dim=1)
        else:
            alive = scores.argmax(dim=-1) != pad
            scores[:, pad] = -torch.inf
            ranking, first = scores.log_softmax(dim=-1).topk(width, dim=-1)
        no_tag = (first[alive] == pad) | ranking[alive].isneginf()
        state = SlotState(
            slots=every[alive],
            tokens=first[alive].reshape(-1, 1),
            log_probs=model_log_probs[alive].gather(1, first[alive]).masked_fill(no_tag, -torch.inf).flatten(),
            ranking=ranking[alive].flatten(),
            finished=no_tag.flatten(),
            lengths=torch.ones(int(alive.sum()) * width, dtype=torch.long, device=device),
        )
        parents = every[alive].repeat_interleave(width)
        state.cache = [(key[parents], value[parents]) for key, value in cache]

        for written in range(1, config.max_tag_tokens + 1):
            if len(state.slots) == 0:
                break
            owner = state.slots.repeat_interleave(width)
            rows = SlotRows(items[owner], batch)
            mask = None
            if context is not None:
                own = context.mask.new_ones(len(owner), written + 1)
                mask = torch.cat([context.mask[items[owner]], own], dim=1)
            position = torch.full_like(owner, written)
            embedded = decoder.embed(prompts[owner], position, state.tokens[:, -1])
            hidden_states = decoder.step(embedded, state.cache, mask, rows, memory, memory_mask)
            logits = self.lm_head(hidden_states).float()
            model_log_probs = logits.log_softmax(dim=-1)
            logits[:, pad] = -torch.inf
            if written == config.max_tag_tokens:
                logits[:, torch.arange(logits.shape[1], device=device) != sep] = -torch.inf
                scores = logits
            else:
                scores = search.processors(state.tokens, logits)
            state = self._choose(state, scores, model_log_probs, search)
            state = self._release(state, width, out_tokens, out_log_probs, local, seen)
        longest = max(int((out_tokens != pad).sum(dim=-1).max()), 1) if out_tokens.numel() else 1
        return out_tokens[..., :longest], out_log_probs, pad_margins, local.trimmed()

    def _choose(self, state: SlotState, scores, model_log_probs, search: SlotSearch) -> SlotState:
        """The next token of every hypothesis; with beams, the best continuations of each slot's hypotheses."""
        sep, width = self.config.tag_sep_token_id, search.hypotheses
        rows = torch.arange(len(scores), device=scores.device)
        stuck = scores.isneginf().all(dim=-1) & ~state.finished
        if search.sample or width == 1:
            # What finished and stuck hypotheses draw is not read, but there must be something to draw from.
            scores = scores.masked_fill((state.finished | stuck)[:, None], 0.0)
            if search.sample:
                token = torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]
            else:
                token = scores.argmax(dim=-1)
            parent, ranking = rows, state.ranking.masked_fill(stuck, -torch.inf)
        else:
            continued = state.ranking[:, None] + scores.log_softmax(dim=-1)
            continued = continued.masked_fill((state.finished | stuck)[:, None], -torch.inf)
            # A finished hypothesis stays in the beam as it is: its only continuation is itself, under [SEP].
            continued[:, sep] = torch.where(state.finished, state.ranking, continued[:, sep])
            lengths = (state.lengths[:, None] + 1).repeat(1, continued.shape[1])
            lengths[:, sep] -= 1
            ranked = continued / lengths**search.length_penalty
            best = ranked.view(len(state.slots), -1).topk(width, dim=-1).indices
            vocabulary = scores.shape[1]
            first_row = torch.arange(len(state.slots), device=scores.device)[:, None] * width
            parent = (first_row + best // vocabulary).flatten()
            token = (best % vocabulary).flatten()
            ranking = continued[parent, token]
        was_finished = state.finished[parent]
        log_probs = state.log_probs[parent] + torch.where(was_finished, 0.0, model_log_probs[parent, token])
        # Stuck, or taken into a beam for want of possible continuations.
        impossible = ranking.isneginf()
        log_probs = log_probs.masked_fill(impossible, -torch.inf)
        finished = was_finished | impossible | (token == sep)
        return SlotState(
            slots=state.slots,
            tokens=torch.cat(
                [state.tokens[parent], token.masked_fill(finished, self.config.tag_pad_token_id)[:, None]], 1
            ),
            log_probs=log_probs,
            ranking=ranking,
            finished=finished,
            lengths=state.lengths[parent] + (~finished).long(),
            cache=[(key[parent], value[parent]) for key, value in state.cache],
        )

    def _release(self, state, width, out_tokens, out_log_probs, local, seen) -> SlotState:
        """Writes out the slots all of whose hypotheses are finished, and keeps the others."""
        pad = self.config.tag_pad_token_id
        done = state.finished.view(-1, width).all(dim=1)
        if not done.any():
            return state
        slots = state.slots[done]
        rows = done.repeat_interleave(width)
        tokens = state.tokens[rows].view(len(slots), width, -1)
        log_probs = state.log_probs[rows].view(len(slots), width)
        stored = tokens[..., : out_tokens.shape[-1]].masked_fill(log_probs.isneginf()[..., None], pad)
        out_tokens[slots, :, : stored.shape[-1]] = stored
        out_log_probs[slots] = log_probs
        # Later slots see a slot's first hypothesis: of beams, which come ranked, the best.
        chosen = torch.arange(len(done), device=done.device)[done] * width
        cache = [(key[chosen], value[chosen]) for key, value in state.cache]
        own_length = torch.where(state.log_probs[chosen].isneginf(), 0, state.lengths[chosen])
        local.store(slots, own_length, cache, seen)
        rows = ~rows
        return SlotState(
            slots=state.slots[~done],
            tokens=state.tokens[rows],
            log_probs=state.log_probs[rows],
            ranking=state.ranking[rows],
            finished=state.finished[rows],
            lengths=state.lengths[rows],
            cache=[(key[rows], value[rows]) for key, value in state.cache],
        )


class SlotContext:
    """Keys and values of what has been written, by slot or by item: what later slots see in sequential decoding.

    Args:
        keys_values: for each layer two of `[rows, heads, length, width / heads]`.
        mask: `[rows, length]`, boolean, true where something was written.
    """

    def __init__(self, keys_values: list, mask: torch.Tensor):
        self.keys_values = keys_values
        self.mask = mask

    @classmethod
    def empty(cls, cache: list, length: int) -> "SlotContext":
        """Room for `length` positions in every row of a cache, in the cache's own precision."""
        pairs = [tuple(t.new_zeros(*t.shape[:2], length, t.shape[3]) for t in pair) for pair in cache]
        key = cache[0][0]
        return cls(pairs, torch.zeros(len(key), length, dtype=torch.bool, device=key.device))

    def store(self, rows, lengths, cache, seen: int) -> None:
        """Takes over a prompt and its first `lengths` tokens from a cache that begins with `seen` older positions."""
        for (key, value), (new_key, new_value) in zip(self.keys_values, cache):
            new_key, new_value = new_key[:, :, seen:], new_value[:, :, seen:]
            key[rows, :, : new_key.shape[2]] = new_key
            value[rows, :, : new_value.shape[2]] = new_value
        place = torch.arange(self.mask.shape[1], device=self.mask.device)
        self.mask[rows] = place <= lengths[:, None]

    def trimmed(self) -> "SlotContext":
        length = int(self.mask.sum(dim=1).max())
        return SlotContext([(k[:, :, :length], v[:, :, :length]) for k, v in self.keys_values], self.mask[:, :length])

    def of_items(self, items: torch.Tensor) -> list:
        return [(key[items], value[items]) for key, value in self.keys_values]

    def spread(self, rows: torch.Tensor, count: int) -> "SlotContext":
        """The same rows at their places `rows` among `count`, the others with nothing written."""
        pairs = [tuple(t.new_zeros(count, *t.shape[1:]).index_copy_(0, rows, t) for t in p) for p in self.keys_values]
        mask = self.mask.new_zeros(count, self.mask.shape[1])
        mask[rows] = self.mask
        return SlotContext(pairs, mask)

    def followed_by(self, other: "SlotContext") -> "SlotContext":
        pairs = [
            (torch.cat([key, other_key], dim=2), torch.cat([value, other_value], dim=2))
            for (key, value), (other_key, other_value) in zip(self.keys_values, other.keys_values)
        ]
        return SlotContext(pairs, torch.cat([self.mask, other.mask], dim=1))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode and afterwards every module back into its own: a frozen tower may be in
    evaluation mode inside a model in training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def collect_tags(tokens, log_probs, threshold: float, max_tags: int | None, pad_token_id: int):
    """Each item's tags by falling probability, each once.

    A tag's probability is that at least one slot writes it, `1 - Π(1 - p)` over the slots that propose it: where the
    matching has not settled which of several slots a tag goes to, its probability is shared out among them.

    Args:
        tokens: `[batch, slots, hypotheses, longest]`, filled up with `pad_token_id`.
        log_probs: `[batch, slots, hypotheses]`, -inf where nothing is written.

    Returns:
        `sequences`, `tag_scores` and `slots` of [`OPTSGGenerateOutput`].
    """
    batch, _, hypotheses, longest = tokens.shape
    kept = []
    for item_tokens, item_log_probs in zip(tokens.flatten(1, 2).tolist(), log_probs.flatten(1).tolist()):
        place_of, log_missed, written = {}, {}, set()
        for place in sorted(range(len(item_log_probs)), key=lambda place: -item_log_probs[place]):
            tag = tuple(item_tokens[place])
            # Sampling may draw a tag several times in a slot, which makes it no likelier.
            if item_log_probs[place] > -math.inf and (tag, place // hypotheses) not in written:
                written.add((tag, place // hypotheses))
                place_of.setdefault(tag, place)
                # Logarithms keep the small probabilities that 1 - p would round away; rounding may leave a p past 1.
                probability = min(math.exp(item_log_probs[place]), 1.0)
                log_missed[tag] = log_missed.get(tag, 0.0) + (
                    math.log1p(-probability) if probability < 1 else -math.inf
                )
        # Rounded as they are returned: a threshold equal to a returned score keeps its tag.
        scores = torch.tensor([-math.expm1(log_missed[tag]) for tag in place_of]).tolist()
        scored = sorted(zip(scores, place_of.values()), key=lambda pair: -pair[0])
        kept.append([(score, place) for score, place in scored if score >= threshold][:max_tags])
    most = max(max(map(len, kept)), 1)
    sequences = torch.full((batch, most, longest), pad_token_id, device=tokens.device)
    tag_scores = torch.zeros(batch, most, device=tokens.device)
    slots = torch.full((batch, most), -1, device=tokens.device)
    for item, pairs in enumerate(kept):
        for rank, (score, place) in enumerate(pairs):
            sequences[item, rank] = tokens[item, place // hypotheses, place % hypotheses]
            tag_scores[item, rank] = score
            slots[item, rank] = place // hypotheses
    return sequences, tag_scores, slots


def plain_settings(model, generation_config: GenerationConfig | None, **given) -> dict:
    """The `threshold`, `max_tags` and `pad_bias` of a `generate` call that names tags instead of writing them: what is
    given, else what the model's `generation_config` says.

    Raises:
        ValueError: one of them is out of range.
    """
    config = generation_config if generation_config is not None else model.generation_config
    settings = {name: getattr(config, name, None) if value is None else value for name, value in given.items()}
    for name in ("threshold", "pad_bias"):
        if name in settings:
            settings[name] = _finite(name, settings[name] if settings[name] is not None else 0.0)
    if not 0 <= settings["threshold"] <= 1:
        raise ValueError(f"threshold={settings['threshold']} is a probability and must lie between 0 and 1.")
    for name in ("max_tags", "alternatives"):
        value = settings.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return settings


def _finite(name: str, value) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return float(value)


def _number_for_decoding(config: GenerationConfig, name: str, decoding: str) -> float:
    """A setting that is one number, or one for each decoding; 0 where it is not given."""
    value = getattr(config, name)
    if isinstance(value, Mapping):
        if unknown := set(value) - set(DECODINGS):
            raise ValueError(f"{name} is given for {sorted(map(str, unknown))}; the decodings are {DECODINGS}.")
        value = value.get(decoding)
    if value is None:
        return 0.0
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number, or one for each of {DECODINGS}.")
    return float(value)
