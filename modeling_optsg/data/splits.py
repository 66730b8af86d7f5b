"""Training and validation examples of a dataset. Training and evaluation set the same examples aside."""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modeling_optsg.seeded_random import example_seed

from .equal_files import find_equal_files

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

    Examples whose files have the same bytes are set aside together, except by id.

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
    tags, copies = train["tags"][:], find_equal_files([train])
    parts = train.train_test_split(test_size=ratio, seed=seed)
    if not copies and _share_tags(parts["train"]["tags"], parts["test"]["tags"]):
        return parts["train"], parts["test"]
    # As with a single validation example. Without common tags, nothing can be validated, which is worse than copies.
    number = len(parts["test"])
    for units in (_units(len(train), copies), _units(len(train), [])):
        chosen = _choose(units, tags, number, seed)
        rows = [row for row in range(len(train)) if row not in chosen], sorted(chosen)
        if _share_tags(*([tags[row] for row in own] for own in rows)):
            break
    return train.select(rows[0]), train.select(rows[1])


def _units(number: int, copies: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
    """Return the rows that must stay together, in the order of their first rows.

    A row with an image and a video may be a copy of one row by the first and of another row by the second.
    """
    pairs = [(group[0][1], row) for group in copies for _, row in group[1:]]
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(number, number))
    units: dict[int, list[int]] = {}
    for row, label in enumerate(connected_components(graph, directed=False)[1].tolist()):
        units.setdefault(label, []).append(row)
    return list(units.values())


def _choose(units: Sequence[Sequence[int]], tags: Sequence[Sequence[str]], number: int, seed: int) -> set[int]:
    """Choose at most `number` rows, whole units, and first those whose tags are in other units too."""
    own_tags = [{tag for row in unit for tag in tags[row]} for unit in units]
    counts = Counter(tag for own in own_tags for tag in own)
    order = np.random.default_rng(seed).permutation(len(units)).tolist()
    order.sort(key=lambda unit: all(counts[tag] < 2 for tag in own_tags[unit]))
    chosen = set()
    for unit in order:
        if len(chosen) + len(units[unit]) <= number:
            chosen.update(units[unit])
    return chosen


def _share_tags(train: Sequence[Sequence[str]], validation: Sequence[Sequence[str]]) -> bool:
    known = {tag for tags in train for tag in tags}
    return any(tag in known for tags in validation for tag in tags)


def is_set_aside(example_id: str, seed: int, ratio: float) -> bool:
    """Return whether an example of a stream is set aside for validation."""
    # Seeds of examples have 56 bits.
    return example_seed(seed, 0, example_id) < ratio * 2**56


def is_kept(example_id: str, seed: int, ratio: float) -> bool:
    """Return whether an example of a stream stays a training example."""
    return not is_set_aside(example_id, seed, ratio)
