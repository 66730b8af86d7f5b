"""Emoji in unseen drawing styles: the configuration `unseen` of icon-tagging.

Noto Emoji and the older Noto Emoji ("blobs") are in no other configuration. Only concepts of the validation and test
splits are kept, so that neither the concepts nor the drawing styles are in the training examples.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from .icon_sets import Icon, naming_errors
from .iconify_sets import read_emoji

PACKAGES = ("@iconify-json/noto", "@iconify-json/noto-v1")


def read_emoji_sets(node_modules: Path, openmoji: Iterable[Icon]) -> Iterator[Icon]:
    """Yield the emoji of both sets, with the titles and tags of OpenMoji.

    Args:
        node_modules: Where the packages are installed.
        openmoji: The emoji of OpenMoji.

    Raises:
        ValueError: The metadata of a set is missing or has another layout than in the pinned version.
    """
    openmoji = list(openmoji)
    for package in PACKAGES:
        with naming_errors(package, node_modules):
            yield from read_emoji(node_modules / package, openmoji)
