"""Counts that describe a tagging benchmark: the supplement's Tables 1 and 2, counted without loading it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa

BATCH = 20_000


@dataclass
class TagCounts:
    """How many examples have each tag.

    Args:
        examples: number of examples; tagged: those with a tag.
        counts: examples of each tag. A tag that an example lists twice counts once.
    """

    examples: int = 0
    tagged: int = 0
    counts: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, rows: datasets.Dataset | datasets.IterableDataset) -> "TagCounts":
        """Counts the column `tags` of a split, a batch of Arrow at a time."""
        codes: dict[str, int] = {}
        totals, found = np.zeros(1024, dtype=np.int64), cls()
        for table in rows.select_columns(["tags"]).with_format("arrow").iter(BATCH):
            column = table["tags"].combine_chunks()
            lists = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            lengths = np.diff(lists.offsets.to_numpy())
            lengths[lists.is_null().to_numpy(zero_copy_only=False)] = 0
            encoded = lists.flatten().dictionary_encode()
            own = [codes.setdefault(tag, len(codes)) for tag in encoded.dictionary.to_pylist()]
            places = np.array(own, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
            # An example and a tag of it are one number; each is wanted once.
            examples = np.repeat(np.arange(len(lengths)), lengths)
            places = np.unique(examples * (len(codes) + 1) + places) % (len(codes) + 1)
            if len(codes) > len(totals):
                totals = np.concatenate([totals, np.zeros(len(codes), dtype=np.int64)])
            totals += np.bincount(places, minlength=len(totals))
            found.examples += len(lengths)
            found.tagged += int((lengths > 0).sum())
        found.counts = Counter({tag: int(totals[code]) for tag, code in codes.items()})
        return found


def tag_statistics(
    dataset: Mapping[str, datasets.Dataset] | Mapping[str, TagCounts], common_count: int = 25
) -> dict[str, int | float]:
    """Counts examples and tags of a dataset with the splits `train` and `test` and a column `tags`.

    With A the training tags, B the test tags and I their intersection, |A ∪ B| = |A| + |B| − |I| and
    |I| = |common| + |rare|, where a common tag is one that at least `common_count` training examples have.

    Args:
        dataset: splits, or the [`TagCounts`] of them.

    Returns:
        `<split>_examples` for every split, `examples`, `unique_tags` (over all splits), `tags_per_example`, `label_vocabulary` (|A|),
        `test_tags` (|B|), `union` (|A ∪ B|), `evaluated_tags` (|I|), `common_tags` and `rare_tags`.

    Raises:
        ValueError: the split `train` or `test` is missing.
    """
    if missing := {"train", "test"} - dataset.keys():
        raise ValueError(f"statistics need the splits train and test; {sorted(missing)} missing from {list(dataset)}")
    found = {split: rows if isinstance(rows, TagCounts) else TagCounts.of(rows) for split, rows in dataset.items()}
    train, test = found["train"].counts, found["test"].counts
    evaluated = train.keys() & test.keys()
    common = sum(train[tag] >= common_count for tag in evaluated)
    return size_statistics(found) | {
        "label_vocabulary": len(train),
        "test_tags": len(test),
        "union": len(train.keys() | test.keys()),
        "evaluated_tags": len(evaluated),
        "common_tags": common,
        "rare_tags": len(evaluated) - common,
    }


def size_statistics(counts: Mapping[str, TagCounts]) -> dict[str, int | float]:
    """The metrics of [`tag_statistics`] that need no two splits."""
    examples = sum(own.examples for own in counts.values())
    return {
        **{f"{split}_examples": own.examples for split, own in counts.items()},
        "examples": examples,
        "unique_tags": len(set().union(*(own.counts for own in counts.values()))),
        "tags_per_example": round(sum(own.counts.total() for own in counts.values()) / max(examples, 1), 2),
    }


def nearest_common_count(train: TagCounts, test: TagCounts, common: int, rare: int) -> tuple[int, int, int]:
    """The training count from which a tag must be common for the split to come nearest to a published one.

    Returns:
        that count, and the common and rare tags it gives; of several the smallest count.
    """
    counts = np.sort([train.counts[tag] for tag in train.counts.keys() & test.counts.keys()])
    candidates = np.unique(np.concatenate([[1], counts, counts + 1]))
    rares = np.searchsorted(counts, candidates, side="left")
    distance = np.abs(rares - rare) + np.abs(len(counts) - rares - common)
    best = int(distance.argmin())
    return int(candidates[best]), int(len(counts) - rares[best]), int(rares[best])
