"""Decodes the text of metadata files, and finds their columns."""

import csv
import io
from collections.abc import Collection
from typing import Any

# The first column with text is used.
TITLE_COLUMNS = ("title", "caption", "text", "description")
DELIMITERS = (",", ";", "\t")
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def decode_text(data: bytes, messages: list[str]) -> str:
    """Decode text in UTF-8, in UTF-16 with a byte order mark, or in an encoding that is detected.

    Args:
        data: The bytes of a file.
        messages: A message about a detected encoding is added.

    Raises:
        ValueError: No encoding fits.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        from charset_normalizer import from_bytes

        detected = from_bytes(data).best()
        if detected is None:
            raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
        messages.append(f"it is not UTF-8 and was read as {detected.encoding}; if titles look wrong, save it as UTF-8")
        return str(detected)


def open_csv(text: str, path_columns: Collection[str], messages: list[str]) -> tuple[list[str], Any]:
    """Find the columns of a CSV file, which commas, semicolons or tabs separate.

    Args:
        text: The text of the file.
        path_columns: Names of columns with paths. The separator is the one that makes one of them a column.
        messages: A message is added if commas are not the separator.

    Returns:
        The names of the columns without spaces around them, and a `csv.reader` of the rows. It is strict: otherwise, a
        quotation mark that is never closed would turn all other rows into one cell.

    Raises:
        csv.Error: The header is damaged.
    """
    header = text.split("\n", 1)[0]
    delimiter = next((own for own in DELIMITERS if {*map(_column_name, header.split(own))} & {*path_columns}), ",")
    if delimiter != ",":
        messages.append(f"its columns are separated by {'tabs' if delimiter == chr(9) else delimiter}")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    return [_column_name(name) for name in next(rows, [])], rows


def check_unicode(text: str) -> None:
    """Check that a text can be encoded: JSON may contain one half of a surrogate pair.

    Raises:
        ValueError: It cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is not valid Unicode text ({error.reason})") from error


def _column_name(name: str) -> str:
    return name.strip().strip('"\ufeff').strip()
