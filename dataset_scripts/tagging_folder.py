"""Reads a folder of images or videos with a metadata file as a tagging dataset."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import SPLIT_KEYWORDS

from .column_names import USUAL_NAMES, ColumnNames, is_one
from .file_states import add_file_states
from .media_suffixes import METADATA_NAMES, media_kind
from .metadata_text import TITLE_COLUMNS, check_unicode, decode_text, open_csv
from .parquet_rows import read_parquet_rows
from .tag_separators import choose_separator, read_tags
from .tag_values import LABEL_COLUMNS
from .tagging_columns import MEDIA_COLUMNS, TEXT_COLUMNS, distinct_tags

logger = logging.getLogger(__name__)

SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}


@dataclass(frozen=True)
class _Metadata:
    """The rows of a metadata file, and the columns that their tags are read from.

    Args:
        path: The file.
        rows: Each row with its location for error messages.
        tags_column: The column with the tags, which need not exist.
        one_hot: The tags of the one-hot columns, `None` without them.
    """

    path: Path
    rows: list[tuple[str, dict]]
    tags_column: str
    one_hot: dict[str, str] | None


def has_metadata(folder: Path) -> bool:
    """Whether `folder`, or one of its split sub-folders, contains a metadata file."""
    return bool(_metadata_files(folder)) or bool(_split_folders(folder))


def load_tagging_folder(folder: str | os.PathLike, names: ColumnNames = USUAL_NAMES) -> datasets.DatasetDict:
    """Read a folder in the `imagefolder` or `videofolder` convention of `datasets`.

    A split is a sub-folder (`train`, `validation`, `test`, or another name that `datasets` knows) with one
    `metadata.jsonl`, `metadata.csv` or `metadata.parquet`. A folder with a metadata file of its own is one `train`
    split, unless all its files are in sub-folders with names of splits. A row has `file_name`, the path of an image or
    video relative to the metadata file, and optionally `title` (text), `tags` (a list, or text with `|`, `;` or `,`
    between the tags, the same in the whole folder) and `id` (`file_name` by default). Without a column `tags`, tags
    are read from `label` or `labels`. Without text in a column `title`, titles are read from `caption`, `text` or
    `description`. A CSV file may have `;` or tabs between the columns; an encoding other than UTF-8 is detected. The
    names of splits may have capital letters.

    Tags are stripped. Empty and repeated tags, other columns, and images and videos without a row are left out and
    reported in warnings.

    The result is not cached: it always has the present content of the files.

    Args:
        folder: The folder.
        names: Columns with other names. `image_column` and `video_column` name the column of paths in place of
            `file_name`; with both of them, each row has one path.

    Returns:
        The splits with the columns `id`, `image` and/or `video` (undecoded), `title` and `tags`. With images and
        videos in one folder, each row has one of them and `None` in the other column.

    Raises:
        ValueError: A metadata file is missing, ambiguous or damaged; a `file_name` leads out of the folder or has the
            suffix of neither an image nor a video; a value has the wrong type; a named column does not exist; or two
            rows of a split have one id.
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
    folders = split_folders or {"train": root}
    files = {split: _read_metadata(_only_metadata_file(path), names) for split, path in folders.items()}
    separator = _choose_separator(list(files.values()), names, root)
    splits = {split: _read_split(metadata, names, separator) for split, metadata in files.items()}
    if not split_folders:
        splits = _by_split(splits["train"], root)
    paths = {example["path"] for examples in splits.values() for example in examples}
    _warn_of_unlisted_files(root, paths)
    return make_splits(splits)


def make_splits(splits: dict[str, list[dict]]) -> datasets.DatasetDict:
    """Return splits of the examples of a folder. Their fingerprints depend on the states of the files.

    Args:
        splits: The examples of each split, as `{"id", "path", "title", "tags"}`.
    """
    kinds = {media_kind(example["path"]) for examples in splits.values() for example in examples}
    media = {kind: feature for kind, feature in MEDIA_COLUMNS.items() if kind in kinds}
    features = datasets.Features({"id": TEXT_COLUMNS["id"], **media, **TEXT_COLUMNS})
    return datasets.DatasetDict(
        {
            split: add_file_states(datasets.Dataset.from_dict(_columns(examples, features), features))
            for split, examples in splits.items()
        }
    )


def _columns(examples: list[dict], features: datasets.Features) -> dict[str, list]:
    columns = {name: [example[name] for example in examples] for name in TEXT_COLUMNS}
    for kind in features.keys() & MEDIA_COLUMNS.keys():
        columns[kind] = [example["path"] if media_kind(example["path"]) == kind else None for example in examples]
    return {name: columns[name] for name in features}


def _metadata_files(folder: Path) -> list[Path]:
    found = [path for path in (folder / name for name in METADATA_NAMES) if os.path.lexists(path)]
    if unusual := [path for path in found if not path.is_file()]:
        raise ValueError(f"{unusual[0]} is not a regular file; remove it")
    return found


