"""Loads Parquet files, WebDataset archives and datasets on the Hub with `datasets`."""

import itertools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .archives import archive_features, with_archive_columns
from .column_names import ColumnNames
from .data_file_checks import check_card, check_hub_card, check_resolved_files
from .tag_separators import choose_separator
from .tag_values import text_column
from .tagging_columns import Rows, text_sources, with_tagging_columns, with_text_columns

logger = logging.getLogger(__name__)

Splits = datasets.DatasetDict | datasets.IterableDatasetDict

# Rows at the beginning of each split of a stream in which the separator of tags is looked for.
HEAD = 1000
# Arguments of `datasets.load_dataset` that `load_dataset_builder` does not have.
_LOAD_OPTIONS = frozenset({"split", "streaming", "verification_mode", "keep_in_memory", "save_infos", "num_proc"})


def load_with_datasets(source: str, options: dict[str, Any], texts_only: bool, names: ColumnNames) -> Splits | Rows:
    """Load a folder of Parquet or tar files, or a dataset on the Hub, with the columns of every tagging dataset.

    Args:
        source: Folder or name on the Hub.
        options: Arguments of `datasets.load_dataset`; `config_name` is accepted instead of `name`.
        texts_only: Whether to return streams of `id`, `title` and `tags` alone.
        names: Columns with other names.

    Raises:
        DatasetNotFoundError, ConnectionError: Loading the dataset from the Hub failed.
        ValueError: An argument is not accepted, the columns are unsuitable, or the dataset's README names files that
            are not its own.
        ImportError: Tar files need a newer version of `datasets`.
    """
    options = {"name" if option == "config_name" else option: value for option, value in options.items()}
    try:
        is_local = os.path.isdir(source)
        names_files = bool(options.get("data_files"))
        if is_local and not names_files:
            check_card(source)
        elif not names_files:
            check_hub_card(source, options.get("revision"), options.get("token"))
        builder = _builder(source, options)
        if not names_files:
            check_resolved_files(builder, source)
        is_archive = isinstance(builder, WebDataset)
        if is_archive:
            # From the first examples alone, `datasets` would not find all columns.
            options["features"] = archive_features(names)
        loaded = datasets.load_dataset(source, **options)
    except TypeError as error:
        raise ValueError(f"{source} does not take the arguments {options}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source}: {error.__cause__ or error}") from error
    is_dict = isinstance(loaded, dict)
    splits = loaded if is_dict else {None: loaded}
    origins = {part: f"{source} ({part})" if is_dict else source for part in splits}
    if is_archive:
        filled = with_archive_columns(splits, origins, names, texts_only)
    else:
        filled = _with_columns(splits, origins, names, _Reader(source, options), texts_only)
    return type(loaded)(filled) if is_dict else filled[None]


def _builder(source: str, options: Mapping[str, Any]) -> datasets.DatasetBuilder:
    return datasets.load_dataset_builder(source, **{name: options[name] for name in options.keys() - _LOAD_OPTIONS})


class _Reader:
    """Reads some columns of a dataset's streams, without the others where the format allows it.

    Args:
        source: The dataset that `datasets.load_dataset` made the streams from.
        options: The arguments that they were made with.
    """

    def __init__(self, source: str, options: dict[str, Any]):
        self.source, self.options = source, options

    def read(self, rows: datasets.IterableDataset, part: str | None, columns: list[str]) -> datasets.IterableDataset:
        """Return the columns of a stream.

        Args:
            rows: The stream with all columns.
            part: Its split, if the streams of all splits were made.
            columns: The columns; none for all of them.
        """
        if not columns:
            return rows
        if not hasattr(_builder(self.source, self.options).config, "columns"):
            return rows.select_columns(columns)
        # `select_columns` of a stream would read every column and then drop most of them.
        options = self.options if part is None else self.options | {"split": part}
        rows = datasets.load_dataset(self.source, **options, columns=columns)
        return rows._resolve_features() if rows.features is None else rows


def _with_columns(
    splits: Mapping[str | None, Rows],
    origins: Mapping[str | None, str],
    names: ColumnNames,
    reader: _Reader,
    texts_only: bool,
) -> dict[str | None, Rows]:
    splits = {part: rows._resolve_features() if rows.features is None else rows for part, rows in splits.items()}
    for part, rows in splits.items():
        names.check(rows.features, origins[part])
    separator = find_tag_separator(splits, origins, names, reader)
    filled = {}
    for part, rows in splits.items():
        # Also with `texts_only`, because this checks the columns.
        filled[part] = with_tagging_columns(rows, origins[part], names, separator)
        if texts_only:
            columns = text_sources(rows.features, names, origins[part])
            filled[part] = with_text_columns(reader.read(rows, part, columns), origins[part], names, separator)
    return filled


def find_tag_separator(
    splits: Mapping[str | None, Rows],
    origins: Mapping[str | None, str],
    names: ColumnNames,
    reader: _Reader | None = None,
) -> str | None:
    """Return one separator for the tags of all splits, `None` if they are not text.

    Args:
        splits: The splits.
        origins: The name of each split in messages.
        names: Columns with other names.
        reader: Reads the streams among the splits.

    Raises:
        ValueError: `names` has a separator, and no split has tags that are text.
    """
    columns = {part: text_column(rows.features, names) for part, rows in splits.items()}
    texts = {part: column for part, column in columns.items() if column and column in splits[part].features}
    origin = next(iter(origins.values()))
    if not texts:
        if names.tag_separator:
            raise ValueError(f"{origin}: tag_separator is for a column of tags that are text, and there is none")
        return None
    cells = (_first_cells(splits[part], part, column, reader) for part, column in texts.items())
    separator, message = choose_separator(itertools.chain.from_iterable(cells), names.tag_separator)
    if message:
        logger.warning("%s: %s", origin, message)
    return separator


def _first_cells(rows: Rows, part: str | None, column: str, reader: _Reader | None) -> Iterable[str | None]:
    """Return the values of a column: all of them, or the first [`HEAD`] of a stream."""
    if isinstance(rows, datasets.Dataset):
        return rows[column]
    return (row[column] for row in reader.read(rows, part, [column]).take(HEAD))
