"""Checks that the metadata of a dataset names only files of that dataset.

The README of a dataset may name its data files. These may be in other folders of this computer or on the web, and
`datasets` would read them. A downloaded folder is not trusted to choose such files.
"""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import datasets
import yaml
from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

CARD, STANDALONE = "README.md", ".huggingface.yaml"


def check_card(folder: str | os.PathLike) -> None:
    """Check that the data files in the metadata of a local folder are inside it.

    Args:
        folder: A folder that `datasets` would load.

    Raises:
        ValueError: They are not, or the metadata cannot be read.
    """
    for name in (CARD, STANDALONE):
        path = Path(folder, name)
        if not path.is_file():
            continue
        try:
            if name == CARD:
                data = DatasetCard.load(path).data
            else:
                data = DatasetCardData(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
            patterns = [
                pattern
                for config in MetadataConfigs.from_dataset_card_data(data).values()
                for pattern in _patterns(config)
            ]
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"{path}: the metadata cannot be read ({' '.join(str(error).split())})") from error
        for pattern in patterns:
            if _leads_outside(pattern):
                raise ValueError(
                    f"{path} names the data files {pattern!r}, which are outside the folder. Remove them from "
                    "its configs, or load these files directly"
                )


def check_resolved_files(builder: datasets.DatasetBuilder, source: str) -> None:
    """Check that the metadata of a dataset on the Hub names no files of this computer.

    Args:
        builder: The dataset's builder.
        source: Name of the dataset on the Hub.

    Raises:
        ValueError: It does.
    """
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if "://" not in str(file):
                raise ValueError(f"{source} names {str(file)!r}, a file of this computer, among its data files")


def _patterns(config: dict) -> list[str]:
    """Return the patterns of files and the folder that one configuration names."""
    found = [config["data_dir"]] if config.get("data_dir") else []
    if config.get("data_files"):
        for patterns in sanitize_patterns(config["data_files"]).values():
            found += [patterns] if isinstance(patterns, str) else patterns
    return [str(pattern) for pattern in found]


def _leads_outside(pattern: str) -> bool:
    # "::" joins file systems, as in "zip://a.csv::https://host/b.zip".
    is_address = "://" in pattern or "::" in pattern or pattern.startswith("~")
    paths = PurePosixPath(pattern), PureWindowsPath(pattern)
    return is_address or any(path.anchor or ".." in path.parts for path in paths)
