"""Reads a folder of images or videos with a metadata file as a tagging dataset."""

import csv
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import SPLIT_KEYWORDS

from .media_suffixes import METADATA_NAMES, media_kind
from .tag_separators import describe_separator, find_printed_list, find_separator, split_tags
from .tagging_columns import MEDIA_COLUMNS, TEXT_COLUMNS, distinct_tags

logger = logging.getLogger(__name__)

SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}


def has_metadata(folder: Path) -> bool:
    """Whether `folder`, or one of its split sub-folders, contains a metadata file."""
    return bool(_metadata_files(folder)) or bool(_split_folders(folder))


def load_tagging_folder(folder: str | os.PathLike) -> datasets.DatasetDict:
    """Read a folder in the `imagefolder` or `videofolder` convention of `datasets`.

    A split is a sub-folder (`train`, `validation`, `test`, or another name that `datasets` knows) with one
    `metadata.jsonl`, `metadata.csv` or `metadata.parquet`. A folder with a metadata file of its own is one `train`
    split, unless all its files are in sub-folders with names of splits. A row has `file_name`, the path of an image or
    video relative to the metadata file, and optionally `title` (text), `tags` (a list; in csv text with `|`, `;` or
    `,` between the tags) and `id` (`file_name` by default).

    Tags are stripped. Empty and repeated tags, other columns, and images and videos without a row are left out and
    reported in warnings.

    The result is not cached: it always has the present content of the files.

    Returns:
        The splits with the columns `id`, `image` and/or `video` (undecoded), `title` and `tags`. With images and
        videos in one folder, each row has one of them and `None` in the other column.

    Raises:
        ValueError: A metadata file is missing, ambiguous or damaged; a `file_name` leads out of the folder or has the
            suffix of neither an image nor a video; a value has the wrong type; or two rows of a split have one id.
        FileNotFoundError: Files that the metadata names are missing.
    """
    root = Path(folder)
    split_folders, in_root = _split_folders(root), _metadata_files(root)
    if split_folders and in_root:
        names = ", ".join(f"{path.name}/" for path in split_folders.values())
        raise ValueError(
            f"{root} contains {in_root[0].name} and also {names} with their own metadata; keep one metadata file, or "
            "one in each split folder"
        )
    if not split_folders and not in_root:
        raise ValueError(f"neither {root} nor a split sub-folder of it contains one of {', '.join(METADATA_NAMES)}")
    if split_folders:
        splits = {split: _read_split(_only_metadata_file(path)) for split, path in split_folders.items()}
    else:
        splits = _by_split(_read_split(_only_metadata_file(root)), root)
    paths = {example["path"] for examples in splits.values() for example in examples}
    _warn_of_unlisted_files(root, paths)
    return make_splits(splits)


def make_splits(splits: dict[str, list[dict]]) -> datasets.DatasetDict:
    """Return splits of the examples of a folder.

    Args:
        splits: The examples of each split, as `{"id", "path", "title", "tags"}`.
    """
    kinds = {media_kind(example["path"]) for examples in splits.values() for example in examples}
    media = {kind: feature for kind, feature in MEDIA_COLUMNS.items() if kind in kinds}
    features = datasets.Features({"id": TEXT_COLUMNS["id"], **media, **TEXT_COLUMNS})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(_columns(examples, features), features)
            for split, examples in splits.items()
        }
    )


def _columns(examples: list[dict], features: datasets.Features) -> dict[str, list]:
    columns = {name: [example[name] for example in examples] for name in TEXT_COLUMNS}
    for kind in features.keys() & MEDIA_COLUMNS.keys():
        columns[kind] = [example["path"] if media_kind(example["path"]) == kind else None for example in examples]
    return {name: columns[name] for name in features}


def _metadata_files(folder: Path) -> list[Path]:
    return [path for path in (folder / name for name in METADATA_NAMES) if path.is_file()]


