"""Reads and tags batches of files in threads, with any model."""

import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from .embedded_titles import find_title
from .media_files import MediaFile
from .sidecars.embedded import EmbeddedMetadata, read_embedded
from .sidecars.reconciliation import tag_key

# Batches that are read while the model tags others.
BATCHES_AHEAD = 2
# Batches that are tagged at the same time on a CPU. Python runs in one thread at a time, so more gain little.
MAX_BATCHES_TAGGED = 4
# Batches whose images and videos are tagged in separate batches.
MIXED_BATCHES = 16
MAX_READERS = 16
# Videos in a batch. Their frames need much memory.
MAX_VIDEOS = 2
# Time to read a file. A large file gets more, because a video on a slow disk may have to be read from start to end.
READ_SECONDS = 60
MIN_BYTES_PER_SECOND = 4_000_000


@dataclass(frozen=True)
class TagSettings:
    """Generation settings. `None` stands for the setting of the model.

    Args:
        threshold: Minimum probability of a tag. If `None`, an image that is tagged by its image words gets its five
            most probable tags.
        max_tags: Maximum number of tags per file.
        decoding: "parallel" or "sequential".
        frames: Number of frames to read from each video.
        exclude: Tags to leave out, ignoring letter case.
        vocabulary: Tags that may be generated. If empty, all tags may be generated.
        book: Folder of a book, of the images that it was made from, or of a checkpoint with a book, or the name of
            such a checkpoint on the Hub. If set, `threshold` defaults to that of the book, and there is no default for
            `max_tags`.
    """

    threshold: float | None = None
    max_tags: int | None = None
    decoding: str | None = None
    frames: int | None = None
    exclude: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    book: str | None = None


@dataclass(frozen=True)
class FileTags:
    """Predictions for one file.

    Args:
        tags: Tags as `{"tag": str, "score": float, "novel": bool}`, most probable first.
        image_words: Image words of the file, `{"word": str, "score": float}`, most probable first.
        sources: For each tag `{"source": str, "neighbours": list}`. The source is "generated", "pointed",
            "classified" or "book", see [`BookTagger`]. The neighbours are the examples of the book that have the tag,
            as `{"id": str, "title": str, "score": float}`.
        title: The title that was used: that of the file, or else the title or caption in the image.
        embedded: The metadata in the image, if it was read.
    """

    tags: list[dict]
    image_words: list[dict]
    sources: list[dict] = field(default_factory=list)
    title: str | None = None
    embedded: EmbeddedMetadata | None = None


@dataclass(frozen=True)
class ReadFile:
    """A file with its frames `[frames, 3, height, width]`, a tensor or an array, its title and its metadata."""

    file: MediaFile
    pixels: Any
    title: str | None
    embedded: EmbeddedMetadata | None


