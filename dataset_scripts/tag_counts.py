"""Counts that describe a tagging benchmark (Tables 1 and 2 of the supplement), made without loading the dataset."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa

from .tagging_columns import Rows

BATCH = 20_000


@dataclass
class TagCounts:
    """The number of examples with each tag.

    Args:
        examples: Number of examples.
        tagged: Number of examples with at least one tag.
        counts: Number of examples with each tag. A tag that an example has twice counts once.
    """

    examples: int = 0
    tagged: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_rows(cls, rows: Rows) -> "TagCounts":
        """Count the column `tags` of a split in batches of Arrow tables."""
        codes: dict[str, int] = {}
        totals, found = np.zeros(1024, dtype=np.int64), cls()
        for table in rows.select_columns(["tags"]).with_format("arrow").iter(BATCH):
            column = table["tags"].combine_chunks()
            lists = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            lengths = np.diff(lists.offsets.to_numpy())
            lengths[lists.is_null().to_numpy(zero_copy_only=False)] = 0
            tag_codes = _encode(lists.flatten(), codes)
            # One number for each pair of an example and a tag, so that a repeated tag counts once.
            pairs = np.unique(np.repeat(np.arange(len(lengths)), lengths) * (len(codes) + 1) + tag_codes)
            if len(codes) > len(totals):
                totals = np.concatenate([totals, np.zeros(len(codes), dtype=np.int64)])
            totals += np.bincount(pairs % (len(codes) + 1), minlength=len(totals))
            found.examples += len(lengths)
            found.tagged += int((lengths > 0).sum())
        found.counts = Counter({tag: int(totals[code]) for tag, code in codes.items()})
        return found


def tag_statistics(
    dataset: Mapping[str, datasets.Dataset] | Mapping[str, TagCounts], common_count: int = 25
) -> dict[str, int | float]:
    """Count the examples and tags of a dataset with the splits `train` and `test` and a column `tags`.

    With A the training tags, B the test tags and I their intersection, |A ∪ B| = |A| + |B| − |I| and
    |I| = |common| + |rare|. A common tag has at least `common_count` training examples, a rare tag has fewer.

    Args:
        dataset: The splits, or their [`TagCounts`].
        common_count: Training examples from which a tag is common.

    Returns:
        `<split>_examples` for every split, `examples`, `unique_tags` (of all splits), `tags_per_example`,
        `training_tags` (|A|), `test_tags` (|B|), `union` (|A ∪ B|), `evaluated_tags` (|I|), `common_tags` and
        `rare_tags`.

    Raises:
        ValueError: The split `train` or `test` is missing.
    """
    if missing := {"train", "test"} - dataset.keys():
        raise ValueError(f"statistics need the splits train and test; {sorted(missing)} missing from {list(dataset)}")
    counts = {
        split: rows if isinstance(rows, TagCounts) else TagCounts.from_rows(rows) for split, rows in dataset.items()
    }
    train, test = counts["train"].counts, counts["test"].counts
    evaluated = train.keys() & test.keys()
    num_common = sum(train[tag] >= common_count for tag in evaluated)
    return size_statistics(counts) | {
        "training_tags": len(train),
        "test_tags": len(test),
        "union": len(train.keys() | test.keys()),
        "evaluated_tags": len(evaluated),
        "common_tags": num_common,
        "rare_tags": len(evaluated) - num_common,
    }


def size_statistics(counts: Mapping[str, TagCounts]) -> dict[str, int | float]:
    """Return the statistics of [`tag_statistics`] that need no comparison of two splits."""
    examples = sum(split.examples for split in counts.values())
    return {
        **{f"{name}_examples": split.examples for name, split in counts.items()},
        "examples": examples,
        "unique_tags": len(set().union(*(split.counts for split in counts.values()))),
        "tags_per_example": round(sum(split.counts.total() for split in counts.values()) / max(examples, 1), 2),
    }


def nearest_common_count(train: TagCounts, test: TagCounts, common: int, rare: int) -> tuple[int, int, int]:
    """Find the `common_count` whose numbers of common and rare tags are nearest to published ones.

    Args:
        train: Counts of the training split.
        test: Counts of the test split.
        common: Published number of common tags.
        rare: Published number of rare tags.

    Returns:
        The count, the smallest of several equally near ones, and the numbers of common and rare tags it gives.
    """
    counts = np.sort([train.counts[tag] for tag in train.counts.keys() & test.counts.keys()])
    candidates = np.unique(np.concatenate([[1], counts, counts + 1]))
    num_rare = np.searchsorted(counts, candidates, side="left")
    distances = np.abs(num_rare - rare) + np.abs(len(counts) - num_rare - common)
    best = int(distances.argmin())
    return int(candidates[best]), int(len(counts) - num_rare[best]), int(num_rare[best])


def _encode(tags: pa.Array, codes: dict[str, int]) -> np.ndarray:
    """Return the code of each tag, and add new tags to `codes`."""
    encoded = tags.dictionary_encode()
    dictionary = [codes.setdefault(tag, len(codes)) for tag in encoded.dictionary.to_pylist()]
    return np.array(dictionary, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
