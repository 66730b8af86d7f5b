"""icon-tagging, built from six open icon sets."""

from .icon_tagging import IconTagging, split_of
from .splits import split_key as group_of

__all__ = ["IconTagging", "group_of", "split_of"]
