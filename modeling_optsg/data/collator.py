"""The data collator, which converts examples to tensors for training or generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers.utils import logging

from modeling_optsg.batch_tags import NO_LABEL
from modeling_optsg.processing_optsg import OPTSGProcessor

logger = logging.get_logger(__name__)

# Frame features replace any visual input, and title features replace the title.
FEATURE_MASKS = {"frame_features": "frame_mask", "title_features": "attention_mask"}
PROCESSOR_ARGUMENTS = {
    "images": ("image", "frame_features"),
    "videos": ("video", "frame_features"),
    "titles": ("title", "title_features"),
}


@dataclass
class TagTable:
    """Training tags with their tokens and text features, computed once.

    Args:
        tags: N tags, each once.
        input_ids: Token ids of each tag under the tag tokenizer, without [SEP].
        features: `[N, text width]`, pooled features of a frozen text tower.
    """

    tags: Sequence[str]
    input_ids: Sequence[Sequence[int]]
    features: torch.Tensor

    def __post_init__(self) -> None:
        self.index = {tag: index for index, tag in enumerate(self.tags)}
        # Also a row of padding.
        width = max(map(len, self.input_ids), default=1)
        self.labels = pad_rows([*self.input_ids, [NO_LABEL] * width], NO_LABEL)
        self._rows = {tuple(ids): row for row, ids in enumerate(self.input_ids)}

    def rows_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows `[batch, max tags]` of tags `[batch, max tags, length]`, both with -100 for padding."""
        tags = [tuple(token for token in tag if token >= 0) for tag in labels.flatten(0, 1).tolist()]
        return torch.tensor([self._rows[tag] if tag else NO_LABEL for tag in tags]).view(labels.shape[:2])

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the labels and the features of tags.

        Args:
            rows: `[batch, max tags]`, -1 for padding.

        Returns:
            `labels` `[batch, max tags, max length]`, -100 for padding, and `features`
            `[batch, max tags, text width]`, 0 for padding.
        """
        features = self.features[rows.clamp(min=0)].float() * (rows >= 0)[..., None]
        return {"labels": self.labels[rows], "features": features}


class OPTSGDataCollator:
    """Collates examples into a batch for `OPTSGForTagGeneration.forward` or `generate`.

    It works in a training loop and in `transformers.Trainer` (with `remove_unused_columns=False`). Every tensor has
    the examples in its first dimension, so that launchers can divide a batch among processes or devices.

    An example is a mapping with any of these columns. `None` or a blank title stands for a missing value:

    - `image`, `video` or `frame_features` (`[frames, width]` or `[frames, tokens, width]`);
    - `title` or `title_features` (`[length, text width]`);
    - `image_features` (`[image_feature_size]`), which come with `frame_features`;
    - `is_mismatched`, whether the image belongs to another example;
    - `tags`. If an example has more tags than there are prompts, `num_prompts` random tags are used each time;
    - `book_input_ids`, tokens of retrieved tags for the open-book baseline;
    - `example_seed`, an integer. If every example has one, it is the seed for sampling the tags of the example. The
      negatives of the batch are sampled with the seed of the first example. A batch is then the same in any process or
      worker. It contains `example_seeds`, from which the model seeds its own random choices.

    Args:
        processor: The model's processor.
        tag_table: All training tags. Without it, the tags of each batch are tokenised.
        num_negatives: Number of random training tags from the table that are added to the tags of the batch as
            negatives of the alignment. They are divided among its examples.
        seed: Seed for sampling tags and negatives of examples without an `example_seed`.

    Attributes:
        oversized_examples: Number of times that an example had too many tags. Each process and each data loader
            worker has its own count.

    Raises:
        ValueError: An example has no input; tags are missing, empty or not in the table; some examples have features
            and others raw inputs; or features differ in width.

    Example:

        >>> from modeling_optsg import OPTSGDataCollator, OPTSGProcessor
        >>> collate = OPTSGDataCollator(OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small"))
        >>> batch = collate([{"title": "tent tree", "tags": ["tent", "camping"]}, {"title": "bus", "tags": ["bus"]}])
        >>> batch["labels"].shape
        torch.Size([2, 2, 16])
        >>> [[tag["tag"] for tag in tags] for tags in collate.processor.batch_decode(batch["labels"])]
        [['tent', 'camping'], ['bus']]
    """

    def __init__(
        self,
        processor: OPTSGProcessor,
        tag_table: TagTable | None = None,
        num_negatives: int = 0,
        seed: int = 0,
    ) -> None:
        if num_negatives and tag_table is None:
            raise ValueError(f"num_negatives={num_negatives} needs a tag_table to sample them from.")
        self.processor = processor
        self.tag_table = tag_table
        self.num_negatives = num_negatives
        self.seed = seed
        self.random = np.random.default_rng(seed)
        self.oversized_examples = 0
        self._worker_seed = None

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Collates examples into a batch. See the class for their columns and the errors."""
        seeds = [example.get("example_seed") for example in examples]
        if None in seeds:
            self._seed_worker()
            randoms = [self.random] * len(examples)
        else:
            randoms = [np.random.default_rng(seed) for seed in seeds]
            self.random = randoms[0]
        tags = self._sample_tag_sets(examples, randoms)
        batch = _pad_features(examples)
        batch |= self._process_raw_inputs(examples, batch)
        if any(example.get("image_features") is not None for example in examples):
            batch["image_features"] = _stack_features([example.get("image_features") for example in examples])
        if any("is_mismatched" in example for example in examples):
            batch["is_mismatched"] = torch.tensor([bool(example.get("is_mismatched")) for example in examples])
        if tags is not None:
            batch |= self._encode_tags(tags)
        if any("book_input_ids" in example for example in examples):
            rows = [example.get("book_input_ids") or [] for example in examples]
            batch["book_input_ids"] = pad_rows(rows, self.processor.tag_tokenizer.pad_token_id)
            batch["book_mask"] = pad_rows([[1] * len(row) for row in rows], 0).bool()
        if None not in seeds:
            batch["example_seeds"] = torch.tensor(seeds)
        return batch

    def _seed_worker(self) -> None:
        # A data loader copies this object to its workers at the start of every epoch. Without separate seeds, all
        # copies would make the same random choices.
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.random = np.random.default_rng([self.seed, worker.seed])

    def _sample_tag_sets(
        self, examples: Sequence[Mapping], randoms: Sequence[np.random.Generator]
    ) -> list[list[str]] | None:
        if not any("tags" in example for example in examples):
            return None
        for index, example in enumerate(examples):
            if isinstance(example.get("tags"), str) or not example.get("tags"):
                raise ValueError(
                    f"Example {index} of the batch has tags={example.get('tags')!r}; expected a list of at least one. "
                    "Leave examples without tags out of the training data."
                )
        return [
            self._sample_tags(list(dict.fromkeys(example["tags"])), random)
            for example, random in zip(examples, randoms)
        ]

    def _sample_tags(self, tags: list[str], random: np.random.Generator) -> list[str]:
        max_tags = self.processor.num_prompts
        if len(tags) <= max_tags:
            return tags
        self.oversized_examples += 1
        if self.oversized_examples == 1:
            logger.warning(
                f"An example has {len(tags)} tags, more than the {max_tags} prompts: a random {max_tags} are used each"
                " time. `oversized_examples` counts such examples."
            )
        return [tags[index] for index in random.choice(len(tags), max_tags, replace=False)]

    def _process_raw_inputs(
        self, examples: Sequence[Mapping], features: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Run the processor on the inputs for which the batch has no features."""
        inputs = {}
        for argument, (column, feature_column) in PROCESSOR_ARGUMENTS.items():
            values = [example.get(column) for example in examples]
            if feature_column in features:
                _check_features(examples, column, feature_column)
            elif any(map(is_present, values)):
                inputs[argument] = values
        if not features:
            return dict(self.processor(**inputs))
        if not inputs:
            return {}
        # The processor rejects examples without inputs, but an example with features needs no other inputs.
        rows = [row for row in range(len(examples)) if any(is_present(values[row]) for values in inputs.values())]
        processed = self.processor(**{name: [values[row] for row in rows] for name, values in inputs.items()})
        padded = {}
        for name, tensor in processed.items():
            padded[name] = tensor.new_zeros(len(examples), *tensor.shape[1:])
            padded[name][rows] = tensor
        return padded

    def _encode_tags(self, tags: list[list[str]]) -> dict[str, torch.Tensor]:
        table = self.tag_table
        if table is None:
            return self.processor.encode_tag_sets(tags)
        different = dict.fromkeys(tag for example_tags in tags for tag in example_tags)
        if unknown := [tag for tag in different if tag not in table.index]:
            raise ValueError(f"The tag table lacks {unknown[:5]}; build it from all tags of the training examples.")
        encoded = table.encode(pad_rows([[table.index[tag] for tag in example_tags] for example_tags in tags], -1))
        batch = {"labels": self._pad_labels(encoded["labels"]), "tag_features": encoded["features"]}
        if self.num_negatives:
            drawn = self.random.choice(len(table.tags), min(self.num_negatives, len(table.tags)), replace=False)
            used = {table.index[tag] for tag in different}
            drawn = [row for row in drawn.tolist() if row not in used]
            length = -(-len(drawn) // len(tags))
            negatives = table.encode(
                pad_rows([drawn[start * length : (start + 1) * length] for start in range(len(tags))], -1)
            )
            batch["negative_input_ids"] = self._pad_labels(negatives["labels"])
            batch["negative_features"] = negatives["features"]
        return batch

    def _pad_labels(self, labels: torch.Tensor) -> torch.Tensor:
        # Processes gather labels, so they have one length in all batches.
        missing = self.processor.max_tag_tokens - labels.shape[-1]
        return torch.nn.functional.pad(labels, (0, max(missing, 0)), value=NO_LABEL)


def _pad_features(examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
    """Pad the precomputed features of a batch and create their masks."""
    batch = {}
    for name, mask_name in FEATURE_MASKS.items():
        given = [example.get(name) for example in examples]
        if all(features is None for features in given):
            continue
        arrays = [None if features is None else np.asarray(features, dtype=np.float32) for features in given]
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


def _stack_features(rows: Sequence[np.ndarray | None]) -> torch.Tensor:
    """Stack one vector per example; zeros for an example that has none."""
    width = next(len(row) for row in rows if row is not None)
    return torch.from_numpy(np.stack([np.zeros(width, np.float32) if row is None else row for row in rows]))


def _check_features(examples: Sequence[Mapping], column: str, feature_column: str) -> None:
    for index, example in enumerate(examples):
        if is_present(example.get(column)) and example.get(feature_column) is None:
            raise ValueError(
                f"Example {index} of the batch has {column}={example[column]!r} but no {feature_column}, which other "
                "examples have."
            )


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Pad lists of integers to one tensor. This is many times faster than `pad_sequence` for short lists."""
    length = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def is_present(value: object) -> bool:
    """Return whether an example has an input: a value that is not `None` and not blank text."""
    return value is not None and not (isinstance(value, str) and not value.strip())
