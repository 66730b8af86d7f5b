"""The book: which training items are like this one, and what their tags are."""

import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from torch.nn import functional as F


class TagBook:
    """The tags of training items, to be found by the items' likeness: a `datasets` table with a FAISS index.

    Args:
        titles: each training item's title.
        tags: each one's tags.
        embeddings: `[items, width]`, compared by inner product.

    Raises:
        ImportError: `faiss` is not installed.
    """

    column = "embedding"

    def __init__(self, titles: Sequence[str], tags: Sequence[Sequence[str]], embeddings: np.ndarray):
        table = Dataset.from_dict({"title": list(titles), "tags": [list(t) for t in tags]})
        self.concepts = [concept(title) for title in titles]
        self.table = table.add_column(self.column, list(np.asarray(embeddings, dtype=np.float32)))
        self._index()

    def _index(self) -> None:
        import faiss

        self.table.add_faiss_index(self.column, metric_type=faiss.METRIC_INNER_PRODUCT)

    def __len__(self) -> int:
        return len(self.table)

    def retrieve(
        self, embeddings: np.ndarray, neighbours: int, own_titles: Sequence[str] | None = None
    ) -> list[list[list[str]]]:
        """The tags of each query's nearest items, nearest first.

        Args:
            embeddings: `[queries, width]`.
            neighbours: how many items a query gets.
            own_titles: in training, the queries' titles. An item is never its own neighbour, nor is one whose title
                has the same words: in the test set there is none, and a model that had them in training would copy
                blindly.

        Returns:
            For each query a list of `neighbours` tag lists; fewer where the book has no more.
        """
        queries = np.asarray(embeddings, dtype=np.float32)
        wanted = min(neighbours if own_titles is None else 4 * neighbours + 16, len(self.table))
        _, rows = self.table.search_batch(self.column, queries, k=wanted)
        tags = self.table.with_format(None)["tags"]
        found = []
        for query, near in enumerate(rows.tolist()):
            near = [row for row in near if row >= 0]
            if own_titles is not None:
                own = concept(own_titles[query])
                near = [row for row in near if self.concepts[row] != own]
            found.append([tags[row] for row in near[:neighbours]])
        return found

    def save(self, folder: str | os.PathLike) -> None:
        """Keeps titles, tags and embeddings in a folder; the index is built again when it is loaded."""
        # A table with an index cannot be saved.
        self.table.drop_index(self.column)
        try:
            self.table.save_to_disk(folder)
        finally:
            self._index()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TagBook":
        book = cls.__new__(cls)
        book.table = load_from_disk(str(folder))
        book.concepts = [concept(title) for title in book.table["title"]]
        book._index()
        return book


def concept(title: str) -> tuple[str, ...]:
    """The words of a title, in no order and any case: what two drawings of one thing have in common."""
    return tuple(sorted(set(re.findall(r"\w+", title.lower()))))


def query_embeddings(pictures: torch.Tensor, titles: torch.Tensor, picture_weight: float) -> np.ndarray:
    """One vector an item, whose inner products are `title similarity + picture_weight * picture similarity`.

    Args:
        pictures: `[items, width]`, pooled and centred; titles: `[items, width]`, pooled. Both are normalised here.
    """
    scale = picture_weight**0.5
    return torch.cat([F.normalize(titles, dim=-1), scale * F.normalize(pictures, dim=-1)], dim=1).numpy()
