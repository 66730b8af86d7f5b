"""Loads every kind of tagging dataset by its name or path."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .archives import ARCHIVE_SUFFIX
from .benchmarks import BUILDERS, is_benchmark, load_benchmark
from .column_names import ColumnNames
from .generic_datasets import load_with_datasets
from .media_suffixes import METADATA_NAMES, media_kind
from .plain_folder import load_plain_folder
from .tagging_columns import TEXT_COLUMNS, Rows
from .tagging_folder import has_metadata, load_tagging_folder

Splits = datasets.DatasetDict | datasets.IterableDatasetDict

_ACCEPTED = (
    f"Accepted: {', '.join(BUILDERS)}; a local folder with {', '.join(METADATA_NAMES)}, with captions, with folders "
    "named after tags, with Parquet files, or with WebDataset tar files; or a dataset on the Hub, org/name"
)


def load_tagging_dataset(
    name_or_path: str | os.PathLike,
    *,
    split: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
    texts_only: bool = False,
    image_column: str | None = None,
    video_column: str | None = None,
    title_column: str | None = None,
    tags_column: str | None = None,
    tag_separator: str | None = None,
    **kwargs: Any,
) -> Splits | Rows:
    """Load a tagging dataset with the columns `id`, `title`, `tags` and `image`, `video` or `frame_features`.

    Args:
        name_or_path: The first of these that applies: the name of a benchmark (`"icon_tagging"`; `"create_tagging"`
            and `"pexel_tagging"` need `data_dir`, the folder of their files); a folder of images or videos with a
            metadata file (see [`load_tagging_folder`]); a folder of Parquet files with these columns; a folder of
            images or videos with captions or class folders (see [`load_plain_folder`]); a folder of tar files in the
            WebDataset format (see [`with_archive_columns`]); the name of a dataset on the Hub, `"org/name"` (for this
            and for Parquet files see [`with_tagging_columns`]).
        split: One split, or a part or sum of splits in the notation of `datasets`, such as `"train[:100]"`. All splits
            are returned in a dict if `None`. Streams accept plain split names only.
        cache_dir: Cache folder of `datasets`. Folders of images and videos are not cached.
        streaming: Whether to return `IterableDataset`s.
        texts_only: Whether streams have only the columns `id` (null where it is missing), `title` and `tags`, in the
            same order and shards. No other column of a Parquet file is read.
        image_column: Column with images if it is not `image`. In a metadata file, the column with their paths.
        video_column: Column with videos or lists of frames if it is not `video`. In a metadata file, the column with
            their paths.
        title_column: Column with titles if it is not `title`.
        tags_column: Column with tags if it is not `tags`: lists of text, text or class labels. Or several one-hot
            columns: `"red,blue"` names two of them, and `"tag_*"` names all columns that begin with `tag_`. Their
            names, without the beginning, are the tags of the rows with 1.
        tag_separator: Separator of tags that are text. By default the one of `|`, `;` and `,` that most texts contain.
        **kwargs: Arguments of a benchmark's builder, or of `datasets.load_dataset` for Parquet, tar files and the Hub.

    Raises:
        FileNotFoundError: There is no such benchmark, folder or Hub dataset, or files of the dataset are missing.
        ValueError: The dataset has another layout, a column or the split does not exist, an argument is not accepted,
            or `texts_only` is given without `streaming`.
        ImportError: Tar files need a newer version of `datasets`.
    """
    if texts_only and not streaming:
        raise ValueError("texts_only needs streaming=True; otherwise use select_columns, which reads no other column")
    names = ColumnNames(image_column, video_column, title_column, tags_column, tag_separator)
    name = os.fspath(name_or_path)
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    if is_benchmark(name):
        if given := names.given():
            raise ValueError(f"{name} has fixed columns and takes no {', '.join(given)}")
        loaded = load_benchmark(name, split=split, cache_dir=cache_dir, streaming=streaming, **kwargs)
    elif name and (load := _folder_loader(folder := Path(name).expanduser())):
        if kwargs:
            raise ValueError(f"a folder of images or videos takes no further arguments; got {', '.join(kwargs)}")
        loaded = _select_split(load(folder, names), split, name)
        loaded = _as_streams(loaded) if streaming else loaded
    else:
        options = {"split": split, "cache_dir": cache_dir, "streaming": streaming, **kwargs}
        source = _source(name)
        try:
            return load_with_datasets(source, options, texts_only, names)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{source!r} is not a local folder, and loading it from the Hub failed: {error}. {_ACCEPTED}"
            ) from error
    return loaded.select_columns(list(TEXT_COLUMNS)) if texts_only else loaded


def _folder_loader(folder: Path) -> Callable[[Path, ColumnNames], datasets.DatasetDict] | None:
    """Return the function that reads a folder of images or videos, `None` for anything else."""
    if has_metadata(folder):
        return load_tagging_folder
    if not folder.is_dir():
        return None
    files = [path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder).parts)]
    suffixes = {path.suffix.lower() for path in files}
    has_archives = ARCHIVE_SUFFIX in suffixes and not any(media_kind(path.name) for path in files)
    if ".parquet" not in suffixes and not has_archives:
        return load_plain_folder
    for path in files:
        suffix = path.suffix.lower()
        if suffix in (".parquet", ARCHIVE_SUFFIX) and path.suffix != suffix:
            raise ValueError(f"{path}: only files with the suffix {suffix} in lower case are read; rename it")
    return None


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _select_split(
    dataset: datasets.DatasetDict, split: str | None, name: str
) -> datasets.DatasetDict | datasets.Dataset:
    if split is None:
        return dataset
    lengths = {part: rows.num_rows for part, rows in dataset.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(str(split)).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{name} has the splits {list(lengths)}; cannot read {str(split)!r}: {error}") from error
    selected = [dataset[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets(selected)


def _as_streams(dataset: datasets.DatasetDict | datasets.Dataset) -> Splits | Rows:
    if isinstance(dataset, datasets.Dataset):
        return dataset.to_iterable_dataset()
    return datasets.IterableDatasetDict({part: rows.to_iterable_dataset() for part, rows in dataset.items()})


def _source(name: str) -> str:
    """Return the path of a folder of Parquet or tar files, or the name of a dataset on the Hub, for `datasets`."""
    if not name:
        raise FileNotFoundError(f"the name is empty. {_ACCEPTED}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that contains it")
    if not _is_hub_name(name):
        raise FileNotFoundError(f"{name!r} is not a benchmark, a local folder or a name on the Hub. {_ACCEPTED}")
    return name


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
