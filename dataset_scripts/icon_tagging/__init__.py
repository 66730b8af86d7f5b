"""icon-tagging, built from six open icon sets."""

from .icon_tagging import IconTagging, split_of

__all__ = ["IconTagging", "split_of"]
