"""Open-Book: retrieve, copy, generate. One sequence of all tags, with a gate between generating and copying."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from modeling_optsg.base_models import OPTSGModel, OPTSGPreTrainedModel
from modeling_optsg.baselines.configuration import OpenBookConfig
from modeling_optsg.batch_tags import check_labels
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode
from modeling_optsg.generation_settings import read_ranking_settings
from modeling_optsg.layers import OutputLayer, TransformerLayer
from modeling_optsg.model_outputs import OPTSGModelOutput
from modeling_optsg.sampled_softmax import sample_classes
from modeling_optsg.tag_decoder import SlotRows, SlotSequence, TagDecoder
from modeling_optsg.tag_ranking import rank_tags
from modeling_optsg.tag_tokens import TagTokensMixin


@dataclass
class OpenBookOutput(ModelOutput):
    """Output of [`OpenBookForTagGeneration`].

    Args:
        loss: Scalar, cross-entropy of the sequence's tokens under the mixture of generating and copying.
        target_log_probs: `[batch, length]`, log-probability of each token of the training sequence, 0 at padding.
        targets: `[batch, length]`, those tokens, -100 at padding.
        copy_gate: `[batch, length]`, ratio of the probability that is copied. Returned with a book.
        generation_loss: Scalar, `loss` under the name that other models give it.
    """

    loss: torch.Tensor | None = None
    target_log_probs: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    copy_gate: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None


@dataclass
class OpenBookGenerateOutput(OPTSGGenerateOutput):
    """Output of [`OpenBookForTagGeneration.generate`].

    Args:
        copy_gate: `[batch]`, the copied ratio, averaged over an example's generated tokens. Returned with a book.
    """

    copy_gate: torch.Tensor | None = None


class Book(NamedTuple):
    """The retrieved tags of a batch: `input_ids`, boolean `mask` and encoded `tokens`, each `[batch, length, ...]`."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor

    def select(self, rows: torch.Tensor) -> "Book":
        """Return the book of some examples."""
        return Book(*(part[rows] for part in self))


