"""Parallel decoding with an exported decoding step: beam search inside slots, with a bound of the tags' scores.

The same search as that of `modeling_optsg.slot_search` and `modeling_optsg.score_bound`, in numpy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..without_torch.tag_merging import MIN_SLOT_PROBABILITY, ClassifierOutput

# As in `modeling_optsg.score_bound`.
MAX_THRESHOLD, TOLERANCE, MIN_RATIO = 0.99, 1e-3, 0.1
Program = Callable[..., dict[str, np.ndarray]]


class SortedTags:
    """The label vocabulary sorted by tokens, in which the tags with a prefix are neighbours.

    Args:
        tags: Token ids of each class.
        max_length: Maximum number of tokens.
    """

    def __init__(self, tags: Sequence[Sequence[int]], max_length: int):
        rows = np.zeros((len(tags), max_length), ">u4")
        for row, tag in zip(rows, tags):
            row[: len(tag)] = tag
        keys = rows.view(f"S{rows.itemsize * max_length}")[:, 0]
        self.order = np.argsort(keys)
        self.keys = keys[self.order]

    def find(self, prefixes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last position plus one, in sorted order, of tags with prefixes `[rows, length]`."""
        keys = np.ascontiguousarray(prefixes, ">u4").view(f"S{4 * prefixes.shape[1]}")[:, 0]
        rest = b"\xff" * (self.keys.itemsize - keys.itemsize)
        padded = [key.ljust(keys.itemsize, b"\0") + rest for key in keys.tolist()]
        return np.searchsorted(self.keys, keys), np.searchsorted(self.keys, np.array(padded), side="right")


