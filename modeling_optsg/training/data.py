"""The examples that are trained on, and those left out."""

import functools
import hashlib
import json
import math
import os
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, DatasetInfo, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable

from dataset_scripts import load_tagging_dataset, undecoded
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.atomic_files import PARTIAL, cannot_be_written
from modeling_optsg.data.feature_cache import UNREADABLE
from modeling_optsg.processing_optsg import NO_MAX_LENGTH, OPTSGProcessor

from .sampling import example_seed
from .streaming import open_shards

logger = get_logger(__name__, log_level="INFO")

# Below the output folder, as long as the run lasts.
VALIDATION_ROWS = "state/validation.arrow"
NO_TAGS = "No training example has a tag; the column `tags` holds each example's list of tags."


def load_streams(arguments) -> tuple[list[IterableDataset], Dataset, Dataset]:
    """The training examples as shards of streams, texts of all of them (see [`open_shards`]), and the validation examples:
    where there is no such split a share of the examples, the same ones however often they are read.

    Raises:
        ValueError: a stream is not all that the system or the arguments need, examples have no ids of their own, or none
            is set aside.
    """
    if arguments.train_ratio < 1:
        raise ValueError("--streaming reads whole splits: leave out --train_ratio, or --streaming.")
    if MODEL_TYPES[arguments.model_type].needs_book or not MODEL_TYPES[arguments.model_type].learns:
        raise ValueError(
            f"--model_type {arguments.model_type} looks up all training examples at once: leave out --streaming."
        )
    load = functools.partial(load_tagging_dataset, arguments.dataset, cache_dir=arguments.dataset_dir, streaming=True)
    streams = {name: undecoded(rows) for name, rows in load().items()}
    texts = load(texts_only=True)["train"]
    shards, known = open_shards(streams["train"], texts, arguments.num_stream_shards, arguments.dataset)
    validation = streams.get("validation")
    if validation is None:
        limit = arguments.validation_ratio * 2**56  # an example's seed is a number of 56 bits
        aside = functools.partial(_is_set_aside, seed=arguments.seed, limit=limit)
        kept = functools.partial(_is_set_aside, seed=arguments.seed, limit=limit, others=True)
        validation = streams["train"].filter(aside, input_columns="id")
        shards = [rows.filter(kept, input_columns="id") for rows in shards]
        known = known.filter(kept, input_columns="id")
    features = streams.get("validation", streams["train"]).features
    validation = _on_disk(validation, features, Path(arguments.output_dir, VALIDATION_ROWS))
    if not len(validation):
        raise ValueError(f"{arguments.dataset}: no example is left for validation; give a larger --validation_ratio.")
    if "validation" not in streams:
        logger.info(f"No validation split: {len(validation)} of the training examples are set aside.")
    return shards, known, validation


def examples_fingerprint(*splits: Dataset) -> str:
    """Tells examples from those of another run, by `id`, `title`, `tags` and `shard`."""
    known = hashlib.sha256()
    for split in splits:
        for name in [name for name in ("id", "title", "tags", "shard") if name in split.column_names]:
            # A batch at a time: as Python's own texts they are several times larger.
            for batch in split.select_columns(name).iter(10_000):
                known.update(json.dumps(batch[name]).encode())
    return known.hexdigest()[:32]


def _on_disk(rows: IterableDataset, features: Features, path: Path) -> Dataset:
    """A stream's rows from an Arrow file that the first process writes: no process holds them in memory."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with ArrowWriter(path=str(partial), features=features) as writer:
            for table in rows.with_format("arrow").iter(100):
                try:
                    writer.write_table(table)
                except OSError as error:
                    raise cannot_be_written("the validation examples", path.parent, error) from error
            writer.finalize()
        os.replace(partial, path)
    known = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            known.update(block)
    # By their bytes: what is cached of them is found again by a run that goes on.
    table = MemoryMappedTable.from_file(str(path))
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=known.hexdigest()[:16])


def _is_set_aside(example_id: str, seed: int, limit: float, others: bool = False) -> bool:
    return (example_seed(seed, 0, example_id) < limit) != others


def load_splits(arguments) -> tuple[None, Dataset, Dataset]:
    """No shards, the training examples and the validation examples; see [`load_streams`]."""
    dataset = load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir)
    train, validation = dataset["train"], dataset.get("validation")
    if validation is None:
        parts = train.train_test_split(test_size=arguments.validation_ratio, seed=arguments.seed)
        train, validation = parts["train"], parts["test"]
        logger.info(f"No validation split: {len(validation)} of the training examples are set aside.")
    if arguments.train_ratio < 1:
        train = train.shuffle(seed=0).select(range(math.ceil(arguments.train_ratio * len(train))))
    return None, train, validation


def without_untrainable_tags(train: Dataset, processor: OPTSGProcessor) -> Dataset:
    """Leaves out tags longer than the decoder allows and examples without tags, and says how many."""
    tags = sorted({tag for example_tags in train["tags"] for tag in example_tags})
    ids = (
        processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"] if tags else []
    )
    too_long = {tag for tag, tokens in zip(tags, ids, strict=True) if len(tokens) > processor.max_tag_tokens}
    if too_long:
        logger.warning(
            f"{len(too_long)} of {len(tags)} training tags are longer than max_tag_tokens={processor.max_tag_tokens} "
            f"tokens and are left out: {sorted(too_long)[:5]} …"
        )
        train = train.map(lambda example: {"tags": [tag for tag in example["tags"] if tag not in too_long]})
    tagged = [index for index, example_tags in enumerate(train["tags"]) if example_tags]
    if not tagged:
        raise ValueError(NO_TAGS)
    if len(tagged) < len(train):
        logger.warning(f"{len(train) - len(tagged)} of {len(train)} training examples have no tags and are left out.")
        train = train.select(tagged)
    oversized = sum(len(set(example_tags)) > processor.num_prompts for example_tags in train["tags"])
    if oversized:
        logger.warning(
            f"{oversized} of {len(train)} training examples have more than num_prompts={processor.num_prompts} tags; "
            "a random choice of them is used each time."
        )
    return train


def title_lengths(train: Dataset, processor: OPTSGProcessor) -> list[int]:
    """Tokens of each example's title.

    Raises:
        ValueError: there are no titles.
    """
    if "title" not in train.column_names:
        raise ValueError("--group_by_length: the examples have no titles.")
    lengths = []
    settings = {"truncation": processor.tokenizer.model_max_length < NO_MAX_LENGTH, "split_special_tokens": True}
    for batch in train.select_columns("title").iter(10_000):
        lengths += map(len, processor.tokenizer(batch["title"], **settings)["input_ids"])
    return lengths


def without_unreadable(rows: Dataset, features: Dataset) -> tuple[Dataset, Dataset, dict[str, str]]:
    """Leaves out examples that [`cache_tower_features`] could not read, and says how many.

    Args:
        rows: as they were; features: what it made of them.

    Returns:
        Rows and features of those that are left, and why the others are not: by `id`, or else by the row's number.
    """
    if UNREADABLE not in features.column_names:
        return rows, features, {}
    broken = {index: reason for index, reason in enumerate(features[UNREADABLE]) if reason is not None}
    features = features.remove_columns(UNREADABLE)
    if not broken:
        return rows, features, {}
    ids = rows["id"] if "id" in rows.column_names else range(len(rows))
    reasons = {str(ids[index]): reason for index, reason in broken.items()}
    logger.warning(
        f"{len(broken)} of {len(rows)} examples cannot be read and are left out, such as: {broken[min(broken)]}"
    )
    kept = [index for index in range(len(rows)) if index not in broken]
    return rows.select(kept), features.select(kept), reasons
