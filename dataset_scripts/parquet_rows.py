"""Reads the rows of a Parquet file that may come from anywhere: little memory, and errors of one kind."""

import os
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

# A small file may hold very many rows, or one very long text.
BATCH_ROWS = 10_000
MAX_COLUMN_BYTES = 2**28


def read_parquet_rows(path: str | os.PathLike, is_used: Callable[[str], bool] = lambda name: True) -> Iterator[dict]:
    """Yield the rows of a Parquet file.

    Args:
        path: Path of the file.
        is_used: Whether a column, by its name, is read. Others may hold values that Python cannot.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a Parquet file, a part of a column needs more than `MAX_COLUMN_BYTES` of memory, or
            a value, such as a date, cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if is_used(name)]
            _check_sizes(file.metadata, set(columns))
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        # For damaged metadata, PyArrow raises an OSError without an error number.
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"it is not a Parquet file ({error})") from error
    except (pa.ArrowException, OverflowError, RecursionError) as error:
        raise ValueError(f"a value cannot be read ({error})") from error


def _check_sizes(metadata: pq.FileMetaData, columns: set[str]) -> None:
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name, size = column.path_in_schema.split(".")[0], column.total_uncompressed_size
            if name in columns and size > MAX_COLUMN_BYTES:
                raise ValueError(
                    f"the column {name} has {size / 1e6:,.0f} MB in one row group; write it with smaller row groups"
                )
