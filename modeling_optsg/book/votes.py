"""Neighbours, and their votes for tags."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from .fusion import MIN_VOTE
from .tables import TagTable

# Sources of similarity: standardised vision tower features, the mean text feature of the title, the evidence that the
# tag classifier reads, and the words of the title (BM25).
VECTOR_SOURCES = ("image", "title", "joint")
SOURCES = (*VECTOR_SOURCES, "words")
# The evidence for a tag that no neighbour has; see [`TagVotes.evidence`].
NO_EVIDENCE = np.array([*[np.log(MIN_VOTE)] * len(SOURCES), *[0.0] * len(SOURCES), 0.0, -5.0, np.log(MIN_VOTE)])


@dataclass
class Neighbours:
    """The nearest examples of each query.

    Args:
        rows: `[queries, neighbours]`, row indices in the book; -1 is padding.
        similarities: `[queries, neighbours, sources]`, 0 where two examples cannot be compared.
        is_comparable: `[queries, neighbours, sources]`, whether the source compares the two examples. `words`
            compares all neighbours of a query whose title has a match.
    """

    rows: np.ndarray
    similarities: np.ndarray
    is_comparable: np.ndarray

    def votes(self, temperatures: Mapping[str, float]) -> np.ndarray:
        """Return the vote of each neighbour, by source, `[queries, neighbours, sources]`.

        The votes of a source are a softmax of the similarities, divided by its temperature. They sum to 1, or to 0 if
        nothing is comparable.
        """
        scaled = self.similarities / np.array([temperatures[name] for name in SOURCES], dtype=np.float32)
        scaled = np.where(self.is_comparable, scaled, np.finfo(scaled.dtype).min)
        return softmax(scaled, axis=1) * self.is_comparable


class TagVotes:
    """Adds up the votes of neighbours for their tags.

    An entry is a pair of a query and a tag of its neighbours. Entries are sorted by query.

    Args:
        table: The tags of all examples of the book.
        neighbours: The neighbours of each query.

    Attributes:
        query: `[entries]`, the query of each entry.
        tag: `[entries]`, the tag of each entry.
    """

    def __init__(self, table: TagTable, neighbours: Neighbours):
        starts, num_tags = table.starts, len(table.tags)
        queries, columns = np.nonzero(neighbours.rows >= 0)
        rows = neighbours.rows[queries, columns]
        counts = starts[rows + 1] - starts[rows]
        # One pair for each tag of each neighbour.
        self.pair_query, self.pair_column = np.repeat(queries, counts), np.repeat(columns, counts)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pair_tag = table.numbers[np.repeat(starts[rows], counts) + offsets]
        keys, self.entry = np.unique(self.pair_query * num_tags + pair_tag, return_inverse=True)
        self.query, self.tag = keys // num_tags, keys % num_tags
        self.neighbour_votes, self.mean_votes = np.zeros(neighbours.rows.shape), np.zeros(len(keys))
        self._starts = np.searchsorted(self.query, np.arange(len(neighbours.rows) + 1))
        self._by_entry = np.argsort(self.entry, kind="stable")
        self._pair_starts = np.searchsorted(self.entry[self._by_entry], np.arange(len(keys) + 1))

    def most_voted(self, query: int, number: int) -> np.ndarray:
        """Return the entries of a query with the largest mean votes. Call [`evidence`] first."""
        entries = np.arange(self._starts[query], self._starts[query + 1])
        return entries[np.argsort(-self.mean_votes[entries], kind="stable")[:number]]

    def totals(self, votes: np.ndarray) -> np.ndarray:
        """Add up votes `[queries, neighbours]` for each entry, `[entries]`."""
        return np.bincount(self.entry, votes[self.pair_query, self.pair_column], minlength=len(self.tag))

    def evidence(self, votes: np.ndarray, similarities: np.ndarray) -> np.ndarray:
        """Return the evidence for each entry, `[entries, len(NO_EVIDENCE)]`.

        It consists of the logarithm of the vote of each source, the largest similarity of each source, log(1 + number
        of neighbours with the tag), the negative logarithm of their best rank, and the logarithm of the mean vote.

        Args:
            votes: `[queries, neighbours, sources]`, see [`Neighbours.votes`].
            similarities: `[queries, neighbours, sources]`.
        """
        num_sources = votes.any(axis=1).sum(axis=-1)
        self.neighbour_votes = votes.sum(axis=-1) / np.maximum(num_sources, 1)[:, None]
        ranks = np.argsort(np.argsort(-self.neighbour_votes, axis=1), axis=1) + 1.0
        largest = np.full((len(self.tag), similarities.shape[-1]), -1.0)
        np.maximum.at(largest, self.entry, similarities[self.pair_query, self.pair_column])
        best_rank = np.full(len(self.tag), np.inf)
        np.minimum.at(best_rank, self.entry, ranks[self.pair_query, self.pair_column])
        of_sources = [self.totals(votes[..., source]) for source in range(votes.shape[-1])]
        columns = [*(np.log(total + MIN_VOTE) for total in of_sources), *largest.T]
        columns += [np.log1p(np.bincount(self.entry, minlength=len(self.tag))), -np.log(best_rank)]
        self.mean_votes = self.totals(self.neighbour_votes)
        columns += [np.log(self.mean_votes + MIN_VOTE)]
        return np.stack(columns, axis=1)

    def neighbours_with_tag(self, entry: int) -> list[tuple[int, float]]:
        """Return the neighbours that have the tag of an entry, as `(column, mean vote)`, largest vote first."""
        pairs = self._by_entry[self._pair_starts[entry] : self._pair_starts[entry + 1]]
        votes = self.neighbour_votes[self.pair_query[pairs], self.pair_column[pairs]]
        order = np.argsort(-votes, kind="stable")
        return list(zip(self.pair_column[pairs][order].tolist(), votes[order].tolist()))
