from .create_tagging import CreateTagging

__all__ = ["CreateTagging"]