class FileTagger:
    """Tags files. A subclass reads their pixels and generates the tags of a batch.

    Args:
        settings: Settings of the generation.
        num_readers: Number of threads that read files. Default: one for each core, but at most `MAX_READERS`.
        num_threads: Number of threads for the model. Up to `MAX_BATCHES_TAGGED` batches are tagged at the same time,
            because threads that work on the same batch often wait for each other.
        concurrent_batches: Whether batches are tagged at the same time.
    """

    def __init__(
        self, settings: TagSettings, num_readers: int | None, num_threads: int, concurrent_batches: bool = True
    ):
        self.num_readers = num_readers or min(MAX_READERS, num_cores())
        self.threads_per_batch = -(-num_threads // MAX_BATCHES_TAGGED) if concurrent_batches else num_threads
        self.num_batches = num_threads // self.threads_per_batch
        self.excluded = {tag_key(tag) for tag in settings.exclude}

    def __call__(
        self, files: list[MediaFile], batch_size: int, with_metadata: Set[str] = frozenset()
    ) -> Iterator[tuple[MediaFile, FileTags | Exception]]:
        """Tag files in batches. Threads tag batches, while others read the next files.

        Args:
            files: The files to tag.
            batch_size: Maximum number of files in a batch.
            with_metadata: Paths of files whose metadata the caller needs.

        Yields:
            Each file with its tags, or with the error from reading or tagging it. Within `MIXED_BATCHES` batches of
            files, images come before videos. The results do not depend on the number of threads.
        """
        batches = split_into_batches(files, batch_size)
        ahead = self.num_batches + BATCHES_AHEAD
        stopped = threading.Event()
        with ThreadPoolExecutor(self.num_readers) as readers, ThreadPoolExecutor(self.num_batches) as taggers:
            read = functools.partial(readers.submit, self._read_in_time, stopped)
            tagging: deque[tuple[list[MediaFile], Future]] = deque()
            try:
                for batch in chain(batches, [None] * ahead):
                    if batch is not None:
                        files_read = [read(file, file.path in with_metadata) for file in batch]
                        tagging.append((batch, taggers.submit(self._tag_when_read, stopped, files_read)))
                    if tagging and (batch is None or len(tagging) >= ahead):
                        batch, tagged = tagging.popleft()
                        yield from zip(batch, tagged.result(), strict=True)
            finally:
                # After an interruption, files that nobody waits for are not read.
                stopped.set()
                for pool in (readers, taggers):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _tag_when_read(self, stopped: threading.Event, files_read: list[Future]) -> list[FileTags | Exception]:
        """Wait for the files of a batch, and tag them in this thread, unless nobody waits for them."""
        read = [future.result() for future in files_read]
        self._start_batch()
        return [] if stopped.is_set() else self._tag(read)

    def _read_in_time(self, stopped: threading.Event, file: MediaFile, with_metadata: bool) -> ReadFile | Exception:
        """Read a file in a thread that is given up after an interruption, or when its decoder hangs."""
        results = []
        size = 0
        with contextlib.suppress(OSError):  # the thread reports a file that cannot be read
            size = os.path.getsize(file.path) if os.path.isfile(file.path) else 0
        seconds = READ_SECONDS + size / MIN_BYTES_PER_SECOND
        end = time.monotonic() + seconds
        # Python does not wait for a daemon at its exit.
        thread = threading.Thread(target=lambda: results.append(self._read(file, with_metadata)), daemon=True)
        thread.start()
        while thread.is_alive() and not stopped.is_set() and time.monotonic() < end:
            thread.join(0.1)
        return results[0] if results else TimeoutError(f"{file.path} could not be read in {seconds:.0f} seconds")

    def _read(self, file: MediaFile, with_metadata: bool) -> ReadFile | Exception:
        try:
            pixels = self._read_pixels(file)
            needs_title = not (file.title or file.is_video)
            embedded = read_embedded(file) if needs_title or with_metadata else None
            return ReadFile(file, pixels, find_title(embedded) if needs_title else file.title, embedded)
        except Exception as error:  # one file must not end the run for the others
            return error

    def _tag(self, read: list[ReadFile | Exception]) -> list[FileTags | Exception]:
        """Return the tags of each file that was read, and the errors of the others."""
        results: list = list(read)
        readable = [index for index, file in enumerate(read) if not isinstance(file, Exception)]
        # An animated image has several frames, like a video.
        for has_one_frame, size in ((True, len(read)), (False, MAX_VIDEOS)):
            chosen = [index for index in readable if (len(read[index].pixels) == 1) == has_one_frame]
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                for index, tags in zip(part, self._tag_batch([read[index] for index in part]), strict=True):
                    results[index] = tags
        return results

    def _tag_batch(self, batch: list[ReadFile]) -> list[FileTags | Exception]:
        """Return the tags of each file of a batch. If the batch fails, its files are tagged one by one."""
        try:
            return self._generate(batch)
        except Exception as error:  # such as too little memory; one file must not end the run for the others
            if len(batch) == 1:
                return [error]
            return [result for file in batch for result in self._tag_batch([file])]

    def _start_batch(self) -> None:
        """Prepare the thread that tags a batch."""

    def _read_pixels(self, file: MediaFile) -> Any:
        """Return the frames of a file, `[frames, 3, height, width]`."""
        raise NotImplementedError

    def _generate(self, batch: list[ReadFile]) -> list[FileTags]:
        """Return the tags of each file of a batch."""
        raise NotImplementedError


def split_into_batches(files: list[MediaFile], size: int) -> Iterator[list[MediaFile]]:
    """Yield the files in batches of images only or videos only.

    A batch has at most `MAX_VIDEOS` videos. In a batch with videos, images would be padded to the same number of
    frames and take as long as a video. Batches are full also in a folder where images and videos alternate, such as
    Live Photos: of `MIXED_BATCHES` batches, the images come before the videos.

    Args:
        files: The files to tag.
        size: Maximum number of files in a batch.
    """
    for start in range(0, len(files), MIXED_BATCHES * size):
        window = files[start : start + MIXED_BATCHES * size]
        for is_video in (False, True):
            group = [file for file in window if file.is_video == is_video]
            step = min(size, MAX_VIDEOS) if is_video else size
            yield from (group[start : start + step] for start in range(0, len(group), step))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return len(available)
