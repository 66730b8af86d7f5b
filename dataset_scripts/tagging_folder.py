"""A folder of images or videos with a metadata file, read as a tagging dataset."""

import csv
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import SPLIT_KEYWORDS

from .media_suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES

logger = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CSV_TAG_SEPARATOR = "|"
_SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}


def has_metadata(folder: Path) -> bool:
    """Whether `folder`, or one of its split sub-folders, holds a metadata file."""
    return bool(_metadata_files(folder)) or bool(_split_folders(folder))


def load_tagging_folder(folder: str | os.PathLike) -> datasets.DatasetDict:
    """Reads a folder of the `imagefolder` / `videofolder` convention.

    Every split is a sub-folder (`train`, `validation`, `test`, or another name `datasets` knows a split by) that holds
    one `metadata.jsonl`, `metadata.csv` or `metadata.parquet`; a folder that holds a metadata file itself is all
    `train`. A row's `file_name` is the path of an image or video from the metadata file's folder. `title` (text),
    `tags` (a list; in csv, text with `|` between tags) and `id` (default: `file_name`) may be missing. Tags are
    stripped; empty ones and repeats are left out and counted in a warning, as are columns and files that are not used.

    Nothing is cached: the rows are those of the files as they are now.

    Returns:
        the splits, with the columns `id`, `image` and/or `video` (undecoded), `title` and `tags`. In a folder that
        holds both images and videos, each row has one of them and `None` in the other column.

    Raises:
        ValueError: a metadata file is missing, ambiguous or damaged; a `file_name` leads out of the folder or is
            neither an image nor a video; a value is of the wrong type; two rows of a split have one id.
        FileNotFoundError: files the metadata names are not there; names the first few and says how many.
    """
    root = Path(folder)
    split_folders, in_root = _split_folders(root), _metadata_files(root)
    if split_folders and in_root:
        raise ValueError(
            f"{root} holds {in_root[0].name} and also {', '.join(f'{path.name}/' for path in split_folders.values())} "
            "with metadata of their own; keep either one metadata file or one for each split"
        )
    if not split_folders and not in_root:
        raise ValueError(f"{root} holds none of {', '.join(METADATA_NAMES)}, nor does a split sub-folder of it")
    splits = {
        split: _read_split(_only_metadata_file(path)) for split, path in (split_folders or {"train": root}).items()
    }
    _warn_of_unlisted_files(root, {example["path"] for examples in splits.values() for example in examples})

    kinds = {_kind(example["path"]) for examples in splits.values() for example in examples}
    media = {"image": datasets.Image(), "video": datasets.Video(decode=False)}
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            **{kind: feature for kind, feature in media.items() if kind in kinds},
            "title": datasets.Value("string"),
            "tags": datasets.List(datasets.Value("string")),
        }
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(_columns(examples, features), features)
            for split, examples in splits.items()
        }
    )


def _columns(examples: list[dict], features: datasets.Features) -> dict[str, list]:
    columns = {name: [example[name] for example in examples] for name in ("id", "title", "tags")}
    for kind in features.keys() & {"image", "video"}:
        columns[kind] = [example["path"] if _kind(example["path"]) == kind else None for example in examples]
    return {name: columns[name] for name in features}


def _metadata_files(folder: Path) -> list[Path]:
    return [path for path in (folder / name for name in METADATA_NAMES) if path.is_file()]


def _only_metadata_file(folder: Path) -> Path:
    found = _metadata_files(folder)
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}; keep one of them")
    return found[0]


def _split_folders(root: Path) -> dict[str, Path]:
    """Sub-folders with metadata by the split they are, in the order train, validation, test."""
    found: dict[str, Path] = {}
    for keyword, split in _SPLIT_NAMES.items():
        path = root / keyword
        if _metadata_files(path):
            if split in found:
                raise ValueError(f"{root}: {found[split].name}/ and {path.name}/ are both the {split} split")
            found[split] = path
    return found