class ScoreBound:
    """Tells which hypotheses can still become tags that reach the threshold of their example.

    Args:
        thresholds: Threshold of each example.
        classifier: The tag classifier's output. Without fusion weights, a score is the slots' probability.
        tags: The label vocabulary, given with fusion weights.
    """

    def __init__(self, thresholds: Sequence[float], classifier: ClassifierOutput | None, tags: SortedTags | None):
        fused = classifier is not None and classifier.fusion_weights is not None
        weights = classifier.fusion_weights if fused else [(1.0, 0.0, 0.0, 1.0, 0.0)] * len(thresholds)
        self.weights = np.array(weights, np.float32)
        with np.errstate(divide="ignore"):
            self.min_logits = _logit(np.minimum(thresholds, MAX_THRESHOLD)).astype(np.float32) - TOLERANCE
        # The largest logit bounds the score only if its weight is not negative.
        self.min_logits[self.weights[:, 1] < 0] = -np.inf
        self.tags = tags if fused else None
        self.logits = classifier.logits[:, tags.order] if fused else None

    def can_reach(self, examples: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """Return which hypotheses can reach the threshold and matter for their tag's probability, boolean `[rows]`.

        Args:
            examples: `[rows]`, the example of each hypothesis.
            tokens: `[rows, length]`, all unfinished hypotheses of these examples, which have the same length.
            log_probs: `[rows]`, their log-probabilities.
        """
        prefixes = np.concatenate([examples[:, None], tokens], axis=1)
        prefixes, same = np.unique(prefixes, axis=0, return_inverse=True)
        same = same.reshape(-1)
        owners, missed = prefixes[:, 0], np.zeros(len(prefixes), np.float32)
        np.add.at(missed, same, np.log1p(-np.minimum(np.exp(log_probs), np.float32(1 - 1e-7))))
        largest = _logit(np.clip(1 - np.exp(missed), MIN_SLOT_PROBABILITY, 1 - MIN_SLOT_PROBABILITY))
        smallest = _logit(MIN_SLOT_PROBABILITY)
        slot_weight, classifier_weight, bias, novel_weight, novel_bias = self.weights[owners].T
        best = np.maximum(novel_weight * largest, novel_weight * smallest) + novel_bias
        if self.tags is not None:
            slots = np.maximum(slot_weight * largest, slot_weight * smallest)
            starts, ends = self.tags.find(prefixes[:, 1:])
            spans = zip(owners, starts, ends)
            logits = [self.logits[row, start:end].max() if end > start else -np.inf for row, start, end in spans]
            known = slots + classifier_weight * np.maximum(logits, -1e30) + bias
            best = np.maximum(best, np.where(ends > starts, known, -np.inf))
        likeliest = np.full(len(prefixes), -np.inf, np.float32)
        np.maximum.at(likeliest, same, log_probs)
        reaches = best >= self.min_logits[owners]
        return reaches[same] & (log_probs >= likeliest[same] + math.log(MIN_RATIO))


def _logit(probability: np.ndarray | float) -> np.ndarray:
    return np.log(probability / (1 - probability))


@dataclass
class _Hypotheses:
    """The hypotheses of all slots, `[slots, hypotheses]` each; their tokens are `[slots, hypotheses, max tokens]`.

    `log_probs` are the model's own and `ranking` those that rank beams, -inf for a hypothesis that is not a tag.
    `cells` says where keys and values of a hypothesis are in the output of the last step.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    ranking: np.ndarray
    finished: np.ndarray
    lengths: np.ndarray
    cells: np.ndarray

    def drop(self, where: np.ndarray) -> None:
        self.log_probs[where] = self.ranking[where] = -np.inf
        self.finished[where] = True


class SlotSearch:
    """Generates the tags of slots.

    Args:
        step: The decoding step.
        settings: The settings of the exported model.
        memory: Order prompts, and keys, values and mask of the memory, from the encoder.
        bound: Drops hypotheses that cannot reach the threshold; `None` to keep all.
    """

    def __init__(
        self, step: Program, settings: dict[str, Any], memory: dict[str, np.ndarray], bound: ScoreBound | None
    ):
        self.step, self.bound = step, bound
        self.prompts = memory["order_prompts"]
        self.memory = {name: memory[name] for name in ("memory_keys", "memory_values", "memory_mask")}
        self.pad, self.sep = settings["pad_token_id"], settings["sep_token_id"]
        self.max_tokens, generation = settings["max_tag_tokens"], settings["generation"]
        self.width, self.pad_bias = generation["num_beams"], generation["pad_bias"]
        self.length_penalty = generation["length_penalty"] if self.width > 1 else 0.0
        least = generation["min_beam_probability"]
        self.min_log_probability = math.log(least) if least else -math.inf

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hypotheses of all slots.

        Returns:
            Tokens `[batch, slots, hypotheses, max tokens]` and log-probabilities `[batch, slots, hypotheses]`.
        """
        batch, slots = self.prompts.shape[:2]
        hypotheses, states = self._start()
        for length in range(1, self.max_tokens + 1):
            rows, columns = (~hypotheses.finished).nonzero()
            if self.bound is not None and len(rows):
                tokens, log_probs = hypotheses.tokens[rows, columns, :length], hypotheses.log_probs[rows, columns]
                kept = self.bound.can_reach(rows // slots, tokens, log_probs)
                # They keep their ranking and so their places in the beam.
                hypotheses.log_probs[rows[~kept], columns[~kept]] = -np.inf
                hypotheses.finished[rows[~kept], columns[~kept]] = True
                rows, columns = rows[kept], columns[kept]
            if not len(rows):
                break
            found, states, cells = self._decode(hypotheses, states, rows, columns, length)
            self._extend(hypotheses, rows, columns, found, cells, length)
        tokens = np.where(np.isneginf(hypotheses.log_probs)[..., None], self.pad, hypotheses.tokens)
        shape = (batch, slots, self.width)
        return tokens.reshape(*shape, -1), hypotheses.log_probs.reshape(shape)

    def _start(self) -> tuple[_Hypotheses, tuple[np.ndarray, np.ndarray]]:
        """Decode the prompts and choose the first tokens. Slots in which [PAD] wins are finished."""
        batch, slots, _ = self.prompts.shape
        layers, _, heads, _, size = self.memory["memory_keys"].shape
        nothing = np.zeros((layers, batch, slots, heads, 0, size), np.float32)
        found = self._run_step(0, self.prompts, np.zeros((batch, slots), np.int64), nothing, nothing)
        states = found.pop("next_keys"), found.pop("next_values")
        found = {name: values.reshape(batch * slots, *values.shape[2:]) for name, values in found.items()}
        ranking, normalizer = found["log_probs"][:, : self.width], found["normalizer"][:, None]
        pad_logits, sep_logits = found["pad_logits"][:, None], found["sep_logits"][:, None]
        everything = np.logaddexp(np.logaddexp(normalizer, pad_logits), sep_logits)
        tokens = np.full((len(ranking), self.width, self.max_tokens), self.pad, np.int64)
        tokens[..., 0] = found["tokens"][:, : self.width]
        hypotheses = _Hypotheses(
            tokens=tokens,
            log_probs=ranking + (normalizer - everything),
            ranking=ranking.copy(),
            finished=np.zeros(ranking.shape, bool),
            lengths=np.ones(ranking.shape, np.int64),
            cells=np.repeat(np.arange(len(ranking))[:, None], self.width, axis=1),
        )
        is_tag = ranking[:, :1] + normalizer > pad_logits + self.pad_bias
        hypotheses.drop(~is_tag | self._is_too_unlikely(hypotheses.log_probs))
        return hypotheses, states

    def _decode(
        self,
        hypotheses: _Hypotheses,
        states: tuple[np.ndarray, np.ndarray],
        rows: np.ndarray,
        columns: np.ndarray,
        length: int,
    ) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Decode the last tokens of hypotheses.

        Returns:
            The scores of their next tokens, `[rows, ...]`; keys and values; and the cell of each row in these.
        """
        batch, slots, _ = self.prompts.shape
        examples = rows // slots
        # The hypotheses of an example lie side by side. Where it has fewer, the first row is decoded again.
        counts = np.bincount(examples, minlength=batch)
        number = counts.max()
        cells = examples * number + np.arange(len(rows)) - (counts.cumsum() - counts)[examples]
        index = np.zeros(batch * number, np.int64)
        index[cells] = np.arange(len(rows))
        prompts = self.prompts.reshape(batch * slots, -1)[rows[index]].reshape(batch, number, -1)
        input_ids = hypotheses.tokens[rows, columns, length - 1][index].reshape(batch, number)
        from_cells = hypotheses.cells[rows, columns][index]
        keys, values = (
            part.reshape(len(part), -1, *part.shape[3:])[:, from_cells].reshape(
                len(part), batch, number, *part.shape[3:]
            )
            for part in states
        )
        found = self._run_step(length, prompts, input_ids, keys, values)
        states = found.pop("next_keys"), found.pop("next_values")
        found = {name: values.reshape(batch * number, *values.shape[2:])[cells] for name, values in found.items()}
        return found, states, cells

    def _run_step(
        self, position: int, prompts: np.ndarray, input_ids: np.ndarray, keys: np.ndarray, values: np.ndarray
    ) -> dict[str, np.ndarray]:
        return self.step(
            prompts=prompts,
            position=np.array([position]),
            input_ids=input_ids,
            keys=keys,
            values=values,
            **self.memory,
        )

    def _extend(
        self,
        hypotheses: _Hypotheses,
        rows: np.ndarray,
        columns: np.ndarray,
        found: dict[str, np.ndarray],
        cells: np.ndarray,
        length: int,
    ) -> None:
        """Choose the best continuations among all beams of each slot that has unfinished ones.

        The candidates of a beam are its best tokens other than [SEP], and [SEP], which adds no length. A finished beam
        has one candidate, itself, under [SEP].
        """
        log_probs, ranking, tokens = self._candidates(found, length)
        ranking = ranking + hypotheses.ranking[rows, columns][:, None]
        open_slots, place = np.unique(rows, return_inverse=True)
        own = {name: value[open_slots] for name, value in vars(hypotheses).items()}
        grid = (len(open_slots), self.width, self.width + 1)
        all_ranking = np.full(grid, -np.inf, np.float32)
        all_ranking[:, :, -1] = np.where(own["finished"], own["ranking"], -np.inf)
        all_ranking[place, columns] = ranking
        all_tokens = np.full(grid, self.sep)
        all_tokens[place, columns] = tokens
        all_log_probs = np.zeros(grid, np.float32)
        all_log_probs[place, columns] = log_probs
        penalised = all_ranking
        if self.length_penalty:
            lengths = np.repeat(own["lengths"][..., None] + 1, self.width + 1, axis=2)
            lengths[:, :, -1] -= 1
            penalised = all_ranking / lengths**self.length_penalty
        best = np.argsort(-penalised.reshape(len(open_slots), -1), axis=1, kind="stable")[:, : self.width]
        parents, slots = best // (self.width + 1), np.arange(len(open_slots))[:, None]
        chosen, added, kept = (
            values.reshape(len(open_slots), -1)[slots, best] for values in (all_tokens, all_log_probs, all_ranking)
        )
        own_cells = own["cells"].copy()
        own_cells[place, columns] = cells
        finished = own["finished"][slots, parents] | (chosen == self.sep)
        new = _Hypotheses(
            tokens=own["tokens"][slots, parents],
            log_probs=own["log_probs"][slots, parents] + added,
            ranking=kept,
            finished=finished,
            lengths=own["lengths"][slots, parents] + ~finished,
            cells=own_cells[slots, parents],
        )
        if length < self.max_tokens:
            new.tokens[..., length] = np.where(finished, self.pad, chosen)
        new.drop(np.isneginf(kept) | self._is_too_unlikely(new.log_probs))
        for name, value in vars(new).items():
            getattr(hypotheses, name)[open_slots] = value

    def _candidates(self, found: dict[str, np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return log-probabilities, ranking and tokens of the next tokens, [SEP] last, `[rows, hypotheses + 1]`."""
        others, sep_logits = found["normalizer"][:, None], found["sep_logits"][:, None]
        possible = np.logaddexp(others, sep_logits)
        everything = np.logaddexp(possible, found["pad_logits"][:, None])
        logits = np.concatenate([found["log_probs"][:, : self.width] + others, sep_logits], axis=1)
        tokens = np.concatenate([found["tokens"][:, : self.width], np.full(sep_logits.shape, self.sep)], axis=1)
        ranking = logits - possible
        if length == self.max_tokens:
            ranking[:, :-1], ranking[:, -1] = -np.inf, 0.0
        return logits - everything, ranking, tokens

    def _is_too_unlikely(self, log_probs: np.ndarray) -> np.ndarray:
        """Return which hypotheses of `[slots, hypotheses]` are too unlikely; never the first, nor a dropped one."""
        is_unlikely = (log_probs < self.min_log_probability) & ~np.isneginf(log_probs)
        return is_unlikely & (np.arange(log_probs.shape[1]) > 0)
