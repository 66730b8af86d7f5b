"""Gives a dataset loaded from Parquet or from the Hub the columns that every tagging dataset has."""

import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

logger = logging.getLogger(__name__)

_TEXT = datasets.Value("string")
TEXT_COLUMNS = datasets.Features({"id": _TEXT, "title": _TEXT, "tags": datasets.List(_TEXT)})
_MEDIA_FEATURES = {"image": datasets.Image(), "video": datasets.Video(decode=False)}
STREAM_BATCH = 100
_STRING_TYPES = ("string", "large_string", "null")


def with_tagging_columns(
    rows: datasets.Dataset | datasets.IterableDataset, origin: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Returns `rows` with `id`, `title` and `tags` as text, and `image` and `video` (undecoded) as such.

    A missing `id` becomes the row's number (of what is loaded: a part of a split begins at 0 again, and a stream that
    several workers read gives each number more than once; give examples that are to be found again an `id`); a missing
    `title` or `tags`, or a null in them, becomes `""` or `[]`. Tags are stripped; empty ones and repeats are left out,
    and counted in a warning where the whole split is at hand. Other columns stay as they are.

    Args:
        rows: one split.
        origin: what to call the dataset in errors.

    Raises:
        ValueError: `title` or `tags` has another type, or there is neither a title nor something to look at.
    """
    if rows.features is None:
        rows = rows._resolve_features()
    features = rows.features
    if not features.keys() & {"image", "video", "frame_features", "title"}:
        raise ValueError(
            f"{origin} has the columns {list(features)}; expected tags and at least one of image, video, "
            "frame_features and title"
        )
    _check_types(features, origin)
    for column, feature in _MEDIA_FEATURES.items():
        if column in features and features[column] != feature:
            rows = rows.cast_column(column, feature)
    if isinstance(rows, datasets.IterableDataset):
        return fill_stream(rows)
    if "tags" in features and _unclean(rows.data.column("tags")):
        before = sum(map(len, filter(None, rows["tags"])))
        cleaned = [_fill("tags", tags, 0) for tags in rows["tags"]]
        rows = rows.remove_columns("tags").add_column("tags", cleaned, feature=TEXT_COLUMNS["tags"])
        left_out = before - sum(map(len, cleaned))
        logger.warning("%s: left out %s empty or repeated tags", origin, f"{left_out:,}")
    for column, feature in TEXT_COLUMNS.items():
        if column not in features or features[column] != feature or rows.data.column(column).null_count:
            values = rows[column] if column in features else [None] * rows.num_rows
            filled = [_fill(column, value, number) for number, value in enumerate(values)]
            if column in features:
                rows = rows.remove_columns(column)
            rows = rows.add_column(column, filled, feature=feature)
    return rows


def undecoded(rows: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    """The same rows with images and videos as the bytes or paths they are."""
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, (datasets.Image, datasets.Video)):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


def _check_types(features: datasets.Features, origin: str):
    title, tags = features.get("title"), features.get("tags")
    if title is not None and getattr(title, "dtype", None) not in _STRING_TYPES:
        raise ValueError(f"{origin}: the column title is {title}; expected text")
    is_list = isinstance(tags, (datasets.List, datasets.LargeList))
    if tags is not None and (not is_list or getattr(tags.feature, "dtype", None) not in _STRING_TYPES):
        raise ValueError(f"{origin}: the column tags is {tags}; expected lists of text")


def _fill(column: str, value, number: int):
    if column == "id":
        return str(number if value is None else value)
    if column == "tags":
        return list(dict.fromkeys(tag.strip() for tag in value or () if tag and tag.strip()))
    return value or ""


def _unclean(tags: pa.ChunkedArray | pa.Array) -> bool:
    """Whether some tag is null, empty, not stripped, or in one list twice."""
    for chunk in tags.chunks if isinstance(tags, pa.ChunkedArray) else [tags]:
        values = chunk.flatten()
        if values.null_count or pa.types.is_null(values.type):
            return True
        kept = pc.utf8_trim_whitespace(values)
        if pc.any(pc.or_(pc.equal(kept, ""), pc.not_equal(kept, values))).as_py():
            return True
        codes = pc.dictionary_encode(values)
        pairs = pc.list_parent_indices(chunk).to_numpy(zero_copy_only=False).astype(np.int64) * (
            len(codes.dictionary) + 1
        )
        pairs = pairs + codes.indices.to_numpy(zero_copy_only=False)
        if len(np.unique(pairs)) < len(pairs):
            return True
    return False


def fill_stream(rows: datasets.IterableDataset, number_rows: bool = True) -> datasets.IterableDataset:
    """What [`with_tagging_columns`] makes of a stream whose columns are as they should be, or some of them.

    Args:
        number_rows: make up an `id` where there is none; else it is null.
    """
    features = datasets.Features({**rows.features, **TEXT_COLUMNS})
    schema = features.arrow_schema

    # As Arrow tables: what is in the other columns, images and features, is neither decoded nor copied.
    def fill(table: pa.Table, numbers: list[int]) -> pa.Table:
        for column in TEXT_COLUMNS:
            there = column in table.column_names
            as_is = there and table.schema.field(column).type == schema.field(column).type
            if as_is and not table[column].null_count and (column != "tags" or not _unclean(table[column])):
                continue
            values = table[column].to_pylist() if there else [None] * len(numbers)
            if column == "id" and not number_rows:
                filled = [None if value is None else str(value) for value in values]
            else:
                filled = [_fill(column, *each) for each in zip(values, numbers)]
            table = table.drop_columns(column) if there else table
            table = table.append_column(schema.field(column), pa.array(filled, schema.field(column).type))
        columns = [table[field.name] for field in schema]
        # One by one: of a slice Arrow cannot cast every struct, and most need no cast.
        columns = [c if c.type == field.type else c.cast(field.type) for c, field in zip(columns, schema)]
        return pa.Table.from_arrays(columns, schema=schema)

    rows = rows.with_format("arrow")
    filled = rows.map(fill, with_indices=True, batched=True, batch_size=STREAM_BATCH, features=features)
    return filled.with_format(None)
