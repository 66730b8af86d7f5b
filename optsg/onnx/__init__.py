"""Runs exported models with onnxruntime, without torch and transformers."""

import importlib.util

# `image_utils`, `processor_inputs` and `tag_merging` of `modeling_optsg` are imported as modules of this package: they
# need no torch, but the other package loads it.
__path__.extend(importlib.util.find_spec("modeling_optsg").submodule_search_locations)

from .tagger import OnnxTagger  # noqa: E402

__all__ = ["OnnxTagger"]
