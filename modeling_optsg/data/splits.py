"""Training and validation examples of a dataset. Training and evaluation set the same examples aside."""

import functools
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from modeling_optsg.seeded_random import example_seed

# Ratio of the examples that are set aside by default.
DEFAULT_RATIO = 0.1


def split_examples(
    dataset: Mapping[str, Dataset],
    *,
    validation_ratio: float | None,
    seed: int,
    train_ratio: float = 1.0,
    by_id: bool = False,
) -> tuple[Dataset, Dataset]:
    """Return the training and the validation examples of a dataset with a train split.

    Args:
        dataset: The splits by name.
        validation_ratio: Ratio of the training examples that are set aside if there is no validation split. `None` for
            a tenth, or more of fewer than 100 examples: 10, or a third.
        seed: Seed of the choice.
        train_ratio: Ratio of the remaining training examples to keep. This choice does not depend on the seed.
        by_id: Whether the examples are chosen by their `id`, as [`is_set_aside`] does for streams.

    Raises:
        ValueError: There are too few training examples to set some aside.
    """
    train, validation = dataset["train"], dataset.get("validation")
    if validation is None:
        train, validation = _set_aside(train, validation_ratio, seed, by_id)
    if train_ratio < 1:
        train = train.shuffle(seed=0).select(range(math.ceil(train_ratio * len(train))))
    return train, validation


def _set_aside(train: Dataset, ratio: float | None, seed: int, by_id: bool) -> tuple[Dataset, Dataset]:
    if ratio is None:
        ratio = DEFAULT_RATIO if by_id else max(DEFAULT_RATIO, min(1 / 3, 10 / max(len(train), 1)))
    if by_id:
        chosen = functools.partial(is_set_aside, seed=seed, ratio=ratio)
        kept = functools.partial(is_kept, seed=seed, ratio=ratio)
        return train.filter(kept, input_columns="id"), train.filter(chosen, input_columns="id")
    if len(train) < 2:
        raise ValueError(
            f"The train split has {len(train)} examples: too few to set some aside for validation. Add a validation "
            "split."
        )
    parts = train.train_test_split(test_size=ratio, seed=seed)
    if _share_tags(parts["train"], parts["test"]):
        return parts["train"], parts["test"]
    # As with a single validation example. Examples are chosen whose tags other examples have too.
    counts = Counter(tag for tags in train["tags"] for tag in set(tags))
    rows, tags = np.random.default_rng(seed).permutation(len(train)).tolist(), train["tags"][:]
    rows.sort(key=lambda row: all(counts[tag] < 2 for tag in tags[row]))
    number = len(parts["test"])
    return train.select(sorted(rows[number:])), train.select(sorted(rows[:number]))


def _share_tags(train: Dataset, validation: Dataset) -> bool:
    known = {tag for tags in train["tags"] for tag in tags}
    return any(tag in known for tags in validation["tags"] for tag in tags)


def is_set_aside(example_id: str, seed: int, ratio: float) -> bool:
    """Return whether an example of a stream is set aside for validation."""
    # Seeds of examples have 56 bits.
    return example_seed(seed, 0, example_id) < ratio * 2**56


def is_kept(example_id: str, seed: int, ratio: float) -> bool:
    """Return whether an example of a stream stays a training example."""
    return not is_set_aside(example_id, seed, ratio)
