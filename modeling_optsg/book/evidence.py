"""The probability of a tag, from the evidence of a book's sources."""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

# Added to votes before the logarithm.
MIN_VOTE = 1e-3
# Strength of the L2 penalty on each weight. One candidate has the weight 1.
L2_PENALTY = 1.0


class EvidenceScore:
    """Logistic regression from the evidence for a tag to its probability.

    The evidence consists of the logarithm of the vote of each source, the largest similarity of each source, the
    logarithm of the number of neighbours with the tag, that of the best rank among them, and that of the mean vote.
    Before [`fit`], the odds of a tag are its mean vote.

    Args:
        num_sources: Number of sources.
    """

    def __init__(self, num_sources: int):
        size = 2 * num_sources + 3
        self.mean, self.scale = np.zeros(size), np.ones(size)
        self.weights, self.bias = np.eye(size)[-1], 0.0

    def __call__(self, evidence: np.ndarray) -> np.ndarray:
        """Return the probabilities `[tags]` of evidence `[tags, evidence size]`."""
        return expit((evidence - self.mean) / self.scale @ self.weights + self.bias)

    def fit(self, evidence: np.ndarray, is_correct: np.ndarray) -> None:
        """Fit the regression by maximum likelihood, with an L2 penalty.

        Args:
            evidence: `[tags, evidence size]`.
            is_correct: `[tags]`, whether the tag is correct.
        """
        self.mean, self.scale = evidence.mean(axis=0), np.maximum(evidence.std(axis=0), 1e-3)
        inputs, targets = (evidence - self.mean) / self.scale, is_correct.astype(float)

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            weights, logits = parameters[:-1], inputs @ parameters[:-1] + parameters[-1]
            value = np.logaddexp(0, logits).sum() - targets @ logits + L2_PENALTY / 2 * weights @ weights
            errors = expit(logits) - targets
            return value, np.append(inputs.T @ errors + L2_PENALTY * weights, errors.sum())

        fitted = minimize(loss, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B").x
        self.weights, self.bias = fitted[:-1], float(fitted[-1])

    def to_dict(self) -> dict[str, list[float] | float]:
        """Return the parameters as JSON data."""
        arrays = {"mean": self.mean, "scale": self.scale, "weights": self.weights}
        return {name: array.tolist() for name, array in arrays.items()} | {"bias": self.bias}

    @classmethod
    def from_dict(cls, values: Mapping) -> "EvidenceScore":
        """Make a regression from the output of [`to_dict`]."""
        score = cls(0)
        for name in ("mean", "scale", "weights"):
            setattr(score, name, np.array(values[name], dtype=float))
        score.bias = float(values["bias"])
        return score
