"""Reads tar files in the WebDataset format, in which the files of an example have the same name."""

import dataclasses
import functools
import json
import logging
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .column_names import ColumnNames
from .media_suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .tag_separators import choose_caption_separator, choose_separator, read_tags, split_caption
from .tagging_columns import MEDIA_COLUMNS, TEXT_COLUMNS, Rows, distinct_tags, map_tables, with_tagging_columns

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIX = ".tar"
KEY, URL = "__key__", "__url__"
# The first of these that the first examples have is used.
TITLE_COLUMNS = ("json.title", "json.caption")
TAGS_COLUMNS = ("json.tags", "txt", "cls", "json.caption")
CAPTION_COLUMNS = ("txt", "json.caption")
# Examples of each split that are looked at first.
HEAD = 100
_UNDECODED = {"image": datasets.Image(decode=False), "video": datasets.Video(decode=False)}
# The parts of an undecoded file, in the order of `datasets`.
_PARTS, _EMPTY = {"bytes": "binary", "path": "string"}, {"bytes": b"", "path": ""}


@dataclasses.dataclass(frozen=True)
class _Sources:
    """Where titles and tags are read from.

    Args:
        title: Column with titles, such as `json.title`.
        tags: Column with tags.
        separator: Separator of tags that are text.
    """

    title: str | None
    tags: str | None
    separator: str


def archive_features(names: ColumnNames) -> datasets.Features:
    """Return a column for each kind of file that is read from the archives.

    Args:
        names: The columns that the user names.

    Raises:
        ImportError: This version of `datasets` cannot read JSON files whose keys differ.
    """
    if not hasattr(datasets, "Json"):
        raise ImportError("reading tar files needs a newer version of datasets: pip install 'datasets>=4.7'")
    features = {KEY: datasets.Value("string"), URL: datasets.Value("string")}
    features |= {"json": datasets.Json(), "txt": datasets.Value("string"), "cls": datasets.Value("int64")}
    for kind, suffixes in (("image", IMAGE_SUFFIXES), ("video", VIDEO_SUFFIXES)):
        for suffix in sorted(suffixes):
            features |= dict.fromkeys((suffix[1:], suffix[1:].upper()), _UNDECODED[kind])
    for column in (names.title_column, names.tags_column):
        if column and column.split(".")[0] not in features:
            features[column] = features.get(column.rpartition(".")[2], datasets.Value("string"))
    for kind, column in (("image", names.image_column), ("video", names.video_column)):
        features |= {column: _UNDECODED[kind]} if column else {}
    return datasets.Features(features)


def with_archive_columns(
    splits: Mapping[str | None, Rows], origins: Mapping[str | None, str], names: ColumnNames, texts_only: bool
) -> dict[str | None, Rows]:
    """Return the examples of archives with the columns of every tagging dataset.

    The `id` is the name of the archive and the key of the example, such as `train-0000/00017`. An image or video is
    recognised by its suffix. The title is `title` or else `caption` in the `json` file. The tags are `tags` in the
    `json` file; or else the `txt` file, which is split as captions are; or else the number in the `cls` file; or
    else `caption` in the `json` file. A warning says which of these are used.

    Args:
        splits: The splits, loaded with [`archive_features`].
        origins: The name of each split in error messages.
        names: Columns with other names: a suffix such as `txt`, or `json.` with a key.
        texts_only: Whether to leave out images and videos.

    Raises:
        ValueError: A named column does not exist; a title or tags have the wrong type; or there are no images, videos
            and titles.
    """
    origin = next(iter(origins.values()))
    head = [row for rows in splits.values() for row in _head(rows)]
    if not head:
        raise ValueError(f"{origin}: the archives contain no examples")
    media = {kind: columns for kind, columns in _media_columns(head[0], names).items() if _has_any(head, columns)}
    sources = _find_sources(head, media, names, origin)
    if isinstance(next(iter(splits.values())), datasets.Dataset):
        columns = {part: _used_columns(rows, names) for part, rows in splits.items()}
        kinds = [kind for kind in _UNDECODED if any(own.get(kind) for own in columns.values())]
        return {
            part: _finish_rows(rows, origins[part], {kind: columns[part].get(kind, []) for kind in kinds}, sources)
            for part, rows in splits.items()
        }
    finish = functools.partial(_finish_stream, kinds=[] if texts_only else list(media), sources=sources, names=names)
    return {part: finish(rows, origins[part]) for part, rows in splits.items()}


