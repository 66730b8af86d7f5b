"""Writes a tagging dataset as Parquet files, videos beside them, with its card: the form that everyone else loads."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, DatasetDict, DatasetInfo, Features, Image, SplitDict, SplitInfo, Value, Video
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCard, DatasetCardData

from .tag_statistics import TagCounts, size_statistics, tag_statistics

if TYPE_CHECKING:
    from modeling_optsg.hub.commits import Published

# The Hub asks for no more than 10,000 files in a folder.
VIDEOS_PER_FOLDER = 5000
VIDEO_FILE_SUFFIXES = frozenset(".avi .mkv .mov .mp4 .mpeg".split())
TEXT_ROW_GROUP = 20_000
# Lists what an export has written, so that another one takes away that and nothing else.
MANIFEST = ".optsg-export.json"
_STATISTICS = re.compile(r"(<!-- statistics -->\n).*?(<!-- /statistics -->)", re.DOTALL)
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
_TEXT = """
# {name}

Examples with free-form tags, exported with `optsg export`. Columns: {columns}.

```python
from datasets import load_dataset

dataset = load_dataset("{where}")
```
{videos}
<!-- statistics -->
<!-- /statistics -->
"""
_VIDEOS = """
`video` is decoded by [torchcodec](https://github.com/pytorch/torchcodec); without it,
`dataset.cast_column("video", datasets.Video(decode=False))` gives the videos' paths.
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
    text = _TEXT.format(name=name, columns=columns, where=name, videos=_VIDEOS if "video" in features else "")
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")


def write_parquet(
    dataset: DatasetDict,
    folder: str | os.PathLike,
    card: DatasetCard | str | os.PathLike,
    max_shard_size: str | int = "500MB",
) -> dict[str, int | float]:
    """Writes every split as `<split>-00000-of-00003.parquet`, …, and the card with its sizes and statistics.

    Images and features are embedded. A dataset with videos is written as a `videofolder` instead: the videos' files as
    they are, five thousand a folder, and `data/<split>/metadata.parquet`; unless a split has no video, when videos are
    embedded too. Either way `datasets.load_dataset(folder)` gives the dataset back. Everything is written beside the
    folder first; the card comes last: a folder without `README.md` was not finished.

    Args:
        dataset: splits with the columns of [`load_tagging_dataset`].
        folder: empty, made if it is not there, or that of an earlier export, whose files are replaced.
        card: a dataset card, or its path. Statistics go into its `<!-- statistics -->` … `<!-- /statistics -->`
            section, or to the end of one that has none.
        max_shard_size: of a Parquet file before compression, in bytes or as `"500MB"`.

    Returns:
        the statistics that the card shows.

    Raises:
        ValueError: `folder` holds anything that no export has written; a Parquet dataset names files instead of
            holding them; or `max_shard_size` is no size.
        FileNotFoundError: an image or video the dataset names is not there.
    """
    folder, largest = Path(folder), convert_file_size_to_int(max_shard_size)
    if largest < 1:
        raise ValueError(f"max_shard_size={max_shard_size!r} must be at least a byte")
    for split, rows in dataset.items():
        _check_files(rows, split)
    earlier = _written_before(folder)
    filled = card if isinstance(card, DatasetCard) else DatasetCard.load(card)
    # A split of no videos would not be taken for a part of a folder of videos.
    as_files = all("video" in rows.features and _has_videos(rows) for rows in dataset.values())

    partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = {
            split: list(
                _write_videos(rows, partial / "data" / split)
                if as_files
                else _write_shards(rows, partial, split, largest)
            )
            for split, rows in dataset.items()
        }
        counts = {split: TagCounts.of(rows) for split, rows in dataset.items()}
        statistics = tag_statistics(counts) if {"train", "test"} <= counts.keys() else size_statistics(counts)
        _fill_card(filled, dataset, written, statistics, as_files)
        files = [path.relative_to(partial).as_posix() for paths in written.values() for path in paths]
        _put_in_place(partial, folder, files, earlier)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    filled.save(folder / "README.md")
    return statistics


def push_folder(folder: str | os.PathLike, repo_id: str, private: bool = False) -> "Published":
    """Publishes what [`write_parquet`] wrote as the Hub dataset `repo_id`, made if need be, by one commit.

    Raises:
        ValueError: the name is malformed, or there are more files than one commit may have.
        PublishingError: the Hub cannot be reached or refuses, or a file was changed on the way.
    """
    # Brings torch, which nothing else here needs.
    from modeling_optsg.hub.commits import LocalFiles, push_files

    # Whatever else lies in the folder is not ours to publish.
    names = [*json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8")), "README.md"]
    return push_files(
        LocalFiles({name: Path(folder) / name for name in names}),
        repo_id,
        repo_type="dataset",
        private=private,
        commit_message="Upload dataset",
        # Files of an earlier upload under other names would stay part of the dataset.
        replace=["*.parquet", "data/*"],
    )


def _written_before(folder: Path) -> list[str]:
    """What an earlier run has written into `folder`, which must hold nothing if none has."""
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if folder.is_dir() and (others := sorted(folder.iterdir())):
        raise ValueError(
            f"{folder} holds files that no export has written, such as {others[0].name}; give an empty or a new folder"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    return []


def _put_in_place(partial: Path, folder: Path, files: list[str], earlier: list[str]) -> None:
    """Moves what is written to where it belongs, in place of what was there. At any moment the manifest names all that
    may lie there, and the card is missing until everything does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / MANIFEST).write_text(json.dumps(sorted({*files, *earlier}), indent=0), encoding="utf-8")
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    (folder / MANIFEST).write_text(json.dumps(files, indent=0), encoding="utf-8")


def _check_files(rows: Dataset, split: str) -> None:
    """Refuses what a stranger's rows could make of this computer's files, and names that would be lost."""
    if "video" in rows.features and "file_name" in rows.features:
        raise ValueError("a dataset of videos cannot have a column file_name: the videos' names go there; rename it")
    # These builders take a cell as it is written; all others have made the path themselves.
    foreign = rows.info.builder_name in ("parquet", "json", "csv", "arrow", "text")
    for column in _media_columns(rows):
        undecoded = rows.select_columns(column).cast_column(column, type(rows.features[column])(decode=False))
        for number, row in enumerate(undecoded):
            cell = row[column]
            if cell is None or cell["bytes"] is not None:
                continue
            if cell["path"] is None:
                raise ValueError(f"{split}, row {number}: {column} has neither bytes nor a path")
            if foreign:
                raise ValueError(
                    f"{split}, row {number}: {column} is the path {cell['path']!r}, not the file itself. What lies "
                    "under that name here is not copied."
                )
            if not os.path.isfile(cell["path"]):
                raise FileNotFoundError(f"{split}, row {number}: there is no file {cell['path']}")


def _has_videos(rows: Dataset) -> bool:
    videos = rows.select_columns("video").cast_column("video", Video(decode=False))
    return any(row["video"] is not None for row in videos)


def _write_shards(rows: Dataset, folder: Path, split: str, largest: int) -> Iterator[Path]:
    size = rows.data.nbytes * len(rows) / max(rows.data.num_rows, 1) + _outside_bytes(rows)
    # No more of them than rows, however large a row is.
    num_shards = max(1, min(math.ceil(size / largest), len(rows)))
    for index in range(num_shards):
        shard = _embedded(rows.shard(num_shards, index, contiguous=True))
        yield _write(shard, folder / f"{split}-{index:05d}-of-{num_shards:05d}.parquet")


def _write_videos(rows: Dataset, folder: Path) -> Iterator[Path]:
    names = []
    for number, video in enumerate(rows.select_columns("video").cast_column("video", Video(decode=False))):
        video = video["video"]
        if video is None:
            names.append(None)
            continue
        # Numbered: an id need not be a file name, and two videos may have one name in different folders. By other
        # suffixes `datasets` takes a video for sound or an image; FFmpeg looks at what is in the file.
        suffix = Path(video["path"] or "").suffix.lower()
        suffix = suffix if suffix in VIDEO_FILE_SUFFIXES else ".mp4"
        names.append(f"{number // VIDEOS_PER_FOLDER:05d}/{number % VIDEOS_PER_FOLDER:05d}{suffix}")
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        if video["bytes"] is not None:
            path.write_bytes(video["bytes"])
        else:
            shutil.copyfile(video["path"], path)
        yield path
    # One file: of several, `datasets` reads the rows in no certain order.
    listed = _embedded(rows.remove_columns("video")).add_column("file_name", names, feature=Value("string"))
    folder.mkdir(parents=True, exist_ok=True)
    yield _write(listed, folder / "metadata.parquet")


def _write(rows: Dataset, path: Path) -> Path:
    # The library's row groups are of a hundred megabytes, which is a million examples where there is nothing but text.
    only_text = not rows.features.keys() & {"image", "video", "frame_features"}
    rows.to_parquet(str(path), batch_size=TEXT_ROW_GROUP if only_text else None)
    return path


def _embedded(rows: Dataset) -> Dataset:
    """With the bytes of images and videos that are files."""
    if not _media_columns(rows):
        return rows
    return rows.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True).with_format(None)


def _outside_bytes(rows: Dataset) -> int:
    """Bytes of the images and videos that are files."""
    size = 0
    for column in _media_columns(rows):
        undecoded = rows.select_columns(column).cast_column(column, type(rows.features[column])(decode=False))
        for row in undecoded:
            if row[column] is not None and row[column]["bytes"] is None:
                size += os.path.getsize(row[column]["path"])
    return size


def _media_columns(rows: Dataset) -> list[str]:
    return [column for column, feature in rows.features.items() if isinstance(feature, (Image, Video))]


def _fill_card(filled: DatasetCard, dataset: DatasetDict, written: dict, statistics: dict, as_files: bool) -> None:
    DatasetInfosDict(default=_info(dataset, written)).to_dataset_card_data(filled.data)
    # By these, not by the files' names: a split may have any name.
    filled.data.configs = [
        {
            "config_name": "default",
            "data_files": [
                {"split": str(split), "path": f"data/{split}/**" if as_files else f"{split}-*-of-*.parquet"}
                for split in dataset
            ],
        }
    ]
    filled.data.size_categories = [_size_category(statistics["examples"])]
    if not _STATISTICS.search(filled.text):
        filled.text += "\n<!-- statistics -->\n<!-- /statistics -->\n"
    filled.text = _STATISTICS.sub(lambda found: found[1] + _as_table(statistics) + found[2], filled.text)


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


def _size_category(examples: int) -> str:
    """The Hub's name for a number of examples, such as `10K<n<100K`."""
    place = sum(examples >= 10 ** (3 + power) for power in range(len(_SIZES)))
    if place == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if place == len(_SIZES) else f"{_SIZES[place - 1]}<n<{_SIZES[place]}"


def _as_table(statistics: dict[str, int | float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:,} |" for name, value in statistics.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"
