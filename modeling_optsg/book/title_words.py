"""Searches titles by their words."""

import re
from collections import Counter
from collections.abc import Sequence

import bm25s
import numpy as np
import torch

# Chinese and Japanese have no spaces between words: each character counts as a word.
_CHARACTERS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")


class TitleWordIndex:
    """BM25 over the words of titles.

    Args:
        titles: The titles. Some may be empty.
    """

    def __init__(self, titles: Sequence[str]):
        self.index = bm25s.BM25()
        self.index.index([title_words(title) for title in titles], show_progress=False)
        self.num_titles = len(titles)
        # The titles with each word, and their scores for it.
        self.rows, self.scores = np.asarray(self.index.scores["indices"]), np.asarray(self.index.scores["data"])
        self.starts = np.asarray(self.index.scores["indptr"])
        # The largest score of each word. The sum over the words of a query bounds the score of a title.
        self.largest = np.maximum.reduceat(np.append(self.scores, 0.0), self.starts[:-1])

    def search(self, title: str, number: int, hidden: np.ndarray | None = None) -> dict[int, float]:
        """Return the rows of the most similar titles with their similarities between 0 and 1, the largest first.

        Args:
            title: The title to search for.
            number: Maximum number of rows.
            hidden: `[titles]`, true for titles to leave out.
        """
        counts = Counter(self.index.get_tokens_ids(title_words(title)))
        # Words with the largest scores first.
        words = sorted(counts, key=lambda word: -self.largest[word])
        bounds = [counts[word] * float(self.largest[word]) for word in words]
        rows, scores = np.zeros(0, dtype=self.rows.dtype), np.zeros(self.num_titles, dtype=self.scores.dtype)
        for index, word in enumerate(words):
            span = slice(self.starts[word], self.starts[word + 1])
            own, own_scores = self.rows[span], self.scores[span]
            if len(rows) >= number:
                found, remaining = scores[rows], sum(bounds[index:])
                # NumPy takes long to partition many equal values.
                limit = torch.from_numpy(found).topk(number).values[-1].item()
                # Other titles with the words so far cannot be among the best.
                rows = rows[found + remaining >= limit]
            if len(rows) >= number and limit >= remaining:
                # Titles without the words so far cannot be among the best.
                position = np.searchsorted(own, rows).clip(max=len(own) - 1)
                has_word = own[position] == rows
                scores[rows[has_word]] += counts[word] * own_scores[position[has_word]]
                continue
            scores[own] += counts[word] * own_scores
            rows = own if not index else _union(rows, own, self.num_titles)
            if hidden is not None:
                rows = rows[~hidden[rows]]
        if len(rows) > number:
            rows = np.sort(rows[torch.from_numpy(scores[rows]).topk(number).indices.numpy()])
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        return {int(row): float(scores[row]) / sum(bounds) for row in rows}


def _union(rows: np.ndarray, others: np.ndarray, number: int) -> np.ndarray:
    """Return the sorted union of two arrays of numbers below `number`."""
    if len(rows) + len(others) < number / 50:
        return np.union1d(rows, others)
    # Faster for many numbers.
    is_in = np.zeros(number, dtype=bool)
    is_in[rows] = is_in[others] = True
    return np.flatnonzero(is_in)


def title_words(title: str) -> list[str]:
    """Return the words of a title in lower case."""
    return _WORD.findall(title.casefold())
