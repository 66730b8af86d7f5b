"""Reads annotation files example by example: JSON lists and JSON lines, plain or compressed, never loaded whole."""

import codecs
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

CHUNK = 1 << 20
MAX_OBJECT_CHARACTERS = 1 << 24
_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"


def read_annotations(path: str | os.PathLike) -> Iterator[dict]:
    """Yields the objects of a JSON list, or of a file with one JSON object a line (blank lines are allowed).

    Which of the two it is, the first character says. A name that ends with `.gz` or `.zst` says how it is compressed.
    At most one example and a megabyte of text more are held at a time.

    Raises:
        ValueError: the file ends in the middle, holds something that is no object, or is no JSON or UTF-8; names the
            file and the number of examples read until then.
    """
    path, count = Path(path), 0
    with _open(path) as raw:
        try:
            for example in _objects(_decoded(raw)):
                if not isinstance(example, dict):
                    raise _Broken(f"holds {_shown(example)} where an object should be")
                yield example
                count += 1
        except _Broken as error:
            raise ValueError(f"{path}, after {count:,} examples: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after {count:,} examples: not UTF-8 ({error.reason})") from None
        except (EOFError, OSError) as error:
            # gzip says so where compressed data stop in the middle.
            raise ValueError(f"{path}, after {count:,} examples: {error}") from None


class _Broken(Exception):
    pass


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return open(path, "rb")


def _decoded(raw: io.BufferedIOBase) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while chunk := raw.read(CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _objects(chunks: Iterator[str]) -> Iterator:
    """The values of a list, or of lines one after the other."""
    text, at, ended = "", 0, False

    def more() -> bool:
        """Lets go of what is read, and reads on."""
        nonlocal text, at, ended
        chunk = next(chunks, None)
        ended = chunk is None
        text, at = text[at:] + (chunk or ""), 0
        return not ended

    def skip(characters: str) -> str:
        """The next character that is none of these, "" at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in characters:
                at += 1
            if at < len(text) or not more():
                return text[at : at + 1]

    in_list = skip(_BLANK) == "["
    at += in_list
    first = True
    while True:
        following = skip(_BLANK)
        if in_list and following == "]":
            at += 1
            if rest := skip(_BLANK):
                raise _Broken(f"goes on with {rest!r} after the end of its list")
            return
        if not following:
            if in_list:
                raise _Broken("the file ends in the middle of its list")
            return
        if in_list and not first:
            if following != ",":
                raise _Broken(f"has {following!r} where a comma should be")
            at += 1
            if skip(_BLANK) == "]":
                raise _Broken("has a comma before the end of its list")
        while True:
            try:
                value, end = _DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # Perhaps the rest is in what is not read yet. What no example is long enough for is no example.
                if len(text) - at > MAX_OBJECT_CHARACTERS or not more():
                    # The decoder stops where a string begins that has no end, or at what it cannot go on with.
                    if "Unterminated" in error.msg or error.pos >= len(text.rstrip()) - 6:
                        raise _Broken("the file ends in the middle of an example") from None
                    raise _Broken(f"no JSON: {error.msg} at {text[error.pos : error.pos + 20]!r}") from None
                continue
            # A number at the end of what is read may go on.
            if end == len(text) and not ended and more():
                continue
            break
        at, first = end, False
        yield value


def _shown(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
