"""Many files: their titles, one row each, and the same as CSV."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from limits import Limits, Refused
from tagging import Tagger

COLUMNS = ("file", "title", "tag", "score", "mark", "train_count", "error")
METADATA = (".csv", ".jsonl")
METADATA_BYTES = 1_000_000


def title_from_name(name: str) -> str:
    return " ".join(Path(name).stem.replace("-", " ").replace("_", " ").split())


def split_metadata(files: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, str], list[str]]:
    """Takes `metadata.csv` and `metadata.jsonl` out of what was sent.

    Args:
        files: `(path, name)` of each.

    Returns:
        The other files, titles by file name, and what was wrong with the metadata. A name in it is only ever compared
        with the names of the files that were sent along: it opens nothing.
    """
    others, titles, problems = [], {}, []
    for path, name in files:
        if Path(name).stem.lower() != "metadata" or Path(name).suffix.lower() not in METADATA:
            others.append((path, name))
            continue
        own = {}
        try:
            for number, row in enumerate(_rows(path, name), 1):
                file, title = row.get("file_name"), row.get("title")
                if not isinstance(file, str) or not isinstance(title, str | None):
                    raise ValueError(f"row {number} has not both a file_name and a title that are text.")
                # Files come without their folders.
                file = Path(file).name
                if own.setdefault(file, title or "") != (title or ""):
                    raise ValueError(f"it has two titles for files called {file}; send one folder at a time.")
            titles |= own
        except (ValueError, csv.Error) as error:
            problems.append(f"{name} was left out: {error}")
    return others, titles, problems


def _rows(path: str, name: str) -> Iterator[dict]:
    if Path(path).stat().st_size > METADATA_BYTES:
        raise ValueError(f"it has more than {METADATA_BYTES} bytes.")
    text = Path(path).read_text(encoding="utf-8-sig")
    if name.lower().endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object.")
            yield row


def tag_files(
    tagger: Tagger,
    files: list[tuple[str, str]],
    decoding: str,
    threshold: float,
    names_as_titles: bool,
    limits: Limits,
) -> Iterator[dict]:
    """Row by row `{"file", "title", "tags", "error"}`, in the order of `files`; `error` is `None` where tags are.

    Raises:
        Refused: there are no files, or too many.
    """
    if not files:
        raise Refused("There are no images or videos.")
    if len(files) > limits.files:
        raise Refused(f"There are {len(files)} files; at most {limits.files} are tagged at once.")
    files, titles, problems = split_metadata(files)
    if not files:
        raise Refused("There are no images or videos beside the metadata.")
    for problem in problems:
        yield {"file": problem.split(" ")[0], "title": "", "tags": [], "error": problem}
    for path, name in files:
        title = titles.get(name) or (title_from_name(name) if names_as_titles else "")
        try:
            tags = tagger.tag(path, name, title, decoding).at(threshold)
            yield {"file": name, "title": title, "tags": tags, "error": None}
        except Refused as error:
            yield {"file": name, "title": title, "tags": [], "error": str(error)}


def to_csv(rows: list[dict]) -> str:
    """One line a tag (`COLUMNS`); a file without tags has one line with none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        for tag in row["tags"] or [{"tag": "", "score": None, "mark": "", "train_count": ""}]:
            score = "" if tag["score"] is None else f"{tag['score']:.4f}"
            writer.writerow(
                {
                    "file": _cell(row["file"]),
                    "title": _cell(row["title"]),
                    "tag": _cell(tag["tag"]),
                    "score": score,
                    "mark": tag["mark"],
                    "train_count": tag["train_count"],
                    "error": _cell(row["error"] or ""),
                }
            )
    return text.getvalue()


def _cell(text: str) -> str:
    """Spreadsheets take a cell that begins so for a formula and run it; an apostrophe says that it is text."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
