"""Builds a book from tagged images and videos."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dataset_scripts.tagging_columns import undecoded
from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.atomic_files import os_errors, write_json
from modeling_optsg.data.collator import OPTSGDataCollator
from modeling_optsg.data.feature_cache import digest, image_settings, tokenizer_settings
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.processing_optsg import OPTSGProcessor

from .book_files import load_book, save_book
from .example_rows import STATE_COLUMN, check_tags, check_unique
from .nearest import check_faiss
from .predictions import GENERATE_OPTIONS, ModelTagReader, ModelTags, check_has_classifier
from .queries import BookQueries
from .tag_book import TagBook
from .title_words import title_words

VISUAL_INPUTS = ("image", "video", "frame_features")
INPUTS = (*VISUAL_INPUTS, "title")
PARTIAL_FOLDER = ".partial"
# The state of an example without image, video and frame features.
TITLE_ONLY = "title only"
# Examples per partial file. An interrupted run repeats at most one chunk.
CHUNK_SIZE = 512
# Maximum number of examples to fit a book to.
MAX_FIT_EXAMPLES = 200


def encoder_fingerprint(model: OPTSGPreTrainedModel, processor: OPTSGProcessor) -> str:
    """Return a hash of everything that a book depends on.

    Its vectors depend on the towers, the evidence pooler and the settings of the processor. What was fitted also
    depends on the tag classifier, the tag decoder and the book reader.

    The number of frames is left out: a book may be searched with more or fewer frames of a video.

    Raises:
        ValueError: The model has no tag classifier, so it computes no evidence.
    """
    check_has_classifier(model)
    settings, layers = image_settings(processor), model.config.vision_feature_layers
    modules = [model.model.vision_tower, model.model.text_tower, model.model.multimodal_encoder.evidence_pooler]
    modules += [model.tag_classifier, model.tag_decoder, model.book_reader]
    modules = [module for module in modules if module is not None]
    return digest(*modules, layers, settings, tokenizer_settings(processor.tokenizer))


def embed_examples(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, examples: Sequence[Mapping], batch_size: int = 64
) -> BookQueries:
    """Compute the vectors by which a book compares examples.

    Args:
        model: A model with a tag classifier.
        processor: Its processor.
        examples: Rows as [`OPTSGDataCollator`] reads them; their tags are ignored. Each has an image, a video or a
            title.
        batch_size: Number of examples per forward pass.

    Raises:
        ValueError: There are no examples, or one cannot be read.
    """
    if not len(examples):
        raise ValueError("There are no examples to embed.")
    collate, parts = OPTSGDataCollator(processor), []
    for start in range(0, len(examples), batch_size):
        rows = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        batch = collate([{name: value for name, value in row.items() if name != "tags"} for row in rows])
        parts.append(_embed_batch(model, batch, [row.get("title") for row in rows]))
    return BookQueries.concatenate(parts)


@torch.no_grad()
def _embed_batch(
    model: OPTSGPreTrainedModel, batch: Mapping[str, torch.Tensor], titles: Sequence[str | None]
) -> BookQueries:
    with evaluation_mode(model):
        features, _ = model.model.encode(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        _, _, evidence = model.model.multimodal_encoder.select(features)
    return BookQueries.from_evidence(evidence, titles)


def build_book(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Dataset,
    folder: str | os.PathLike,
    *,
    batch_size: int = 16,
    progress: bool = True,
    open_image: Callable[[Any], Any] | None = None,
    library: str | os.PathLike | None = None,
) -> tuple[TagBook, dict[str, str]]:
    """Make a book, fit it to its own examples and save it. It predicts only tags of these examples.

    After an interruption, call it again to resume. If the folder has an older book, only new and changed examples, and
    those that the book is fitted to, are read.

    Args:
        model: A model with a tag classifier.
        processor: Its processor.
        examples: Rows with `id`, `title`, `tags`, and `image` or `video` as the processor reads them. A column `group`
            names the group of each example. Without a group, an example is grouped by the words of its title.
        folder: Folder of the book.
        batch_size: Number of examples per forward pass.
        progress: Whether to show a progress bar.
        open_image: Applied to the `image` of an example before the processor reads it, such as a function that returns
            the preview of a raw file. Its `ValueError`, `OSError` or `ImportError` makes the example unreadable.
        library: Folder of the images, if each `id` is the path of an image in it.

    Returns:
        The book, and a dict from the `id` of each unreadable example to the reason.

    Raises:
        ValueError: No example can be read, an `id` occurs twice, a tag is `None`, or the model has no tag classifier.
        ImportError: There are more than 200,000 examples, and `faiss` is not installed.
    """
    check_faiss(len(examples))
    check_unique(map(str, examples["id"]))
    check_tags(examples)
    # The processor decodes the images: a chunk of decoded ones takes much memory, and a damaged one ends the loop.
    examples = undecoded(examples)
    columns = _columns(examples)
    reader = _ExampleReader(model, processor, Path(folder, PARTIAL_FOLDER), batch_size, open_image)

    def read_rows(rows: Sequence[int]) -> list[dict]:
        return [examples[row] | {name: values[row] for name, values in columns.items()} for row in rows]

    old, reused = _reusable(folder, reader, columns)
    parts, pending = [], [row for row, name in enumerate(columns["id"]) if name not in reused]
    with tqdm(total=len(pending), unit="file", disable=not progress) as bar:
        for start in range(0, len(pending), CHUNK_SIZE):
            rows = read_rows(pending[start : start + CHUNK_SIZE])
            parts += reader.read_chunk(rows)
            bar.update(len(rows))
    if not parts and not reused:
        raise ValueError("None of the examples can be read; a book needs at least one.")
    read = [row for row in pending if columns["id"][row] not in reader.unreadable]
    kept = [row for row, name in enumerate(columns["id"]) if name in reused]
    table = Dataset.from_dict({name: [values[row] for row in kept + read] for name, values in columns.items()})
    if old is None:
        book = TagBook(table, BookQueries.concatenate(parts), reader.fingerprint)
    else:
        book, vectors = old, {name: rows[[*reused.values()]] for name, rows in old.vectors.items()}
        if parts:
            added = old.normalize(BookQueries.concatenate(parts))
            vectors = {name: torch.cat([rows, added[name]]) for name, rows in vectors.items()}
        book.replace_examples(table, vectors)
        # There may now be too few examples to fit the book to.
        book.reset_fit()
    book.own_tags_only = True
    chosen = np.random.default_rng(0).permutation(kept + read)[:MAX_FIT_EXAMPLES].tolist()
    parts, model_tags, ids = reader.read_tags(read_rows(chosen))
    if parts:
        row_of = {name: row for row, name in enumerate(table["id"])}
        book.fit_to_itself(
            BookQueries.concatenate(parts), [row_of[name] for name in ids], model_tags, reader.read_outputs
        )
    save_book(book, folder, library)
    shutil.rmtree(reader.folder, ignore_errors=True)
    return book, reader.unreadable


def _columns(examples: Dataset) -> dict[str, list]:
    """Return the columns of a book for examples."""
    ids, titles = list(map(str, examples["id"])), [title or "" for title in examples["title"]]
    inputs = examples.select_columns([name for name in VISUAL_INPUTS if name in examples.column_names])
    states = [_joined_state(row.values()) for row in inputs] or [TITLE_ONLY] * len(ids)
    known = examples["group"] if "group" in examples.column_names else [None] * len(examples)
    groups = list(map(group_of, ids, titles, known))
    return {"id": ids, "title": titles, "tags": examples["tags"][:], "group": groups, STATE_COLUMN: states}


def _reusable(
    folder: str | os.PathLike, reader: "_ExampleReader", columns: Mapping[str, list]
) -> tuple[TagBook | None, dict[str, int]]:
    """Return the older book in a folder, and its rows of unchanged examples by `id`, in the order of `columns`."""
    try:
        old = load_book(folder, reader.fingerprint)
    except (FileNotFoundError, ValueError):
        return None, {}
    # The reduction of image features was fitted to the older examples.
    if len(columns["id"]) > 2 * len(old):
        return None, {}
    rows = {key: row for row, key in enumerate(zip(*(old.examples[name] for name in ("id", "title", STATE_COLUMN))))}
    keys = zip(columns["id"], columns["title"], columns[STATE_COLUMN])
    return old, {key[0]: rows[key] for key in keys if key in rows and key[2]}


def group_of(id_: str, title: str | None, known: Any = None) -> str:
    """Return the group of an example: a known one, or the words of its title, or its id without a title.

    Examples with the same words in their titles may show the same thing.
    """
    if known is not None:
        return str(known)
    return " ".join(sorted(set(title_words(title or "")))) or id_


class _ExampleReader:
    """Reads examples: computes their vectors, or the model's tags.

    Attributes:
        unreadable: By `id`, the reason for each unreadable example.
    """

    def __init__(
        self,
        model: OPTSGPreTrainedModel,
        processor: OPTSGProcessor,
        folder: Path,
        batch_size: int,
        open_image: Callable[[Any], Any] | None,
    ):
        self.open_image = open_image
        self.model, self.processor, self.folder, self.batch_size = model, processor, folder, batch_size
        self.fingerprint = encoder_fingerprint(model, processor)
        self.collate, self.read_outputs = OPTSGDataCollator(processor), ModelTagReader(model, processor)
        self.unreadable: dict[str, str] = {}

    def read_chunk(self, rows: Sequence[Mapping]) -> list[BookQueries]:
        """Compute the vectors of a chunk, or load them if an interrupted call saved them."""
        key = [self.fingerprint, *([row["id"], row["title"], row[STATE_COLUMN]] for row in rows)]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        vectors_path, path = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        found = _load_chunk(vectors_path, path)
        if found is None or self._is_readable_now([row for row in rows if row["id"] in found[1]]):
            parts, unreadable = [], {}
            for batch, titles, _ in self._batches(rows, unreadable):
                queries = _embed_batch(self.model, batch, titles)
                parts.append(BookQueries({name: rows.half() for name, rows in queries.vectors.items()}, titles))
            found = BookQueries.concatenate(parts).vectors if parts else {}, unreadable
            self.folder.mkdir(parents=True, exist_ok=True)
            with os_errors(vectors_path):
                save_file(found[0], f"{vectors_path}.partial")
            os.replace(f"{vectors_path}.partial", vectors_path)
            write_json(path, found[1])
        self.unreadable |= found[1]
        titles = [row["title"] for row in rows if row["id"] not in self.unreadable]
        return [BookQueries(found[0], titles)] if titles else []

    def _is_readable_now(self, rows: Sequence[Mapping]) -> bool:
        """Return whether any of the rows, which were unreadable, can be read now."""
        return next(self._batches(rows, {}), None) is not None

    def read_tags(self, rows: Sequence[Mapping]) -> tuple[list[BookQueries], list[ModelTags], list[str]]:
        """Return the queries of the readable rows, the tags of the model for them, and their ids."""
        parts, tags, ids = [], [], []
        for batch, titles, batch_ids in self._batches(rows, {}):
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            queries, own = self.read_outputs(self.model.generate(**batch, **GENERATE_OPTIONS), titles)
            parts.append(queries)
            tags += own
            ids += batch_ids
        return parts, tags, ids

    def _batches(
        self, rows: Sequence[Mapping], unreadable: dict[str, str]
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[str], list[str]]]:
        """Yield the model's inputs, titles and ids of each batch, and add unreadable examples to `unreadable`."""
        for start in range(0, len(rows), self.batch_size):
            yield from self._readable(rows[start : start + self.batch_size], unreadable)

    def _readable(
        self, rows: Sequence[Mapping], unreadable: dict[str, str]
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[str], list[str]]]:
        try:
            batch = self.collate([self._open(row) for row in rows])
        except (ValueError, OSError, ImportError) as error:
            if len(rows) == 1:
                unreadable[rows[0]["id"]] = str(error)
                return
            # Halving the batch finds the unreadable examples.
            half = len(rows) // 2
            yield from self._readable(rows[:half], unreadable)
            yield from self._readable(rows[half:], unreadable)
            return
        yield batch, [row["title"] for row in rows], [row["id"] for row in rows]

    def _open(self, row: Mapping) -> dict[str, Any]:
        inputs = {name: row.get(name) for name in INPUTS}
        if self.open_image is not None and inputs["image"] is not None:
            inputs["image"] = self.open_image(inputs["image"])
        return inputs


def _load_chunk(vectors_path: Path, path: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """Load what a call saved, `None` if there is nothing or it is damaged."""
    try:
        return load_file(vectors_path), json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError):
        return None


def _joined_state(values: Iterable[Any]) -> str:
    """Return the state of an example from its image, video and frame features; empty if a file cannot be found."""
    given = [value for value in values if value is not None]
    return " ".join(filter(None, map(_state, given))) if given else TITLE_ONLY


def _state(value: Any) -> str:
    """Return a text that changes when an input changes; empty if there is none, or its file cannot be found.

    For a file, it is the size and the time, which are faster to read than the content. For embedded images and videos,
    pixels and frame features, it is a hash of the content. A list of frames has a hash of the states of its frames.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        return ""
    if isinstance(value, str | os.PathLike):
        try:
            status = os.stat(value)
        except (OSError, ValueError):
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"
    if not isinstance(value, bytes):
        try:
            array = np.asarray(value, dtype=np.float64)
            value = repr(array.shape).encode() + array.tobytes()
        except (TypeError, ValueError):
            value = json.dumps(list(map(_state, value)), allow_nan=False).encode()
    return hashlib.sha256(value).hexdigest()[:32]
