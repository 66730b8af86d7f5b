"""Text output for terminals.

Control characters in file names and tags are escaped, and the columns of a table line up in every script. `tqdm` is
imported late because it is slow to import.
"""

import logging
import sys
import unicodedata
from typing import TextIO

MAX_FILE_WIDTH, MIN_TAG_WIDTH = 40, 24
_CONTROL_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
_BIDIRECTIONAL_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    """Escapes characters that move the cursor, change colours or reverse the line."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _CONTROL_CATEGORIES
        or unicodedata.bidirectional(character) in _BIDIRECTIONAL_CONTROLS
        else character
        for character in text
    )


def error_line(error: BaseException) -> str:
    """Return the message of an exception as one line without control characters."""
    # The text of a KeyError is only the key.
    missing_key = type(error) is KeyError and len(error.args) == 1
    text = f"missing key {error}" if missing_key else str(error)
    return printable(" ".join(text.split())) or type(error).__name__


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 file" or "2,000 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line above any progress bar and flushes it.

    Args:
        file: Standard output if omitted.
    """
    from tqdm import tqdm

    with tqdm.external_write_mode(file=file or sys.stdout):
        print(text, file=file or sys.stdout, flush=True)


class StderrHandler(logging.Handler):
    """Prints a library's warnings on standard error, with the command's name in front.

    Args:
        prefix: The command's name.
    """

    def __init__(self, prefix: str):
        super().__init__(logging.WARNING)
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Print one log record."""
        print_line(f"{self.prefix}: {printable(record.getMessage())}", file=sys.stderr)


class TagTable:
    """Formats a table of tags row by row, for printing while the files are tagged.

    Args:
        files: Paths of all files, which determine the width of the first column.
    """

    def __init__(self, files: list[str]):
        self.file_width = min(MAX_FILE_WIDTH, max(map(_width, map(printable, files)), default=0))
        self.tag_width = MIN_TAG_WIDTH

    def header(self) -> str:
        """Return the line with the column names."""
        return self._row("file", "tag", "probability", "novel")

    def rows(self, file: str, tags: list[dict]) -> str:
        """Return the lines of one file.

        Args:
            file: Path of the file.
            tags: Tags as `OPTSGProcessor.batch_decode` returns them, `{"tag": str, "score": float, "novel": bool}`.
        """
        names = [printable(tag["tag"]) for tag in tags]
        self.tag_width = max([self.tag_width, *map(_width, names)])
        cells = [
            (name, f"{tag['score']:.3f}", "novel" if tag["novel"] else "")
            for name, tag in zip(names, tags, strict=True)
        ] or [("(no tags)", "", "")]
        file = printable(file)
        lines = []
        if _width(file) > self.file_width:
            lines, file = [file], ""
        lines.append(self._row(file, *cells[0]))
        lines += [self._row("", *row) for row in cells[1:]]
        return "\n".join(lines)

    def _row(self, file: str, tag: str, probability: str, novel: str) -> str:
        return f"{_pad(file, self.file_width)}  {_pad(tag, self.tag_width)}  {probability:>11}  {novel}".rstrip()


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """Number of terminal columns that `text` takes; a Chinese character takes two."""
    from tqdm.utils import disp_len

    return disp_len(text)
