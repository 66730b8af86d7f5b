"""CREATE-tagging, built from the released files."""

from .create_tagging import CreateTagging

__all__ = ["CreateTagging"]
