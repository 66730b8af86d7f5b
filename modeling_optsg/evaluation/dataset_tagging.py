"""Tagging of large datasets in shards, which any process can make in any order."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from dataset_scripts import undecoded
from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.atomic_files import sync
from modeling_optsg.data.feature_cache import digest, tokenizer_settings
from modeling_optsg.processing_optsg import OPTSGProcessor

from .prediction import predict_tags

FEATURES = Features(
    {
        "id": Value("string"),
        "tags": List({"tag": Value("string"), "score": Value("float32"), "novel": Value("bool")}),
        "error": Value("string"),
    }
)


def model_fingerprint(model: OPTSGPreTrainedModel, processor: OPTSGProcessor) -> str:
    """Hashes everything in a checkpoint that its predictions depend on."""
    image_processor = getattr(processor, "image_processor", None)
    return digest(
        model,
        model.generation_config.to_dict() | {"transformers_version": None},
        image_processor and image_processor.to_dict(),
        processor.num_frames,
        tokenizer_settings(processor.tokenizer),
        processor.tag_tokenizer.get_vocab(),
        sorted(processor.label_vocabulary),
    )


def dataset_fingerprint(dataset: Dataset, sampled_rows: Sequence[int]) -> str:
    """Hashes the ids and titles of a dataset in their order, and all columns of some rows.

    Args:
        dataset: A dataset of [`load_tagging_dataset`].
        sampled_rows: Indices of the rows whose images, videos and features are hashed. Reading those of all rows would
            take as long as tagging them.
    """
    columns = [name for name in ("id", "title") if name in dataset.column_names]
    sha256 = hashlib.sha256()
    for rows in dataset.select_columns(columns).with_format("arrow").iter(10_000):
        sha256.update(json.dumps(rows.to_pydict(), ensure_ascii=False).encode())
    for row in undecoded(dataset).select(sampled_rows):
        for name, value in row.items():
            value = list(map(_content, value)) if isinstance(value, list) else _content(value)
            sha256.update(repr((name, value)).encode())
    return sha256.hexdigest()[:32]


def _content(value: object) -> object:
    """Return the beginning of a file that a value names by its path, or any other value itself."""
    if not isinstance(value, dict) or value.get("bytes") is not None or not value.get("path"):
        return value
    try:
        with open(value["path"], "rb") as file:
            return file.read(2**20)
    except OSError as error:
        return type(error).__name__


def split_into_shards(num_examples: int, shard_size: int) -> list[range]:
    """Divide the indices of examples into shards of `shard_size` examples; the last one may be smaller.

    Raises:
        ValueError: There are no examples, or `shard_size` is not positive.
    """
    if num_examples < 1:
        raise ValueError("There are no examples to tag.")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1.")
    return [range(start, min(start + shard_size, num_examples)) for start in range(0, num_examples, shard_size)]


def shard_path(folder: str | os.PathLike, index: int, num_shards: int) -> Path:
    """Return the path of a shard's Parquet file."""
    return Path(folder, f"tags-{index:05d}-of-{num_shards:05d}.parquet")


def is_complete(path: Path, num_examples: int) -> bool:
    """Return whether a shard's file exists and holds all its examples; a file damaged by a crash does not."""
    try:
        return pq.read_metadata(path).num_rows == num_examples
    except (OSError, pa.ArrowInvalid):
        return False


def tag_examples(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    batch_size: int = 64,
    **generate_kwargs: object,
) -> list[dict]:
    """Predicts the tags of examples, some of which may be unreadable.

    Args:
        model: A model with `generate`.
        processor: The processor of the model.
        examples: Rows of [`load_tagging_dataset`], with undecoded images and videos.
        batch_size: Number of examples per batch.
        generate_kwargs: Arguments of `generate`.

    Returns:
        For each example a row with the columns of `FEATURES`. An unreadable example has no tags, and the reason as
        `error`.
    """
    rows = []
    for start in range(0, len(examples), batch_size):
        batch = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        rows += _tag_batch(model, processor, batch, generate_kwargs)
    return rows


def _tag_batch(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, batch: list[Mapping], generate_kwargs: Mapping
) -> list[dict]:
    try:
        tags = predict_tags(model, processor, batch, batch_size=len(batch), progress=False, **generate_kwargs)
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [{"id": batch[0]["id"], "tags": [], "error": str(error)}]
        # Halving keeps the batches around an unreadable example large.
        half = len(batch) // 2
        return [
            row for part in (batch[:half], batch[half:]) for row in _tag_batch(model, processor, part, generate_kwargs)
        ]
    return [{"id": example["id"], "tags": own, "error": None} for example, own in zip(batch, tags, strict=True)]


def write_shard(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    dataset: Dataset,
    path: Path,
    examples: range,
    **kwargs: object,
) -> None:
    """Tag the examples of a shard and write its Parquet file, unless the file is complete.

    The file appears under its name only when it is complete.

    Args:
        model: A model with `generate`.
        processor: The processor of the model.
        dataset: All examples.
        path: Path of the file, from [`shard_path`].
        examples: Indices of the shard's examples.
        kwargs: Arguments of [`tag_examples`].

    Raises:
        ValueError: All examples of the shard fail for the same reason, such as a wrong setting.
    """
    if is_complete(path, len(examples)):
        return
    # Undecoded: the processor opens images and videos itself, and names the unreadable ones.
    rows = tag_examples(model, processor, undecoded(dataset.select(examples)), **kwargs)
    if len(rows) > 1 and len({row["error"] for row in rows}) == 1 and rows[0]["error"] is not None:
        raise ValueError(f"All {len(rows)} examples of a shard fail for the same reason: {rows[0]['error']}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    Dataset.from_list(rows, features=FEATURES).to_parquet(str(partial))
    # The content must be on the disk before the name is.
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
