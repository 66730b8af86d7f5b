"""The modules of `modeling_optsg` that need no torch, without the package, which loads torch and transformers.

`optsg.without_torch.image_utils` is the file `modeling_optsg/image_utils.py`.
"""

import importlib.util

__path__ = list(importlib.util.find_spec("modeling_optsg").submodule_search_locations)
