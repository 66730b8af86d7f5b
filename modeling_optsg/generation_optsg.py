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

from .multimodal_encoder import MemoryLayout
from .tag_decoder import SlotRows
from .tag_ranking import ClassifierEvidence, rank_tags

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
        sequences: `[batch, most tags of an example, longest tag]`, tag tokens without [SEP], filled up with
            `tag_pad_token_id`; an example's tags by falling probability.
        tag_scores: `[batch, most tags of an example]`, each tag's probability, 0 where there is none.
        slots: `[batch, most tags of an example]`, the prompt that wrote the tag, -1 where there is none or where the example
            as a whole proposed it.
        slot_scores: `[batch, most tags of an example]`, the slots' part of each probability: that at least one writes the
            tag. This and the next of models with `use_tag_classifier` only.
        classifier_logits: `[batch, most tags of an example]`, the example's as a whole; 0 for a novel tag: it says nothing of one.
        pad_margins: `[batch, num_prompts]`, in each slot the logit of the best first token less that of [PAD]: with
            greedy search or beams the slot is written where this exceeds `pad_bias`.
        slot_tokens, slot_log_probs: with `output_slots`, what every slot proposes before `threshold` and `max_tags`:
            `[batch, num_prompts, num_return_sequences, longest tag]` and `[batch, num_prompts, num_return_sequences]`, -inf where it
            proposes nothing.
        classifier_evidence: with `output_slots` and `use_tag_classifier`, what the example as a whole says of them.
        prompt_attentions, memory_layout: with `output_attentions`, where each prompt looks and what is there; see
            [`OPTSGModelOutput`].
    """

    sequences: torch.Tensor | None = None
    tag_scores: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    slot_scores: torch.Tensor | None = None
    classifier_logits: torch.Tensor | None = None
    pad_margins: torch.Tensor | None = None
    slot_tokens: torch.Tensor | None = None
    slot_log_probs: torch.Tensor | None = None
    classifier_evidence: ClassifierEvidence | None = None
    prompt_attentions: tuple[torch.Tensor, ...] | None = None
    memory_layout: MemoryLayout | None = None

    def at_pad_bias(self, pad_bias: float, pad_token_id: int, max_tags: int | None = None) -> "OPTSGGenerateOutput":
        """What `generate` would have returned with this `pad_bias`, at least the one it was called with, and a
        `threshold` of 0, where slots do not see one another: a slot is then written or not, and the same if written.
        Needs `output_slots`."""
        dropped = (self.pad_margins <= pad_bias)[..., None]
        collected = rank_tags(
            self.slot_tokens,
            self.slot_log_probs.masked_fill(dropped, -torch.inf),
            0.0,
            max_tags,
            pad_token_id,
            self.classifier_evidence,
        )
        return OPTSGGenerateOutput(**vars(collected), pad_margins=self.pad_margins)


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

    @classmethod
    def of_tags(cls, tags: Iterable[str], processor, config) -> "TagVocabularyLogitsProcessor":
        """The vocabulary of tags as text, in the letter case of the training tags.

        Args:
            processor: the model's [`OPTSGProcessor`]; config: the model's.

        Raises:
            ValueError: they are no list of tags, or one cannot be encoded.
        """
        if isinstance(tags, str | Mapping) or not isinstance(tags, Iterable):
            raise ValueError(f"tag_vocabulary is of type {type(tags).__name__}; expected a list of tags")
        tags = list(tags)
        if wrong := [tag for tag in tags if not isinstance(tag, str)]:
            raise ValueError(f"tag_vocabulary holds {wrong[0]!r}, of type {type(wrong[0]).__name__}; expected text")
        tokens = processor.encode_tags(processor.spell_as_trained(tags))["tag_input_ids"]
        return cls(tokens.tolist(), config.tag_pad_token_id, config.tag_sep_token_id)

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
    log_floor: float


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
        num_candidates: int | None = None,
        fusion_weights: Sequence[float] | None = None,
        logit_adjustment: float | None = None,
        min_beam_probability: float | None = None,
        tag_vocabulary: Iterable[Sequence[int]] | TagVocabularyLogitsProcessor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        output_slots: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> OPTSGGenerateOutput:
        """Writes each example's tags.

        A slot whose first token is [PAD] is empty; any other slot writes one tag. A tag's score is the model's own
        probability of writing it in its slot: the product of its tokens' probabilities, [SEP] among them, before
        `pad_bias`, processors or temperature. A tag that several slots write is listed once, with the probability that
        at least one of them does. With `fusion_weights`, that is weighed against what the example as a whole says of the
        tag.

        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            decoding: "sequential", slots in order, each seeing those before it (the paper's); or "parallel", all slots
                at once, each seeing only itself. The two have the same weights.
            threshold: tags with a smaller probability are left out.
            pad_bias: added to the logit of [PAD]; a negative value makes the model write more tags. Where [PAD] wins,
                no threshold brings a tag back.
            max_tags: at most so many tags an example, the most probable ones.
            num_candidates: so many train tags that suit the example as a whole best are candidates too, whether a slot writes
                them or not; 0 if not given. Not with sampling, a tag vocabulary or processors.
            fusion_weights: five numbers: for a train tag the weight of the slots' logit, of the example's, and their bias;
                for a novel tag the weight of the slots' logit and its bias. For models with `use_tag_classifier`; fitted on
                validation examples.
            logit_adjustment: so many times the logarithm of a train tag's training count is taken off what the example as
                a whole says of it ([`LabelVocabulary.adjust`]); 0 if not given.
            min_beam_probability: an alternative of a slot, beyond its first, is given up as soon as its probability is
                smaller; 0 if not given, and the search is exhaustive.
            tag_vocabulary: token ids of the only tags allowed (`processor.encode_tags` makes them), or a
                [`TagVocabularyLogitsProcessor`] built from them once.
            logits_processor: processors of `transformers`; they see a slot's own tokens as `input_ids`.
            generation_config: instead of the model's. `threshold`, `pad_bias`, `fusion_weights` and `logit_adjustment`
                there are as here or one for each decoding, as in `{"parallel": 0.3, "sequential": 0.2}`.
            output_slots: return what every slot proposes too.
            output_attentions: return where each order prompt looks. What is written stays the same.
            kwargs: `num_beams` (beam search inside each slot), `do_sample` with `temperature`, `top_k`, `top_p`, …,
                `num_return_sequences` (num_return_sequences a slot), `length_penalty` (0 unless given), and the other
                `SEARCH_SETTINGS`, fields of `GenerationConfig`.

        Raises:
            ValueError: an unknown setting, one out of range, or a tag vocabulary this model cannot write.
        """
        config = copy.deepcopy(generation_config if generation_config is not None else self.generation_config)
        own = {"decoding": decoding, "threshold": threshold, "pad_bias": pad_bias, "max_tags": max_tags}
        own |= {
            "num_candidates": num_candidates,
            "fusion_weights": fusion_weights,
            "min_beam_probability": min_beam_probability,
        }
        own |= {"logit_adjustment": logit_adjustment}
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
        threshold, pad_bias, logit_adjustment = (
            _finite(name, _for_decoding(config, name, decoding, 0.0))
            for name in ("threshold", "pad_bias", "logit_adjustment")
        )
        fusion_weights, num_candidates = _for_decoding(config, "fusion_weights", decoding), config.num_candidates or 0
        if fusion_weights is not None:
            fusion_weights = tuple(_finite("fusion_weights", weight) for weight in fusion_weights)
            if len(fusion_weights) != 5 or self.tag_classifier is None:
                raise ValueError(
                    f"fusion_weights={fusion_weights} must be five numbers, for a model with use_tag_classifier."
                )
        if not 0 <= _finite("min_beam_probability", config.min_beam_probability or 0.0) < 1:
            raise ValueError(f"min_beam_probability={config.min_beam_probability} must lie in [0, 1).")
        if not isinstance(num_candidates, int) or num_candidates < 0:
            raise ValueError(f"num_candidates={num_candidates!r} must be a whole number of at least 0.")
        if num_candidates and fusion_weights is None:
            raise ValueError(f"num_candidates={num_candidates} need fusion_weights: no slot gives them a probability.")
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
            # Of remote code there may be several copies of a class, but one of what it inherits from.
            if not isinstance(tag_vocabulary, LogitsProcessor):
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
            log_floor=math.log(config.min_beam_probability) if config.min_beam_probability else -math.inf,
        )

        with evaluation_mode(self):
            outputs = self.model(
                pixel_values=pixel_values,
                frame_features=frame_features,
                frame_mask=frame_mask,
                input_ids=input_ids,
                title_features=title_features,
                attention_mask=attention_mask,
                output_attentions=output_attentions,
            )
            write = self._write_parallel if decoding == "parallel" else self._write_sequential
            tokens, log_probs, pad_margins = write(outputs, search)
            tokens, log_probs = (t[:, :, : config.num_return_sequences] for t in (tokens, log_probs))
            evidence = None
            if self.tag_classifier is not None:
                # Proposals are chosen among whole tags: what forbids tokens one by one could not forbid them.
                free = not processors and not config.do_sample
                num_candidates = num_candidates if free else 0
                evidence = self._classifier_evidence(
                    outputs.classifier_pooler_output, num_candidates, fusion_weights, logit_adjustment
                )
        collected = rank_tags(tokens, log_probs, threshold, config.max_tags, self.config.tag_pad_token_id, evidence)
        return OPTSGGenerateOutput(
            **vars(collected),
            pad_margins=pad_margins,
            slot_tokens=tokens if output_slots else None,
            slot_log_probs=log_probs if output_slots else None,
            classifier_evidence=evidence if output_slots else None,
            prompt_attentions=outputs.prompt_attentions,
            memory_layout=outputs.memory_layout,
        )

    def _classifier_evidence(
        self, summary, num_candidates: int, weights, logit_adjustment: float
    ) -> ClassifierEvidence:
        """What the example as a whole says of every train tag, and the ones that suit it best."""
        classes = self.tag_classifier.label_vocabulary
        logits = classes.adjust(self.tag_classifier.logits(summary).float(), logit_adjustment)
        best = logits.topk(min(num_candidates, logits.shape[1]), dim=1).indices
        return ClassifierEvidence(
            logits=logits,
            classes=classes.index(),
            num_candidates=classes.of(best),
            weights=weights,
        )

    def _write_parallel(self, outputs, search: SlotSearch):
        batch, num_prompts, _ = outputs.order_prompts.shape
        examples = torch.arange(batch, device=outputs.memory.device).repeat_interleave(num_prompts)
        memory = self.tag_decoder.memory_keys_values(outputs.memory)
        tokens, log_probs, pad_margins, _ = self._write_slots(
            outputs.order_prompts.flatten(0, 1), examples, memory, outputs.memory_mask, search
        )
        shape = (batch, num_prompts)
        return tokens.unflatten(0, shape), log_probs.unflatten(0, shape), pad_margins.unflatten(0, shape)

    def _write_sequential(self, outputs, search: SlotSearch):
        batch, num_prompts, _ = outputs.order_prompts.shape
        examples = torch.arange(batch, device=outputs.memory.device)
        memory = self.tag_decoder.memory_keys_values(outputs.memory)
        context = None
        written = []
        for slot in range(num_prompts):
            *result, slot_context = self._write_slots(
                outputs.order_prompts[:, slot], examples, memory, outputs.memory_mask, search, context
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

    def _write_slots(self, prompts, examples, memory, memory_mask, search: SlotSearch, context=None):
        """Writes one tag (and its num_return_sequences) for each slot, all at once.

        Args:
            prompts: `[slots, hidden_size]`; examples: `[slots]`, ascending, the example of each.
            memory: each layer's keys and values of the memory; memory_mask: `[batch, memory length]`.
            context: what was written in earlier slots, [`SlotContext`] by example, or `None`.

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
        rows = SlotRows(examples, batch)
        cache = [None] * len(decoder.layers) if context is None else context.of_examples(examples)
        mask = None if context is None else torch.cat([context.mask[examples], context.mask.new_ones(count, 1)], dim=1)
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        embedded = decoder.embed(prompts, zeros, zeros)
        hidden_states = decoder.step(embedded, cache, mask, rows, memory, memory_mask)
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
        no_tag = ((first[alive] == pad) | ranking[alive].isneginf()).flatten()
        log_probs = model_log_probs[alive].gather(1, first[alive]).flatten()
        if not search.sample:
            no_tag |= self._too_unlikely(log_probs, width, search)
        state = SlotState(
            slots=every[alive],
            tokens=first[alive].reshape(-1, 1),
            log_probs=log_probs.masked_fill(no_tag, -torch.inf),
            ranking=ranking[alive].flatten().masked_fill(no_tag, -torch.inf),
            finished=no_tag,
            lengths=torch.ones(int(alive.sum()) * width, dtype=torch.long, device=device),
        )
        parents = every[alive].repeat_interleave(width)
        state.cache = [(key[parents], value[parents]) for key, value in cache]

        for written in range(1, config.max_tag_tokens + 1):
            if len(state.slots) == 0:
                break
            # What is finished stays in its slot's beam but costs nothing more.
            active = (~state.finished).nonzero().flatten()
            owner = state.slots.repeat_interleave(width)[active]
            rows = SlotRows(examples[owner], batch)
            mask = None
            if context is not None:
                own = context.mask.new_ones(len(owner), written + 1)
                mask = torch.cat([context.mask[examples[owner]], own], dim=1)
            position = torch.full_like(owner, written)
            embedded = decoder.embed(prompts[owner], position, state.tokens[active, -1])
            cache = [(key[active], value[active]) for key, value in state.cache]
            hidden_states = decoder.step(embedded, cache, mask, rows, memory, memory_mask)
            state.cache = [
                tuple(_one_longer(old, active, new) for old, new in zip(*pairs)) for pairs in zip(state.cache, cache)
            ]
            logits = self.lm_head(hidden_states).float()
            model_log_probs = logits.log_softmax(dim=-1)
            logits[:, pad] = -torch.inf
            if written == config.max_tag_tokens:
                logits[:, torch.arange(logits.shape[1], device=device) != sep] = -torch.inf
                scores = logits
            else:
                scores = search.processors(state.tokens[active], logits)
            state = self._choose(state, active, scores, model_log_probs, search)
            state = self._release(state, width, out_tokens, out_log_probs, local, seen)
        longest = max(int((out_tokens != pad).sum(dim=-1).max()), 1) if out_tokens.numel() else 1
        return out_tokens[..., :longest], out_log_probs, pad_margins, local.trimmed()

    def _choose(self, state: SlotState, active, scores, model_log_probs, search: SlotSearch) -> SlotState:
        """The next token of every hypothesis; with beams, the best continuations of each slot's hypotheses.

        Args:
            active: `[active]`, which hypotheses are not finished; scores, model_log_probs: `[active, vocabulary]`.
        """
        sep, width, slots = self.config.tag_sep_token_id, search.hypotheses, len(state.slots)
        stuck = scores.isneginf().all(dim=-1)
        # What stuck hypotheses draw is not read, but there must be something to draw from.
        scores = scores.masked_fill(stuck[:, None], 0.0)
        beams = not search.sample and width > 1
        if beams:
            # Of each hypothesis the best tokens beside [SEP], and [SEP], whose length counts otherwise. A finished
            # hypothesis stays in the beam as it is: its only continuation is itself, under [SEP].
            following = scores.log_softmax(dim=-1)
            ended = following[:, sep].clone()
            following[:, sep] = -torch.inf
            following, tokens = following.topk(min(width, following.shape[1]), dim=-1)
            following = torch.cat([following, ended[:, None]], dim=-1)
            following = (state.ranking[active, None] + following).masked_fill(stuck[:, None], -torch.inf)
            choices = following.shape[1]
            continued = following.new_full((slots * width, choices), -torch.inf)
            continued[:, -1] = state.ranking.masked_fill(~state.finished, -torch.inf)
            continued[active] = following
            candidates = tokens.new_full((slots * width, choices), sep)
            candidates[active, :-1] = tokens
            log_probs = continued.new_zeros(continued.shape)
            log_probs[active] = model_log_probs.gather(1, candidates[active])
            lengths = (state.lengths[:, None] + 1).repeat(1, choices)
            lengths[:, -1] -= 1
            best = (continued / lengths**search.length_penalty).view(slots, -1).topk(width, dim=-1).indices
            first_row = torch.arange(slots, device=scores.device)[:, None] * width
            parent, place = (first_row + best // choices).flatten(), (best % choices).flatten()
            token, ranking = candidates[parent, place], continued[parent, place]
            log_probs = log_probs[parent, place]
        else:
            drawn = torch.multinomial(scores.softmax(dim=-1), 1)[:, 0] if search.sample else scores.argmax(dim=-1)
            parent = torch.arange(slots * width, device=scores.device)
            token = drawn.new_full((slots * width,), sep).index_copy_(0, active, drawn)
            log_probs = torch.zeros_like(state.log_probs)
            log_probs[active] = model_log_probs.gather(1, drawn[:, None])[:, 0]
            ranking = state.ranking.index_fill(0, active[stuck], -torch.inf)
        was_finished = state.finished[parent]
        log_probs = state.log_probs[parent] + torch.where(was_finished, 0.0, log_probs)
        # Stuck, or taken into a beam for want of possible continuations.
        impossible = ranking.isneginf()
        if beams:
            impossible |= self._too_unlikely(log_probs, width, search)
            # What is given up must not stand before what is not, which would then be the alternative.
            ranking = ranking.masked_fill(impossible, -torch.inf)
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

    @staticmethod
    def _too_unlikely(log_probs: torch.Tensor, width: int, search: SlotSearch) -> torch.Tensor:
        """Which of `[slots * width]` hypotheses are given up for `min_beam_probability`; never the first of a slot."""
        alternative = torch.arange(len(log_probs), device=log_probs.device) % width > 0
        return alternative & (log_probs < search.log_floor)

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
    """Keys and values of what has been written, by slot or by example: what later slots see in sequential decoding.

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

    def of_examples(self, examples: torch.Tensor) -> list:
        return [(key[examples], value[examples]) for key, value in self.keys_values]

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


def plain_settings(model, generation_config: GenerationConfig | None, **given) -> dict:
    """The `threshold`, `max_tags`, … of a `generate` call that names tags instead of writing them: what is given, else
    what the model's `generation_config` says.

    Raises:
        ValueError: one of them is out of range.
    """
    config = generation_config if generation_config is not None else model.generation_config
    settings = {name: getattr(config, name, None) if value is None else value for name, value in given.items()}
    for name in ("threshold", "pad_bias", "logit_adjustment"):
        if name in settings:
            settings[name] = _finite(name, settings[name] if settings[name] is not None else 0.0)
    if not 0 <= settings["threshold"] <= 1:
        raise ValueError(f"threshold={settings['threshold']} is a probability and must lie between 0 and 1.")
    for name in ("max_tags", "num_return_sequences"):
        value = settings.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return settings


def _finite(name: str, value) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return float(value)


def _for_decoding(config: GenerationConfig, name: str, decoding: str, default=None):
    """A setting that is one for all, or one for each decoding."""
    value = getattr(config, name)
    if isinstance(value, Mapping):
        if unknown := set(value) - set(DECODINGS):
            raise ValueError(f"{name} is given for {sorted(map(str, unknown))}; the decodings are {DECODINGS}.")
        value = value.get(decoding)
    return default if value is None else value


def _one_longer(old: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A cache `[hypotheses, heads, length, width]` with one more position, known of some rows only."""
    longer = torch.nn.functional.pad(old, (0, 0, 0, 1))
    longer[rows, :, -1] = new[:, :, -1]
    return longer
