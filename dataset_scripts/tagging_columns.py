"""Gives a dataset from Parquet files or from the Hub the columns that every tagging dataset has."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .column_names import USUAL_NAMES, ColumnNames
from .tag_values import (
    TEXT_TYPES,
    TagColumns,
    find_tag_columns,
    is_text_list,
    label_column,
    label_like_columns,
    text_column,
)

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
# A video as a list of its frames.
FRAMES = datasets.List(datasets.Image(decode=False))
FRAMES_COLUMNS = ("frames", "images")
VISUAL_COLUMNS = (*MEDIA_COLUMNS, "frame_features")
STREAM_BATCH = 100
READ_BATCH = 10_000


def with_tagging_columns(
    rows: Rows, origin: str, names: ColumnNames = USUAL_NAMES, separator: str | None = None
) -> Rows:
    """Return `rows` with text in `id`, `title` and `tags`, and with `image` and an undecoded `video`.

    A missing `id` becomes the row's number. Numbers start at 0 in every part of a split, and they repeat where several
    workers read one stream: datasets whose examples must be recognised later need an `id`. A missing `title` becomes
    `""`, missing `tags` become `[]`. Class labels in `tags` become their names. Without a column `tags`, the class
    labels in `label` or `labels` become tags. Text in `tags` is split. Tags are stripped; empty and repeated ones are
    left out, and counted in a warning unless `rows` is a stream. A list of images in `image` or `video`, or without
    these in `frames` or `images`, becomes a `video` that is a list of undecoded frames. Other columns do not change.

    Args:
        rows: One split.
        origin: The dataset's name in error messages.
        names: Columns with other names. Columns that they replace are left out with a warning.
        separator: Separator of tags that are text. Needed if there are such tags.

    Raises:
        ValueError: A column has another type, a named column does not exist, tags are text and there is no separator,
            or there is no title, image, video or frame features.
    """
    if rows.features is None:
        rows = rows._resolve_features()
    names.check(rows.features, origin)
    column = text_column(rows.features, names)
    if separator is None and column and rows.features[column].dtype != "null":
        raise ValueError(f"{origin}: the tags in the column {column} are text; give the separator between two tags")
    if not names.tags_column and "tags" not in rows.features and not label_column(rows.features, names):
        if unused := label_like_columns(rows.features):
            logger.warning(
                "%s has no column tags, so its examples have no tags. Not used: %s", origin, ", ".join(unused)
            )
    rows = _with_usual_names(rows, origin, names, separator)
    _check_features(rows.features, origin)
    for column, feature in MEDIA_COLUMNS.items():
        feature = FRAMES if _is_frames(rows.features.get(column)) else feature
        if column in rows.features and rows.features[column] != feature:
            rows = rows.cast_column(column, feature)
    if isinstance(rows, datasets.IterableDataset):
        return fill_stream_columns(rows)
    return _fill_columns(rows, origin)


def with_text_columns(
    rows: datasets.IterableDataset, origin: str, names: ColumnNames, separator: str | None
) -> datasets.IterableDataset:
    """Return a stream with only `id`, which may be null, `title` and `tags`, as [`with_tagging_columns`] makes them.

    Args:
        rows: A stream with the columns of [`text_sources`].
        origin: The dataset's name in error messages.
        names: Columns with other names.
        separator: Separator of tags that are text.
    """
    names = dataclasses.replace(names, image_column=None, video_column=None)
    rows = _with_usual_names(rows, origin, names, separator)
    return fill_stream_columns(rows, number_rows=False).select_columns(list(TEXT_COLUMNS))


def text_sources(features: datasets.Features, names: ColumnNames, origin: str) -> list[str]:
    """Return the columns that `id`, `title` and `tags` are read from."""
    tags = find_tag_columns(features, names, None, origin)
    sources = ["id", names.title_column or "title", *(tags.columns if tags else ["tags"])]
    return [column for column in sources if column in features]


def map_tables(
    rows: datasets.IterableDataset, function: Callable[..., pa.Table], features: datasets.Features, **kwargs: Any
) -> datasets.IterableDataset:
    """Apply a function to the Arrow tables of a stream, so that other columns are neither decoded nor copied.

    Args:
        rows: A stream.
        function: Function from a table to a table.
        features: The columns that it returns.
        kwargs: Further arguments of `IterableDataset.map`.
    """
    mapped = rows.with_format("arrow").map(
        function, batched=True, batch_size=STREAM_BATCH, features=datasets.Features(features), **kwargs
    )
    return mapped.with_format(None)


def _with_usual_names(rows: Rows, origin: str, names: ColumnNames, separator: str | None) -> Rows:
    """Rename the columns for title, images and videos, and read the tags as lists of text."""
    features = rows.features
    tags = find_tag_columns(features, names, separator, origin)
    renamed = _media_names(features, names, origin)
    if names.title_column:
        renamed[names.title_column] = "title"
    used = {*renamed, *(tags.columns if tags else ())}
    replaced = set(renamed.values()) | ({"tags"} if tags else set())
    if names.image_column or names.video_column:
        replaced |= set(VISUAL_COLUMNS)
    if left_out := [column for column in features if column in replaced and column not in used]:
        logger.warning("%s: columns not used, because others are named: %s", origin, ", ".join(left_out))
    renamed = {column: name for column, name in renamed.items() if column != name}
    removed = [*left_out, *(tags.columns if tags else ())]
    if not renamed and not removed:
        return rows
    if isinstance(rows, datasets.Dataset):
        values = [] if tags else None
        if tags:
            for table in rows.select_columns(list(tags.columns)).with_format("arrow").iter(READ_BATCH):
                values += tags.read(table)
        rows = rows.remove_columns(removed).rename_columns(renamed)
        return rows.add_column("tags", values, feature=TEXT_COLUMNS["tags"]) if tags else rows
    kept = {renamed.get(name, name): own for name, own in features.items() if name not in removed}
    kept |= {"tags": TEXT_COLUMNS["tags"]} if tags else {}
    function = functools.partial(_rename_table, removed=removed, renamed=renamed, tags=tags)
    return map_tables(rows, function, kept)


def _rename_table(
    table: pa.Table, *, removed: list[str], renamed: dict[str, str], tags: TagColumns | None
) -> pa.Table:
    values = tags.read(table.select(tags.columns)) if tags else None
    table = table.drop_columns(removed)
    table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    return table if values is None else table.append_column("tags", pa.array(values, pa.list_(pa.string())))


def _media_names(features: datasets.Features, names: ColumnNames, origin: str) -> dict[str, str]:
    """Return the columns that become `image` and `video`. Lists of images become `video`."""
    if named := [column for column in (names.image_column, names.video_column) if column]:
        renamed = {
            column: "video" if column == names.video_column or _is_frames(features[column]) else "image"
            for column in named
        }
        if len(set(renamed.values())) < len(renamed):
            raise ValueError(f"{origin}: {' and '.join(named)} are both videos; name one of them")
        return renamed
    if _is_frames(features.get("image")) and "video" not in features:
        return {"image": "video"}
    frames = [column for column in FRAMES_COLUMNS if _is_frames(features.get(column))]
    return {frames[0]: "video"} if frames and not features.keys() & set(VISUAL_COLUMNS) else {}


def _is_file(feature: object) -> bool:
    """Whether a column contains files: their bytes, their paths or both."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    is_media = isinstance(feature, (datasets.Image, datasets.Video))
    return is_media or getattr(feature, "dtype", None) in ("string", "large_string", "binary", "large_binary", "null")


