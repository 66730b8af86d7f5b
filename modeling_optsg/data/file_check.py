"""Reads every image and video of a dataset, to find unreadable files and copies."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from dataset_scripts import undecoded
from dataset_scripts.tagging_columns import MEDIA_COLUMNS
from modeling_optsg.image_utils import is_url, read_image, unwrap_file
from modeling_optsg.video_utils import read_frames

from .equal_files import find_equal_files

BATCH_SIZE = 64
# Large files are decoded at a fraction of their size.
MIN_SIDE = 64


@dataclass(frozen=True)
class Example:
    """An example of a dataset.

    Args:
        split: Its split.
        id: Its id, or its row number if it has none.
    """

    split: str
    id: str


@dataclass(frozen=True)
class UnreadableFile:
    """An image or video that cannot be read.

    Args:
        example: Its example.
        path: Its path, `None` if the dataset contains its bytes without a path.
        reason: The error message.
    """

    example: Example
    path: str | None
    reason: str


@dataclass(frozen=True)
class Copies:
    """Examples whose image or video files have the same bytes.

    Args:
        examples: Two or more examples.
        same_tags: Whether they have the same tags.
    """

    examples: list[Example]
    same_tags: bool

    @property
    def splits(self) -> list[str]:
        """The splits of the examples, each once."""
        return list(dict.fromkeys(example.split for example in self.examples))


@dataclass
class FileCheck:
    """Result of [`check_files`].

    Args:
        num_files: Number of images and videos, including unreadable ones.
        copies: Examples whose files have the same bytes.
        unreadable: Files that cannot be read. `None` if they were not looked for.
    """

    num_files: int = 0
    copies: list[Copies] = field(default_factory=list)
    unreadable: list[UnreadableFile] | None = None


def check_files(splits: Mapping[str, Dataset], *, read: bool = True, progress: bool = False) -> FileCheck:
    """Find images and videos that are copies of others, and read all of them to find those that cannot be read.

    Images are decoded. Of a video, one frame in the middle is decoded. An unreadable file is no copy.

    Args:
        splits: Rows with `id`, `tags`, and `image` or `video` or both. Rows without either are passed over.
        read: Whether to read all files. Otherwise only files of the same size are compared.
        progress: Whether to show a progress bar.

    Raises:
        ImportError: There are videos to read, and PyAV is not installed.
    """
    found, failed = FileCheck(unreadable=[] if read else None), set()
    total = sum(len(rows) for rows in splits.values())
    with ThreadPoolExecutor() as pool, tqdm(total=total, unit="example", disable=not progress, leave=False) as bar:
        for part, (split, rows) in enumerate(splits.items()):
            for batch in _batches(split, rows):
                files = [(row, example, file) for row, example, own in batch for file in own]
                found.num_files += len(files)
                if read:
                    # Pillow and PyAV release the interpreter while they work.
                    reasons = pool.map(
                        _read_file, [file for *_, file in files], [example.id for _, example, _ in files]
                    )
                    for (row, example, (_, source)), reason in zip(files, reasons, strict=True):
                        if reason is not None:
                            failed.add((part, row))
                            path = source.get("path") if isinstance(source, Mapping) else None
                            found.unreadable.append(UnreadableFile(example, path, reason))
                bar.update(len(batch))
    groups = (
        [member for member in group if member not in failed] for group in find_equal_files(list(splits.values()))
    )
    found.copies = [_copies(splits, group) for group in groups if len(group) > 1]
    return found


def _copies(splits: Mapping[str, Dataset], group: list[tuple[int, int]]) -> Copies:
    names = list(splits)
    rows = [splits[names[part]].select_columns(["id", "tags"])[row] for part, row in group]
    examples = [_example(names[part], row, own["id"]) for (part, row), own in zip(group, rows, strict=True)]
    return Copies(examples, len({frozenset(own["tags"] or ()) for own in rows}) == 1)


def _example(split: str, row: int, example_id: str | None) -> Example:
    return Example(split, str(row if example_id is None else example_id))


def _batches(split: str, rows: Dataset) -> Iterator[list[tuple[int, Example, list[tuple[str, Any]]]]]:
    """Yield the rows of a split with their numbers, examples, and undecoded files by kind."""
    kinds = [kind for kind in MEDIA_COLUMNS if kind in rows.column_names]
    if not kinds:
        return
    number = 0
    for columns in undecoded(rows.select_columns(["id", *kinds])).iter(BATCH_SIZE):
        batch = []
        for index, example_id in enumerate(columns["id"]):
            files = [(kind, columns[kind][index]) for kind in kinds if columns[kind][index] is not None]
            batch.append((number, _example(split, number, example_id), files))
            number += 1
        yield batch


def _read_file(file: tuple[str, Any], name: str) -> str | None:
    """Return the reason why a file cannot be read, or `None`."""
    kind, source = file
    try:
        if isinstance(source, list):
            for number, frame in enumerate(source):
                read_image(frame, f"{name}, frame {number}", MIN_SIDE)
            return None
        content, _ = unwrap_file(source, name)
        if kind == "video":
            read_frames(content, 1, name, MIN_SIDE)
        else:
            # Bytes have no path, so a message has the name of the example.
            content = Path(content).read_bytes() if isinstance(content, str) and not is_url(content) else content
            read_image(content, name, MIN_SIDE)
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    except ValueError as error:
        return str(error)
    return None
