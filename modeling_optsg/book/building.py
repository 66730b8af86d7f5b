"""Makes a book of tagged images and videos."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.collator import OPTSGDataCollator
from modeling_optsg.data.feature_cache import digest, tokenizer_settings
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.processing_optsg import OPTSGProcessor

from .tag_book import COLUMNS, BookQueries, TagBook

INPUTS = ("image", "video", "title")
TOWER_INPUTS = ("pixel_values", "frame_features", "image_features", "frame_mask")
TOWER_INPUTS += ("input_ids", "title_features", "attention_mask")
PARTIAL_FOLDER = ".partial"
# Examples per partial file. An interrupted run repeats at most the work of one.
CHUNK_SIZE = 512


def encoder_fingerprint(model: OPTSGPreTrainedModel, processor: OPTSGProcessor) -> str:
    """Hashes everything that the vectors of a book depend on: towers, evidence and the processor's settings.

    Raises:
        ValueError: The model has no tag classifier, so it computes no evidence.
    """
    pooler = model.model.multimodal_encoder.evidence_pooler
    if pooler is None:
        raise ValueError("This model has no tag classifier. A book needs a model with one.")
    image_processor = getattr(processor, "image_processor", None)
    settings = image_processor and image_processor.to_dict()
    towers = [tower for tower in (model.model.vision_tower, model.model.text_tower) if tower is not None]
    return digest(*towers, pooler, settings, processor.num_frames, tokenizer_settings(processor.tokenizer))


@torch.no_grad()
def embed_inputs(
    model: OPTSGPreTrainedModel, inputs: Mapping[str, torch.Tensor], titles: Sequence[str | None]
) -> tuple[BookQueries, dict[str, torch.Tensor]]:
    """Compute the vectors of a batch, and the tower features that `generate` takes instead of the inputs.

    Args:
        model: A model with a tag classifier.
        inputs: Inputs of the model, from the processor or a collator.
        titles: The titles of the batch.
    """
    encoder_inputs = {name: inputs[name] for name in TOWER_INPUTS if name in inputs}
    with evaluation_mode(model):
        vision, title_features = model.model.encode_inputs(**encoder_inputs)
        features = {name: inputs.get(name) for name in ("frame_mask", "attention_mask")}
        features |= {"title_features": title_features}
        if vision is not None:
            features |= {"frame_features": vision.frame_features, "image_features": vision.image_features}
        features = {name: tensor for name, tensor in features.items() if tensor is not None}
        return BookQueries.from_evidence(model.model(**features).evidence, titles), features


def embed_examples(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, examples: Sequence[Mapping], batch_size: int = 64
) -> BookQueries:
    """Compute the vectors that a book compares examples by.

    Args:
        model: A model with a tag classifier.
        processor: Its processor.
        examples: Rows as [`OPTSGDataCollator`] reads them; their tags are ignored. Each has an image, a video or a
            title.
        batch_size: Number of examples per forward pass.

    Raises:
        ValueError: An example cannot be read.
    """
    collate, parts = OPTSGDataCollator(processor), []
    for start in range(0, len(examples), batch_size):
        rows = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        batch = collate([{name: value for name, value in row.items() if name != "tags"} for row in rows])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        parts.append(embed_inputs(model, batch, [row.get("title") for row in rows])[0])
    return BookQueries.concatenate(parts)


def build_book(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    folder: str | os.PathLike,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> tuple[TagBook, dict[str, str]]:
    """Make a book, fit it to its own examples and save it.

    An interrupted call is resumed by the next one.

    Args:
        model: A model with a tag classifier.
        processor: Its processor.
        examples: Rows with `id`, `title`, `tags`, `group`, and `image` or `video`.
        folder: Folder of the book.
        batch_size: Number of examples per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        The book, and the reason for each unreadable example by its `id`.

    Raises:
        ValueError: No example can be read, an `id` occurs twice, or the model has no tag classifier.
    """
    fingerprint, partial = encoder_fingerprint(model, processor), Path(folder, PARTIAL_FOLDER)
    parts, kept, unreadable = [], [], {}
    with tqdm(total=len(examples), unit="file", disable=not progress) as bar:
        for start in range(0, len(examples), CHUNK_SIZE):
            rows = [examples[index] for index in range(start, min(start + CHUNK_SIZE, len(examples)))]
            queries, reasons = _embed_chunk(model, processor, rows, partial, fingerprint, batch_size)
            unreadable |= reasons
            kept += [row for row in rows if row["id"] not in reasons]
            parts += [] if queries is None else [queries]
            bar.update(len(rows))
    if not kept:
        raise ValueError("No example can be read, so there is nothing to look up.")
    columns = {name: [row[name] or "" for row in kept] for name in COLUMNS}
    queries = BookQueries.concatenate(parts)
    book = TagBook(Dataset.from_dict(columns), queries, fingerprint)
    book.fit_to_itself(queries)
    book.save(folder)
    shutil.rmtree(partial, ignore_errors=True)
    return book, unreadable


def _embed_chunk(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    rows: Sequence[Mapping],
    partial: Path,
    fingerprint: str,
    batch_size: int,
) -> tuple[BookQueries | None, dict[str, str]]:
    """Embed some examples, or read the vectors that an interrupted call saved."""
    key = [fingerprint, [[row["id"], row["title"], _file_state(row)] for row in rows]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path, reasons_path = partial / f"{name}.safetensors", partial / f"{name}.json"
    if not reasons_path.exists():
        parts, reasons = [], {}
        for start in range(0, len(rows), batch_size):
            part, unreadable = _embed_readable(model, processor, rows[start : start + batch_size])
            parts += part
            reasons |= unreadable
        partial.mkdir(parents=True, exist_ok=True)
        if parts:
            save_file(BookQueries.concatenate(parts).vectors, path)
        # Written last: it says that the chunk is complete.
        reasons_path.write_text(json.dumps(reasons), encoding="utf-8")
    reasons = json.loads(reasons_path.read_text(encoding="utf-8"))
    titles = [row["title"] or "" for row in rows if row["id"] not in reasons]
    return (BookQueries(load_file(path), titles) if titles else None), reasons


def _embed_readable(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, rows: Sequence[Mapping]
) -> tuple[list[BookQueries], dict[str, str]]:
    """Embed the examples of a batch that can be read, and return the reasons for the others by their `id`."""
    try:
        inputs = [{name: row.get(name) for name in INPUTS} for row in rows]
        return [embed_examples(model, processor, inputs, len(rows))], {}
    except (ValueError, OSError, ImportError) as error:
        if len(rows) == 1:
            return [], {rows[0]["id"]: str(error)}
        # Halving the batch finds the unreadable examples.
        half = len(rows) // 2
        first, second = (_embed_readable(model, processor, part) for part in (rows[:half], rows[half:]))
        return first[0] + second[0], first[1] | second[1]


def _file_state(row: Mapping) -> list | None:
    """Return size and modification time of an example's file, which stand for its content."""
    value = row.get("image") or row.get("video")
    try:
        state = os.stat(value["path"] if isinstance(value, Mapping) else value)
    except (OSError, TypeError, KeyError):
        return None
    return [state.st_size, state.st_mtime_ns]