def _head(rows: Rows) -> Iterator[dict[str, Any]]:
    if isinstance(rows, datasets.IterableDataset):
        return iter(rows.take(HEAD))
    return iter(rows.select(range(min(HEAD, len(rows)))))


def _media_columns(columns: Iterable[str], names: ColumnNames) -> dict[str, list[str]]:
    """Return the columns with images and those with videos."""
    if names.image_column or names.video_column:
        named = {"image": names.image_column, "video": names.video_column}
        return {kind: [column] for kind, column in named.items() if column}
    kinds = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
    return {kind: [name for name in columns if f".{name.lower()}" in suffixes] for kind, suffixes in kinds.items()}


def _has_any(head: list[dict[str, Any]], columns: Iterable[str]) -> bool:
    return any(row[column] is not None for column in columns for row in head)


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Return a column of a row, where `json.a.b` is a value inside the column `json`."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _find_sources(
    head: list[dict[str, Any]], media: Mapping[str, list[str]], names: ColumnNames, origin: str
) -> _Sources:
    """Find the columns of titles and tags in the first examples, and check those that the user names."""

    def has_values(column: str) -> bool:
        return any(_value(row, column) is not None for row in head)

    columns = [name for row in head for name, value in row.items() if value is not None]
    columns += [f"json.{key}" for row in head if isinstance(row["json"], dict) for key in row["json"]]
    existing = [name for name in dict.fromkeys(columns) if name not in (KEY, URL)]
    named = {f"{kind}_column": column for kind, column in names.renamed().items()}
    for argument, column in (named | {"tags_column": names.tags_column}).items():
        if column and column not in existing and not has_values(column):
            raise ValueError(
                f"{origin}: the first examples have no {column!r}, which {argument} names; they have "
                f"{', '.join(existing)}"
            )
    tags = names.tags_column or next(filter(has_values, TAGS_COLUMNS), None)
    title = names.title_column or next((name for name in TITLE_COLUMNS if name != tags and has_values(name)), None)
    if not media and title is None:
        raise ValueError(
            f"{origin}: the first examples have no image, video or title; they have {', '.join(existing)}"
        )
    choose = choose_caption_separator if tags in CAPTION_COLUMNS else choose_separator
    separator, message = choose((_value(row, tags) for row in head if tags), names.tag_separator)
    logger.warning("%s: titles are read from %s, tags from %s", origin, title or "no file", tags or "no file")
    if message:
        logger.warning("%s: %s", origin, message)
    return _Sources(title, tags, separator)


def _used_columns(rows: datasets.Dataset, names: ColumnNames) -> dict[str, list[str]]:
    """Return the columns with images and those with videos that have a value in any row."""
    return {
        kind: [column for column in columns if rows.data.column(column).null_count < len(rows)]
        for kind, columns in _media_columns(rows.features, names).items()
    }


def _finish_rows(
    rows: datasets.Dataset, origin: str, media: Mapping[str, list[str]], sources: _Sources
) -> datasets.Dataset:
    texts: dict[str, list] = {name: [] for name in TEXT_COLUMNS}
    text_columns = [name for name, feature in rows.features.items() if feature not in _UNDECODED.values()]
    for row in rows.select_columns(text_columns):
        for name, value in _read_texts(row, sources, origin).items():
            texts[name].append(value)
    rows = rows.select_columns([KEY, *(column for columns in media.values() for column in columns)])
    for kind, columns in media.items():
        if len(columns) > 1:
            features = {name: own for name, own in rows.features.items() if name not in columns}
            features = datasets.Features(features | {kind: _UNDECODED[kind]})
            function = functools.partial(_join_columns, columns=columns, kind=kind)
            rows = rows.with_format("arrow").map(
                function, batched=True, batch_size=HEAD, features=features, remove_columns=columns
            )
            rows = rows.with_format(None)
        elif not columns:
            rows = rows.add_column(kind, [None] * len(rows), feature=_UNDECODED[kind])
        elif columns != [kind]:
            rows = rows.rename_column(columns[0], kind)
    for name, feature in TEXT_COLUMNS.items():
        rows = rows.add_column(name, texts[name], feature=feature)
    return with_tagging_columns(rows.remove_columns(KEY), origin)


