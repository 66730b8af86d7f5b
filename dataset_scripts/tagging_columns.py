"""Gives a dataset from Parquet files or from the Hub the columns that every tagging dataset has."""

import functools
import logging
from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

logger = logging.getLogger(__name__)

Rows = datasets.Dataset | datasets.IterableDataset

TEXT_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        "title": datasets.Value("string"),
        "tags": datasets.List(datasets.Value("string")),
    }
)
MEDIA_COLUMNS = datasets.Features({"image": datasets.Image(), "video": datasets.Video(decode=False)})
# Columns of image classification datasets.
LABEL_COLUMNS = ("label", "labels")
STREAM_BATCH = 100
_STRING_TYPES = ("string", "large_string", "null")


def with_tagging_columns(rows: Rows, origin: str) -> Rows:
    """Return `rows` with text in `id`, `title` and `tags`, and with `image` and an undecoded `video`.

    A missing `id` becomes the row's number. Numbers start at 0 in every part of a split, and they repeat where several
    workers read one stream: datasets whose examples must be recognised later need an `id`. A missing `title` becomes
    `""`, missing `tags` become `[]`. Class labels in `tags` become their names. Without a column `tags`, the class
    labels in `label` or `labels` become tags. Tags are stripped; empty and repeated ones are left out, and counted in
    a warning unless `rows` is a stream. Other columns do not change.

    Args:
        rows: One split.
        origin: The dataset's name in error messages.

    Raises:
        ValueError: `title` or `tags` has another type, or there is no title, image, video or frame features.
    """
    if rows.features is None:
        rows = rows._resolve_features()
    rows = name_classes(rows)
    if "tags" not in rows.features and (unused := _label_like_columns(rows.features)):
        logger.warning("%s has no column tags, so its examples have no tags. Not used: %s", origin, ", ".join(unused))
    _check_features(rows.features, origin)
    for column, feature in MEDIA_COLUMNS.items():
        if column in rows.features and rows.features[column] != feature:
            rows = rows.cast_column(column, feature)
    if isinstance(rows, datasets.IterableDataset):
        return fill_stream_columns(rows)
    return _fill_columns(rows, origin)


def label_column(features: datasets.Features) -> str | None:
    """Return the column whose class labels are the tags, `None` if there is none."""
    names = ("tags",) if "tags" in features else LABEL_COLUMNS
    return next((name for name in names if _class_names(features.get(name)) is not None), None)


def name_classes(rows: Rows) -> Rows:
    """Return `rows` with the names of the class labels in `tags`, instead of the column [`label_column`]."""
    if (column := label_column(rows.features)) is None:
        return rows
    names, tags = _class_names(rows.features[column]), TEXT_COLUMNS["tags"]
    if isinstance(rows, datasets.Dataset):
        named = _name_labels(rows[column], names)
        return rows.remove_columns(column).add_column("tags", named, feature=tags)
    features = datasets.Features({name: own for name, own in rows.features.items() if name != column} | {"tags": tags})
    named = rows.with_format("arrow").map(
        functools.partial(_name_labels_of_table, column=column, names=names),
        batched=True,
        batch_size=STREAM_BATCH,
        features=features,
    )
    return named.with_format(None)


def _class_names(feature: object) -> list[str] | None:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _label_like_columns(features: datasets.Features) -> list[str]:
    return [name for name, own in features.items() if name in LABEL_COLUMNS or _class_names(own) is not None]


def _name_labels(values: Iterable[int | list[int] | None], names: list[str]) -> list[list[str]]:
    """Return the names of each row's labels. -1 is an unknown class and has none."""
    lists = (value if isinstance(value, list) else [value] for value in values)
    return [[names[label] for label in labels if label is not None and label >= 0] for labels in lists]


def _name_labels_of_table(table: pa.Table, *, column: str, names: list[str]) -> pa.Table:
    named = pa.array(_name_labels(table[column].to_pylist(), names), pa.list_(pa.string()))
    return table.drop_columns(column).append_column("tags", named)


def undecoded(rows: Rows) -> Rows:
    """Return the same rows with images and videos as bytes or paths."""
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, (datasets.Image, datasets.Video)):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


def distinct_tags(tags: Iterable[str | None]) -> list[str]:
    """Strip tags and leave out empty and repeated ones; the order stays."""
    return list(dict.fromkeys(tag.strip() for tag in tags if tag and tag.strip()))


