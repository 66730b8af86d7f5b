"""Finds spellings of one tag among the tags of a dataset."""

import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from modeling_optsg.evaluation.metrics import normalize_tag

# Words that end with these letters have a plural with "es".
PLURAL_WITH_ES = ("s", "x", "z", "ch", "sh")
MIN_PLURAL_LENGTH = 4


@dataclass
class TagVariants:
    """Spellings of one tag.

    Args:
        counts: Number of examples with each spelling, the most frequent spelling first.
        kinds: How they differ: some of "case", "Unicode", "white space", "punctuation" and "plural".
    """

    counts: dict[str, int]
    kinds: list[str]


def find_tag_variants(counts: Mapping[str, int]) -> list[TagVariants]:
    """Find tags that differ only in case, Unicode form, white space, punctuation or an English plural.

    Punctuation is that around a tag, and hyphens and underscores in it. Symbols such as `+` are kept.

    Args:
        counts: Number of examples with each tag.

    Returns:
        The groups of such tags. Those that differ only in the plural come last, and frequent tags come first.

    Example:

        >>> from modeling_optsg.data.tag_variants import find_tag_variants
        >>> find_tag_variants({"Night-Sky": 1, "night sky": 4, "cat": 2})
        [TagVariants(counts={'night sky': 4, 'Night-Sky': 1}, kinds=['case', 'punctuation'])]
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for tag in counts:
        groups[_without_punctuation(tag)].append(tag)
    singulars = {key: _singular(key, groups) for key in groups}
    merged: dict[str, list[str]] = defaultdict(list)
    for key, tags in groups.items():
        merged[singulars[key]] += tags
    variants = []
    for tags in merged.values():
        if len(tags) > 1:
            ordered = sorted(tags, key=lambda tag: (-counts[tag], tag))
            variants.append(TagVariants({tag: counts[tag] for tag in ordered}, _differences(tags)))
    return sorted(variants, key=lambda found: (found.kinds == ["plural"], -sum(found.counts.values())))


def _fold_unicode(tag: str) -> str:
    return unicodedata.normalize("NFKC", tag).casefold()


def _without_spaces(tag: str) -> str:
    return normalize_tag(tag).replace(" ", "")


def _without_punctuation(tag: str) -> str:
    key = _without_spaces(tag)
    start, end = 0, len(key)
    while start < end and unicodedata.category(key[start]).startswith("P"):
        start += 1
    while start < end and unicodedata.category(key[end - 1]).startswith("P"):
        end -= 1
    # A tag of punctuation alone has no other key.
    return key[start:end].replace("-", "").replace("_", "") or key


# Each step also removes the differences of the steps before it.
_STEPS = (
    ("case", str.casefold),
    ("Unicode", _fold_unicode),
    ("white space", _without_spaces),
    ("punctuation", _without_punctuation),
)


def _differences(tags: list[str]) -> list[str]:
    kinds, num_different = [], len(tags)
    for kind, fold in _STEPS:
        folded = len({fold(tag) for tag in tags})
        if folded < num_different:
            kinds.append(kind)
        num_different = folded
    return kinds + ["plural"] * (num_different > 1)


def _singular(key: str, keys: Mapping[str, object]) -> str:
    """Return the key without an English plural ending, if that is a key too."""
    if len(key) < MIN_PLURAL_LENGTH or not key.endswith("s") or key.endswith("ss"):
        return key
    if key.endswith("es") and key[:-2].endswith(PLURAL_WITH_ES) and key[:-2] in keys:
        return key[:-2]
    return key[:-1] if key[:-1] in keys else key
