"""Gives a dataset loaded from Parquet or from the Hub the columns that every tagging dataset has."""

from collections.abc import Mapping

import datasets

_TEXT = datasets.Value("string")
_TEXT_COLUMNS = datasets.Features({"id": _TEXT, "title": _TEXT, "tags": datasets.List(_TEXT)})
_MEDIA_FEATURES = {"image": datasets.Image(), "video": datasets.Video(decode=False)}
_STRING_TYPES = ("string", "large_string", "null")


def with_tagging_columns(
    rows: datasets.Dataset | datasets.IterableDataset, origin: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Returns `rows` with `id`, `title` and `tags` as text, and `image` and `video` (undecoded) as such.

    A missing `id` becomes the row's number; a missing `title` or `tags`, or a null in them, becomes `""` or `[]`.
    Other columns stay as they are.

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
        return _fill_stream(rows)
    for column, feature in _TEXT_COLUMNS.items():
        if column not in features or features[column] != feature or rows.data.column(column).null_count:
            values = rows[column] if column in features else [None] * rows.num_rows
            filled = [_fill(column, value, number) for number, value in enumerate(values)]
            if column in features:
                rows = rows.remove_columns(column)
            rows = rows.add_column(column, filled, feature=feature)
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
    return value or ("" if column == "title" else [])


def _fill_stream(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    features = datasets.Features({**rows.features, **_TEXT_COLUMNS})
    # Undecoded until the text is filled in: a picture would otherwise be decoded and encoded again for every row.
    if "image" in features:
        rows = rows.cast_column("image", datasets.Image(decode=False))

    def fill(row: Mapping, number: int) -> dict:
        return {column: _fill(column, row.get(column), number) for column in _TEXT_COLUMNS}

    # The features are cast to afterwards: given to map, they would be taken as applied and pictures stay undecoded.
    return rows.map(fill, with_indices=True).cast(features)
