"""Reads the tags of datasets that have class labels, text or one-hot columns instead of lists of tags."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa

from .column_names import ColumnNames, is_one
from .tag_separators import read_tags

# Columns of image classification datasets.
LABEL_COLUMNS = ("label", "labels")
TEXT_TYPES = ("string", "large_string", "null")


@dataclass(frozen=True)
class TagColumns:
    """The columns that tags are read from.

    Args:
        columns: The columns.
        read: Function that returns the tags of each row of a table with these columns.
    """

    columns: tuple[str, ...]
    read: Callable[[pa.Table], list[list[str | None]]]


def find_tag_columns(
    features: datasets.Features, names: ColumnNames, separator: str | None, origin: str
) -> TagColumns | None:
    """Return the columns to read tags from, `None` if there are lists of text or no tags.

    Args:
        features: The columns of the dataset.
        names: The columns that the user names.
        separator: The separator of tags that are text.
        origin: The dataset's name in error messages.
    """
    if one_hot := names.one_hot_columns(features, origin):
        return TagColumns(tuple(one_hot), functools.partial(_read_one_hot, tags=one_hot, origin=origin))
    if column := text_column(features, names):
        return TagColumns((column,), functools.partial(_read_texts, separator=separator, origin=origin))
    if column := label_column(features, names):
        return TagColumns((column,), functools.partial(_read_labels, names=_class_names(features[column])))
    if names.tags_column and names.tags_column != "tags":
        return TagColumns((names.tags_column,), _read_lists)
    return None


def text_column(features: datasets.Features, names: ColumnNames) -> str | None:
    """Return the column whose text is split into tags, `None` if there is none."""
    column = names.tags_column or "tags"
    return column if getattr(features.get(column), "dtype", None) in TEXT_TYPES else None


def label_column(features: datasets.Features, names: ColumnNames) -> str | None:
    """Return the column whose class labels are the tags, `None` if there is none."""
    column = names.tags_column or ("tags" if "tags" in features else None)
    candidates = LABEL_COLUMNS if column is None else (column,)
    return next((name for name in candidates if _class_names(features.get(name)) is not None), None)


def label_like_columns(features: datasets.Features) -> list[str]:
    """Return the columns that may contain tags."""
    return [name for name, own in features.items() if name in LABEL_COLUMNS or _class_names(own) is not None]


def is_text_list(feature: object) -> bool:
    """Whether a column contains lists of text."""
    is_list = isinstance(feature, (datasets.List, datasets.LargeList))
    return is_list and getattr(feature.feature, "dtype", None) in TEXT_TYPES


def _class_names(feature: object) -> list[str] | None:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _read_lists(table: pa.Table) -> list[list[str | None]]:
    return [tags or [] for tags in table.column(0).to_pylist()]


def _read_labels(table: pa.Table, *, names: list[str]) -> list[list[str]]:
    """Return the names of each row's labels. -1 is an unknown class and has none."""
    values: Iterable[int | list[int] | None] = table.column(0).to_pylist()
    lists = (value if isinstance(value, list) else [value] for value in values)
    return [[names[label] for label in labels if label is not None and label >= 0] for labels in lists]


def _read_texts(table: pa.Table, *, separator: str, origin: str) -> list[list[str | None]]:
    try:
        return [read_tags(text, separator) for text in table.column(0).to_pylist()]
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _read_one_hot(table: pa.Table, *, tags: dict[str, str], origin: str) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(len(table))]
    for column, tag in tags.items():
        values, place = table[column].to_numpy(), f"{origin}: a value of the column {column}"
        if values.dtype == object:
            values = np.array([is_one(value, place) for value in values], dtype=bool)
        elif not (valid := np.isin(values, (0, 1))).all():
            is_one(values[int(valid.argmin())].item(), place)
        for row in np.flatnonzero(values):
            found[row].append(tag)
    return found