class TagCopier(nn.Module):
    """The pointer of the copy mechanism: where in the book the next token is, and whether to copy it."""

    def __init__(self, config: OpenBookConfig):
        super().__init__()
        self.config = config
        self.positions = nn.Embedding(config.max_book_tokens, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layer = TransformerLayer(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate = nn.Linear(config.hidden_size, 1)

    def encode(self, embedded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encode the embedded tokens of the book in context.

        Args:
            embedded: `[batch, book length, hidden_size]`.
            mask: Boolean `[batch, book length]`.
        """
        positions = torch.arange(embedded.shape[1], device=embedded.device)
        hidden_states = self.dropout(embedded + self.config.hidden_size**0.5 * self.positions(positions))
        # A row without a book attends to its first padding token, which nothing reads.
        visible = mask.clone()
        visible[:, 0] |= ~mask.any(dim=1)
        hidden_states, _ = self.layer(hidden_states, visible[:, None, None, :])
        return self.norm(hidden_states)

    def point(self, hidden_states: torch.Tensor, book: Book) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute where to copy from, and how much.

        Args:
            hidden_states: `[batch, length, hidden_size]` of the decoder.
            book: The retrieved tags.

        Returns:
            The pointer `[batch, length, book length]` and the gate `[batch, length]`, both 0 for an example without a
            book.
        """
        scores = self.q_proj(hidden_states) @ book.tokens.transpose(1, 2) * self.config.hidden_size**-0.5
        scores = scores.float().masked_fill(~book.mask[:, None], torch.finfo(torch.float32).min)
        has_book = book.mask.any(dim=1)[:, None]
        pointer = scores.softmax(dim=-1) * has_book[..., None]
        return pointer, self.gate(hidden_states)[..., 0].float().sigmoid() * has_book

    def forward(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, book: Book
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes generating and copying.

        Args:
            hidden_states: `[batch, length, hidden_size]` of the decoder.
            logits: `[batch, length, tag_vocab_size]` of the output layer.
            book: The retrieved tags.

        Returns:
            Log-probabilities `[batch, length, tag_vocab_size]` of the mixture, and the gate `[batch, length]`.
        """
        pointer, gate = self.point(hidden_states, book)
        copied = torch.zeros_like(logits, dtype=torch.float32)
        copied = copied.scatter_add(2, book.input_ids[:, None].expand(-1, logits.shape[1], -1), pointer)
        mixed = (1 - gate)[..., None] * logits.float().softmax(dim=-1) + gate[..., None] * copied
        return mixed.clamp(min=1e-20).log(), gate


class OpenBookForTagGeneration(TagTokensMixin, OPTSGPreTrainedModel, GenerationMixin):
    """Retrieve-copy-generate on the modules of OP-TSG.

    One slot holds the sequence `y_1 [SEP] y_2 [SEP] ... [PAD]` of all tags. A gate mixes the vocabulary with the
    tokens of the tags of similar training examples. Without a book (`num_book_examples=0`) it is the plain sequence
    model. An [`ExampleRetriever`] retrieves; the model reads the retrieved tags' tokens.
    """

    config_class = OpenBookConfig

    def __init__(self, config: OpenBookConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_decoder = TagDecoder(config, max_slot_tokens=config.max_sequence_tokens)
        self.lm_head = OutputLayer(config.hidden_size, config.tag_vocab_size)
        self.copier = TagCopier(config) if config.num_book_examples else None
        self.post_init()
        self.generation_config = GenerationConfig(pad_bias=0.0, threshold=0.0)

    @can_return_tuple
    def forward(
        self,
        book_input_ids: torch.Tensor | None = None,
        book_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> OpenBookOutput:
        """Compute the training loss. To generate tags, call `generate`.

        Args:
            book_input_ids: `[batch, book length]`, tokens of the retrieved tags. An example may have none.
            book_mask: `[batch, book length]`, true for real tokens.
            labels: See [`OPTSGForTagGeneration.forward`].
            inputs: Arguments of [`OPTSGModel.forward`].

        Raises:
            ValueError: An example cannot be encoded, labels are missing, or a model without a book gets one.
        """
        if not check_labels(labels):
            raise ValueError("forward() needs labels. To generate tags, call generate().")
        outputs = self.model(**inputs, return_dict=True)
        book = self._read_book(book_input_ids, book_mask, len(labels))
        memory, memory_mask = _append_book(outputs, book)
        sequence = self._lay_out_sequence(labels)
        prompt = outputs.order_prompts.mean(dim=1, keepdim=True)
        one_slot = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        hidden_states = self.tag_decoder(prompt, sequence, one_slot, memory, memory_mask)
        log_probs, gate = self._target_log_probs(hidden_states, sequence.targets, book)
        loss = -log_probs.sum() / (sequence.targets >= 0).sum()
        return OpenBookOutput(
            loss=loss,
            target_log_probs=log_probs,
            targets=sequence.targets,
            copy_gate=gate,
            generation_loss=loss.detach(),
        )

    def _target_log_probs(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, book: Book | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Sequences differ in length and the vocabulary is wide: the logits of padding, and the copied ratio of tokens
        # that are not targets, would be most of the work.
        is_real = targets >= 0
        num_sampled = self.config.num_sampled_tokens if self.training else 0
        tokens, columns, correction = sample_classes(targets[is_real], self.config.tag_vocab_size, num_sampled)
        # All tokens are faster without indexing.
        chosen = None if len(tokens) == self.config.tag_vocab_size else tokens
        logits = self.token_logits(hidden_states[is_real], chosen) + correction
        log_probs, gate = -F.cross_entropy(logits.float(), columns, reduction="none"), None
        if book is not None:
            pointer, gate = self.copier.point(hidden_states, book)
            copied = (pointer * (book.input_ids[:, None] == targets[..., None])).sum(dim=-1)
            mixed = (1 - gate[is_real]) * log_probs.exp() + (gate * copied)[is_real]
            log_probs = mixed.clamp(min=1e-20).log()
        return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(is_real, log_probs), gate

    def _empty_book(self, batch: int) -> Book | None:
        """Return a book of padding in training: the copier needs a gradient, which other processes may wait for."""
        if self.copier is None or not self.training:
            return None
        input_ids = torch.full((batch, 1), self.config.tag_pad_token_id, device=self.device)
        return self._read_book(input_ids, torch.zeros_like(input_ids), batch)

    def _read_book(self, input_ids: torch.Tensor | None, mask: torch.Tensor | None, batch: int) -> Book | None:
        if input_ids is None:
            return self._empty_book(batch)
        if self.copier is None:
            raise ValueError("This model has num_book_examples=0, so it accepts no book_input_ids.")
        if input_ids.shape[1] > self.config.max_book_tokens:
            raise ValueError(
                f"book_input_ids has {input_ids.shape[1]} tokens; this model reads at most max_book_tokens="
                f"{self.config.max_book_tokens}."
            )
        if input_ids.shape[1] == 0:
            return self._empty_book(len(input_ids))
        mask = torch.ones_like(input_ids).bool() if mask is None else mask.bool()
        embedded = self.config.hidden_size**0.5 * self.tag_decoder.token_embeddings(input_ids)
        return Book(input_ids, mask, self.copier.encode(embedded, mask))

    def next_token_log_probs(
        self, hidden_states: torch.Tensor, book: Book | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute log-probabilities `[batch, length, tag_vocab_size]` of the next token, and the gate."""
        logits = self.token_logits(hidden_states)
        if book is None:
            return logits.float().log_softmax(dim=-1), None
        return self.copier(hidden_states, logits, book)

    def _lay_out_sequence(self, labels: torch.Tensor) -> SlotSequence:
        """Lays out all tags of an example in one slot, each ended by [SEP], the whole by [PAD].

        Tags that would make it longer than `max_sequence_tokens` are dropped.
        """
        sep, end = self.config.tag_sep_token_id, self.config.tag_pad_token_id
        rows = []
        for example_labels in labels.tolist():
            tags = [[token for token in tag if token >= 0] for tag in example_labels]
            tags = [tag for tag in tags if tag]
            if self.training and self.config.tag_order == "shuffled":
                tags = [tags[index] for index in torch.randperm(len(tags)).tolist()]
            tokens = []
            for tag in tags:
                tag_tokens = [*tag, sep]
                if len(tokens) + len(tag_tokens) < self.config.max_sequence_tokens:
                    tokens += tag_tokens
            rows.append(tokens + [end])
        max_length, device = max(map(len, rows)), labels.device
        targets = torch.tensor([row + [-100] * (max_length - len(row)) for row in rows], device=device)
        # A position reads the token before it; the first position is the prompt.
        input_ids = torch.cat([targets.new_full((len(rows), 1), end), targets[:, :-1].clamp(min=0)], dim=1)
        return SlotSequence(
            input_ids=input_ids,
            targets=targets,
            slot=torch.zeros_like(targets),
            position=torch.arange(max_length, device=device).expand(len(rows), -1),
            valid=targets >= 0,
        )

    @torch.no_grad()
    def generate(
        self,
        book_input_ids: torch.Tensor | None = None,
        book_mask: torch.Tensor | None = None,
        *,
        threshold: float | None = None,
        pad_bias: float | None = None,
        max_tags: int | None = None,
        generation_config: GenerationConfig | None = None,
        **inputs: Any,
    ) -> OpenBookGenerateOutput:
        """Generate the tags of each example with greedy search, one sequence per example.

        The score of a tag is the product of its tokens' probabilities given all tags before it. A tag that is
        generated twice is listed once.

        Args:
            book_input_ids, book_mask: See [`forward`].
            threshold: Minimum score of a tag.
            pad_bias: Added to the logit of the sequence's end where a tag may begin.
            max_tags: Maximum number of tags of an example.
            generation_config: Used instead of the model's.
            inputs: Arguments of [`OPTSGModel.forward`].
        """
        settings = read_ranking_settings(
            self, generation_config, inputs, threshold=threshold, pad_bias=pad_bias, max_tags=max_tags
        )
        with evaluation_mode(self):
            outputs = self.model(**inputs, return_dict=True)
            book = self._read_book(book_input_ids, book_mask, len(outputs.memory))
            search = _SequenceSearch(self, outputs.order_prompts.mean(dim=1), book, settings["pad_bias"])
            search.run(*_append_book(outputs, book))
        pad = self.config.tag_pad_token_id
        ranked = rank_tags(*search.tags(), settings["threshold"], settings["max_tags"], pad)
        return OpenBookGenerateOutput(**vars(ranked), copy_gate=search.mean_gates())


@dataclass
class _OpenTag:
    tokens: list[int] = field(default_factory=list)
    log_prob: float = 0.0


class _SequenceSearch:
    """Greedy search for one sequence per example."""

    def __init__(self, model: OpenBookForTagGeneration, prompts: torch.Tensor, book: Book | None, pad_bias: float):
        self.model, self.prompts, self.book, self.pad_bias = model, prompts, book, pad_bias
        self.sep, self.end = model.config.tag_sep_token_id, model.config.tag_pad_token_id
        self.finished = [[] for _ in prompts]
        self.open = [_OpenTag() for _ in prompts]
        self.gate_sums, self.steps = torch.zeros(2, len(prompts), device=prompts.device)

    def run(self, memory: torch.Tensor, memory_mask: torch.Tensor) -> None:
        decoder, device = self.model.tag_decoder, self.prompts.device
        memory_cache, cache = decoder.cache_memory(memory), DynamicCache()
        active = torch.arange(len(self.prompts), device=device)
        tokens = torch.full_like(active, self.end)
        for position in range(self.model.config.max_sequence_tokens):
            embedded = decoder.embed(self.prompts[active], torch.full_like(active, position), tokens)
            rows = SlotRows(active, len(self.prompts))
            hidden_states = decoder.step(embedded, cache, None, rows, memory_cache, memory_mask)
            book = None if self.book is None else self.book.select(active)
            log_probs, gate = self.model.next_token_log_probs(hidden_states[:, None], book)
            if gate is not None:
                self.gate_sums[active] += gate[:, 0]
                self.steps[active] += 1
            tokens = self._mask(log_probs[:, 0].clone(), active).argmax(dim=-1)
            kept = self._record(active, tokens, log_probs[:, 0].gather(1, tokens[:, None])[:, 0])
            if not len(kept):
                return
            active, tokens = active[kept], tokens[kept]
            cache.batch_select_indices(kept)

    def _mask(self, scores: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Allow the end only where a tag may begin, and [SEP] only inside a tag, where it is forced at the limit."""
        lengths = torch.tensor([len(self.open[example].tokens) for example in active.tolist()], device=scores.device)
        may_begin, is_full = lengths == 0, lengths == self.model.config.max_tag_tokens
        scores[:, self.end] = torch.where(may_begin, scores[:, self.end] + self.pad_bias, -torch.inf)
        scores[:, self.sep] = scores[:, self.sep].masked_fill(may_begin, -torch.inf)
        is_other = torch.arange(scores.shape[1], device=scores.device) != self.sep
        scores[is_full] = scores[is_full].masked_fill(is_other, -torch.inf)
        return scores

    def _record(self, active: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """Append the tokens, and return the rows of the sequences that have not ended."""
        rows = zip(active.tolist(), tokens.tolist(), log_probs.tolist(), strict=True)
        for example, token, log_prob in rows:
            tag = self.open[example]
            tag.log_prob += log_prob
            if token == self.sep:
                self.finished[example].append(tag)
                self.open[example] = _OpenTag()
            elif token != self.end:
                tag.tokens.append(token)
        return (tokens != self.end).nonzero().flatten()

    def tags(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens `[batch, 1, tags, max length]` and log-probabilities `[batch, 1, tags]`."""
        max_tags = max(max(map(len, self.finished)), 1)
        max_length = max((len(tag.tokens) for tags in self.finished for tag in tags), default=1)
        tokens = torch.full((len(self.finished), 1, max_tags, max_length), self.end)
        log_probs = torch.full((len(self.finished), 1, max_tags), -torch.inf)
        for example, tags in enumerate(self.finished):
            for index, tag in enumerate(tags):
                tokens[example, 0, index, : len(tag.tokens)] = torch.tensor(tag.tokens)
                log_probs[example, 0, index] = tag.log_prob
        return tokens.to(self.prompts.device), log_probs.to(self.prompts.device)

    def mean_gates(self) -> torch.Tensor | None:
        return None if self.book is None else self.gate_sums / self.steps.clamp(min=1)


def _append_book(outputs: OPTSGModelOutput, book: Book | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the book to the memory and its mask."""
    if book is None:
        return outputs.memory, outputs.memory_mask
    return torch.cat([outputs.memory, book.tokens], dim=1), torch.cat([outputs.memory_mask, book.mask], dim=1)


OpenBookConfig.register_for_auto_class()
OpenBookForTagGeneration.register_for_auto_class("AutoModel")
