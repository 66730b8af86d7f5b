"""Writes a tagging dataset as Parquet files, clips beside them, with its card: the form that everyone else loads."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, DatasetInfo, Features, Image, SplitDict, SplitInfo, Value, Video
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from .tag_statistics import TagCounts, size_statistics, tag_statistics

# The Hub asks for no more than 10,000 files in a folder.
CLIPS_A_FOLDER = 5000
_STATISTICS = re.compile(r"(<!-- statistics -->\n).*?(<!-- /statistics -->)", re.DOTALL)
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
_TEXT = """
# {name}

Items with free-form tags, exported with `optsg export`. Columns: {columns}.

```python
from datasets import load_dataset

dataset = load_dataset("{where}")
```
{clips}
<!-- statistics -->
<!-- /statistics -->
"""
_CLIPS = """
`video` is decoded by [torchcodec](https://github.com/pytorch/torchcodec); without it,
`dataset.cast_column("video", datasets.Video(decode=False))` gives the clips' paths.
"""


def new_card(name: str, dataset: DatasetDict, license: str | None, language: list[str] | None) -> DatasetCard:
    """A card for a dataset that has none of its own.

    Args:
        name: what to call it, such as a folder's or a repository's name.
        license, language: identifiers of the Hub, such as `"cc-by-4.0"` and `["en"]`; `"unknown"` and left out if not
            given.
    """
    features = next(iter(dataset.values())).features
    data = DatasetCardData(
        pretty_name=name,
        license=license or "unknown",
        language=language,
        task_categories=["video-classification" if "video" in features else "image-classification"],
        tags=["tagging"],
    )
    columns = ", ".join(f"`{column}`" for column in features)
    text = _TEXT.format(name=name, columns=columns, where=name, clips=_CLIPS if "video" in features else "")
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")


def write_parquet(
    dataset: DatasetDict,
    folder: str | os.PathLike,
    card: DatasetCard | str | os.PathLike,
    max_shard_size: str | int = "500MB",
) -> dict[str, int | float]:
    """Writes every split as `<split>-00000-of-00003.parquet`, …, and the card with its sizes and statistics.

    Pictures and features are embedded. A dataset with clips is written as a `videofolder` instead: the clips' files as
    they are, five thousand a folder, and `data/<split>/metadata.parquet`. Either way `datasets.load_dataset(folder)`
    gives the dataset back. The card comes last: a folder without `README.md` was not finished.

    Args:
        dataset: splits with the columns of [`load_tagging_dataset`].
        folder: made if it is not there; files of an earlier run are replaced.
        card: a dataset card, or its path. Statistics go into its `<!-- statistics -->` … `<!-- /statistics -->`
            section, or to the end of one that has none.
        max_shard_size: of a Parquet file before compression, in bytes or as `"500MB"`.

    Returns:
        the statistics that the card shows.

    Raises:
        ValueError: `folder` holds other Parquet files, which would be loaded as part of the dataset.
        FileNotFoundError: a picture or clip the dataset names is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    filled = card if isinstance(card, DatasetCard) else DatasetCard.load(card)
    _remove_earlier(folder, dataset)
    largest = convert_file_size_to_int(max_shard_size)
    written = {
        split: list(
            _write_clips(rows, folder / "data" / split)
            if "video" in rows.features
            else _write_shards(rows, folder, split, largest)
        )
        for split, rows in dataset.items()
    }
    counts = {split: TagCounts.of(rows) for split, rows in dataset.items()}
    statistics = tag_statistics(counts) if {"train", "test"} <= counts.keys() else size_statistics(counts)
    DatasetInfosDict(default=_info(dataset, written)).to_dataset_card_data(filled.data)
    filled.data.size_categories = [_size_category(statistics["items"])]
    if not _STATISTICS.search(filled.text):
        filled.text += "\n<!-- statistics -->\n<!-- /statistics -->\n"
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


def _remove_earlier(folder: Path, dataset: DatasetDict) -> None:
    """Takes away what an earlier run wrote for these splits, which may have been of more files."""
    splits = "|".join(map(re.escape, dataset))
    ours = re.compile(rf"(?:{splits})-\d{{5}}-of-\d{{5}}\.parquet|data/(?:{splits})/metadata\.parquet")
    earlier = sorted(folder.rglob("*.parquet"))
    if others := [path for path in earlier if not ours.fullmatch(path.relative_to(folder).as_posix())]:
        raise ValueError(f"{folder} holds other Parquet files, such as {others[0].name}; give an empty folder")
    # The card first: without it nobody takes what is left for finished.
    (folder / "README.md").unlink(missing_ok=True)
    for path in earlier:
        if path.name == "metadata.parquet":
            shutil.rmtree(path.parent)
        else:
            path.unlink()


def _write_shards(rows: Dataset, folder: Path, split: str, largest: int) -> Iterator[Path]:
    size = rows.data.nbytes * len(rows) / max(rows.data.num_rows, 1) + _outside_bytes(rows)
    num_shards = max(1, math.ceil(size / largest))
    for index in range(num_shards):
        shard = _embedded(rows.shard(num_shards, index, contiguous=True))
        yield _write(shard, folder / f"{split}-{index:05d}-of-{num_shards:05d}.parquet")


def _write_clips(rows: Dataset, folder: Path) -> Iterator[Path]:
    names = []
    for number, clip in enumerate(rows.select_columns("video").cast_column("video", Video(decode=False))):
        clip = clip["video"]
        if clip is None:
            names.append(None)
            continue
        # Numbered: an id need not be a file name, and two clips may have one name in different folders.
        suffix = Path(clip["path"] or "").suffix.lower() or ".mp4"
        names.append(f"{number // CLIPS_A_FOLDER:05d}/{number % CLIPS_A_FOLDER:05d}{suffix}")
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        if clip["bytes"] is not None:
            path.write_bytes(clip["bytes"])
        else:
            shutil.copyfile(clip["path"], path)
        yield path
    # One file: of several, `datasets` reads the rows in no certain order.
    listed = _embedded(rows.remove_columns("video")).add_column("file_name", names, feature=Value("string"))
    folder.mkdir(parents=True, exist_ok=True)
    yield _write(listed, folder / "metadata.parquet")


def _write(rows: Dataset, path: Path) -> Path:
    unfinished = path.with_name(f"{path.name}.part")
    rows.to_parquet(str(unfinished))
    os.replace(unfinished, path)
    return path


def _embedded(rows: Dataset) -> Dataset:
    """With the bytes of pictures that are files."""
    if not _picture_columns(rows):
        return rows
    return rows.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True).with_format(None)


