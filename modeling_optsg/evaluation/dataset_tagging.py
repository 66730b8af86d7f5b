"""Tags for a dataset of any size: in shards that can be made anywhere, in any order, and made again."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from dataset_scripts import undecoded
from modeling_optsg.data.atomic_files import sync

from .prediction import predict_tags

FEATURES = Features(
    {
        "id": Value("string"),
        "tags": List({"tag": Value("string"), "score": Value("float32"), "novel": Value("bool")}),
        "error": Value("string"),
    }
)


def shards_of(examples: int, shard_size: int) -> list[range]:
    """The examples of each shard: `shard_size` of them, the last one what is left.

    Raises:
        ValueError: there are no examples, or a shard would hold none.
    """
    if examples < 1:
        raise ValueError("There are no examples to tag.")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1.")
    return [range(start, min(start + shard_size, examples)) for start in range(0, examples, shard_size)]


def shard_path(folder: str | os.PathLike, index: int, num_shards: int) -> Path:
    return Path(folder, f"tags-{index:05d}-of-{num_shards:05d}.parquet")


def is_whole(path: Path, examples: range) -> bool:
    """Whether a shard is there with all its examples; a file that a machine lost while it failed is none."""
    try:
        return pq.read_metadata(path).num_rows == len(examples)
    except (OSError, pa.ArrowInvalid):
        return False


def tag_examples(model, processor, examples: Sequence[Mapping], batch_size: int = 64, **settings) -> list[dict]:
    """Tags of examples, one row each; an example that cannot be read has the reason as `error` and no tags.

    Args:
        examples: rows of [`load_tagging_dataset`], images and videos undecoded.
        settings: of `generate`.
    """
    found = []
    for start in range(0, len(examples), batch_size):
        batch = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        found += _tag_batch(model, processor, batch, settings)
    return found


def _tag_batch(model, processor, batch: list[Mapping], settings: dict) -> list[dict]:
    try:
        tags = predict_tags(model, processor, batch, batch_size=len(batch), progress=False, **settings)
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [{"id": batch[0]["id"], "tags": [], "error": str(error)}]
        # Halves, so that a bad example costs its neighbours neither their tags nor their company in a batch.
        half = len(batch) // 2
        return [row for part in (batch[:half], batch[half:]) for row in _tag_batch(model, processor, part, settings)]
    return [{"id": example["id"], "tags": own, "error": None} for example, own in zip(batch, tags, strict=True)]


def write_shard(
    model,
    processor,
    dataset: Dataset,
    folder: str | os.PathLike,
    index: int,
    num_shards: int,
    examples: range,
    **settings,
) -> Path:
    """Tags a shard's examples and writes them, unless that is done; a shard is there as a whole or not at all.

    Args:
        dataset: all examples; examples: those of this shard.
        settings: of [`tag_examples`].

    Returns:
        The shard's Parquet file, with the columns of `FEATURES`.

    Raises:
        ValueError: all its examples fail for one reason, such as a wrong setting.
    """
    path = shard_path(folder, index, num_shards)
    if is_whole(path, examples):
        return path
    # The processor opens images and videos, and can say which one is broken.
    found = tag_examples(model, processor, undecoded(dataset.select(examples)), **settings)
    if len(found) > 1 and len({row["error"] for row in found}) == 1 and found[0]["error"] is not None:
        raise ValueError(f"All {len(found)} examples of a shard fail alike: {found[0]['error']}")
    tagged = Dataset.from_list(found, features=FEATURES)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    tagged.to_parquet(str(partial))
    # In this order: the name must not stand for bytes that are not on the disk yet.
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
    return path