def _only_metadata_file(folder: Path) -> Path:
    found = _metadata_files(folder)
    if len(found) > 1:
        raise ValueError(f"{folder} contains {' and '.join(path.name for path in found)}; keep one of them")
    return found[0]


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the sub-folders with metadata by their split, in the order train, validation, test."""
    found: dict[str, Path] = {}
    for keyword, split in SPLIT_NAMES.items():
        path = root / keyword
        if _metadata_files(path):
            if split in found:
                raise ValueError(f"{root}: {found[split].name}/ and {path.name}/ are both the {split} split")
            found[split] = path
    return found


def _by_split(examples: list[dict], root: Path) -> dict[str, list[dict]]:
    """Return examples by the split that names their sub-folder, or all in `train` if a sub-folder names none."""
    folders = [Path(os.path.relpath(example["path"], root)).parts[0] for example in examples]
    if not set(folders) <= set(SPLIT_NAMES):
        if named := set(folders) & set(SPLIT_NAMES):
            logger.warning(
                "%s: all examples are in the train split, because some are not in a folder of a split (%s)",
                root, ", ".join(sorted(named)),
            )  # fmt: skip
        return {"train": examples}
    if len({SPLIT_NAMES[folder] for folder in folders}) < len(set(folders)):
        raise ValueError(f"{root}: several of the folders {', '.join(sorted(set(folders)))} are the same split")
    splits = {split: [] for split in dict.fromkeys(SPLIT_NAMES.values())}
    for folder, example in zip(folders, examples, strict=True):
        splits[SPLIT_NAMES[folder]].append(example)
    return {split: own for split, own in splits.items() if own}


def _read_split(metadata: Path) -> list[dict]:
    examples, ids = [], set()
    missing, num_left_out, unused_columns = [], 0, set()
    real_folder = os.path.realpath(metadata.parent)
    for location, row in _read_rows(metadata):
        file_name, title, tags, example_id = _check_row(row, location)
        path = _path_inside(real_folder, metadata.parent, file_name, location)
        if example_id in ids:
            raise ValueError(f"{location}: an earlier row has the id {example_id!r}; every row needs its own")
        ids.add(example_id)
        if not os.path.isfile(path):
            missing.append(file_name)
        distinct = distinct_tags(tags)
        num_left_out += len(tags) - len(distinct)
        unused_columns |= row.keys() - {"file_name", *TEXT_COLUMNS}
        examples.append({"id": example_id, "path": path, "title": title, "tags": distinct})
    if missing:
        names = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(f"{metadata} names {len(missing):,} files that do not exist: {names}")
    if not examples:
        raise ValueError(f"{metadata} has no rows")
    if num_left_out:
        logger.warning("%s: left out %s empty or repeated tags", metadata, f"{num_left_out:,}")
    if unused_columns:
        logger.warning("%s: columns not used: %s", metadata, ", ".join(sorted(map(str, unused_columns))))
    return examples


def _read_rows(metadata: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a metadata file, which need not be a dict, with its location for error messages."""
    if metadata.suffix == ".parquet":
        yield from _read_parquet_rows(metadata)
        return
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            yield from (_read_csv_rows if metadata.suffix == ".csv" else _read_json_rows)(file, metadata)
    except UnicodeDecodeError as error:
        raise ValueError(f"{metadata}: not UTF-8 text ({error})") from error


def _read_parquet_rows(metadata: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = pq.read_table(metadata).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{metadata}: not a Parquet file ({error})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{metadata}, row {number}", row


def _read_json_rows(file: Iterator[str], metadata: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        location = f"{metadata}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{location}: not JSON ({error})") from error
        yield location, row


def _read_csv_rows(file: Iterator[str], metadata: Path) -> Iterator[tuple[str, dict]]:
    reader, rows = csv.DictReader(file, strict=True), []
    try:
        for row in reader:
            location = f"{metadata}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{location}: more cells than the header's {len(reader.fieldnames)} columns")
            if message := find_printed_list(row.get("tags")):
                raise ValueError(f"{location}: {message}")
            rows.append((location, row))
    except csv.Error as error:
        raise ValueError(f"{metadata}, line {reader.line_num}: not csv ({error})") from error
    separator = find_separator(row.get("tags") for _, row in rows)
    if message := describe_separator(separator):
        logger.warning("%s: %s", metadata, message)
    for location, row in rows:
        if isinstance(row.get("tags"), str):
            row["tags"] = split_tags(row["tags"], separator)
        yield location, row


def _check_row(row: Any, location: str) -> tuple[str, str, list[str], str]:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{location}: expected a row with "file_name", got {row!r}')
    file_name, title, tags, example_id = row["file_name"], row.get("title"), row.get("tags"), row.get("id")
    if not isinstance(title, str | None):
        raise ValueError(f"{location}: title must be text, got {title!r}")
    if not isinstance(tags, list | None) or not all(isinstance(tag, str) for tag in tags or []):
        raise ValueError(f"{location}: tags must be a list of texts, got {tags!r}")
    if not isinstance(example_id, str | int | None):
        raise ValueError(f"{location}: id must be text or an integer, got {example_id!r}")
    if media_kind(file_name) is None:
        raise ValueError(f"{location}: {file_name!r} has the suffix of neither an image nor a video")
    return file_name, title or "", tags or [], file_name if example_id is None else str(example_id)


def _path_inside(real_folder: str, folder: Path, file_name: str, location: str) -> str:
    path = os.path.join(folder, file_name)
    is_relative = "\0" not in file_name and not os.path.isabs(file_name)
    if not is_relative or os.path.commonpath([real_folder, os.path.realpath(path)]) != real_folder:
        raise ValueError(f"{location}: {file_name!r} leads out of {folder}; only files inside it are read")
    return os.path.abspath(path)


def _warn_of_unlisted_files(root: Path, listed: set[str]) -> None:
    unlisted = [
        path
        for folder, _, names in os.walk(root)
        for path in (os.path.abspath(os.path.join(folder, name)) for name in names if not name.startswith("."))
        if media_kind(path) and path not in listed
    ]
    if unlisted:
        logger.warning(
            "%s: left out %s images or videos that no metadata file names, such as %s",
            root, f"{len(unlisted):,}", sorted(unlisted)[0],
        )  # fmt: skip
