"""Pexel-tagging, built from files that you have."""

from .pexel_tagging import PexelTagging

__all__ = ["PexelTagging"]
