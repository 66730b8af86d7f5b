"""Writes a tagging dataset as a folder of Parquet files with its card, the form that everyone else loads."""

import os
import re
from pathlib import Path

from datasets import DatasetDict
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, HfApi

from .tag_statistics import tag_statistics

_STATISTICS = re.compile(r"(<!-- statistics -->\n).*?(<!-- /statistics -->)", re.DOTALL)


def write_parquet(dataset: DatasetDict, folder: str | os.PathLike, card: str | os.PathLike) -> dict[str, int | float]:
    """Writes `<split>-00000-of-00001.parquet` for every split, and the card with this dataset's sizes and statistics.

    `datasets.load_dataset(folder)` then gives the dataset back.

    Args:
        dataset: has the splits `train` and `test` at least, and its pictures' bytes rather than their paths.
        folder: made if it is not there; files of an earlier run are replaced.
        card: a dataset card with a `<!-- statistics -->` … `<!-- /statistics -->` section to be filled.

    Returns:
        the statistics that the card shows.

    Raises:
        ValueError: `folder` holds other Parquet files, which would be loaded as part of the dataset.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}-00000-of-00001.parquet" for split in dataset}
    if others := sorted(set(folder.rglob("*.parquet")) - set(files.values())):
        raise ValueError(f"{folder} holds other Parquet files, such as {others[0].name}; give an empty folder")
    for split, rows in dataset.items():
        rows.to_parquet(str(files[split]))

    info = next(iter(dataset.values())).info.copy()
    info.download_size = sum(path.stat().st_size for path in files.values())
    statistics = tag_statistics(dataset)
    filled = DatasetCard.load(card)
    DatasetInfosDict(default=info).to_dataset_card_data(filled.data)
    filled.text = _STATISTICS.sub(lambda found: found[1] + _as_table(statistics) + found[2], filled.text)
    filled.save(folder / "README.md")
    return statistics


def push_folder(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """Uploads what [`write_parquet`] wrote as the Hub dataset `repo_id`, made if need be, and returns its address."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    # Without the deletion, files of an earlier upload under other names would stay part of the dataset.
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=str(folder), delete_patterns="*.parquet")
    return f"{api.endpoint}/datasets/{repo_id}"


def _as_table(statistics: dict[str, int | float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:,} |" for name, value in statistics.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"