def _outside_bytes(rows: Dataset) -> int:
    """Bytes of the pictures that are files."""
    size = 0
    for column in _picture_columns(rows):
        for picture in rows.cast_column(column, Image(decode=False))[column]:
            if picture is not None and picture["bytes"] is None:
                size += os.path.getsize(picture["path"])
    return size


def _picture_columns(rows: Dataset) -> list[str]:
    return [column for column, feature in rows.features.items() if isinstance(feature, Image)]


def _info(dataset: DatasetDict, written: dict[str, list[Path]]) -> DatasetInfo:
    features = Features(next(iter(dataset.values())).features)
    if "video" in features:
        features["video"] = Video()
    sizes = {split: sum(path.stat().st_size for path in paths) for split, paths in written.items()}
    splits = SplitDict(
        {split: SplitInfo(split, num_bytes=sizes[split], num_examples=len(rows)) for split, rows in dataset.items()}
    )
    total = sum(sizes.values())
    return DatasetInfo(features=features, splits=splits, download_size=total, dataset_size=total)


def _size_category(items: int) -> str:
    """The Hub's name for a number of items, such as `10K<n<100K`."""
    place = sum(items >= 10 ** (3 + power) for power in range(len(_SIZES)))
    if place == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if place == len(_SIZES) else f"{_SIZES[place - 1]}<n<{_SIZES[place]}"


def _as_table(statistics: dict[str, int | float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:,} |" for name, value in statistics.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"
