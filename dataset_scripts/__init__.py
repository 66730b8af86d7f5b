"""Tagging benchmarks, and `load_tagging_dataset`, which loads them and every other tagging dataset in the same way."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarks import benchmark_card, example_groups
    from .loading import load_tagging_dataset
    from .tag_counts import tag_statistics
    from .tagging_columns import undecoded

__all__ = ["benchmark_card", "example_groups", "load_tagging_dataset", "tag_statistics", "undecoded"]

_MODULES = {
    "benchmark_card": "benchmarks",
    "example_groups": "benchmarks",
    "load_tagging_dataset": "loading",
    "tag_statistics": "tag_counts",
    "undecoded": "tagging_columns",
}


# On demand: the command line reads `media_suffixes` and must answer `--help` without importing `datasets`.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
