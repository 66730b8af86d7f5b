"""Lets caches notice that local images or videos were replaced, for rows that have paths and no content."""

import hashlib
import os
from collections.abc import Iterator

import datasets
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from .tagging_columns import MEDIA_COLUMNS, READ_BATCH, undecoded


def hash_file_states(rows: datasets.Dataset) -> str:
    """Return a hash of size and modification time of the local files that rows name, `""` if they name none.

    Args:
        rows: Rows with `image` or `video`. Columns whose rows all have their content are not looked at.
    """
    states, found = hashlib.sha256(), False
    for path in _paths(rows):
        try:
            status = os.stat(path)
        except OSError:
            # For example a file in an archive, or one that is missing, which is reported where it is read.
            states.update(b"-")
        else:
            states.update(f"{status.st_size}:{status.st_mtime_ns};".encode())
            found = True
    return states.hexdigest()[:32] if found else ""


def add_file_states(rows: datasets.Dataset) -> datasets.Dataset:
    """Make the fingerprint of rows depend on [`hash_file_states`], and return the rows."""
    if states := hash_file_states(rows):
        rows._fingerprint = Hasher.hash([rows._fingerprint, states])
    return rows


def _paths(rows: datasets.Dataset) -> Iterator[str]:
    # Lists of frames are left out.
    types = (datasets.Image, datasets.Video)
    names = [name for name in MEDIA_COLUMNS if isinstance(rows.features.get(name), types)]
    # Separate columns, so that no content is read.
    parts = undecoded(rows.select_columns(names)).flatten().with_format(None)
    for name in names:
        if not pc.all(pc.is_valid(parts.data.column(f"{name}.bytes"))).as_py():
            for batch in parts.select_columns(path := f"{name}.path").iter(READ_BATCH):
                yield from filter(None, batch[path])
