"""Splits text into tags."""

from collections.abc import Iterable

# The separator is the first of these that a cell of the file contains.
SEPARATORS = ("|", ";", ",")
# The separator that `optsg` writes. Other separators are reported.
DEFAULT_SEPARATOR = SEPARATORS[0]
CAPTION_SEPARATOR = ","


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


def choose_separator(cells: Iterable[object], given: str | None = None) -> tuple[str, str | None]:
    """Return the separator of tags that are text, and a message about it, `None` if there is nothing to report.

    Args:
        cells: The tags of each row. Values that are not text are ignored.
        given: The separator that the user gives.
    """
    if given is not None:
        return given, None
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    separator = find_separator(texts)
    if any(separator in text for text in texts):
        message = describe_separator(separator)
        return separator, message and f"{message}, or give tag_separator"
    # A text of letters alone can only be one tag.
    phrase = next((text for text in texts if text and not text.isalnum()), None)
    if phrase is None:
        return separator, None
    return separator, (
        f"tags that are text contain none of {' '.join(SEPARATORS)}, so each text is one tag, such as {phrase!r}; if "
        "it is several tags, give tag_separator"
    )


def read_tags(value: list[str | None] | str | None, separator: str) -> list[str | None]:
    """Return the tags of an example that has a list, or a text that is split at `separator`.

    Raises:
        ValueError: The text is a printed list.
    """
    if isinstance(value, str):
        if message := find_printed_list(value):
            raise ValueError(message)
        return split_tags(value, separator)
    return [] if value is None else value


def split_caption(caption: str, separator: str = CAPTION_SEPARATOR) -> list[str]:
    """Split a caption into tags, at `separator` and at line breaks."""
    return [tag for line in caption.splitlines() for tag in split_tags(line, separator)]


def split_tags(cell: str, separator: str) -> list[str]:
    """Split a cell into tags, without surrounding spaces. Empty tags are kept, since readers count them."""
    return [tag.strip() for tag in cell.split(separator)] if cell.strip() else []
