"""Image words: the classes that the pretrained vision tower predicts for an image.

Its classifier was trained on far more kinds of images than the tagger. If an image is unlike the training images of
the tagger, image words replace a missing title.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from .layers import unit_vectors

# How a tower's classifier pools the tokens of an image.
POOLINGS = ("pooler_output", "first_token", "mean")
# Number of image words returned to the user.
SHOWN_WORDS = 5


@dataclass
class VisionFeatures:
    """Features of images and videos, from [`TowerMixin.encode_frames`].

    Args:
        frame_features: `[batch, frames, tokens, frame_feature_size]`.
        image_features: `[batch, image_feature_size]`, averaged over the real frames; zero without frames.
        word_probabilities: `[batch, image words]`, averaged over the real frames; zero without frames. `None` for a
            model without image words.
    """

    frame_features: torch.Tensor
    image_features: torch.Tensor
    word_probabilities: torch.Tensor | None = None


def pool_for_words(outputs: object, pooling: str) -> torch.Tensor:
    """Pool a tower's outputs in the way that its classifier does.

    Args:
        outputs: Outputs of the tower.
        pooling: One of `POOLINGS`.

    Returns:
        `[images, width]`.
    """
    if pooling == "pooler_output":
        return outputs.pooler_output.flatten(1)
    tokens = outputs.last_hidden_state
    if tokens.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    return tokens[:, 0] if pooling == "first_token" else tokens.mean(dim=1)


class ImageWords(nn.Module):
    """Classifier of the vision tower. Its class names serve as titles.

    For a two-tower model such as CLIP, the weights of the classifier are the scaled text features of the words, and
    image features are projected and normalised.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.pooling, self.normalize = config.image_word_pooling, config.image_word_normalize
        width, projected = config.image_word_feature_size, config.image_word_projection_size
        words = len(config.image_word_labels)
        self.projection = nn.Linear(width, projected, bias=False) if projected else None
        self.classifier = nn.Linear(projected or width, words)
        # Pooled text-tower features of the words, so that words need no pass through the text tower.
        self.register_buffer("text_features", torch.zeros(words, config.text_config.hidden_size))

    def forward(self, outputs: object) -> torch.Tensor:
        """Compute the probability of each word, `[images, words]`, from the outputs of the vision tower."""
        pooled = pool_for_words(outputs, self.pooling).to(self.text_features.dtype)
        if self.projection is not None:
            pooled = self.projection(pooled)
        if self.normalize:
            pooled = unit_vectors(pooled)
        return self.classifier(pooled).float().softmax(dim=-1)


def decode_image_words(outputs: ModelOutput, config: PreTrainedConfig) -> list[list[dict[str, str | float]]]:
    """Return the `SHOWN_WORDS` most probable image words of each example.

    Args:
        outputs: Output of `generate`.
        config: Configuration of the model, for the words.

    Returns:
        For each example `[{"word": str, "score": float}]`; empty without an image or without image words.
    """
    if outputs.image_words is None:
        return [[] for _ in range(len(outputs.sequences))]
    labels = config.image_word_labels
    shown = (rows[:, :SHOWN_WORDS].tolist() for rows in (outputs.image_words, outputs.image_word_scores))
    rows = zip(*shown, strict=True)
    return [
        [{"word": labels[word], "score": score} for word, score in zip(*row, strict=True) if score > 0] for row in rows
    ]
