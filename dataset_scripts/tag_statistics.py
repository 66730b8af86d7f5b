"""Counts that describe a tagging benchmark: the rows of the supplement's statistics table."""

from collections import Counter

from datasets import DatasetDict


def tag_statistics(dataset: DatasetDict, common_count: int = 25) -> dict[str, int | float]:
    """Counts items and tags of a dataset with the splits `train` and `test` and a column `tags`.

    With A the training tags, B the test tags and I their intersection, |A ∪ B| = |A| + |B| − |I| and
    |I| = |common| + |rare|, where a common tag is one that at least `common_count` training items have.

    Returns:
        `<split>_items` for every split, `items`, `unique_tags` (over all splits), `tags_per_item`, `train_tags` (|A|),
        `test_tags` (|B|), `evaluated_tags` (|I|), `common_tags` and `rare_tags`.

    Raises:
        ValueError: the split `train` or `test` is missing.
    """
    if missing := {"train", "test"} - dataset.keys():
        raise ValueError(f"statistics need the splits train and test; {sorted(missing)} missing from {list(dataset)}")
    counts = {split: Counter(tag for tags in rows["tags"] for tag in set(tags)) for split, rows in dataset.items()}
    evaluated = counts["train"].keys() & counts["test"].keys()
    common = sum(counts["train"][tag] >= common_count for tag in evaluated)
    items = sum(rows.num_rows for rows in dataset.values())
    return {
        **{f"{split}_items": rows.num_rows for split, rows in dataset.items()},
        "items": items,
        "unique_tags": len(set().union(*counts.values())),
        "tags_per_item": round(sum(count.total() for count in counts.values()) / max(items, 1), 2),
        "train_tags": len(counts["train"]),
        "test_tags": len(counts["test"]),
        "evaluated_tags": len(evaluated),
        "common_tags": common,
        "rare_tags": len(evaluated) - common,
    }
