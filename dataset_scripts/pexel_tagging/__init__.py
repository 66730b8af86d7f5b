from .pexel_tagging import PexelTagging

__all__ = ["PexelTagging"]
