"""Metrics: per-tag F1 averaged over tags (Full, Rare, Common), micro and per-example metrics, and Tag Gain."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

# The metrics that [`TagEvaluator.score`] returns.
METRICS = (
    "full_f1",
    "rare_f1",
    "common_f1",
    "micro_precision",
    "micro_recall",
    "micro_f1",
    "example_precision",
    "example_recall",
    "example_f1",
    "novel_ratio",
    "tags_per_example",
)
NO_EVALUATED_TAG = (
    "No reference tag is a training tag: there is nothing to average an F1 over. Add examples that share tags, so "
    "that the validation examples have tags of the training examples."
)


class TagEvaluator:
    """Compares predicted tags with the ground truth.

    The evaluated tags are the training tags that occur in the ground truth. F1 is computed for each of them over the
    examples, and averaged over the tags: Full over all of them, Rare and Common over its two parts (Table 4 of the
    supplement). Micro and per-example metrics count all predicted and all ground-truth tags. Tags must match exactly.

    Args:
        references: For each example its ground-truth tags.
        train_counts: The number of training examples of each training tag.
        common_count: The training count from which a tag is common.

    Raises:
        ValueError: No example has a ground-truth tag.

    Example:

        >>> from modeling_optsg import TagEvaluator
        >>> evaluator = TagEvaluator([["cat", "pet"], ["dog"]], train_counts={"cat": 30, "dog": 2, "pet": 1})
        >>> cat, dog = {"tag": "cat", "score": 0.9}, {"tag": "dog", "score": 0.6}
        >>> predictions = [[cat], [dog, {"tag": "cat", "score": 0.2}]]
        >>> metrics = evaluator.score(predictions, threshold=0.5)
        >>> metrics["full_f1"], metrics["rare_f1"], metrics["common_f1"], metrics["micro_f1"]
        (66.67, 50.0, 100.0, 80.0)
    """

    def __init__(
        self, references: Sequence[Sequence[str]], train_counts: Mapping[str, int], common_count: int = 25
    ) -> None:
        self.references = [set(tags) for tags in references]
        self.train_counts, self.common_count = train_counts, common_count
        reference_counts = Counter(tag for tags in self.references for tag in tags)
        if not reference_counts:
            raise ValueError("The references have no tags: there is nothing to compare predictions with.")
        self.evaluated_tags = sorted(tag for tag in reference_counts if train_counts.get(tag, 0) > 0)
        self._index = {tag: index for index, tag in enumerate(self.evaluated_tags)}
        self._support = np.array([reference_counts[tag] for tag in self.evaluated_tags], dtype=int)
        self._common = np.array([train_counts[tag] >= common_count for tag in self.evaluated_tags], dtype=bool)
        self._example_support = np.array([len(tags) for tags in self.references])

    def select(self, examples: Sequence[int]) -> "TagEvaluator":
        """Return the evaluator of some of the examples.

        Args:
            examples: Their indices.
        """
        return TagEvaluator([self.references[index] for index in examples], self.train_counts, self.common_count)

    def score(self, predictions: Sequence[Sequence[Mapping]], threshold: float = 0.0) -> dict[str, float]:
        """Compute the metrics of predictions.

        Args:
            predictions: For each example its predicted tags as `{"tag": str, "score": float}`, each tag once.
            threshold: Predictions with a smaller score are ignored.

        Returns:
            `full_f1`, `rare_f1`, `common_f1`, `micro_precision`, `micro_recall`, `micro_f1`, `example_precision`,
            `example_recall`, `example_f1` and `novel_ratio` (the ratio of predicted tags that are not training tags)
            in percent, and `tags_per_example`. The average over no tags is `None`: `rare_f1` without rare tags,
            `common_f1` without common tags, and `full_f1` if no ground-truth tag is a training tag.

        Raises:
            ValueError: The number of predictions is not that of the references, or a tag is listed twice for an
                example or has no score.
        """
        return self.sweep(predictions, [threshold])[0]

    def sweep(self, predictions: Sequence[Sequence[Mapping]], thresholds: Sequence[float]) -> list[dict[str, float]]:
        """Compute the metrics of [`score`] at each of several thresholds."""
        self._check_length(predictions)
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
                raise ValueError(f"{tag!r} of example {example} has the score {score}; expected a number.")
        examples = np.array([row[0] for row in rows], dtype=int)
        tags = np.array([row[1] for row in rows], dtype=int)
        scores = np.array([row[2] for row in rows], dtype=float)
        hits = np.array([row[3] for row in rows], dtype=bool)
        novel = np.array([self.train_counts.get(row[4], 0) == 0 for row in rows], dtype=bool)
        return [self._score(examples[k], tags[k], hits[k], novel[k]) for k in (scores >= t for t in thresholds)]

    def _check_length(self, predictions: Sequence) -> None:
        if len(predictions) != len(self.references):
            raise ValueError(f"{len(predictions)} predictions for {len(self.references)} reference examples.")

    def _score(self, examples: np.ndarray, tags: np.ndarray, hits: np.ndarray, novel: np.ndarray) -> dict[str, float]:
        """Compute the metrics of `[N]` pairs of an example and a predicted tag.

        Args:
            examples: The index of each pair's example.
            tags: The index of its tag among the evaluated tags, -1 for others.
            hits: Whether the tag is in the ground truth of the example.
            novel: Whether the tag is not a training tag.
        """
        known = tags >= 0
        predicted = np.bincount(tags[known], minlength=len(self._support))
        correct = np.bincount(tags[known & hits], minlength=len(self._support))
        tag_f1 = 2 * correct / (predicted + self._support)
        example_predicted = np.bincount(examples, minlength=len(self.references))
        example_correct = np.bincount(examples[hits], minlength=len(self.references))
        precision = hits.mean() if len(hits) else 0.0
        recall = hits.sum() / self._example_support.sum()
        fractions = {
            "full_f1": tag_f1.mean() if len(tag_f1) else None,
            "rare_f1": tag_f1[~self._common].mean() if (~self._common).any() else None,
            "common_f1": tag_f1[self._common].mean() if self._common.any() else None,
            "micro_precision": precision,
            "micro_recall": recall,
            "micro_f1": 2 * precision * recall / max(precision + recall, 1e-12),
            "example_precision": (example_correct / np.maximum(example_predicted, 1)).mean(),
            "example_recall": (example_correct / np.maximum(self._example_support, 1)).mean(),
            "example_f1": (2 * example_correct / np.maximum(example_predicted + self._example_support, 1)).mean(),
            "novel_ratio": novel.mean() if len(novel) else 0.0,
        }
        metrics = {name: None if x is None else round(100 * float(x), 2) for name, x in fractions.items()}
        return metrics | {"tags_per_example": round(float(example_predicted.mean()), 2)}

    def by_frequency(self, predictions: Sequence[Sequence[Mapping]], edges: Sequence[int]) -> list[dict[str, float]]:
        """Average per-tag F1 over groups of tags with similar training counts.

        Args:
            predictions: As in [`score`].
            edges: The smallest training count of each group, in ascending order; the last group has no upper limit.

        Returns:
            For each group with evaluated tags `{"from", "to", "tags", "f1"}`: its smallest and largest training count
            (`to` is `None` for the last group), its number of tags, and their mean F1 in percent.

        Raises:
            ValueError: `edges` are not in ascending order, or the number of predictions is not that of the references.
        """
        if list(edges) != sorted(set(edges)) or not edges:
            raise ValueError(f"edges={list(edges)}: expected numbers in ascending order.")
        self._check_length(predictions)
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
        self, predictions: Sequence[Sequence[Mapping]], metric_for_best_model: str = "full_f1", steps: int = 50
    ) -> tuple[float, dict[str, float]]:
        """Find the threshold with the best metric.

        Among equally good thresholds, it is the one with the largest micro F1, and among these the largest.

        Args:
            predictions: As in [`score`].
            metric_for_best_model: The metric to maximise, as in [`parse_metric`].
            steps: Number of thresholds to try between 0 and 1, and again between 0 and 0.1.

        Returns:
            The threshold, and the metrics with it.
        """
        grid = np.concatenate([np.linspace(0, top, steps, endpoint=False) for top in (1, 0.1)])
        thresholds = sorted({round(float(threshold), 4) for threshold in grid})
        metrics = self.sweep(predictions, thresholds)
        best = max(range(len(metrics)), key=lambda index: (*metric_rank(metrics[index], metric_for_best_model), index))
        return thresholds[best], metrics[best]

    def check_metric(self, metric_for_best_model: str) -> None:
        """Check that a metric can be computed for these examples.

        Raises:
            ValueError: It is unknown or an average over no tags, or no ground-truth tag is a training tag.
        """
        if not self.evaluated_tags:
            raise ValueError(NO_EVALUATED_TAG)
        metric_value(self.score([[] for _ in self.references]), metric_for_best_model)

    def at_k(self, predictions: Sequence[Sequence[Mapping]], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """Compute precision and recall of the k best predictions of each example, averaged over the examples.

        Args:
            predictions: For each example its tags, best first, each once.
            ks: The numbers of predictions to keep. Where an example has fewer, the missing ones count as wrong.

        Returns:
            `precision_at_<k>` and `recall_at_<k>` in percent. The recall of an example without ground truth is 0.

        Raises:
            ValueError: One of `ks` is not a positive integer, or the number of predictions is not that of the
                references.
        """
        self._check_length(predictions)
        if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
            raise ValueError(f"ks={list(ks)}: expected positive integers.")
        max_k = max(ks)
        hits = np.zeros((len(predictions), max_k), dtype=bool)
        for example, (tags, reference) in enumerate(zip(predictions, self.references)):
            found = [p["tag"] in reference for p in tags[:max_k]]
            hits[example, : len(found)] = found
        correct = hits.cumsum(axis=1)
        metrics = {}
        for k in sorted(set(ks)):
            metrics[f"precision_at_{k}"] = round(100 * float((correct[:, k - 1] / k).mean()), 2)
            recall = correct[:, k - 1] / np.maximum(self._example_support, 1)
            metrics[f"recall_at_{k}"] = round(100 * float(recall.mean()), 2)
        return metrics


def metric_value(metrics: Mapping[str, float], metric_for_best_model: str) -> float:
    """Compute the value that a fit maximises.

    Args:
        metrics: Metrics by name.
        metric_for_best_model: See [`parse_metric`].

    Returns:
        The value. It is negative below the floor, and then increases with the metric that has the floor.

    Raises:
        ValueError: A metric is unknown or `None`, or the floor is not a number.
    """
    names, floored, floor = parse_metric(metric_for_best_model)
    for name in (*names, floored):
        if name == "full_f1" and metrics[name] is None:
            raise ValueError(NO_EVALUATED_TAG)
        if name is not None and metrics[name] is None:
            raise ValueError(
                f"metric_for_best_model={metric_for_best_model!r} cannot be computed: no evaluated tag is "
                f"{name.removesuffix('_f1')}. Use full_f1 or micro_f1."
            )
    if floored is not None and metrics[floored] < floor:
        return metrics[floored] - floor - 100.0
    return sum(metrics[name] for name in names) / len(names)


def metric_rank(metrics: Mapping[str, float], metric_for_best_model: str) -> tuple[float, float]:
    """Return a key to sort settings by: the value that a fit maximises, then micro F1. See [`metric_value`]."""
    return metric_value(metrics, metric_for_best_model), metrics["micro_f1"]


def parse_metric(metric_for_best_model: str) -> tuple[list[str], str | None, float]:
    """Parse the metric that a fit maximises.

    Args:
        metric_for_best_model: One of `METRICS`, or the mean of several, such as `"full_f1+micro_f1"`. With a floor, as
            in `"full_f1@micro_f1>=52"`, settings whose micro F1 is below 52 rank below all others.

    Returns:
        The metrics that are averaged, the metric with a floor (`None` without one), and the floor.

    Raises:
        ValueError: A metric is unknown, or the floor is not a number.
    """
    mean_of, _, condition = metric_for_best_model.partition("@")
    floored, _, floor = condition.partition(">=")
    names = mean_of.split("+")
    if unknown := [name for name in [*names, *filter(None, [floored])] if name not in METRICS]:
        raise ValueError(
            f"metric_for_best_model={unknown[0]!r} is not a metric; expected one of {', '.join(METRICS)}."
        )
    if not condition:
        return names, None, 0.0
    try:
        limit = float(floor)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ValueError(f"metric_for_best_model={metric_for_best_model!r} needs a number after {floored}>=.")
    return names, floored, limit


def tag_gain(
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    label_vocabulary: Iterable[str],
    relevant: Callable[[int, str], bool] | None = None,
) -> dict[str, float]:
    """Compute Tag Gain: 100 · (novel predicted pairs judged relevant) / (ground-truth pairs).

    A pair is an example and one of its tags.

    Args:
        predictions: For each example its predicted tags, each once.
        references: For each example its ground-truth tags.
        label_vocabulary: The training tags; any other predicted tag is novel.
        relevant: Takes the index of an example and a novel tag, and returns whether the tag is relevant. By default a
            tag is relevant if it is in the ground truth of the example.

    Returns:
        `tag_gain` and `novel_ratio` (the ratio of predicted pairs whose tag is novel) in percent, and the counts
        `novel_pairs`, `relevant_pairs` and `reference_pairs`.

    Raises:
        ValueError: The number of predictions is not that of the references, or the references have no tags.
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
        raise ValueError("The references have no tags; Tag Gain is a ratio of their number.")
    return {
        "tag_gain": round(100 * found / pairs, 3),
        "novel_ratio": round(100 * len(novel) / max(predicted, 1), 2),
        "novel_pairs": len(novel),
        "relevant_pairs": found,
        "reference_pairs": pairs,
    }


def normalize_tag(tag: str) -> str:
    """Remove differences of case, of full and half width, and of surrounding or repeated spaces from a tag."""
    return " ".join(unicodedata.normalize("NFKC", tag).casefold().split())


def check_tag_sets(name: str, tag_sets: Sequence[Sequence[str]], normalize: bool = False) -> list[list[str]]:
    """Check that no example has a tag twice, and normalise the tags if asked to.

    Args:
        name: What error messages call the tag sets.
        tag_sets: For each example its tags.
        normalize: Whether to apply [`normalize_tag`]. Tags of an example that become equal are merged.

    Returns:
        For each example its tags.

    Raises:
        ValueError: A tag is listed twice for an example, before normalisation.
    """
    for example, tags in enumerate(tag_sets):
        if len(set(tags)) < len(tags):
            twice = next(tag for tag in tags if tags.count(tag) > 1)
            raise ValueError(f"{name} list {twice!r} twice for example {example}; list each tag of an example once.")
    if normalize:
        return [list(dict.fromkeys(map(normalize_tag, tags))) for tags in tag_sets]
    return list(tag_sets)
