"""Open-Book: retrieve, copy, generate. One sequence of all tags, with a gate between writing and copying."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from modeling_optsg.baselines.configuration import OpenBookConfig
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode, plain_settings
from modeling_optsg.layers import TransformerLayer
from modeling_optsg.modeling_optsg import OPTSGModel, OPTSGPreTrainedModel
from modeling_optsg.sampled_softmax import sample_classes
from modeling_optsg.tag_decoder import SlotRows, SlotSequence, TagDecoder
from modeling_optsg.tag_ranking import rank_tags


@dataclass
class OpenBookOutput(ModelOutput):
    """
    Args:
        loss: scalar, cross-entropy of the sequence's tokens under the mixture of writing and copying.
        target_log_probs: `[batch, length]`, log-probability of each token of the training sequence, 0 at filler.
        targets: `[batch, length]`, those tokens, -100 at filler.
        copy_gate: `[batch, length]`, share of the probability that is copied; `None` without a book.
        generation_loss: `loss`, by the name other generators give it.
    """

    loss: torch.Tensor | None = None
    target_log_probs: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    copy_gate: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None


@dataclass
class OpenBookGenerateOutput(OPTSGGenerateOutput):
    """
    Args:
        copy_gate: `[batch]`, the mean over an example's written tokens of the share that was copied; `None` without a
            book.
    """

    copy_gate: torch.Tensor | None = None


class TagCopier(nn.Module):
    """The pointer of the copy mechanism: where in the retrieved tags the next token stands, and whether to take it."""

    def __init__(self, config: OpenBookConfig):
        super().__init__()
        self.config = config
        self.positions = nn.Embedding(config.max_book_tokens, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layer = TransformerLayer(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate = nn.Linear(config.hidden_size, 1)

    def read(self, embedded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Book tokens `[batch, book length, width]`, embedded, as their neighbours make them understood."""
        places = torch.arange(embedded.shape[1], device=embedded.device)
        hidden_states = self.dropout(embedded + self.config.hidden_size**0.5 * self.positions(places))
        # A row without a book attends to its first filler token, which nothing reads.
        visible = mask.clone()
        visible[:, 0] |= ~mask.any(dim=1)
        hidden_states, _ = self.layer(hidden_states, visible[:, None, None, :])
        return self.norm(hidden_states)

    def point(self, hidden_states, book, book_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to copy from, `[batch, length, book length]`, and how much, the gate `[batch, length]`; both 0 for an
        example without a book. Arguments as in [`forward`]."""
        scores = self.q_proj(hidden_states) @ book.transpose(1, 2) * self.config.hidden_size**-0.5
        scores = scores.float().masked_fill(~book_mask[:, None], torch.finfo(torch.float32).min)
        has_book = book_mask.any(dim=1)[:, None]
        pointer = scores.softmax(dim=-1) * has_book[..., None]
        return pointer, self.gate(hidden_states)[..., 0].float().sigmoid() * has_book

    def forward(self, hidden_states, logits, book, book_input_ids, book_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[batch, length, width]` of the decoder; `logits`: its `[batch, length, vocabulary]`.
            book: `[batch, book length, width]`, from [`read`]; `book_input_ids`, `book_mask`: `[batch, book length]`.

        Returns:
            Log-probabilities `[batch, length, vocabulary]` of the mixture, and the gate `[batch, length]`.
        """
        pointer, gate = self.point(hidden_states, book, book_mask)
        copied = torch.zeros_like(logits, dtype=torch.float32)
        copied = copied.scatter_add(2, book_input_ids[:, None].expand(-1, logits.shape[1], -1), pointer)
        mixed = (1 - gate)[..., None] * logits.float().softmax(dim=-1) + gate[..., None] * copied
        return mixed.clamp(min=1e-20).log(), gate


class OpenBookForTagGeneration(OPTSGPreTrainedModel, GenerationMixin):
    """Retrieve-copy-generate on OP-TSG's own rooms: one slot holds the sequence `y_1 [SEP] y_2 [SEP] … [PAD]` of all
    tags, and a gate mixes the vocabulary with the tokens of the tags of similar training examples. Without a book
    (`num_book_examples=0`) it is the plain one-sequence generator.

    Retrieval is the work of a [`TagBook`]; the model takes the retrieved tags' tokens.
    """

    config_class = OpenBookConfig
    _tied_weights_keys = {"lm_head.weight": "tag_decoder.token_embeddings.weight"}

    def __init__(self, config: OpenBookConfig):
        super().__init__(config)
        self.model = OPTSGModel(config)
        self.tag_decoder = TagDecoder(config, max_slot_tokens=config.max_sequence_tokens)
        self.lm_head = nn.Linear(config.hidden_size, config.tag_vocab_size)
        self.copier = TagCopier(config) if config.num_book_examples else None
        self.post_init()
        self.generation_config = GenerationConfig(pad_bias=0.0, threshold=0.0)

    def get_input_embeddings(self):
        return self.tag_decoder.token_embeddings

    def set_input_embeddings(self, value):
        self.tag_decoder.token_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        book_input_ids: torch.Tensor | None = None,
        book_mask: torch.Tensor | None = None,
        tag_input_ids: torch.Tensor | None = None,
        tag_lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        example_seeds: torch.Tensor | None = None,
        **kwargs,
    ) -> OpenBookOutput:
        """The training loss; to write tags call `generate`.

        Args:
            pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask: see [`OPTSGModel`].
            book_input_ids: `[batch, book length]`, tokens of the retrieved tags; `book_mask`: true for real ones. An
                example may have none.
            tag_input_ids, tag_lengths, labels, example_seeds: see [`OPTSGForTagGeneration.forward`].

        Raises:
            ValueError: an example cannot be read, labels or their tags are missing, or a book is given to a model without
                one.
        """
        if labels is None or tag_input_ids is None or tag_lengths is None:
            raise ValueError("forward() needs labels, tag_input_ids and tag_lengths; to write tags call generate().")
        inputs = self.model(
            pixel_values=pixel_values,
            frame_features=frame_features,
            frame_mask=frame_mask,
            input_ids=input_ids,
            title_features=title_features,
            attention_mask=attention_mask,
            example_seeds=example_seeds,
        )
        book = self._open(book_input_ids, book_mask)
        memory, memory_mask = self._with_book(inputs, book)
        sequence = self._one_sequence(tag_input_ids, tag_lengths, labels)
        prompt = inputs.order_prompts.mean(dim=1, keepdim=True)
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

    def _target_log_probs(self, hidden_states, targets, book):
        # Sequences differ in length and the vocabulary is wide: the logits of filler, and the copied share of tokens
        # that are not asked for, would be most of the work.
        real = targets >= 0
        sampled = self.config.num_sampled_tokens if self.training else 0
        tokens, columns, correction = sample_classes(targets[real], self.config.tag_vocab_size, sampled)
        logits = self._token_logits(hidden_states[real], tokens) + correction
        written = -F.cross_entropy(logits.float(), columns, reduction="none")
        gate = None
        if book is not None:
            input_ids, mask, tokens = book
            pointer, gate = self.copier.point(hidden_states, tokens, mask)
            copied = (pointer * (input_ids[:, None] == targets[..., None])).sum(dim=-1)
            written = ((1 - gate[real]) * written.exp() + (gate * copied)[real]).clamp(min=1e-20).log()
        return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(real, written), gate

    def _token_logits(self, hidden_states, tokens=None):
        # In training the embeddings may be tied to text; the output layer's own weight would be their offsets alone.
        tied = self.tag_decoder.token_embeddings if self.config.tie_word_embeddings else self.lm_head
        weight, bias = tied.weight, self.lm_head.bias
        if tokens is None or len(tokens) == len(weight):
            return F.linear(hidden_states, weight, bias)
        return F.linear(hidden_states, weight[tokens], bias[tokens])

    def _open(self, book_input_ids, book_mask):
        """The retrieved tags as `(tokens, mask, what they mean)`, or `None`."""
        if book_input_ids is None:
            return None
        if self.copier is None:
            raise ValueError("This model has num_book_examples=0: it takes no book_input_ids.")
        if book_input_ids.shape[1] > self.config.max_book_tokens:
            raise ValueError(
                f"The retrieved tags have {book_input_ids.shape[1]} tokens; this model reads at most max_book_tokens="
                f"{self.config.max_book_tokens}."
            )
        if book_input_ids.shape[1] == 0:
            return None
        book_mask = torch.ones_like(book_input_ids) if book_mask is None else book_mask
        embedded = self.config.hidden_size**0.5 * self.tag_decoder.token_embeddings(book_input_ids)
        return book_input_ids, book_mask.bool(), self.copier.read(embedded, book_mask.bool())

    def _with_book(self, inputs, book):
        if book is None:
            return inputs.memory, inputs.memory_mask
        _, mask, tokens = book
        return torch.cat([inputs.memory, tokens], dim=1), torch.cat([inputs.memory_mask, mask], dim=1)

    def _next_token(self, hidden_states, book):
        logits = self._token_logits(hidden_states)
        if book is None:
            return logits.float().log_softmax(dim=-1), None
        input_ids, mask, tokens = book
        return self.copier(hidden_states, logits, tokens, input_ids, mask)

    def _one_sequence(self, tag_input_ids, tag_lengths, labels) -> SlotSequence:
        """All tags of an example in one slot, each ended by [SEP], the whole by [PAD]. Tags that would make it longer
        than `max_sequence_tokens` are left out."""
        sep, end, room = self.config.tag_sep_token_id, self.config.tag_pad_token_id, self.config.max_sequence_tokens
        rows = []
        for example_labels in labels.tolist():
            tags = [label for label in example_labels if label >= 0]
            if self.training and self.config.tag_order == "shuffled":
                tags = [tags[place] for place in torch.randperm(len(tags)).tolist()]
            tokens = []
            for tag in tags:
                written = tag_input_ids[tag, : tag_lengths[tag]].tolist() + [sep]
                if len(tokens) + len(written) < room:
                    tokens += written
            rows.append(tokens + [end])
        longest = max(map(len, rows))
        device = labels.device
        targets = torch.tensor([row + [-100] * (longest - len(row)) for row in rows], device=device)
        # What a position reads is the token before it; at 0 stands the prompt.
        input_ids = torch.cat([targets.new_full((len(rows), 1), end), targets[:, :-1].clamp(min=0)], dim=1)
        return SlotSequence(
            input_ids=input_ids,
            targets=targets,
            slot=torch.zeros_like(targets),
            position=torch.arange(longest, device=device).expand(len(rows), -1),
            valid=targets >= 0,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        book_input_ids: torch.Tensor | None = None,
        book_mask: torch.Tensor | None = None,
        *,
        threshold: float | None = None,
        pad_bias: float | None = None,
        max_tags: int | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> OpenBookGenerateOutput:
        """Writes each example's tags greedily, one sequence an example.

        A tag's score is the product of its tokens' probabilities given all tags before it; a tag written twice is
        listed once, with the larger.

        Args:
            pixel_values, …, attention_mask, book_input_ids, book_mask: see [`forward`].
            threshold: tags with a smaller probability are left out.
            pad_bias: added to the logit of the sequence's end where a tag may begin.
            max_tags: at most so many tags an example.
            generation_config: instead of the model's.
        """
        settings = plain_settings(self, generation_config, threshold=threshold, pad_bias=pad_bias, max_tags=max_tags)
        with evaluation_mode(self):
            inputs = self.model(
                pixel_values=pixel_values,
                frame_features=frame_features,
                frame_mask=frame_mask,
                input_ids=input_ids,
                title_features=title_features,
                attention_mask=attention_mask,
            )
            book = self._open(book_input_ids, book_mask)
            memory, memory_mask = self._with_book(inputs, book)
            written, gates = self._write_sequences(
                inputs.order_prompts.mean(dim=1), memory, memory_mask, book, settings["pad_bias"]
            )
        tokens, log_probs = self._pack(written, memory.device)
        collected = rank_tags(
            tokens[:, None],
            log_probs[:, None],
            settings["threshold"],
            settings["max_tags"],
            self.config.tag_pad_token_id,
        )
        return OpenBookGenerateOutput(**vars(collected), copy_gate=gates)

    def _write_sequences(self, prompts, memory, memory_mask, book, pad_bias):
        """For each example its tags as `(tokens, log-probability)`, and the mean copy gate."""
        config, decoder = self.config, self.tag_decoder
        sep, end, batch = config.tag_sep_token_id, config.tag_pad_token_id, len(prompts)
        device = prompts.device
        examples = torch.arange(batch, device=device)
        keys_values = decoder.memory_keys_values(memory)
        cache = [None] * len(decoder.layers)
        token = torch.full((batch,), end, device=device)
        open_tags, open_log_probs = [[] for _ in range(batch)], [0.0] * batch
        written = [[] for _ in range(batch)]
        gate_sums, steps = torch.zeros(batch, device=device), torch.zeros(batch, device=device)
        active = examples
        for place in range(config.max_sequence_tokens):
            rows = SlotRows(active, batch)
            position = torch.full_like(active, place)
            embedded = decoder.embed(prompts[active], position, token)
            hidden_states = decoder.step(embedded, cache, None, rows, keys_values, memory_mask)[:, None]
            log_probs, gate = self._next_token(hidden_states, _rows(book, active))
            log_probs = log_probs[:, 0]
            if gate is not None:
                gate_sums[active] += gate[:, 0]
                steps[active] += 1
            scores = log_probs.clone()
            fresh = torch.tensor([not open_tags[example] for example in active.tolist()], device=device)
            longest = torch.tensor(
                [len(open_tags[example]) == config.max_tag_tokens for example in active.tolist()], device=device
            )
            scores[:, end] = torch.where(fresh, scores[:, end] + pad_bias, -torch.inf)
            scores[:, sep] = scores[:, sep].masked_fill(fresh, -torch.inf)
            scores[longest] = scores[longest].masked_fill(
                torch.arange(scores.shape[1], device=device) != sep, -torch.inf
            )
            token = scores.argmax(dim=-1)
            gained = log_probs.gather(1, token[:, None])[:, 0].tolist()
            going_on = []
            for row, (example, drawn) in enumerate(zip(active.tolist(), token.tolist())):
                open_log_probs[example] += gained[row]
                if drawn == sep:
                    written[example].append((open_tags[example], open_log_probs[example]))
                    open_tags[example], open_log_probs[example] = [], 0.0
                elif drawn != end:
                    open_tags[example].append(drawn)
                if drawn != end:
                    going_on.append(row)
            if not going_on:
                break
            kept = torch.tensor(going_on, device=device)
            active, token = active[kept], token[kept]
            cache = [(key[kept], value[kept]) for key, value in cache]
        return written, gate_sums / steps.clamp(min=1) if book is not None else None

    def _pack(self, written, device):
        most = max(max(map(len, written)), 1)
        longest = max((len(tokens) for tags in written for tokens, _ in tags), default=1)
        packed = torch.full((len(written), most, longest), self.config.tag_pad_token_id)
        log_probs = torch.full((len(written), most), -torch.inf)
        for example, tags in enumerate(written):
            for place, (tokens, log_prob) in enumerate(tags):
                packed[example, place, : len(tokens)] = torch.tensor(tokens)
                log_probs[example, place] = log_prob
        return packed.to(device), log_probs.to(device)


def _rows(book, rows: torch.Tensor):
    return None if book is None else tuple(part[rows] for part in book)


OpenBookConfig.register_for_auto_class()
OpenBookForTagGeneration.register_for_auto_class("AutoModel")

__all__ = ["OpenBookForTagGeneration", "OpenBookGenerateOutput", "OpenBookOutput"]