def _is_frames(feature: object) -> bool:
    """Whether a column contains lists of images. Lists of text are not, since they may be anything."""
    if not isinstance(feature, (datasets.List, datasets.LargeList)):
        return False
    return _is_file(feature.feature) and getattr(feature.feature, "dtype", None) not in TEXT_TYPES


def undecoded_feature(feature: object) -> object | None:
    """Return the type of a column whose images or videos stay undecoded, `None` if it has neither."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        inner = undecoded_feature(feature.feature)
        return None if inner is None else type(feature)(inner)
    return type(feature)(decode=False) if isinstance(feature, (datasets.Image, datasets.Video)) else None


def undecoded(rows: Rows) -> Rows:
    """Return the same rows with images and videos as bytes or paths."""
    for column, feature in (rows.features or {}).items():
        if (wanted := undecoded_feature(feature)) is not None:
            rows = rows.cast_column(column, wanted)
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
    function = functools.partial(_fill_table, schema=features.arrow_schema, number_rows=number_rows)
    return map_tables(rows, function, features, with_indices=True)


def _check_features(features: datasets.Features, origin: str) -> None:
    if not features.keys() & {"image", "video", "frame_features", "title"}:
        raise ValueError(
            f"{origin} has the columns {list(features)}; expected tags and at least one of image, video, "
            "frame_features and title"
        )
    title, tags, video = (features.get(column) for column in ("title", "tags", "video"))
    if title is not None and getattr(title, "dtype", None) not in TEXT_TYPES:
        raise ValueError(f"{origin}: the column title is {title}; expected text")
    if tags is not None and not is_text_list(tags):
        raise ValueError(f"{origin}: the column tags is {tags}; expected lists of text, text or class labels")
    if "image" in features and not _is_file(features["image"]):
        raise ValueError(f"{origin}: the column image is {features['image']}; expected images")
    if video is not None and not _is_file(video) and not _is_frames(video):
        raise ValueError(f"{origin}: the column video is {video}; expected videos or lists of images")


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
