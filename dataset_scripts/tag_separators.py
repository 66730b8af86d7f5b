"""Splits text into tags."""

from collections.abc import Iterable

# The separator is the first of these that a cell of the file contains.
SEPARATORS = ("|", ";", ",")
# The separator that `optsg` writes. Other separators are reported.
DEFAULT_SEPARATOR = SEPARATORS[0]


def find_separator(cells: Iterable[object]) -> str:
    """Return the separator of the tags in a file. Values that are not text are ignored.

    Args:
        cells: The tags of each row.
    """
    texts = [cell for cell in cells if isinstance(cell, str)]
    return next((mark for mark in SEPARATORS if any(mark in text for text in texts)), DEFAULT_SEPARATOR)


def find_printed_list(cell: object) -> str | None:
    """Return a message about a cell that contains a printed list, `None` for other cells.

    `DataFrame.to_csv` prints a column of lists in this way.
    """
    if isinstance(cell, str) and cell.lstrip().startswith(("['", '["', "[]")):
        return f"tags are a printed list, {cell!r}; write them as 'first tag|second tag'"
    return None


def describe_separator(separator: str) -> str | None:
    """Return a message about a separator, `None` for the default one."""
    if separator == DEFAULT_SEPARATOR:
        return None
    return f"tags are split at {separator!r}; if it is part of a tag, separate the tags with {DEFAULT_SEPARATOR!r}"


def split_tags(cell: str, separator: str) -> list[str]:
    """Split a cell into tags, without surrounding spaces. Empty tags are kept, since readers count them."""
    return [tag.strip() for tag in cell.split(separator)] if cell.strip() else []