def _join_columns(table: pa.Table, *, columns: list[str], kind: str) -> pa.Table:
    joined = pc.coalesce(*(table[column] for column in columns))
    return table.drop_columns(columns).append_column(kind, joined)


def _finish_stream(
    rows: datasets.IterableDataset, origin: str, *, kinds: list[str], sources: _Sources, names: ColumnNames
) -> datasets.IterableDataset:
    media = _media_columns(rows.features, names)
    packed = {column: datasets.Value("string") for column in TEXT_COLUMNS}
    packed |= {f"{kind}_{part}": datasets.Value(dtype) for kind in kinds for part, dtype in _PARTS.items()}
    pack = functools.partial(_pack, media=media, kinds=kinds, sources=sources, origin=origin)
    rows = rows.map(pack, features=datasets.Features(packed), remove_columns=list(rows.features))
    features = datasets.Features({**TEXT_COLUMNS, **{kind: _UNDECODED[kind] for kind in kinds}})
    unpack = functools.partial(_unpack, kinds=kinds, schema=features.arrow_schema)
    rows = map_tables(rows, unpack, features)
    for kind in kinds:
        rows = rows.cast_column(kind, MEDIA_COLUMNS[kind])
    return rows


def _pack(
    row: Mapping[str, Any], *, media: Mapping[str, list[str]], kinds: list[str], sources: _Sources, origin: str
) -> dict[str, Any]:
    """Return the values of a row as text and bytes that are never null.

    `datasets` makes one Arrow table of each row of a stream, and joins only tables whose columns have the same types.
    """
    texts = _read_texts(row, sources, origin)
    packed = texts | {"tags": json.dumps(distinct_tags(texts["tags"]), allow_nan=False)}
    for kind, columns in media.items():
        files = [row[column] for column in columns if row[column] is not None]
        if kind in kinds:
            packed |= {f"{kind}_{part}": files[0][part] if files else empty for part, empty in _EMPTY.items()}
        elif files and kinds:
            raise ValueError(
                f"{origin}: {texts['id']} has a {kind}, and the first {HEAD} examples have none; load the archives "
                "without streaming"
            )
    return packed


def _unpack(table: pa.Table, *, kinds: list[str], schema: pa.Schema) -> pa.Table:
    columns = {name: table[name] for name in ("id", "title")}
    columns["tags"] = pa.array(map(json.loads, table["tags"].to_pylist()), schema.field("tags").type)
    for kind in kinds:
        data, paths = (table[f"{kind}_{part}"].combine_chunks() for part in _PARTS)
        columns[kind] = pa.StructArray.from_arrays(
            [data, paths], list(_PARTS), mask=pc.equal(pc.binary_length(data), 0)
        )
    return pa.table(columns, schema=schema)


def _read_texts(row: Mapping[str, Any], sources: _Sources, origin: str) -> dict[str, Any]:
    """Return `id`, `title` and `tags` of a row."""
    archive = posixpath.basename(row[URL].replace("\\", "/")).removesuffix(ARCHIVE_SUFFIX)
    example = f"{archive}/{row[KEY]}"
    title = _value(row, sources.title) if sources.title else None
    if title is not None and not isinstance(title, str):
        raise ValueError(f"{origin}: {sources.title} of {example} is {title!r}; expected text")
    return {"id": example, "title": title or "", "tags": _read_tags(row, example, sources, origin)}


def _read_tags(row: Mapping[str, Any], example: str, sources: _Sources, origin: str) -> list[str]:
    value = _value(row, sources.tags) if sources.tags else None
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, str) and sources.tags in CAPTION_COLUMNS:
        return split_caption(value, sources.separator)
    try:
        tags = read_tags(value, sources.separator)
    except ValueError as error:
        raise ValueError(f"{origin}: {sources.tags} of {example}: {error}") from error
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{origin}: {sources.tags} of {example} is {value!r}; expected text or a list of texts")
    return tags
