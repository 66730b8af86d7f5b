"""Splits text into tags."""

from collections import Counter
from collections.abc import Iterable

# The separator is the one of these that most cells contain.
SEPARATORS = ("|", ";", ",")
# The separator that `optsg` writes. Other separators are reported.
DEFAULT_SEPARATOR = SEPARATORS[0]
CAPTION_SEPARATOR = ","
MAX_EXAMPLE_CHARACTERS = 80


def find_separator(cells: Iterable[object], default: str = DEFAULT_SEPARATOR) -> str:
    """Return the separator that most cells contain, or `default` if none contains one.

    Of separators in equally many cells, `default` comes first, and then the order of `SEPARATORS` decides.

    Args:
        cells: The tags of each row. Values that are not text are ignored.
        default: One of `SEPARATORS`.
    """
    counts = Counter(mark for cell in cells if isinstance(cell, str) for mark in SEPARATORS if mark in cell)
    return max(sorted(SEPARATORS, key=lambda mark: mark != default), key=lambda mark: counts[mark])


def find_printed_list(cell: object) -> str | None:
    """Return a message about a cell that contains a printed list, `None` for other cells.

    `DataFrame.to_csv` prints a column of lists in this way.
    """
    if isinstance(cell, str) and cell.lstrip().startswith(("['", '["', "[]")):
        return f"tags are a printed list, {cell!r}; write them as 'first tag|second tag'"
    return None


def describe_separator(separator: str, cells: Iterable[object], default: str = DEFAULT_SEPARATOR) -> str | None:
    """Return a message if a separator is not the default one, or if cells without it contain another one.

    Args:
        separator: The separator that [`find_separator`] returns.
        cells: The tags of each row. Values that are not text are ignored.
        default: The default separator.
    """
    others = [
        cell
        for cell in cells
        if isinstance(cell, str) and separator not in cell and any(mark in cell for mark in SEPARATORS)
    ]
    if others:
        count = f"{len(others):,} texts are one tag each, because they have"
        count = "1 text is one tag, because it has" if len(others) == 1 else count
        return (
            f"tags are split at {separator!r}; {count} another separator, such as "
            f"{others[0][:MAX_EXAMPLE_CHARACTERS]!r}; separate all tags in the same way"
        )
    if separator == default:
        return None
    return f"tags are split at {separator!r}; if it is part of a tag, separate the tags with {default!r}"


def choose_separator(
    cells: Iterable[object], given: str | None = None, default: str = DEFAULT_SEPARATOR
) -> tuple[str, str | None]:
    """Return the separator of tags that are text, and a message about it, `None` if there is nothing to report.

    Args:
        cells: The tags of each row. Values that are not text are ignored.
        given: The separator that the user gives.
        default: The separator if no cell contains one.
    """
    if given is not None:
        return given, None
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    separator = find_separator(texts, default)
    if any(separator in text for text in texts):
        message = describe_separator(separator, texts, default)
        return separator, message and f"{message}, or give tag_separator"
    # A text of letters alone can only be one tag.
    phrase = next((text for text in texts if text and not text.isalnum()), None)
    if phrase is None:
        return separator, None
    return separator, (
        f"tags that are text contain none of {' '.join(SEPARATORS)}, so each text is one tag, such as "
        f"{phrase[:MAX_EXAMPLE_CHARACTERS]!r}; if "
        "it is several tags, give tag_separator"
    )


def choose_caption_separator(captions: Iterable[object], given: str | None = None) -> tuple[str, str | None]:
    """Return the separator of the tags in captions, and a message as [`choose_separator`] does.

    Captions are always split at line breaks, and the comma is the default. A line break therefore counts as a comma.

    Args:
        captions: The captions. Values that are not text are ignored.
        given: The separator that the user gives.
    """
    lines = [
        [line for line in caption.splitlines() if line.strip()] for caption in captions if isinstance(caption, str)
    ]
    separator = find_separator(map(CAPTION_SEPARATOR.join, lines), CAPTION_SEPARATOR)
    # No caption with several lines is one tag.
    return choose_separator(map(separator.join, lines), given, CAPTION_SEPARATOR)


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


def split_caption(caption: str, separator: str) -> list[str]:
    """Split a caption into tags, at `separator` and at line breaks."""
    return [tag for line in caption.splitlines() for tag in split_tags(line, separator)]


def split_tags(cell: str, separator: str) -> list[str]:
    """Split a cell into tags, without surrounding spaces. Empty tags are kept, since readers count them."""
    return [tag.strip() for tag in cell.split(separator)] if cell.strip() else []
