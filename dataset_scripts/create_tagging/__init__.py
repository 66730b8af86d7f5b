from ..create_tagging.create_tagging import CreateTagging

__all__ = ["CreateTagging"]
