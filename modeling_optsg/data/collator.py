"""Batches for training: examples in, tensors out, each tag of a batch once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass
class TagTable:
    """Training tags with all that is known of them in advance.

    Args:
        tags: the tags, each once.
        input_ids: token ids of each under the tag tokenizer, without [SEP].
        features: `[tags, text width]`, pooled text-tower features (so: the text tower is frozen).
    """

    tags: Sequence[str]
    input_ids: Sequence[Sequence[int]]
    features: torch.Tensor

    def __post_init__(self):
        self.index = {tag: index for index, tag in enumerate(self.tags)}


class OPTSGDataCollator:
    """Makes batches of examples for `OPTSGForTagGeneration.forward`, in a training loop or in `transformers.Trainer`
    (with `remove_unused_columns=False`).

    An example is a mapping with any of `image`, `video` or `frame_features` (`[frames, width]` or
    `[frames, tokens, width]`), `title` or `title_features` (`[length, text width]`), and `tags`; `None`, or a blank
    title, stands for what it does not have. Of an example with more tags than prompts a random `num_prompts` are taken
    each time; how often that happened is in `oversized_examples` (of the process at hand: workers of a data loader count
    their own) and is logged.

    Where every example has an `example_seed` (a whole number), its tags are chosen by that, and the batch's negatives by the
    first one's: the same whatever the process or worker. The seeds are in the batch as `example_seeds`, for what the
    model draws.

    Args:
        processor: an [`OPTSGProcessor`].
        tag_table: tags known in advance; without it tags are tokenised batch by batch.
        num_negatives: with a table, so many random training tags are added to the batch's as
            negatives of the alignment.
        seed: of the sampling of tags and negatives.
        max_book_tokens: most tokens of an example's `book_tags`, the tag lists of its neighbours, nearest first, for a
            model with a book. Examples without the column make batches without a book.

    Raises:
        ValueError: an example has nothing to look at, or the tags of some are missing, empty or not in the table; some
            examples have features and others what they are made of; features differ in width.
    """

    def __init__(
        self,
        processor,
        tag_table: TagTable | None = None,
        num_negatives: int = 0,
        seed: int = 0,
        max_book_tokens: int | None = None,
    ):
        if num_negatives and tag_table is None:
            raise ValueError(f"num_negatives={num_negatives} needs a tag_table to take them from.")
        self.processor = processor
        self.tag_table = tag_table
        self.num_negatives = num_negatives
        self.seed = seed
        self.random = np.random.default_rng(seed)
        self.oversized_examples = 0
        self.max_book_tokens = max_book_tokens
        self._worker_seed = None

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        seeds = [example.get("example_seed") for example in examples]
        if None in seeds:
            self._seed_worker()
            randoms = [self.random] * len(examples)
        else:
            randoms = [np.random.default_rng(seed) for seed in seeds]
            self.random = randoms[0]
        tags = self._tag_sets(examples, randoms)
        batch = self._precomputed(examples)
        raw = self._raw(examples, batch)
        if not batch:
            batch = dict(self.processor(**raw))
        elif raw:
            # The processor refuses an example that has nothing; here its features may be all it has.
            rows = [row for row in range(len(examples)) if any(_is_given(values[row]) for values in raw.values())]
            encoded = self.processor(**{name: [values[row] for row in rows] for name, values in raw.items()})
            for name, tensor in encoded.items():
                batch[name] = tensor.new_zeros(len(examples), *tensor.shape[1:])
                batch[name][rows] = tensor
        if tags is not None:
            batch |= self._encode_tags(tags)
        if self.max_book_tokens is not None and any("book_tags" in example for example in examples):
            retrieved = [example.get("book_tags") or [] for example in examples]
            batch |= encode_book(retrieved, self.processor.tag_tokenizer, self.max_book_tokens)
        if None not in seeds:
            batch["example_seeds"] = torch.tensor(seeds)
        return batch

    def _seed_worker(self) -> None:
        # Every epoch a loader's workers start from copies of this object, which would all draw the same.
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.random = np.random.default_rng([self.seed, worker.seed])

    def _tag_sets(self, examples, randoms) -> list[list[str]] | None:
        if not any("tags" in example for example in examples):
            return None
        for index, example in enumerate(examples):
            if isinstance(example.get("tags"), str) or not example.get("tags"):
                raise ValueError(
                    f"Example {index} of the batch has tags={example.get('tags')!r}; expected a list of at least one. "
                    "Leave examples without tags out of the training data."
                )
        return [
            self._sample(list(dict.fromkeys(example["tags"])), random) for example, random in zip(examples, randoms)
        ]

    def _sample(self, tags: list[str], random: np.random.Generator) -> list[str]:
        most = self.processor.num_prompts
        if len(tags) <= most:
            return tags
        self.oversized_examples += 1
        if self.oversized_examples == 1:
            logger.warning(
                f"An example has {len(tags)} tags, more than the {most} prompts: a random {most} are used each time. "
                "Further ones are counted in `oversized_examples`."
            )
        return [tags[index] for index in random.choice(len(tags), most, replace=False)]

    def _precomputed(self, examples) -> dict[str, torch.Tensor]:
        batch = {}
        for name, mask_name in (("frame_features", "frame_mask"), ("title_features", "attention_mask")):
            given = [example.get(name) for example in examples]
            if all(features is None for features in given):
                continue
            arrays = [None if f is None else np.asarray(f, dtype=np.float32) for f in given]
            if name == "frame_features":
                arrays = [a[:, None] if a is not None and a.ndim == 2 else a for a in arrays]
            shapes = {a.shape[1:] for a in arrays if a is not None}
            if len(shapes) > 1:
                raise ValueError(f"The {name} of a batch differ in shape: {sorted(shapes)}.")
            lengths = [0 if a is None else len(a) for a in arrays]
            padded = np.zeros((len(examples), max(lengths), *next(iter(shapes))), np.float32)
            for row, array in zip(padded, arrays):
                if array is not None:
                    row[: len(array)] = array
            batch[name] = torch.from_numpy(padded)
            batch[mask_name] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return batch

    def _raw(self, examples, precomputed) -> dict[str, list]:
        """What the processor is to read, by the name of its argument."""
        raw = {}
        sources = {"images": ("image", "frame_features"), "videos": ("video", "frame_features")}
        for argument, (name, features) in (sources | {"titles": ("title", "title_features")}).items():
            values = [example.get(name) for example in examples]
            if features not in precomputed:
                if any(map(_is_given, values)):
                    raw[argument] = values
                continue
            for index, value in enumerate(values):
                if _is_given(value) and examples[index].get(features) is None:
                    raise ValueError(
                        f"Example {index} of the batch has {name}={value!r} but no {features}, which other examples have."
                    )
        return raw

    def _encode_tags(self, tags: list[list[str]]) -> dict[str, torch.Tensor]:
        index = {}
        labels = [[index.setdefault(tag, len(index)) for tag in example_tags] for example_tags in tags]
        encode = self.processor.encode_tags if self.tag_table is None else self._look_up_tags
        return encode(list(index)) | {"labels": _padded(labels, -100)}

    def _look_up_tags(self, tags: list[str]) -> dict[str, torch.Tensor]:
        table = self.tag_table
        if unknown := [tag for tag in tags if tag not in table.index]:
            raise ValueError(f"The tag table lacks {unknown[:5]}; build it from all tags of the training examples.")
        rows = [table.index[tag] for tag in tags]
        candidates = rows
        if self.num_negatives:
            drawn = self.random.choice(len(table.tags), min(self.num_negatives, len(table.tags)), replace=False)
            used = set(rows)
            candidates = rows + [row for row in drawn.tolist() if row not in used]
        input_ids = [table.input_ids[row] for row in rows]
        return {
            "tag_input_ids": _padded(input_ids, 0),
            "tag_lengths": torch.tensor([len(ids) for ids in input_ids]),
            "tag_features": table.features[candidates].float(),
            "tag_ids": torch.tensor(rows),
        }


def encode_book(
    retrieved: Sequence[Sequence[Sequence[str]]], tag_tokenizer, max_tokens: int
) -> dict[str, torch.Tensor]:
    """Retrieved tags as tokens, nearest neighbour first, each tag ended by [SEP].

    A tag several neighbours have is there as often: the pointer adds the copies up, which is their vote. Tags that do
    not fit are left out, the farthest first.

    Args:
        retrieved: for each example its neighbours' tag lists.
        max_tokens: most tokens of an example.

    Returns:
        `book_input_ids` and `book_mask`, `[examples, longest]`.
    """
    unique = {tag: None for neighbours in retrieved for tags in neighbours for tag in tags}
    if unique:
        ids = tag_tokenizer(list(unique), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        unique = dict(zip(unique, ids))
    rows = []
    for neighbours in retrieved:
        row = []
        for written in (unique[tag] + [tag_tokenizer.sep_token_id] for tags in neighbours for tag in tags):
            if len(row) + len(written) > max_tokens:
                break
            row += written
        rows.append(row)
    return {
        "book_input_ids": _padded(rows, tag_tokenizer.pad_token_id),
        "book_mask": _padded([[1] * len(row) for row in rows], 0).bool(),
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Lists of numbers as the rows of one tensor; from one list of them, which is many times faster than tensors."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


def _is_given(value) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())
