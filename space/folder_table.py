"""Tags many files and exports their tags as CSV."""

import csv
import io
import json
import logging
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from limits import InputError, Limits, well_formed
from tagging import Tagger

logger = logging.getLogger(__name__)

COLUMNS = ("file", "title", "tag", "score", "mark", "train_count", "error")
METADATA_SUFFIXES = (".csv", ".jsonl")
MAX_METADATA_BYTES = 1_000_000


def title_from_name(name: str) -> str:
    """Make a title from a file name: `red-square.png` becomes `red square`."""
    return " ".join(Path(name).stem.replace("-", " ").replace("_", " ").split())


def split_metadata(files: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, str], list[str]]:
    """Separate `metadata.csv` and `metadata.jsonl` from the other files and read their titles.

    File names in the metadata are only compared with the names of the uploaded files; they open nothing.

    Args:
        files: `(path, name)` of each file.

    Returns:
        The other files, titles by file name in the form NFC, and error messages for metadata that cannot be used.
    """
    others, titles, problems = [], {}, []
    for path, name in files:
        if Path(name).stem.lower() != "metadata" or Path(name).suffix.lower() not in METADATA_SUFFIXES:
            others.append((path, name))
            continue
        try:
            titles |= _read_titles(path, name)
        except (ValueError, OSError, RecursionError, csv.Error) as error:
            problems.append(f"{name} was ignored: {error}")
    return others, titles, problems


def _read_titles(path: str, name: str) -> dict[str, str]:
    titles = {}
    for number, row in enumerate(_read_rows(path, name), 1):
        file, title = row.get("file_name"), row.get("title")
        if not isinstance(file, str) or not isinstance(title, str | None):
            raise ValueError(f"row {number} needs a file_name and a title, both text.")
        # Browsers upload files without their folders.
        file, title = well_formed(_composed(Path(file).name)), well_formed(title or "")
        if titles.setdefault(file, title) != title:
            raise ValueError(f"it has two titles for files named {file}. Upload one folder at a time.")
    return titles


def _read_rows(path: str, name: str) -> Iterator[dict]:
    if (size := Path(path).stat().st_size) > MAX_METADATA_BYTES:
        raise ValueError(f"it has {size} bytes; the limit is {MAX_METADATA_BYTES} bytes.")
    text = Path(path).read_text(encoding="utf-8-sig")
    if name.lower().endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text))
        return
    # `splitlines` also splits at characters that JSON allows inside text, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object.")
            yield row


def _composed(name: str) -> str:
    """Return a file name in the Unicode form of most systems; macOS decomposes accented letters."""
    return unicodedata.normalize("NFC", name)


def tag_files(
    tagger: Tagger,
    files: list[tuple[str, str]],
    decoding: str,
    threshold: float | None,
    names_as_titles: bool,
    limits: Limits,
    client: str = "",
) -> Iterator[dict]:
    """Tag files one by one.

    Args:
        tagger: The model and its processor.
        files: `(path, name)` of each file.
        decoding: `"parallel"` or `"sequential"`.
        threshold: Minimum probability of a tag; `None` for the default of each file.
        names_as_titles: Make titles from file names where the metadata has none.
        limits: The limits of this Space.
        client: Address of the visitor, whose time for reading files is limited.

    Yields:
        `{"file", "title", "tags", "error"}` in the order of `files`; `error` is `None` for a file that was tagged.

    Raises:
        InputError: There are no files, or too many.
    """
    if not files:
        raise InputError("There are no images or videos. Upload at least one.")
    if len(files) > limits.files:
        raise InputError(f"There are {len(files)} files; the limit is {limits.files} files per request.")
    files, titles, problems = split_metadata(files)
    if not files:
        raise InputError("There is only metadata. Upload at least one image or video.")
    for problem in problems:
        yield {"file": problem.split(" ")[0], "title": "", "tags": [], "error": problem}
    for path, name in files:
        title = titles.get(_composed(name)) or (title_from_name(name) if names_as_titles else "")
        try:
            tagged = tagger.tag(path, name, title, decoding, client)
            tags = tagged.tags_above(tagged.default_threshold if threshold is None else threshold)
            yield {"file": name, "title": title, "tags": tags, "error": None}
        except InputError as error:
            yield {"file": name, "title": title, "tags": [], "error": str(error)}
        except Exception:
            # One file must not lose the tags of the others.
            logger.exception("%r", name)
            yield {"file": name, "title": title, "tags": [], "error": f"{name} cannot be tagged."}


def to_csv(rows: list[dict]) -> str:
    """Return the rows of [`tag_files`] as CSV.

    The columns are `COLUMNS`. Each tag has one line; a file without tags has one line with an empty tag.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        for tag in row["tags"] or [{"tag": "", "score": None, "mark": "", "train_count": ""}]:
            writer.writerow(
                {
                    "file": _escape_formula(row["file"]),
                    "title": _escape_formula(row["title"]),
                    "tag": _escape_formula(tag["tag"]),
                    "score": "" if tag["score"] is None else f"{tag['score']:.4f}",
                    "mark": tag["mark"],
                    "train_count": tag["train_count"],
                    "error": _escape_formula(row["error"] or ""),
                }
            )
    return text.getvalue()


def _escape_formula(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would run as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
