"""The benchmarks that have a builder in this package."""

import importlib
from pathlib import Path
from typing import Any

import datasets

# Each builder class is in the sub-package that has the benchmark's name.
BUILDERS = {
    "icon_tagging": "IconTagging",
    "create_tagging": "CreateTagging",
    "pexel_tagging": "PexelTagging",
}


def is_benchmark(name: str) -> bool:
    """Whether `name`, with hyphens or underscores, is a benchmark of this package."""
    return _module_name(name) in BUILDERS


def benchmark_card(name: str) -> Path | None:
    """Return the path of a benchmark's dataset card, or `None` for any other name."""
    return Path(__file__).with_name(_module_name(name)) / "README.md" if is_benchmark(name) else None


def benchmark_notice(name: str) -> Path | None:
    """Return the path of the notices that the licences of a benchmark ask for, or `None` if there are none."""
    card = benchmark_card(name)
    notice = None if card is None else card.with_name("NOTICE")
    return notice if notice is not None and notice.is_file() else None


def example_groups(rows: datasets.Dataset, name: str) -> list[str | None]:
    """Return the group of each example of a dataset, `None` where it is unknown.

    Examples of one group may show the same thing. A benchmark that divides groups among its splits, instead of
    examples, has a function `group_of` from a title to its group.

    Args:
        rows: The examples. If they have a column `group`, its values are returned as text.
        name: The name by which the dataset was loaded.
    """
    if "group" in rows.column_names:
        return [None if group is None else str(group) for group in rows["group"]]
    if is_benchmark(name):
        module = importlib.import_module(f".{_module_name(name)}", __package__)
        if hasattr(module, "group_of"):
            return [module.group_of(title or "") or None for title in rows["title"]]
    return [None] * len(rows)


def load_benchmark(
    name: str, *, split: str | None, cache_dir: str | None, streaming: bool, **kwargs: Any
) -> datasets.DatasetDict | datasets.Dataset | datasets.IterableDatasetDict | datasets.IterableDataset:
    """Build a benchmark, or load it from the cache.

    Args:
        name: A name for which [`is_benchmark`] holds.
        split: One split; all splits if `None`.
        cache_dir: Cache folder of `datasets`.
        streaming: Whether to return streams, which are not built first.
        **kwargs: Arguments of the builder.

    Raises:
        FileNotFoundError: Files of the benchmark are missing.
        ValueError: The builder does not take these arguments, or a file is damaged.
    """
    module = importlib.import_module(f".{_module_name(name)}", __package__)
    try:
        builder = getattr(module, BUILDERS[_module_name(name)])(cache_dir=cache_dir, **kwargs)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
    except TypeError as error:
        raise ValueError(f"{name} does not take the arguments {kwargs}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        # Its own message says only that generating failed.
        raise ValueError(f"{name}: {error.__cause__ or error}") from error
    return builder.as_dataset(split=split)


def _module_name(name: str) -> str:
    return name.replace("-", "_")