def _kind(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def _read_split(metadata: Path) -> list[dict]:
    examples, missing, left_out_tags, other_columns = [], [], 0, set()
    ids: set[str] = set()
    real_folder = os.path.realpath(metadata.parent)
    for place, row in _read_rows(metadata):
        file_name, title, tags, example_id = _check_row(row, place)
        path = _path_inside(real_folder, metadata.parent, file_name, place)
        if example_id in ids:
            raise ValueError(f"{place}: the id {example_id!r} is that of an earlier row; every row needs its own")
        ids.add(example_id)
        if not os.path.isfile(path):
            missing.append(file_name)
        cleaned = list(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
        left_out_tags += len(tags) - len(cleaned)
        other_columns |= row.keys() - {"file_name", "title", "tags", "id"}
        examples.append({"id": example_id, "path": path, "title": title, "tags": cleaned})
    if missing:
        examples = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(f"{metadata} names {len(missing):,} files that are not there: {examples}")
    if not examples:
        raise ValueError(f"{metadata} holds no rows")
    if left_out_tags:
        logger.warning("%s: left out %s empty or repeated tags", metadata, f"{left_out_tags:,}")
    if other_columns:
        logger.warning("%s: columns not used: %s", metadata, ", ".join(sorted(map(str, other_columns))))
    return examples


def _read_rows(metadata: Path) -> Iterator[tuple[str, dict]]:
    """`(where it stands, row)` for every row."""
    try:
        if metadata.suffix == ".parquet":
            for number, row in enumerate(pq.read_table(metadata).to_pylist(), start=1):
                yield f"{metadata}, row {number}", row
            return
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            if metadata.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    place = f"{metadata}, line {reader.line_num}"
                    if None in row:
                        raise ValueError(f"{place}: more cells than the header's {len(reader.fieldnames)} columns")
                    if isinstance(row.get("tags"), str):
                        row["tags"] = _split_csv_tags(row["tags"], place)
                    yield place, row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{metadata}, line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{metadata}, line {number}: not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{metadata}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{metadata}, line {reader.line_num}: not csv ({error})") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{metadata}: not a Parquet file ({error})") from error


def _split_csv_tags(cell: str, place: str) -> list[str]:
    # What `DataFrame.to_csv` writes for a column of lists would otherwise become one strange tag.
    if cell.lstrip().startswith(("['", '["', "[]")):
        raise ValueError(f"{place}: tags are a printed list, {cell!r}; write them as 'first tag|second tag'")
    return cell.split(CSV_TAG_SEPARATOR) if cell.strip() else []


def _check_row(row, place: str) -> tuple[str, str, list[str], str]:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{place}: expected a row with "file_name", got {row!r}')
    file_name, title, tags, example_id = row["file_name"], row.get("title"), row.get("tags"), row.get("id")
    if not isinstance(title, str | None):
        raise ValueError(f"{place}: title must be text, got {title!r}")
    if not isinstance(tags, list | None) or not all(isinstance(tag, str) for tag in tags or []):
        raise ValueError(f"{place}: tags must be a list of texts, got {tags!r}")
    if not isinstance(example_id, str | int | None):
        raise ValueError(f"{place}: id must be text or a whole number, got {example_id!r}")
    if _kind(file_name) is None:
        raise ValueError(f"{place}: {file_name!r} has the suffix of neither an image nor a video")
    return file_name, title or "", tags or [], file_name if example_id is None else str(example_id)


def _path_inside(real_folder: str, folder: Path, file_name: str, place: str) -> str:
    path = os.path.join(folder, file_name)
    inside = "\0" not in file_name and not os.path.isabs(file_name)
    if not inside or os.path.commonpath([real_folder, os.path.realpath(path)]) != real_folder:
        raise ValueError(f"{place}: {file_name!r} leads out of {folder}; only files inside it are read")
    return os.path.abspath(path)


def _warn_of_unlisted_files(root: Path, listed: set[str]):
    unlisted = [
        path
        for folder, _, names in os.walk(root)
        for path in (os.path.abspath(os.path.join(folder, name)) for name in names if not name.startswith("."))
        if _kind(path) and path not in listed
    ]
    if unlisted:
        logger.warning(
            "%s: %s images or videos are in no metadata file and left out, such as %s",
            root, f"{len(unlisted):,}", sorted(unlisted)[0],
        )  # fmt: skip
