"""Tags and groups of a book's examples as arrays, without a Python object for each value."""

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset


class TagTable:
    """The tags of all examples.

    Args:
        examples: Rows with the column `tags`. Without tags, an example has an empty list or `None`.

    Attributes:
        tags: All tags, most frequent first.
        counts: `[tags]`, the number of examples with each tag.
        numbers: The concatenated tag indices of all examples. An example has each tag once.
        starts: `[examples + 1]`, where the tags of each example start.
    """

    def __init__(self, examples: Dataset):
        column = _column(examples, "tags")
        encoded = column.flatten().cast(pa.string()).dictionary_encode()
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        self.counts = np.zeros(0, dtype=np.int64)
        self.tags, self.numbers = [], self.counts
        self.starts = np.zeros(len(column) + 1, dtype=np.int64)
        if not len(encoded):
            return
        names, width = encoded.dictionary.to_pylist(), len(encoded.dictionary)
        pairs = np.unique(np.repeat(np.arange(len(column)), lengths) * width + encoded.indices.to_numpy())
        rows, numbers = np.divmod(pairs, width)
        counts = np.bincount(numbers, minlength=width)
        order = np.argsort(-counts, kind="stable")
        rank = np.empty(width, dtype=np.int64)
        rank[order] = np.arange(width)
        self.tags, self.counts = [names[number] for number in order], counts[order]
        self.numbers = np.sort(rows * width + rank[numbers]) % width
        self.starts = np.searchsorted(rows, np.arange(len(column) + 1))


class GroupTable:
    """The groups of all examples.

    Args:
        examples: Rows with the column `group`.

    Attributes:
        numbers: `[examples]`, the number of each example's group.
        sizes: `[groups]`, the number of examples of each group.
    """

    def __init__(self, examples: Dataset):
        encoded = _column(examples, "group").dictionary_encode()
        self._by_name = {name: number for number, name in enumerate(encoded.dictionary.to_pylist())}
        self.numbers = torch.from_numpy(encoded.indices.to_numpy().astype(np.int64))
        self.sizes = torch.bincount(self.numbers)

    def number_of(self, group: str | None) -> int:
        """Return the number of a group, -1 if no example belongs to it."""
        return self._by_name.get(group, -1)


def _column(examples: Dataset, name: str) -> pa.Array:
    return examples.select_columns(name).with_format("arrow")[:][name].combine_chunks()