def fill_stream_columns(rows: datasets.IterableDataset, number_rows: bool = True) -> datasets.IterableDataset:
    """Add and clean the text columns of a stream as [`with_tagging_columns`] does.

    Args:
        rows: A stream whose columns have the right types; text columns may be missing.
        number_rows: Whether a missing `id` becomes the row's number. Otherwise it stays null.
    """
    features = datasets.Features({**rows.features, **TEXT_COLUMNS})
    # Arrow tables, so that images and features in the other columns are neither decoded nor copied.
    filled = rows.with_format("arrow").map(
        functools.partial(_fill_table, schema=features.arrow_schema, number_rows=number_rows),
        with_indices=True,
        batched=True,
        batch_size=STREAM_BATCH,
        features=features,
    )
    return filled.with_format(None)


def _check_features(features: datasets.Features, origin: str) -> None:
    if not features.keys() & {"image", "video", "frame_features", "title"}:
        raise ValueError(
            f"{origin} has the columns {list(features)}; expected tags and at least one of image, video, "
            "frame_features and title"
        )
    title, tags = features.get("title"), features.get("tags")
    if title is not None and getattr(title, "dtype", None) not in _STRING_TYPES:
        raise ValueError(f"{origin}: the column title is {title}; expected text")
    is_list = isinstance(tags, (datasets.List, datasets.LargeList))
    if tags is not None and (not is_list or getattr(tags.feature, "dtype", None) not in _STRING_TYPES):
        raise ValueError(f"{origin}: the column tags is {tags}; expected lists of text or class labels")


def _fill_columns(rows: datasets.Dataset, origin: str) -> datasets.Dataset:
    for column, feature in TEXT_COLUMNS.items():
        present = column in rows.features
        if present and rows.features[column] == feature and not _needs_cleaning(column, rows.data.column(column)):
            continue
        values = rows[column] if present else [None] * rows.num_rows
        cleaned = [_clean(column, value, number) for number, value in enumerate(values)]
        left_out = sum(map(len, filter(None, values))) - sum(map(len, cleaned)) if column == "tags" else 0
        if left_out:
            logger.warning("%s: left out %s empty or repeated tags", origin, f"{left_out:,}")
        rows = rows.remove_columns(column) if present else rows
        rows = rows.add_column(column, cleaned, feature=feature)
    return rows


def _fill_table(table: pa.Table, numbers: list[int], *, schema: pa.Schema, number_rows: bool) -> pa.Table:
    for column in TEXT_COLUMNS:
        field, present = schema.field(column), column in table.column_names
        has_type = present and table.schema.field(column).type == field.type
        if has_type and not _needs_cleaning(column, table[column]):
            continue
        values = table[column].to_pylist() if present else [None] * len(numbers)
        if column == "id" and not number_rows:
            cleaned = [None if value is None else str(value) for value in values]
        else:
            cleaned = [_clean(column, value, number) for value, number in zip(values, numbers)]
        table = table.drop_columns(column) if present else table
        table = table.append_column(field, pa.array(cleaned, field.type))
    # Column by column: Arrow cannot cast every struct of a sliced table, and most columns need no cast.
    columns = [table[field.name] for field in schema]
    columns = [own if own.type == field.type else own.cast(field.type) for own, field in zip(columns, schema)]
    return pa.Table.from_arrays(columns, schema=schema)


def _clean(column: str, value: str | int | list[str | None] | None, number: int) -> str | list[str]:
    if column == "id":
        return str(number if value is None else value)
    return distinct_tags(value or ()) if column == "tags" else value or ""


def _needs_cleaning(column: str, values: pa.ChunkedArray | pa.Array) -> bool:
    """Whether a value is null, or a tag is null, empty, not stripped or twice in one list."""
    if values.null_count or column != "tags":
        return values.null_count > 0
    chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
    return any(_has_unclean_tags(chunk) for chunk in chunks)


def _has_unclean_tags(lists: pa.Array) -> bool:
    tags = lists.flatten()
    if tags.null_count or pa.types.is_null(tags.type):
        return True
    stripped = pc.utf8_trim_whitespace(tags)
    if pc.any(pc.or_(pc.equal(stripped, ""), pc.not_equal(stripped, tags))).as_py():
        return True
    encoded = pc.dictionary_encode(tags)
    # One number for each pair of a list and a tag: a pair that occurs twice is a repeated tag.
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    pairs = rows * (len(encoded.dictionary) + 1) + encoded.indices.to_numpy(zero_copy_only=False)
    return len(np.unique(pairs)) < len(pairs)
