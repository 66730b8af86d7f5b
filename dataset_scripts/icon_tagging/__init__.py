from ..icon_tagging.icon_tagging import IconTagging, split_of

__all__ = ["IconTagging", "split_of"]
