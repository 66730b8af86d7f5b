"""Fuses the evidence of the model and of neighbours into the probability of a tag."""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

# Added to votes before taking the logarithm.
MIN_VOTE = 1e-3
# L2 penalty on the weights, relative to the loss of one tag.
L2_PENALTY = 1.0
# Standardised features beyond this many standard deviations are clipped.
MAX_DEVIATION = 5.0
# Columns of the features of a tag. The first four come from the model: whether the tag is novel, whether a slot
# generated it, and the logits of slots and classifier. Then come the logit of the pointers, whether a neighbour has
# the tag, and the evidence of the neighbours.
IS_NOVEL, IS_GENERATED, SLOT_LOGIT, CLASSIFIER_LOGIT, POINTER_LOGIT, IN_BOOK, EVIDENCE = range(7)
MODEL_FEATURES = 4


class FusedScore:
    """Logistic regression on features of a tag, with a logit adjustment in favour of rare tags.

    Args:
        size: Number of features. The last one is the logarithm of the tag's frequency.
    """

    def __init__(self, size: int):
        self.mean, self.scale = np.zeros(size), np.ones(size)
        self.weights, self.bias = np.zeros(size), 0.0
        self.is_fitted = False

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the probabilities `[tags]` of features `[tags, size]`."""
        return expit(self._standardize(features) @ self.weights + self.bias)

    def fit(self, features: np.ndarray, is_correct: np.ndarray) -> None:
        """Fit the regression by maximum likelihood, with an L2 penalty.

        Args:
            features: `[tags, size]`.
            is_correct: `[tags]`, whether the tag is correct.
        """
        self.mean, self.scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-3)
        self.weights, self.bias = _regress(self._standardize(features), is_correct)
        self.is_fitted = True

    def _standardize(self, features: np.ndarray) -> np.ndarray:
        # A feature that is nearly constant in the fit may be far away later.
        return ((features - self.mean) / self.scale).clip(-MAX_DEVIATION, MAX_DEVIATION)

    def adjusted(self, features: np.ndarray, is_correct: np.ndarray, adjustment: float) -> "FusedScore":
        """Return a score that favours rare tags: the logit adjustment of Menon et al. (2020), then recalibrated.

        Args:
            features: `[tags, size]`, the features that the score was fitted to.
            is_correct: `[tags]`, whether the tag is correct.
            adjustment: Strength τ of the adjustment; 0 changes nothing.
        """
        score = FusedScore(len(self.mean))
        score.mean, score.scale, score.is_fitted = self.mean, self.scale, self.is_fitted
        shift = np.eye(len(self.mean))[-1] * adjustment * self.scale
        inputs = self._standardize(features) @ (self.weights - shift)
        (slope,), score.bias = _regress(inputs[:, None], is_correct)
        score.weights = slope * (self.weights - shift)
        return score

    def to_dict(self) -> dict[str, list[float] | float | bool]:
        """Return the parameters as JSON data."""
        arrays = {"mean": self.mean, "scale": self.scale, "weights": self.weights}
        return {name: array.tolist() for name, array in arrays.items()} | {
            "bias": self.bias,
            "is_fitted": self.is_fitted,
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> "FusedScore":
        """Make a score from the output of [`to_dict`]."""
        score = cls(len(values["mean"]))
        for name in ("mean", "scale", "weights"):
            setattr(score, name, np.array(values[name], dtype=float))
        score.bias, score.is_fitted = float(values["bias"]), bool(values["is_fitted"])
        return score


class BookScore:
    """The score of a tag that the model knows, and that of a tag that only the book knows.

    A model that was not trained on a tag has no evidence against it. The second score therefore reads neither slots
    nor classifier. It is fitted to the tags of the neighbours, as if the model did not know them.

    Args:
        size: Number of features; see `MODEL_FEATURES` and `IN_BOOK`.
    """

    def __init__(self, size: int):
        self.known, self.new = FusedScore(size), FusedScore(size - MODEL_FEATURES)

    @property
    def is_fitted(self) -> bool:
        """Whether the scores are fitted."""
        return self.known.is_fitted

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the probabilities `[tags]` of features `[tags, size]`."""
        is_novel, is_generated, in_book = features[:, [IS_NOVEL, IS_GENERATED, IN_BOOK]].astype(bool).T
        known, new = self.known(features), self.new(features[:, MODEL_FEATURES:])
        # A slot that also generates a new tag does not make it less probable.
        new = np.where(is_generated, np.maximum(known, new), new)
        return np.where(is_novel & in_book, new, known)

    def fit(self, features: np.ndarray, is_correct: np.ndarray) -> None:
        """Fit both scores to features `[tags, size]`. See [`FusedScore.fit`]."""
        in_book = features[:, IN_BOOK].astype(bool)
        self.known.fit(features, is_correct)
        self.new.fit(features[in_book][:, MODEL_FEATURES:], is_correct[in_book])

    def adjusted(self, features: np.ndarray, is_correct: np.ndarray, adjustment: float) -> "BookScore":
        """Return scores that favour rare tags. See [`FusedScore.adjusted`]."""
        score, in_book = BookScore(features.shape[1]), features[:, IN_BOOK].astype(bool)
        score.known = self.known.adjusted(features, is_correct, adjustment)
        score.new = self.new.adjusted(features[in_book][:, MODEL_FEATURES:], is_correct[in_book], adjustment)
        return score

    def to_dict(self) -> dict[str, dict]:
        """Return the parameters as JSON data."""
        return {"known": self.known.to_dict(), "new": self.new.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping) -> "BookScore":
        """Make a score from the output of [`to_dict`]."""
        score = cls(len(values["known"]["mean"]))
        score.known, score.new = FusedScore.from_dict(values["known"]), FusedScore.from_dict(values["new"])
        return score


def _regress(inputs: np.ndarray, is_correct: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights `[width]` and the bias of a logistic regression on `inputs` `[tags, width]`."""
    targets = is_correct.astype(float)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, logits = parameters[:-1], inputs @ parameters[:-1] + parameters[-1]
        value = np.logaddexp(0, logits).sum() - targets @ logits + L2_PENALTY / 2 * weights @ weights
        errors = expit(logits) - targets
        return value, np.append(inputs.T @ errors + L2_PENALTY * weights, errors.sum())

    fitted = minimize(loss, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return fitted[:-1], float(fitted[-1])
