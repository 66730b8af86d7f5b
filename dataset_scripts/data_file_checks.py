"""Checks that the metadata of a dataset names only files of that dataset.

The README of a dataset may name its data files. These may be in other folders of this computer or on the web, and
`datasets` would read them. Neither a downloaded folder nor a dataset on the Hub is trusted to choose such files.
"""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import datasets
import yaml
from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData, snapshot_download

CARD, STANDALONE = "README.md", ".huggingface.yaml"


def check_card(folder: str | os.PathLike, source: str | None = None) -> None:
    """Check that the data files in the metadata of a local folder are inside it.

    Args:
        folder: A folder that `datasets` would load.
        source: Name of the dataset on the Hub that the folder is from.

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
            if _leads_outside(pattern) and not (source and _is_in_repository(pattern, source)):
                raise ValueError(
                    f"{f'{name} of {source}' if source else path} names the data files {pattern!r}, which are outside "
                    f"the {'dataset' if source else 'folder'}. Remove them from its configs, or load these files "
                    "directly"
                )


def check_hub_card(source: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Check that the data files in the metadata of a dataset on the Hub are its own, before any address is opened.

    Args:
        source: Name of the dataset on the Hub.
        revision: Branch, tag or commit.
        token: Token for the Hub.

    Raises:
        ValueError: They are not, or the metadata cannot be read.
    """
    try:
        folder = snapshot_download(
            source, repo_type="dataset", revision=revision, token=token, allow_patterns=[CARD, STANDALONE]
        )
    except (OSError, ValueError):
        # `datasets` says why it is not there, and may have it in its cache.
        return
    check_card(folder, source)


def check_resolved_files(builder: datasets.DatasetBuilder, source: str | os.PathLike) -> None:
    """Check that the data files of a dataset are its own, also if they are links.

    Args:
        builder: The dataset's builder.
        source: A local folder, or the name of a dataset on the Hub.

    Raises:
        ValueError: They are not.
    """
    roots = []
    if os.path.isdir(source):
        folder = Path(os.path.realpath(source))
        # In the cache of the Hub, files are links to a folder next to the snapshots.
        roots = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    # The Hub may know a dataset by another name than the one it was asked for.
    repository = builder.repo_id or str(source)
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            is_own = any(Path(os.path.realpath(file)).is_relative_to(root) for root in roots)
            if not (is_own if roots else _is_in_repository(file, repository)):
                raise ValueError(
                    f"{source} has the data file {file!r}, which is not inside it or is a link that leads outside. "
                    "Load the folder or the dataset that the file is in"
                )


def _is_in_repository(file: str, source: str) -> bool:
    is_plain = "::" not in file and ".." not in file.split("/")
    return is_plain and file.startswith((f"hf://datasets/{source}@", f"hf://datasets/{source}/"))


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
