"""Finds images and videos that have the same bytes."""

import functools
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from dataset_scripts import undecoded
from dataset_scripts.tagging_columns import MEDIA_COLUMNS
from modeling_optsg.image_utils import is_url

BATCH_SIZE = 64
BLOCK_BYTES = 2**20


def find_equal_files(parts: Sequence[Dataset]) -> list[list[tuple[int, int]]]:
    """Find examples whose image or video has the same bytes.

    Only files of the same size are read. Remote and missing files are passed over. A video that is a list of frames is
    compared frame by frame.

    Args:
        parts: Rows with `image` or `video` or both; columns with other names are ignored.

    Returns:
        Groups of at least two examples, each as the numbers of its part and its row, in the order of the rows.
    """
    groups = []
    for column in MEDIA_COLUMNS:
        by_size = defaultdict(list)
        for part, rows in enumerate(parts):
            if column in rows.column_names:
                for row, size in enumerate(_sizes(rows, column)):
                    if size is not None:
                        by_size[size].append((part, row))
        candidates = sorted(member for members in by_size.values() if len(members) > 1 for member in members)
        by_content = defaultdict(list)
        for part, rows in enumerate(parts):
            own = [row for number, row in candidates if number == part]
            digests = _digests(rows, column, own) if own else []
            for row, digest in zip(own, digests, strict=True):
                if digest is not None:
                    by_content[digest].append((part, row))
        groups += [members for members in by_content.values() if len(members) > 1]
    return sorted(groups)


def _sizes(rows: Dataset, column: str) -> Iterator[tuple[int, ...] | None]:
    """Yield the size of each row's file in bytes, or those of its frames; `None` if there is no local file."""
    for table in undecoded(rows.select_columns(column)).with_format("arrow").iter(BATCH_SIZE):
        for files in table[column].chunks:
            if pa.types.is_struct(files.type):
                yield from (None if size is None else (size,) for size in _file_sizes(files))
                continue
            sizes = iter(_file_sizes(files.flatten()))
            for number in pc.list_value_length(files).to_pylist():
                own = [next(sizes) for _ in range(number or 0)]
                yield tuple(own) if own and None not in own else None


def _file_sizes(files: pa.StructArray) -> list[int | None]:
    # The lengths are known without the bytes.
    lengths = pc.binary_length(pc.struct_field(files, "bytes")).to_pylist()
    paths = pc.struct_field(files, "path").to_pylist()
    return [_path_size(path) if length is None else length for length, path in zip(lengths, paths, strict=True)]


def _path_size(path: str | None) -> int | None:
    try:
        return None if path is None or is_url(path) else os.stat(path).st_size
    except (OSError, ValueError):
        return None


def _digests(rows: Dataset, column: str, numbers: Sequence[int]) -> Iterator[bytes | None]:
    """Yield the digest of each of these rows' files, `None` if it cannot be read."""
    chosen = undecoded(rows.select_columns(column)).select(numbers)
    with ThreadPoolExecutor() as pool:
        for batch in chosen.iter(BATCH_SIZE):
            # hashlib releases the interpreter while it works.
            yield from pool.map(_digest, batch[column])


def _digest(source: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in [source] if isinstance(source, Mapping) else source:
            content = file.get("bytes")
            with open(file["path"], "rb") if content is None else io.BytesIO(content) as opened:
                for block in iter(functools.partial(opened.read, BLOCK_BYTES), b""):
                    digest.update(block)
    except OSError:
        return None
    return digest.digest()
