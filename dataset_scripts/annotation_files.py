"""Reads annotation files example by example: JSON lists and JSON lines, plain or compressed, never loaded whole."""

import codecs
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

CHUNK = 1 << 20
MAX_OBJECT_CHARACTERS = 1 << 24
_DECODER = json.JSONDecoder()
_WHITE_SPACE = " \t\r\n"


def read_annotations(path: str | os.PathLike) -> Iterator[dict]:
    """Yield the objects of a JSON list, or of a file with one JSON object on each line.

    The first character decides which of the two it is. Files may be compressed (`.gz` and `.zst`), and blank lines are
    allowed. At most one example and another megabyte of text are in memory.

    Raises:
        ValueError: The file is truncated, is not JSON or UTF-8, or contains something other than objects. The message
            has the file's name and the number of examples before the error.
    """
    path, count = Path(path), 0
    with _open(path) as raw:
        try:
            for example in _JSONReader(_decode(raw)).values():
                if not isinstance(example, dict):
                    raise _InvalidFile(f"expected an object, got {_shorten(example)}")
                yield example
                count += 1
        except _InvalidFile as error:
            raise ValueError(f"{path}, after {count:,} examples: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after {count:,} examples: not UTF-8 ({error.reason})") from None
        except (EOFError, OSError) as error:
            # From gzip, where the compressed data are truncated.
            raise ValueError(f"{path}, after {count:,} examples: {error}") from None


class _InvalidFile(Exception):
    pass


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return open(path, "rb")


def _decode(raw: io.BufferedIOBase) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while chunk := raw.read(CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


class _JSONReader:
    """Parses JSON values from chunks of text."""

    def __init__(self, chunks: Iterator[str]):
        self.chunks = chunks
        self.text = ""
        self.position = 0
        self.at_end = False

    def values(self) -> Iterator[Any]:
        """Yield the values of a list, or values that follow each other."""
        if self._next_character() != "[":
            while self._next_character():
                yield self._value()
            return
        self.position += 1
        if self._next_character() != "]":
            yield self._value()
            while self._next_character() == ",":
                self.position += 1
                if self._next_character() == "]":
                    raise _InvalidFile("there is a comma before the end of the list")
                yield self._value()
        if (end := self._next_character()) != "]":
            raise _InvalidFile(f"expected a comma, got {end!r}" if end else "the file ends in the middle of its list")
        self.position += 1
        if rest := self._next_character():
            raise _InvalidFile(f"there is {rest!r} after the end of the list")

    def _next_character(self) -> str:
        """Skip white space and return the next character without consuming it; `""` at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _WHITE_SPACE:
                self.position += 1
            if self.position < len(self.text) or not self._read_chunk():
                return self.text[self.position : self.position + 1]

    def _read_chunk(self) -> bool:
        """Drop the text before the position and append the next chunk; whether there was one."""
        chunk = next(self.chunks, None)
        if chunk is None:
            self.at_end = True
            return False
        self.text, self.position = self.text[self.position :] + chunk, 0
        return True

    def _value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # The rest of the value may be in the next chunk.
                if len(self.text) - self.position > MAX_OBJECT_CHARACTERS or not self._read_chunk():
                    raise self._explain(error) from None
                continue
            # A number at the end of the text may continue in the next chunk.
            if end < len(self.text) or self.at_end or not self._read_chunk():
                self.position = end
                return value

    def _explain(self, error: json.JSONDecodeError) -> _InvalidFile:
        # In truncated text the decoder stops where an unterminated string begins, or near the end.
        if "Unterminated" in error.msg or error.pos >= len(self.text.rstrip()) - 6:
            return _InvalidFile("the file ends in the middle of an example")
        return _InvalidFile(f"not JSON: {error.msg} at {self.text[error.pos : error.pos + 20]!r}")


def _shorten(value: Any) -> str:
    # It is only shown, so a value that is not JSON is not an error here.
    text = json.dumps(value, ensure_ascii=False, allow_nan=True)
    return text if len(text) <= 40 else f"{text[:40]}…"
