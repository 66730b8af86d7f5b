"""Per-tag F1 averaged over tags (Full / Rare / Common), micro and per-item metrics, Tag Gain, and the fit of a
threshold."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np


class TagEvaluator:
    """Scores predicted tag sets against ground truth.

    The evaluated tags are those with both a training count and a reference example; F1 is computed for each over the
    examples and averaged (Table 4 of the supplement: Full is over all of them, Rare and Common over its two parts).
    Micro and per-item metrics count every predicted and every reference tag, evaluated or not. Tags match exactly.

    Args:
        references: the ground-truth tags of each example.
        train_counts: training examples of each training tag.
        common_count: training count from which a tag is common.
    """

    def __init__(self, references: Sequence[Sequence[str]], train_counts: Mapping[str, int], common_count: int = 25):
        self.references = [set(tags) for tags in references]
        self.train_counts = train_counts
        reference_counts = Counter(tag for tags in self.references for tag in tags)
        self.evaluated_tags = sorted(tag for tag in reference_counts if train_counts.get(tag, 0) > 0)
        if not self.evaluated_tags:
            raise ValueError("No reference tag is a training tag: there is nothing to average an F1 over.")
        self._index = {tag: index for index, tag in enumerate(self.evaluated_tags)}
        self._support = np.array([reference_counts[tag] for tag in self.evaluated_tags])
        self._common = np.array([train_counts[tag] >= common_count for tag in self.evaluated_tags])
        self._example_support = np.array([len(tags) for tags in self.references])

    def score(self, predictions: Sequence[Sequence[Mapping]], threshold: float = 0.0) -> dict[str, float]:
        """
        Args:
            predictions: for each example its predicted tags as `{"tag": str, "score": float}`, each tag once.
            threshold: predictions with a smaller score do not count.

        Returns:
            `full_f1`, `rare_f1`, `common_f1`, `micro_precision`, `micro_recall`, `micro_f1`, `example_precision`,
            `example_recall`, `example_f1` in percent, `tags_per_example`, and `novel_ratio`: share of predicted pairs whose
            tag is not a training tag.

        Raises:
            ValueError: there are not as many predictions as references, a tag is listed twice for an example, or has no
                score.
        """
        return self.sweep(predictions, [threshold])[0]

    def sweep(self, predictions: Sequence[Sequence[Mapping]], thresholds: Sequence[float]) -> list[dict[str, float]]:
        """[`score`] at many thresholds."""
        if len(predictions) != len(self.references):
            raise ValueError(f"{len(predictions)} predictions for {len(self.references)} reference examples.")
        rows = [
            (example, self._index.get(p["tag"], -1), p["score"], p["tag"] in self.references[example], p["tag"])
            for example, tags in enumerate(predictions)
            for p in tags
        ]
        seen = set()
        for example, _, score, _, tag in rows:
            if (example, tag) in seen:
                raise ValueError(
                    f"{tag!r} is listed twice for example {example}; list each once, with its largest score."
                )
            seen.add((example, tag))
            if score is None or score != score:
                raise ValueError(f"{tag!r} of example {example} has the score {score}; a threshold cannot judge it.")
        examples = np.array([row[0] for row in rows], dtype=int)
        tags = np.array([row[1] for row in rows], dtype=int)
        scores = np.array([row[2] for row in rows], dtype=float)
        hits = np.array([row[3] for row in rows], dtype=bool)
        novel = np.array([self.train_counts.get(row[4], 0) == 0 for row in rows], dtype=bool)
        return [self._score(examples[k], tags[k], hits[k], novel[k]) for k in (scores >= t for t in thresholds)]

    def _score(self, examples, tags, hits, novel) -> dict[str, float]:
        known = tags >= 0
        predicted = np.bincount(tags[known], minlength=len(self._support))
        correct = np.bincount(tags[known & hits], minlength=len(self._support))
        tag_f1 = 2 * correct / (predicted + self._support)
        example_predicted = np.bincount(examples, minlength=len(self.references))
        example_correct = np.bincount(examples[hits], minlength=len(self.references))
        precision = hits.mean() if len(hits) else 0.0
        recall = hits.sum() / self._example_support.sum()
        fractions = {
            "full_f1": tag_f1.mean(),
            "rare_f1": tag_f1[~self._common].mean() if (~self._common).any() else float("nan"),
            "common_f1": tag_f1[self._common].mean() if self._common.any() else float("nan"),
            "micro_precision": precision,
            "micro_recall": recall,
            "micro_f1": 2 * precision * recall / max(precision + recall, 1e-12),
            "example_precision": (example_correct / np.maximum(example_predicted, 1)).mean(),
            "example_recall": (example_correct / np.maximum(self._example_support, 1)).mean(),
            "example_f1": (2 * example_correct / np.maximum(example_predicted + self._example_support, 1)).mean(),
            "novel_ratio": novel.mean() if len(novel) else 0.0,
        }
        metrics = {name: round(100 * float(value), 2) for name, value in fractions.items()}
        return metrics | {"tags_per_example": round(float(example_predicted.mean()), 2)}

    def by_frequency(self, predictions: Sequence[Sequence[Mapping]], edges: Sequence[int]) -> list[dict[str, float]]:
        """Per-tag F1 averaged over tags of like training frequency.

        Args:
            predictions: as in [`score`].
            edges: training counts at which a new group begins, ascending; the last group has no end.

        Returns:
            For each group that has evaluated tags `{"from", "to", "tags", "f1"}`: its training counts, both included
            (`to` is `None` for the last), the number of its tags and their mean F1 in percent.
        """
        if list(edges) != sorted(set(edges)) or not edges:
            raise ValueError(f"edges={list(edges)} must rise.")
        if len(predictions) != len(self.references):
            raise ValueError(f"{len(predictions)} predictions for {len(self.references)} reference examples.")
        predicted, correct = np.zeros((2, len(self._support)))
        for tags, reference in zip(predictions, self.references):
            for tag in (p["tag"] for p in tags if p["tag"] in self._index):
                predicted[self._index[tag]] += 1
                correct[self._index[tag]] += tag in reference
        tag_f1 = 2 * correct / (predicted + self._support)
        counts = np.array([self.train_counts[tag] for tag in self.evaluated_tags])
        groups = []
        for start, end in zip(edges, [*edges[1:], None]):
            inside = (counts >= start) & (counts < (end if end is not None else np.inf))
            if inside.any():
                groups.append(
                    {
                        "from": start,
                        "to": None if end is None else end - 1,
                        "tags": int(inside.sum()),
                        "f1": round(100 * float(tag_f1[inside].mean()), 2),
                    }
                )
        return groups

    def best_threshold(
        self, predictions: Sequence[Sequence[Mapping]], objective: str = "full_f1", steps: int = 50
    ) -> tuple[float, dict[str, float]]:
        """The threshold with the largest `objective`, among `steps` even steps below 1 and as many below 0.1, and the
        metrics there."""
        grid = np.concatenate([np.linspace(0, top, steps, endpoint=False) for top in (1, 0.1)])
        thresholds = sorted({round(float(threshold), 4) for threshold in grid})
        metrics = self.sweep(predictions, thresholds)
        best = max(range(len(metrics)), key=lambda index: metric_value(metrics[index], objective))
        return thresholds[best], metrics[best]

    def at_k(self, predictions: Sequence[Sequence[Mapping]], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """Precision and recall of each example's k best predictions, averaged over the examples.

        Args:
            predictions: for each example its tags best first, each once.
            ks: how many of them are looked at. An example with fewer predictions has the missing ones wrong.

        Returns:
            `precision_at_<k>` and `recall_at_<k>` in percent. An example without any ground truth has a recall of 0.
        """
        if len(predictions) != len(self.references):
            raise ValueError(f"{len(predictions)} predictions for {len(self.references)} reference examples.")
        if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
            raise ValueError(f"ks={list(ks)} must be whole numbers of at least 1.")
        longest = max(ks)
        hits = np.zeros((len(predictions), longest), dtype=bool)
        for example, (tags, reference) in enumerate(zip(predictions, self.references)):
            found = [p["tag"] in reference for p in tags[:longest]]
            hits[example, : len(found)] = found
        correct = hits.cumsum(axis=1)
        metrics = {}
        for k in sorted(set(ks)):
            metrics[f"precision_at_{k}"] = round(100 * float((correct[:, k - 1] / k).mean()), 2)
            recall = correct[:, k - 1] / np.maximum(self._example_support, 1)
            metrics[f"recall_at_{k}"] = round(100 * float(recall.mean()), 2)
        return metrics


def metric_value(metrics: Mapping[str, float], objective: str) -> float:
    """What a fit makes as large as it can: a figure by name, or the mean of several, as in `"full_f1+micro_f1"`; with
    `"full_f1@micro_f1>=52"`, the figure among the settings that keep the other one above a floor. What lies below it
    counts by how far, and less than anything above.

    Raises:
        ValueError: one of them is no figure, or the floor no number.
    """
    objective, _, condition = objective.partition("@")
    floored, _, floor = condition.partition(">=")
    names = objective.split("+")
    if unknown := [name for name in [*names, *filter(None, [floored])] if name not in metrics]:
        raise ValueError(f"objective={unknown[0]!r} is no figure; expected one of {sorted(metrics)}.")
    if condition and metrics[floored] < float(floor):
        return metrics[floored] - float(floor) - 100.0
    return sum(metrics[name] for name in names) / len(names)


def tag_gain(
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    label_vocabulary,
    relevant: Callable[[int, str], bool] | None = None,
) -> dict[str, float]:
    """Tag Gain: 100 · (novel predicted pairs judged relevant) / (ground-truth pairs).

    Args:
        predictions: each example's predicted tags, each once.
        references: its ground-truth tags.
        label_vocabulary: the tags of the training examples; a predicted tag outside them is novel.
        relevant: says of an example's index and a novel tag whether the tag is relevant; by default it is when the example's
            ground truth has it.

    Returns:
        `tag_gain` and `novel_ratio` (of the predicted pairs) in percent, and the counts `novel_pairs`,
        `relevant_pairs`, `reference_pairs`.
    """
    references = [set(tags) for tags in references]
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} reference examples.")
    known = set(label_vocabulary)
    novel = [(example, tag) for example, tags in enumerate(predictions) for tag in tags if tag not in known]
    if relevant is None:
        found = sum(tag in references[example] for example, tag in novel)
    else:
        found = sum(bool(relevant(example, tag)) for example, tag in novel)
    pairs, predicted = sum(map(len, references)), sum(map(len, predictions))
    if not pairs:
        raise ValueError("The references have no tags at all: there is nothing the gain could be a share of.")
    return {
        "tag_gain": round(100 * found / pairs, 3),
        "novel_ratio": round(100 * len(novel) / max(predicted, 1), 2),
        "novel_pairs": len(novel),
        "relevant_pairs": found,
        "reference_pairs": pairs,
    }


def normalize_tag(tag: str) -> str:
    """A tag without differences of case, of width (full and half), and of surrounding or repeated spaces."""
    return " ".join(unicodedata.normalize("NFKC", tag).casefold().split())


def checked_tag_sets(name: str, tag_sets: Sequence[Sequence[str]], normalize: bool = False) -> list[list[str]]:
    """Tag sets in which every tag is listed once, normalised by [`normalize_tag`] if asked; tags of an example that
    become the same then count once.

    Raises:
        ValueError: a tag is listed twice for an example as it is written; `name` is what the message calls the sets.
    """
    for example, tags in enumerate(tag_sets):
        if len(set(tags)) < len(tags):
            twice = next(tag for tag in tags if tags.count(tag) > 1)
            raise ValueError(f"{name} list {twice!r} twice for example {example}; list each tag of an example once.")
    if normalize:
        return [list(dict.fromkeys(map(normalize_tag, tags))) for tags in tag_sets]
    return list(tag_sets)
