"""Loads every kind of tagging dataset by its name or path."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .benchmarks import BUILDERS, is_benchmark, load_benchmark
from .media_suffixes import METADATA_NAMES
from .plain_folder import load_plain_folder
from .tagging_columns import (
    TEXT_COLUMNS,
    Rows,
    fill_stream_columns,
    label_column,
    name_classes,
    with_tagging_columns,
)
from .tagging_folder import has_metadata, load_tagging_folder

Splits = datasets.DatasetDict | datasets.IterableDatasetDict

_ACCEPTED = (
    f"Accepted: {', '.join(BUILDERS)}; a local folder with {', '.join(METADATA_NAMES)}, with captions, with folders "
    "named after tags, or with Parquet files; or a dataset on the Hub, org/name"
)


def load_tagging_dataset(
    name_or_path: str | os.PathLike,
    *,
    split: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
    texts_only: bool = False,
    **kwargs: Any,
) -> Splits | Rows:
    """Load a tagging dataset with the columns `id`, `title`, `tags` and `image`, `video` or `frame_features`.

    Args:
        name_or_path: The first of these that applies: the name of a benchmark (`"icon_tagging"`; `"create_tagging"`
            and `"pexel_tagging"` need `data_dir`, the folder of their files); a folder of images or videos with a
            metadata file (see [`load_tagging_folder`]); a folder of Parquet files with these columns; a folder of
            images or videos with captions or class folders (see [`load_plain_folder`]); the name of a dataset on the
            Hub, `"org/name"` (for this and for Parquet files see [`with_tagging_columns`]).
        split: One split, or a part or sum of splits in the notation of `datasets`, such as `"train[:100]"`. All splits
            are returned in a dict if `None`. Streams accept plain split names only.
        cache_dir: Cache folder of `datasets`. Folders of images and videos are not cached.
        streaming: Whether to return `IterableDataset`s.
        texts_only: Whether streams have only the columns `id` (null where it is missing), `title` and `tags`, in the
            same order and shards. No other column of a Parquet file is read.
        **kwargs: Arguments of a benchmark's builder, or of `datasets.load_dataset` for Parquet and the Hub.

    Raises:
        FileNotFoundError: There is no such benchmark, folder or Hub dataset, or files of the dataset are missing.
        ValueError: The dataset has another layout, the split does not exist, an argument is not accepted, or
            `texts_only` is given without `streaming`.
    """
    if texts_only and not streaming:
        raise ValueError("texts_only needs streaming=True; otherwise use select_columns, which reads no other column")
    name = os.fspath(name_or_path)
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    if is_benchmark(name):
        loaded = load_benchmark(name, split=split, cache_dir=cache_dir, streaming=streaming, **kwargs)
    elif name and (load := _folder_loader(folder := Path(name).expanduser())):
        if kwargs:
            raise ValueError(f"a folder of images or videos takes no further arguments; got {', '.join(kwargs)}")
        loaded = _select_split(load(folder), split, name)
        loaded = _as_streams(loaded) if streaming else loaded
    else:
        options = {"split": split, "cache_dir": cache_dir, "streaming": streaming, **kwargs}
        return _load_parquet(_parquet_source(name), options, texts_only)
    return loaded.select_columns(list(TEXT_COLUMNS)) if texts_only else loaded


def _folder_loader(folder: Path) -> Callable[[Path], datasets.DatasetDict] | None:
    """Return the function that reads a folder of images or videos, `None` for anything else."""
    if has_metadata(folder):
        return load_tagging_folder
    if not folder.is_dir():
        return None
    parquet_files = (path.relative_to(folder).parts for path in folder.rglob("*.parquet"))
    return load_plain_folder if all(map(_is_hidden, parquet_files)) else None


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


def _parquet_source(name: str) -> str:
    """Return the path of a folder of Parquet files, or the name of a dataset on the Hub, for `datasets`."""
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


def _load_parquet(source: str, options: dict[str, Any], texts_only: bool) -> Splits | Rows:
    """Load Parquet files or a Hub dataset with `datasets`, and add the columns that are missing."""
    options = {"name" if option == "config_name" else option: value for option, value in options.items()}
    try:
        loaded = datasets.load_dataset(source, **options)
    except TypeError as error:
        raise ValueError(f"{source} does not take the arguments {options}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source}: {error.__cause__ or error}") from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is not a local folder, and loading it from the Hub failed: {error}. {_ACCEPTED}"
        ) from error
    if not isinstance(loaded, dict):
        return _tagging_columns(loaded, source, source, options, texts_only)
    return type(loaded)(
        {
            part: _tagging_columns(rows, f"{source} ({part})", source, options | {"split": part}, texts_only)
            for part, rows in loaded.items()
        }
    )


def _tagging_columns(rows: Rows, origin: str, source: str, options: dict[str, Any], texts_only: bool) -> Rows:
    if rows.features is None:
        rows = rows._resolve_features()
    # Also with `texts_only`, because this checks the columns.
    filled = with_tagging_columns(rows, origin)
    return _stream_texts(rows, source, options) if texts_only else filled


def _stream_texts(rows: datasets.IterableDataset, source: str, options: dict[str, Any]) -> datasets.IterableDataset:
    """Return the text columns of a stream, read without the others where the format allows it.

    Args:
        rows: The stream with all its columns, as `datasets` loads it.
        source: The dataset that `datasets.load_dataset` made the stream from.
        options: The arguments that it was made with.
    """
    builder_options = {option: options[option] for option in options.keys() - {"split", "streaming"}}
    builder = datasets.load_dataset_builder(source, **builder_options)
    wanted = dict.fromkeys([*TEXT_COLUMNS, label_column(rows.features)])
    columns = [column for column in wanted if column in rows.features]
    if columns and hasattr(builder.config, "columns"):
        # `select_columns` of a stream would read every column and then drop most of them.
        rows = datasets.load_dataset(source, **options, columns=columns)
    if rows.features is None:
        rows = rows._resolve_features()
    return fill_stream_columns(name_classes(rows), number_rows=False).select_columns(list(TEXT_COLUMNS))
