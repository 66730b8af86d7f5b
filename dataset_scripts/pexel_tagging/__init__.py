from ..pexel_tagging.pexel_tagging import PexelTagging

__all__ = ["PexelTagging"]