def _only_metadata_file(folder: Path) -> Path:
    found = _metadata_files(folder)
    if len(found) > 1:
        raise ValueError(f"{folder} contains {' and '.join(path.name for path in found)}; keep one of them")
    return found[0]


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the sub-folders with metadata by their split, in the order train, validation, test."""
    found: dict[str, Path] = {}
    paths = sorted(root.iterdir()) if root.is_dir() else []
    for keyword, split in SPLIT_NAMES.items():
        for path in [path for path in paths if path.name.casefold() == keyword and _metadata_files(path)]:
            if split in found:
                raise ValueError(f"{root}: {found[split].name}/ and {path.name}/ are both the {split} split")
            found[split] = path
    return found


def _by_split(examples: list[dict], root: Path) -> dict[str, list[dict]]:
    """Return examples by the split that names their sub-folder, or all in `train` if a sub-folder names none."""
    folders = [Path(os.path.relpath(example["path"], root)).parts[0] for example in examples]
    split_of = {name: SPLIT_NAMES.get(name.casefold()) for name in folders}
    if None in split_of.values():
        if named := [name for name, split in split_of.items() if split]:
            logger.warning(
                "%s: all examples are in the train split, because some are not in a folder of a split (%s)",
                root, ", ".join(sorted(named)),
            )  # fmt: skip
        return {"train": examples}
    if len(set(split_of.values())) < len(split_of):
        raise ValueError(f"{root}: several of the folders {', '.join(sorted(split_of))} are the same split")
    splits = {split: [] for split in dict.fromkeys(SPLIT_NAMES.values())}
    for folder, example in zip(folders, examples, strict=True):
        splits[split_of[folder]].append(example)
    return {split: own for split, own in splits.items() if own}


def _read_split(metadata: _Metadata, names: ColumnNames, separator: str) -> list[dict]:
    examples, ids = [], set()
    missing, num_left_out, unused_columns = [], 0, set()
    folder = metadata.path.parent
    real_folder = os.path.realpath(folder)
    for location, row in _with_usual_names(metadata, names, separator):
        file_name, title, tags, example_id = _check_row(row, location)
        path = _path_inside(real_folder, folder, file_name, location)
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
        shown = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(f"{metadata.path} names {len(missing):,} files that do not exist: {shown}")
    if num_left_out:
        logger.warning("%s: left out %s empty or repeated tags", metadata.path, f"{num_left_out:,}")
    if unused_columns:
        has_tags = metadata.one_hot or any(metadata.tags_column in row for _, row in metadata.rows)
        logger.warning(
            "%s: columns not used: %s%s", metadata.path, ", ".join(sorted(map(str, unused_columns))),
            "" if has_tags else ". There is no column tags, so no example has tags; name yours with --tags_column",
        )  # fmt: skip
    return examples


def _read_metadata(path: Path, names: ColumnNames) -> _Metadata:
    """Read a metadata file, and find the columns with the tags."""
    rows = []
    for location, row in _read_rows(path, names):
        # The first unusable row ends the reading: there may be millions of them.
        named = bool(names.image_column or names.video_column)
        if not isinstance(row, dict) or ("file_name" in row and not row["file_name"] and not named):
            raise ValueError(f'{location}: expected a row with "file_name", got {row!r}')
        rows.append((location, row))
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    names.check(columns, str(path))
    if "file_name" not in columns and not names.image_column and not names.video_column:
        raise ValueError(
            f'{rows[0][0]}: expected a row with "file_name", and {path.name} has only the columns '
            f"{', '.join(map(str, columns))}. Name the column with the paths with --image_column or --video_column, "
            "and the column with the tags, if it is not tags, with --tags_column"
        )
    tags_column = names.tags_column or "tags"
    if not names.tags_column and "tags" not in columns:
        labels = [name for name in LABEL_COLUMNS if name in columns and _are_tags(row.get(name) for _, row in rows)]
        if labels:
            tags_column = labels[0]
            logger.warning("%s has no column tags, so tags are read from the column %s", path, tags_column)
    return _Metadata(path, rows, tags_column, names.one_hot_columns(columns, str(path)))


def _are_tags(values: Iterable[object]) -> bool:
    """Whether the values of a column are text or lists of text. Class numbers are not."""
    cells = (cell for value in values for cell in (value if isinstance(value, list) else [value]))
    return all(isinstance(cell, str | None) for cell in cells)


def _choose_separator(files: list[_Metadata], names: ColumnNames, root: Path) -> str:
    """Return one separator for the tags of all metadata files of a folder."""
    origin = files[0].path if len(files) == 1 else root
    own = [metadata for metadata in files if not metadata.one_hot]
    texts = [row.get(metadata.tags_column) for metadata in own for _, row in metadata.rows]
    if names.tag_separator and (not own or {list} == set(map(type, texts)) - {type(None)}):
        raise ValueError(f"{origin}: tag_separator is for tags that are text, and no row has such tags")
    separator, message = choose_separator(texts, names.tag_separator)
    if message:
        logger.warning("%s: %s", origin, message)
    return separator


def _read_rows(metadata: Path, names: ColumnNames) -> Iterator[tuple[str, Any]]:
    """Yield each row of a metadata file, which need not be a dict, with its location for error messages."""
    if metadata.suffix == ".parquet":
        yield from _read_parquet_rows(metadata)
        return
    messages = []
    try:
        text = decode_text(metadata.read_bytes(), messages)
    except ValueError as error:
        raise ValueError(f"{metadata}: {error}") from error
    if metadata.suffix == ".csv":
        yield from _read_csv_rows(text, metadata, names, messages)
    else:
        yield from _read_json_rows(io.StringIO(text, newline=""), metadata)
    for message in messages:
        logger.warning("%s: %s", metadata, message)


def _read_parquet_rows(metadata: Path) -> Iterator[tuple[str, dict]]:
    try:
        for number, row in enumerate(read_parquet_rows(metadata), start=1):
            yield f"{metadata}, row {number}", row
    except ValueError as error:
        raise ValueError(f"{metadata}: {error}") from error


def _read_json_rows(file: Iterator[str], metadata: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        location = f"{metadata}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{location}: not JSON ({error})") from error
        yield location, row


def _read_csv_rows(text: str, metadata: Path, names: ColumnNames, messages: list[str]) -> Iterator[tuple[str, dict]]:
    columns, rows = [], None
    try:
        columns, rows = open_csv(text, ("file_name", *names.renamed().values()), messages)
        for cells in rows:
            location = f"{metadata}, line {rows.line_num}"
            if len(cells) > len(columns):
                raise ValueError(f"{location}: more cells than the header's {len(columns)} columns")
            if cells:
                yield location, dict(zip_longest(columns, cells))
    except csv.Error as error:
        raise ValueError(f"{metadata}, line {rows.line_num if rows else 1}: not csv ({error})") from error


def _with_usual_names(metadata: _Metadata, names: ColumnNames, separator: str) -> Iterator[tuple[str, dict]]:
    """Yield the rows with the columns `file_name`, `title` and `tags`, and with lists of tags."""
    one_hot, tags_column, named = metadata.one_hot, metadata.tags_column, names.renamed()
    used = {*named.values(), *(one_hot or [tags_column])}
    replaced = {"title" if name == "title" else "file_name" for name in named} | {"tags"}
    if left_out := sorted(replaced.intersection(column for _, row in metadata.rows for column in row) - used):
        logger.warning("%s: columns not used, because others are named: %s", metadata.path, ", ".join(left_out))
    titles = [] if "title" in named else [name for name in TITLE_COLUMNS if name not in used]
    title_columns = {_title_column(row, titles) for _, row in metadata.rows} - {None}
    if other := sorted(title_columns - {"title"}):
        logger.warning("%s: titles are read from the column %s", metadata.path, ", ".join(other))
    for location, row in metadata.rows:
        usual = {column: value for column, value in row.items() if column not in used and column not in title_columns}
        if title_column := _title_column(row, titles):
            usual["title"] = row[title_column]
        usual |= _named_values(row, named, location)
        try:
            if one_hot:
                usual["tags"] = [tag for column, tag in one_hot.items() if is_one(row.get(column), column)]
            else:
                usual["tags"] = read_tags(row.get(tags_column), separator)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error
        yield location, usual


def _title_column(row: dict, names: list[str]) -> str | None:
    """Return the first of some columns with text. A title that is not text is returned too, to be reported."""
    for name in names:
        value = row.get(name)
        if value.strip() if isinstance(value, str) else name == "title" and value is not None:
            return name
    return None


def _named_values(row: dict, named: dict[str, str], location: str) -> dict[str, Any]:
    """Return the title and the path of a row from the columns that the user names."""
    values = {name: row.get(column) for name, column in named.items()}
    paths = [values.pop(kind) for kind in MEDIA_COLUMNS if kind in values]
    if not paths:
        return values
    paths = [path for path in paths if path]
    if len(paths) > 1:
        raise ValueError(f"{location}: there are paths of an image and of a video, {paths}; expected one of them")
    return values | {"file_name": paths[0] if paths else None}


def _check_row(row: dict, location: str) -> tuple[str, str, list[str], str]:
    if not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{location}: expected a row with "file_name", got {row!r}')
    file_name, title, tags, example_id = row["file_name"], row.get("title"), row.get("tags"), row.get("id")
    if not isinstance(title, str | None):
        raise ValueError(f"{location}: title must be text, got {title!r}")
    if not isinstance(tags, list | None) or not all(isinstance(tag, str) for tag in tags or []):
        raise ValueError(f"{location}: tags must be text or a list of texts, got {tags!r}")
    if not isinstance(example_id, str | int | None):
        raise ValueError(f"{location}: id must be text or an integer, got {example_id!r}")
    try:
        for text in (file_name, title or "", *(tags or []), str(example_id)):
            check_unicode(text)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
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
