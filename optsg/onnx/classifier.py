"""The tag classifier of an exported model: its logits, its candidates, and what each example is tagged by.

The same as in `modeling_optsg.tag_classifier` and `modeling_optsg.generation_optsg`, in numpy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..without_torch.tag_merging import ClassifierOutput
from .search import SortedTags

# As in `modeling_optsg.tag_classifier`.
WORD_TEMPERATURE, MIN_PROBABILITY = 2.0, 1e-6
BOTH, IMAGE, TITLE, IMAGE_WORDS = "image+title", "image", "title", "image words"


def tagged_by(encoded: dict[str, np.ndarray]) -> list[str]:
    """Return what each example is tagged by: image, title, both, or the words of an unfamiliar image."""
    rows = zip(encoded["reads_words"], encoded["uses_image"], encoded["has_title"])
    return [
        IMAGE_WORDS if reads_words else BOTH if uses_image and has_title else IMAGE if uses_image else TITLE
        for reads_words, uses_image, has_title in rows
    ]


class TagClassifier:
    """Computes the logits of the label vocabulary.

    Args:
        program: The exported program.
        settings: The settings of the exported model.
    """

    def __init__(self, program: Callable[..., dict[str, np.ndarray]], settings: dict[str, Any]):
        self.program, self.settings = program, settings["generation"]
        self.classes = {tuple(tag): index for index, tag in enumerate(settings["classes"])}
        self.tokens = np.full((len(self.classes), settings["max_tag_tokens"]), settings["pad_token_id"])
        for row, tag in zip(self.tokens, settings["classes"]):
            row[: len(tag)] = tag
        self.sorted_tags = SortedTags(settings["classes"], settings["max_tag_tokens"])
        log_counts = np.log(np.array(settings["class_counts"], np.float32))
        ratios = np.exp(log_counts - log_counts.max())
        self.adjustment = self.settings["logit_adjustment"] * log_counts
        # The adjustment of an average tag.
        self.mean_adjustment = self.settings["logit_adjustment"] * float(ratios @ log_counts / ratios.sum())

    def __call__(self, encoded: dict[str, np.ndarray]) -> ClassifierOutput:
        """Classify a batch.

        Args:
            encoded: Outputs of the encoder.
        """
        fusion_weights, calibration = self.settings["fusion_weights"], np.array([[1.0, 0.0]], np.float32)
        if fusion_weights is not None:
            # Image words are read like titles.
            names = [TITLE if name == IMAGE_WORDS else name for name in tagged_by(encoded)]
            fusion_weights = [fusion_weights[name] for name in names]
            # If the classifier weight is 0, its logits are not calibrated.
            pairs = [weights[1:3] if weights[1] > 0 else (1.0, 0.0) for weights in fusion_weights]
            calibration = np.array(pairs, np.float32)
        logits = self.program(vectors=encoded["vectors"])["logits"] - self.adjustment
        for example in np.flatnonzero(encoded["uses_words"]):
            scale, bias = calibration[example % len(calibration)]
            logits[example] = self._mix_words(logits[example], encoded, example, scale, bias)
        number = min(self.settings["num_candidates"], logits.shape[1])
        best = np.argsort(-logits, axis=1, kind="stable")[:, :number]
        return ClassifierOutput(logits, self.classes, self.tokens[best], fusion_weights)

    def _mix_words(
        self, logits: np.ndarray, encoded: dict[str, np.ndarray], example: int, scale: float, bias: float
    ) -> np.ndarray:
        """Average the probabilities of an image without a title with those of its words as titles."""
        weights = encoded["word_probabilities"][example] ** (1 / WORD_TEMPERATURE)
        word_logits = self.program(vectors=encoded["word_vectors"][example])["logits"] - self.mean_adjustment
        of_words = weights / weights.sum() @ _sigmoid(scale * word_logits + bias)
        familiarity = encoded["familiarity"][example]
        mixed = familiarity * _sigmoid(scale * logits + bias) + (1 - familiarity) * of_words
        mixed = np.clip(mixed, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
        return (np.log(mixed / (1 - mixed)) - bias) / scale


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))
