"""Reads every image and video of a dataset once, to find unreadable files and copies."""

import functools
import hashlib
import io
from collections import defaultdict
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

BATCH_SIZE = 64
BLOCK_BYTES = 2**20


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
        unreadable: The unreadable ones.
        copies: Readable ones with the same bytes.
    """

    num_files: int = 0
    unreadable: list[UnreadableFile] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)


def check_files(splits: Mapping[str, Dataset], progress: bool = False) -> FileCheck:
    """Read every image and video.

    Images are decoded. Of a video, one frame in the middle is decoded.

    Args:
        splits: Rows with `id`, `tags`, and `image` or `video` or both. Rows without either are passed over.
        progress: Whether to show a progress bar.

    Raises:
        ImportError: There are videos, and PyAV is not installed.
    """
    found, contents = FileCheck(), defaultdict(list)
    total = sum(len(rows) for rows in splits.values())
    with ThreadPoolExecutor() as pool, tqdm(total=total, unit="example", disable=not progress, leave=False) as bar:
        for split, rows in splits.items():
            for batch in _batches(split, rows):
                files = [(example, tags, file) for example, tags, own in batch for file in own]
                # Pillow, PyAV and hashlib release the interpreter while they work.
                read = pool.map(_read_file, [file for *_, file in files], [example.id for example, *_ in files])
                for (example, tags, (_, source)), (digest, reason) in zip(files, read, strict=True):
                    found.num_files += 1
                    if reason is None:
                        contents[digest].append((example, frozenset(tags)))
                    else:
                        found.unreadable.append(UnreadableFile(example, source.get("path"), reason))
                bar.update(len(batch))
    for owners in contents.values():
        if len(owners) > 1:
            found.copies.append(Copies([example for example, _ in owners], len({tags for _, tags in owners}) == 1))
    return found


def _batches(
    split: str, rows: Dataset
) -> Iterator[list[tuple[Example, list[str], list[tuple[str, Mapping[str, Any]]]]]]:
    """Yield the examples of a split with their tags and their undecoded files by kind."""
    kinds = [kind for kind in MEDIA_COLUMNS if kind in rows.column_names]
    if not kinds:
        return
    number = 0
    for columns in undecoded(rows.select_columns(["id", "tags", *kinds])).iter(BATCH_SIZE):
        batch = []
        for index, (example_id, tags) in enumerate(zip(columns["id"], columns["tags"])):
            files = [(kind, columns[kind][index]) for kind in kinds if columns[kind][index] is not None]
            batch.append((Example(split, str(number if example_id is None else example_id)), tags or [], files))
            number += 1
        yield batch


def _read_file(file: tuple[str, Mapping[str, Any]], name: str) -> tuple[bytes | None, str | None]:
    """Return the digest of a file's bytes, or the reason why the file cannot be read."""
    kind, source = file
    try:
        content, _ = unwrap_file(source, name)
        if kind == "video":
            read_frames(content, 1, name)
        else:
            # The bytes are read once, for the pixels and the digest.
            content = Path(content).read_bytes() if isinstance(content, str) and not is_url(content) else content
            read_image(content, name)
        return _digest(content), None
    except OSError as error:
        return None, f"{name}: {error.strerror or error}"
    except ValueError as error:
        return None, str(error)


def _digest(content: bytes | str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        for block in iter(functools.partial(file.read, BLOCK_BYTES), b""):
            digest.update(block)
    return digest.digest()
