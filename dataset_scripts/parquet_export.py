"""Exports a tagging dataset as Parquet files and video files that `datasets` loads without this package."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Value, Video
from datasets.packaged_modules.videofolder.videofolder import VideoFolder
from datasets.table import embed_table_storage
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCard

from .export_card import fill_card
from .export_manifest import MANIFEST, Manifest
from .tag_counts import TagCounts, size_statistics, tag_statistics
from .tagging_columns import undecoded, undecoded_feature

# The Hub recommends at most 10,000 files in a folder.
VIDEOS_PER_FOLDER = 5000
# `datasets` takes files with other suffixes for sound or images. FFmpeg recognises a video by its content.
VIDEO_SUFFIXES_OF_DATASETS = frozenset(VideoFolder.EXTENSIONS)
OTHER_VIDEO_SUFFIX = ".mp4"
TEXT_ROW_GROUP = 20_000
CARD, NOTICE = "README.md", "NOTICE"


def write_parquet(
    dataset: DatasetDict,
    folder: str | os.PathLike,
    card: DatasetCard | str | os.PathLike,
    max_shard_size: str | int = "500MB",
    notice: str | os.PathLike | None = None,
) -> dict[str, int | float]:
    """Write a dataset and its card to a folder from which `datasets.load_dataset` loads it again.

    Every split is written as `<split>-00000-of-00003.parquet` and so on, with images and features inside. If every
    split has video files, the dataset is written as a `videofolder` instead: unchanged video files, and a
    `data/<split>/metadata.parquet`. Everything is written next to the folder first and then moved into it. The card is
    written last, so a folder without `README.md` is incomplete.

    Args:
        dataset: Splits with the columns of [`load_tagging_dataset`].
        folder: A new or empty folder, or one with an earlier export, whose files are replaced.
        card: A dataset card or its path. Its size and statistics are filled in (see [`fill_card`]).
        max_shard_size: Largest size of a Parquet file before compression, in bytes or as `"500MB"`.
        notice: A file with the notices that the licences ask for, which is kept with the images as `NOTICE`.

    Returns:
        The statistics in the card.

    Raises:
        ValueError: `folder` contains files that are not from an export, or exported files that were changed, a Parquet
            dataset has paths instead of images or videos, or `max_shard_size` is not a size.
        FileNotFoundError: An image or video of the dataset is missing.
    """
    folder, shard_bytes = Path(folder), convert_file_size_to_int(max_shard_size)
    if shard_bytes < 1:
        raise ValueError(f"max_shard_size={max_shard_size!r} must be at least one byte")
    for split, rows in dataset.items():
        _check_media(rows, split)
    earlier = Manifest.of_earlier_export(folder)
    card = card if isinstance(card, DatasetCard) else DatasetCard.load(card)
    # `datasets` would not take a split without videos for a part of a video folder.
    as_files = all(isinstance(rows.features.get("video"), Video) and _has_videos(rows) for rows in dataset.values())

    partial = _make_partial_folder(folder)
    try:
        files, num_bytes, data_files = [], {}, {}
        for split, rows in dataset.items():
            if as_files:
                paths = list(_write_videos(rows, partial, split))
            else:
                paths = list(_write_shards(rows, partial, split, shard_bytes))
            files += [path.relative_to(partial).as_posix() for path in paths]
            num_bytes[split] = sum(path.stat().st_size for path in paths)
            data_files[split] = f"data/{split}/**" if as_files else f"{split}-*-of-*.parquet"
        counts = {split: TagCounts.from_rows(rows) for split, rows in dataset.items()}
        statistics = tag_statistics(counts) if {"train", "test"} <= counts.keys() else size_statistics(counts)
        fill_card(card, dataset, num_bytes, data_files, statistics)
        if notice is not None:
            shutil.copyfile(notice, partial / NOTICE)
            files.append(NOTICE)
        card.save(partial / CARD)
        _replace_files(partial, folder, [*files, CARD], earlier)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return statistics


def _make_partial_folder(folder: Path) -> Path:
    """Make the folder next to `folder` in which an export is written, in place of one that a killed export left."""
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    if (partial / MANIFEST).is_file() and not partial.is_symlink():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{partial} is not from an export; move it, or give another folder") from None
    (partial / MANIFEST).touch()
    return partial


def _replace_files(partial: Path, folder: Path, files: list[str], earlier: Manifest) -> None:
    """Move the new files into `folder` in place of earlier ones.

    At any time the manifest names every exported file that may be there, and the card is missing until all are.
    """
    earlier.check_free(folder, files)
    new = Manifest.of_files(partial, files)
    folder.mkdir(parents=True, exist_ok=True)
    (earlier | new).save(folder)
    earlier.delete_files(folder)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    new.save(folder)


def _check_media(rows: Dataset, split: str) -> None:
    """Refuses rows with paths of any file on this computer, and a column that the export would overwrite."""
    if "video" in rows.features and "file_name" in rows.features:
        raise ValueError("a dataset with videos cannot have a column file_name, which the export adds; rename it")
    # These builders take cells from a file unchanged; all others make the paths themselves.
    is_foreign = rows.info.builder_name in ("parquet", "json", "csv", "arrow", "text")
    for column in _media_columns(rows):
        for number, cell in enumerate(_undecoded_cells(rows, column)):
            if cell is None or cell["bytes"] is not None:
                continue
            if cell["path"] is None:
                raise ValueError(f"{split}, row {number}: {column} has neither bytes nor a path")
            if is_foreign:
                raise ValueError(
                    f"{split}, row {number}: {column} is the path {cell['path']!r}, not the file itself. For safety, "
                    "files of this computer that a dataset names are not exported."
                )
            if not os.path.isfile(cell["path"]):
                raise FileNotFoundError(f"{split}, row {number}: the file {cell['path']} does not exist")


def _has_videos(rows: Dataset) -> bool:
    return any(video is not None for video in _undecoded_cells(rows, "video"))


def _write_shards(rows: Dataset, folder: Path, split: str, shard_bytes: int) -> Iterator[Path]:
    size = rows.data.nbytes * len(rows) / max(rows.data.num_rows, 1) + _bytes_of_files(rows)
    # At most one shard for each row, however large a row is.
    num_shards = max(1, min(math.ceil(size / shard_bytes), len(rows)))
    for index in range(num_shards):
        shard = _embed_files(rows.shard(num_shards, index, contiguous=True))
        yield _write_rows(shard, folder / f"{split}-{index:05d}-of-{num_shards:05d}.parquet")


def _write_videos(rows: Dataset, folder: Path, split: str) -> Iterator[Path]:
    folder = folder / "data" / split
    names = []
    for number, video in enumerate(_undecoded_cells(rows, "video")):
        if video is None:
            names.append(None)
            continue
        # Numbers, because an id need not be a file name and videos of different folders may have the same name.
        suffix = Path(video["path"] or "").suffix.lower()
        suffix = suffix if suffix in VIDEO_SUFFIXES_OF_DATASETS else OTHER_VIDEO_SUFFIX
        names.append(f"{number // VIDEOS_PER_FOLDER:05d}/{number % VIDEOS_PER_FOLDER:05d}{suffix}")
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        if video["bytes"] is not None:
            path.write_bytes(video["bytes"])
        else:
            shutil.copyfile(video["path"], path)
        yield path
    # One file, because `datasets` reads the rows of several metadata files in no fixed order.
    metadata = _embed_files(rows.remove_columns("video")).add_column("file_name", names, feature=Value("string"))
    folder.mkdir(parents=True, exist_ok=True)
    yield _write_rows(metadata, folder / "metadata.parquet")


def _write_rows(rows: Dataset, path: Path) -> Path:
    # By default a row group has 100 MB, which is a million examples of text: too few groups to shuffle a stream.
    has_media = rows.features.keys() & {"image", "video", "frame_features"}
    rows.to_parquet(str(path), batch_size=None if has_media else TEXT_ROW_GROUP)
    return path


def _embed_files(rows: Dataset) -> Dataset:
    """Replace the paths of images and videos by the contents of the files."""
    if not _media_columns(rows):
        return rows
    return rows.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True).with_format(None)


def _bytes_of_files(rows: Dataset) -> int:
    """Return the size of the images and videos that rows name by their paths."""
    cells = (cell for column in _media_columns(rows) for cell in _undecoded_cells(rows, column))
    return sum(os.path.getsize(cell["path"]) for cell in cells if cell is not None and cell["bytes"] is None)


def _media_columns(rows: Dataset) -> list[str]:
    return [column for column, feature in rows.features.items() if undecoded_feature(feature) is not None]


def _undecoded_cells(rows: Dataset, column: str) -> Iterator[dict | None]:
    """Yield the images, videos or frames of a column as `{"bytes": …, "path": …}`."""
    for row in undecoded(rows.select_columns(column)):
        if isinstance(row[column], list):
            yield from row[column]
        else:
            yield row[column]
