"""Text for terminals: nothing in a file name or a tag may act on one, and columns line up in every script."""

import logging
import sys
import unicodedata

from tqdm import tqdm
from tqdm.utils import disp_len

FILE_WIDTH, TAG_WIDTH = 40, 24
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}
_TEXT_REVERSALS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    """`text` with what could move the cursor, change colours or reverse the line written as an escape (`\\x1b`)."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _CONTROLS or unicodedata.bidirectional(character) in _TEXT_REVERSALS
        else character
        for character in text
    )


def say(text: str, file=None):
    """Prints `text` (to standard output when `file` is left out) past any progress bar, and at once."""
    with tqdm.external_write_mode(file=file or sys.stdout):
        print(text, file=file or sys.stdout, flush=True)


class ReportHandler(logging.Handler):
    """Warnings that a library logs, as lines of this command's own on standard error."""

    def __init__(self, prefix: str):
        super().__init__(logging.WARNING)
        self.prefix = prefix

    def emit(self, record: logging.LogRecord):
        say(f"{self.prefix}: {printable(record.getMessage())}", file=sys.stderr)


class TagTable:
    """A table that is printed while it grows: columns are as wide as the file names ask for and the tags so far."""

    def __init__(self, files: list[str]):
        self.file_width = min(FILE_WIDTH, max(map(disp_len, map(printable, files)), default=0))
        self.tag_width = TAG_WIDTH

    def header(self) -> str:
        return self._row("file", "tag", "probability", "novel")

    def rows(self, file: str, tags: list[dict]) -> str:
        """The lines of one file, the most probable tag first.

        Args:
            tags: `{"tag": str, "score": float, "novel": bool}`, as `OPTSGProcessor.batch_decode` returns them.
        """
        names = [printable(tag["tag"]) for tag in tags]
        self.tag_width = max([self.tag_width, *map(disp_len, names)])
        cells = [
            (name, f"{tag['score']:.3f}", "novel" if tag["novel"] else "")
            for name, tag in zip(names, tags, strict=True)
        ] or [("(no tags)", "", "")]
        file = printable(file)
        lines = []
        if disp_len(file) > self.file_width:
            lines, file = [file], ""
        lines.append(self._row(file, *cells[0]))
        lines += [self._row("", *row) for row in cells[1:]]
        return "\n".join(lines)

    def _row(self, file: str, tag: str, probability: str, novel: str) -> str:
        return f"{_pad(file, self.file_width)}  {_pad(tag, self.tag_width)}  {probability:>11}  {novel}".rstrip()


def _pad(text: str, width: int) -> str:
    return text + " " * (width - disp_len(text))
