"""Which split an example belongs to, and how its tags are cleaned."""

import hashlib
import re
from collections.abc import Iterable

STYLE_WORDS = frozenset({"outline", "filled", "off", "variant", "alt"})


def split_key(title: str) -> str:
    """Return the concept of a title: its sorted set of lower-cased alphanumeric (a-z, 0-9) words without style words.

    One concept has one split, whichever sets draw it and in whichever styles.
    """
    return " ".join(sorted(set(re.findall(r"[a-z0-9]+", title.lower())) - STYLE_WORDS))


def split_of(title: str) -> str:
    """Return the split of a title: `"train"`, `"validation"` or `"test"`.

    md5 of the [`split_key`] modulo 12 decides.
    """
    key = split_key(title)
    remainder = int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % 12
    return {0: "validation", 1: "test"}.get(remainder, "train")


# Not shared with other datasets: like the splits, the tags of the benchmark must not change.
def clean_tags(tags: Iterable[str]) -> list[str]:
    """Lower-cases and strips tags, and leaves out empty and repeated ones; the order stays."""
    return list(dict.fromkeys(tag for tag in (tag.strip().lower() for tag in tags) if tag))
