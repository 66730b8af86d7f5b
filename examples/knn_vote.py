"""What a user would try first: the tags of the most similar training items, by a weighted vote (no training)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from modeling_optsg import TagEvaluator


class KNNVote:
    """Neighbours by `title similarity + picture_weight * picture similarity`, both cosine similarities of mean-pooled
    tower features (pictures centred on the training mean); each votes for its tags with its similarity.

    Args:
        items: training items with `frame_features` and `title_features`.
        tags: their tags.
    """

    def __init__(self, items: Sequence[dict], tags: Sequence[Sequence[str]]):
        self.tags = tags
        self.items = items
        pictures = self._pooled(items, "frame_features")
        self.mean = pictures.mean(dim=0)
        self.pictures, self.titles = (
            F.normalize(pictures - self.mean),
            F.normalize(self._pooled(items, "title_features")),
        )

    @staticmethod
    def _pooled(items, name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([i[name].reshape(-1, i[name].shape[-1]).mean(0, np.float32) for i in items]))

    def predict(self, items: Sequence[dict], neighbours: int, picture_weight: float) -> list[list[dict]]:
        """For each item its neighbours' tags with their share of the vote, as `{"tag", "score"}`."""
        pictures = F.normalize(self._pooled(items, "frame_features") - self.mean)
        titles = F.normalize(self._pooled(items, "title_features"))
        similarity = titles @ self.titles.T + picture_weight * pictures @ self.pictures.T
        predictions = []
        for weights, rows in zip(*(part.tolist() for part in similarity.topk(neighbours))):
            votes = defaultdict(float)
            for weight, row in zip(weights, rows):
                for tag in self.tags[row]:
                    votes[tag] += weight / sum(weights)
            predictions.append([{"tag": tag, "score": score} for tag, score in votes.items()])
        return predictions

    def fit(
        self, items: Sequence[dict], evaluator: TagEvaluator, objective: str = "full_f1"
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The number of neighbours, the picture's weight and the threshold with the largest validation `objective`,
        and the validation figures there."""
        fitted = []
        for neighbours in (3, 5, 8, 10, 15):
            for picture_weight in (0.2, 0.4, 0.7, 1.0):
                predictions = self.predict(items, neighbours, picture_weight)
                threshold, figures = evaluator.best_threshold(predictions, objective)
                settings = {"neighbours": neighbours, "picture_weight": picture_weight, "threshold": threshold}
                fitted.append((settings, figures))
        return max(fitted, key=lambda pair: pair[1][objective])
