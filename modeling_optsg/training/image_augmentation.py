"""Replaces images of training examples with extra images of the same title, or with mismatched images."""

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from dataset_scripts.icon_tagging.splits import STYLE_WORDS
from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.feature_cache import CachedFeatures

from .arguments import OPTSGTrainingArguments
from .data import has_evidence
from .sampling import SeededExamples

# Attempts to find an example with another title.
MAX_DRAWS = 20
VISUAL_COLUMNS = ("image", "video", "frame_features", "image_features")


class AugmentedImages(SeededExamples):
    """Training examples with randomly replaced images.

    The choice depends only on the example's seed. Only cached image features are replaced.

    Args:
        examples: Map-style examples with `title`.
        extra_images: Further examples, of which only the images are used. An image may replace that of an example with
            the same title.
        extra_image_ratio: Probability that an example with such images gets one of them.
        mismatch_ratio: Probability that an example gets the image of any other example. Its `is_mismatched` is then
            true, and the model learns not to trust an image that contradicts the title.
    """

    def __init__(
        self,
        examples: CachedFeatures,
        extra_images: CachedFeatures | None = None,
        extra_image_ratio: float = 0.0,
        mismatch_ratio: float = 0.0,
    ):
        super().__init__(examples)
        self.extra_images = extra_images
        self.extra_image_ratio, self.mismatch_ratio = extra_image_ratio, mismatch_ratio
        by_title = defaultdict(list)
        for index, title in enumerate(_titles(extra_images)):
            by_title[_title_key(title)].append(index)
        by_title.pop("", None)
        self.keys = [_title_key(title) for title in _titles(examples)]
        self.alternatives = [by_title.get(key, []) for key in self.keys]

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        example = super().__getitem__(pair)
        index, seed = pair
        random = np.random.default_rng([seed, len(self.examples)])
        wants_extra, wants_mismatch = random.random(2) < (self.extra_image_ratio, self.mismatch_ratio)
        # Uncached images may be unreadable. The error would then name the wrong example.
        is_cached = example.get("image_features") is not None
        example["is_mismatched"] = bool(wants_mismatch and is_cached and example.get("title"))
        if example["is_mismatched"]:
            other = self._draw_mismatch(index, random)
            example["is_mismatched"] = other is not None
            return example if other is None else example | _visual(self.examples[other])
        if wants_extra and is_cached and index < len(self.alternatives) and self.alternatives[index]:
            chosen = int(random.choice(self.alternatives[index]))
            return example | _visual(self.extra_images[chosen])
        return example

    def _draw_mismatch(self, index: int, random: np.random.Generator) -> int | None:
        """Return a random example with another title, `None` if none was found."""
        for other in random.integers(len(self.examples), size=MAX_DRAWS).tolist():
            if self.keys[other] != self.keys[index]:
                return other
        return None


def augment_images(
    examples: CachedFeatures,
    extra_images: CachedFeatures | None,
    model: OPTSGPreTrainedModel,
    args: OPTSGTrainingArguments,
) -> AugmentedImages:
    """Replace images of training examples as the arguments say.

    Only a model with a tag classifier gets mismatched images: the others could not learn to ignore them.
    """
    mismatch_ratio = args.mismatch_ratio if has_evidence(model) else 0.0
    return AugmentedImages(examples, extra_images, args.extra_image_ratio, mismatch_ratio)


def _titles(examples: CachedFeatures | None) -> list[str | None]:
    has_titles = examples is not None and "title" in examples.dataset.column_names
    return examples.dataset["title"][:] if has_titles else []


def _visual(example: Mapping) -> dict:
    return {name: example[name] for name in VISUAL_COLUMNS if name in example}


def _title_key(title: str | None) -> str:
    """Return the sorted words of a title without those of a style, such as "outline".

    "off" is kept, because it changes the meaning (a struck-through bell).
    """
    words = set(re.findall(r"\w+", (title or "").lower()))
    return " ".join(sorted(words - (STYLE_WORDS - {"off"})))
