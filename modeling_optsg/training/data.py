"""Training and validation examples, and which of them are left out."""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetInfo, Features, IterableDataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable

from dataset_scripts import load_tagging_dataset, undecoded
from dataset_scripts.column_names import ColumnNames
from dataset_scripts.file_hash import file_sha256
from dataset_scripts.file_states import add_file_states, hash_file_states
from dataset_scripts.generic_datasets import find_tag_separator
from dataset_scripts.tag_values import text_column
from dataset_scripts.tagging_columns import TEXT_COLUMNS, with_tagging_columns
from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.atomic_files import PARTIAL, cannot_be_written
from modeling_optsg.data.collator import OPTSGDataCollator
from modeling_optsg.data.feature_cache import FEATURE_COLUMNS, CachedFeatures, cache_readable_examples
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.data.splits import DEFAULT_RATIO, is_kept, is_set_aside, split_examples
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.processing_optsg import NO_MAX_LENGTH, OPTSGProcessor

from .arguments import OPTSGTrainingArguments
from .image_changes import changed_copies
from .run_state import STATE_FOLDER
from .streaming import TaggedStream, open_stream_shards

logger = get_logger(__name__)

# Streamed validation examples, kept in the output folder until the run is finished.
VALIDATION_ROWS = f"{STATE_FOLDER}/validation.arrow"
NO_TAGS = (
    "No training example has a tag. Tags are read from the column `tags`, as lists or as text; name another column "
    "with --tags_column."
)


def load_examples(args: OPTSGTrainingArguments) -> tuple[list[IterableDataset] | None, Dataset, Dataset]:
    """Return stream shards (`None` without streaming), training examples and validation examples.

    See [`load_splits`] and [`load_streams`].

    Raises:
        ValueError: No dataset is given.
    """
    if not args.dataset:
        raise ValueError("--dataset is missing; give a folder, a benchmark such as icon_tagging, or a Hub name.")
    return load_streams(args) if args.streaming else (None, *load_splits(args))


def load_splits(args: OPTSGTrainingArguments) -> tuple[Dataset, Dataset]:
    """Return the training and the validation examples of `args.dataset`. See [`divide_examples`]."""
    dataset = load_tagging_dataset(args.dataset, cache_dir=args.dataset_dir, **args.column_arguments())
    if "train" not in dataset:
        raise ValueError(f"{args.dataset} has no train split; it has {', '.join(dataset)}.")
    return divide_examples(dataset, args)


def divide_examples(dataset: Mapping[str, Dataset], args: OPTSGTrainingArguments) -> tuple[Dataset, Dataset]:
    """Return the training and the validation examples of a dataset.

    Without a validation split, `validation_ratio` of the training examples are set aside.
    """
    train, validation = split_examples(
        dataset, validation_ratio=args.validation_ratio, seed=args.seed, train_ratio=args.train_ratio
    )
    if "validation" not in dataset:
        logger.info(f"No validation split: {len(validation)} of the training examples are set aside.")
    return train, validation


def read_given_datasets(datasets: Mapping[str, Dataset | None], args: OPTSGTrainingArguments) -> dict[str, Dataset]:
    """Return datasets in memory with the columns of every tagging dataset. Empty datasets are left out.

    Args:
        datasets: The training and validation examples, `train_dataset` and `eval_dataset`.
        args: Names the columns, and the separator of tags that are text. All datasets have one separator.

    Raises:
        ValueError: There are no training examples, a named column does not exist, or the columns are unsuitable.
    """
    names = ColumnNames(**args.column_arguments())
    datasets = {origin: rows for origin, rows in datasets.items() if rows}
    if "train_dataset" not in datasets:
        raise ValueError("train_dataset has no examples.")
    for origin, rows in datasets.items():
        names.check(rows.column_names, origin)
    separator = find_tag_separator(datasets, {origin: origin for origin in datasets}, names)
    return {origin: with_tagging_columns(rows, origin, names, separator) for origin, rows in datasets.items()}


def read_evaluated_dataset(rows: Dataset, train: Dataset | None, args: OPTSGTrainingArguments) -> Dataset:
    """Return a dataset in memory to evaluate on, with the columns of every tagging dataset.

    Args:
        rows: The dataset. One from [`load_tagging_dataset`] has the usual columns, so `args` does not apply to it.
        train: The training examples in memory, whose tags have the same separator if both are text.
        args: Names the columns, and the separator of tags that are text.

    Raises:
        ValueError: A named column does not exist, or the columns are unsuitable.
    """
    names, origin = ColumnNames(**args.column_arguments()), "eval_dataset"
    named = {*names.renamed().values(), names.tags_column}
    if not named & set(rows.column_names) and TEXT_COLUMNS.items() <= rows.features.items():
        return with_tagging_columns(rows, origin)
    names.check(rows.column_names, origin)
    separator = None
    if text_column(rows.features, names):
        datasets = {origin: rows} | ({} if train is None else {"train_dataset": train})
        separator = find_tag_separator(datasets, {own: own for own in datasets}, names)
    return with_tagging_columns(rows, origin, names, separator)


def load_streams(args: OPTSGTrainingArguments) -> tuple[list[IterableDataset], Dataset, Dataset]:
    """Open the training examples as stream shards, and read their texts and the validation examples.

    Without a validation split, `validation_ratio` of the training examples are set aside, chosen by their `id`.

    Returns:
        The stream shards; `id`, `title`, `tags` and `stream_shard` of every training example; and the validation
        examples.

    Raises:
        ValueError: The arguments need random access to the examples, the examples have no unique ids, or none is left
            for validation.
    """
    if args.train_ratio < 1:
        raise ValueError("--streaming reads whole splits, so it cannot be combined with --train_ratio.")
    if MODEL_TYPES[args.model_type].needs_book or not MODEL_TYPES[args.model_type].is_trained:
        raise ValueError(
            f"--model_type {args.model_type} searches all training examples; it cannot be combined with --streaming."
        )
    options = {"cache_dir": args.dataset_dir, "streaming": True, **args.column_arguments()}
    load = functools.partial(load_tagging_dataset, args.dataset, **options)
    streams = {name: undecoded(rows) for name, rows in load().items()}
    texts = load(texts_only=True)["train"]
    stream_shards, train = open_stream_shards(streams["train"], texts, args.num_stream_shards, args.dataset)
    validation = streams.get("validation")
    if validation is None:
        ratio = DEFAULT_RATIO if args.validation_ratio is None else args.validation_ratio
        set_aside = functools.partial(is_set_aside, seed=args.seed, ratio=ratio)
        kept = functools.partial(is_kept, seed=args.seed, ratio=ratio)
        validation = streams["train"].filter(set_aside, input_columns="id")
        stream_shards = [rows.filter(kept, input_columns="id") for rows in stream_shards]
        train = train.filter(kept, input_columns="id")
    features = streams.get("validation", streams["train"]).features
    validation = _write_and_map(validation, features, Path(args.output_dir, VALIDATION_ROWS))
    if not len(validation):
        raise ValueError(f"{args.dataset}: no example is left for validation; give a larger --validation_ratio.")
    if "validation" not in streams:
        logger.info(f"No validation split: {len(validation)} of the training examples are set aside.")
    return stream_shards, train, validation


def _write_and_map(rows: IterableDataset, features: Features, path: Path) -> Dataset:
    """Write a stream to an Arrow file in the main process, and map the file into memory in all processes."""
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
    # A hash of the content, so that a resumed run finds its cached tower features.
    fingerprint = file_sha256(path)[:16]
    table = MemoryMappedTable.from_file(str(path))
    written = Dataset(table, info=DatasetInfo(features=features), fingerprint=fingerprint)
    return add_file_states(written)


def examples_fingerprint(
    train: Dataset, validation: Dataset, stream_shards: Sequence[IterableDataset] | None = None
) -> str:
    """Return a hash of all examples, the same in all processes.

    It depends on `id`, `title`, `tags` and `stream_shard`, and on size and modification time of local images and
    videos, except those that are streamed.

    Raises:
        ValueError: Processes see different examples.
    """
    content = hashlib.sha256()
    for split in (train, validation):
        for name in [name for name in ("id", "title", "tags", "stream_shard") if name in split.column_names]:
            # In batches: as Python strings the texts would need several times the memory.
            for batch in split.select_columns(name).iter(10_000):
                content.update(json.dumps(batch[name]).encode())
    if stream_shards is not None:
        content.update(json.dumps([rows.num_shards for rows in stream_shards]).encode())
    own = (content.hexdigest()[:32], "".join(hash_file_states(split) for split in (train, validation)))
    found = gather_object([own])
    if len({rows for rows, _ in found}) > 1:
        raise ValueError(
            "The dataset has different examples in different processes; use the same files on all machines."
        )
    # Of the first process: copies on other machines may have other modification times.
    rows, states = found[0]
    return hashlib.sha256(f"{rows}{states}".encode()).hexdigest()[:32] if states else rows


def too_long_tags(tags: Sequence[str], processor: OPTSGProcessor) -> set[str]:
    """Return the tags that are too long for the decoder."""
    if not tags:
        return set()
    ids = processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return {tag for tag, tokens in zip(tags, ids, strict=True) if len(tokens) > processor.max_tag_tokens}


def without_untrainable_tags(train: Dataset, processor: OPTSGProcessor) -> Dataset:
    """Leave out tags that are too long for the decoder, then examples without tags, and log how many.

    Raises:
        ValueError: No example is left.
    """
    tags = sorted({tag for example_tags in train["tags"] for tag in example_tags})
    too_long = too_long_tags(tags, processor)
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
            "a random selection of them is used each time."
        )
    return train


def cache_examples(
    rows: Dataset,
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    args: OPTSGTrainingArguments,
    titles: bool = True,
) -> tuple[CachedFeatures, Dataset, dict[str, str]]:
    """Compute the features of frozen towers, or read them from the cache. All processes share the work.

    Args:
        rows: Examples.
        model: Model with the towers.
        processor: Its processor.
        args: Training arguments.
        titles: Whether titles are needed.

    Returns:
        The readable examples with their features, the same rows without them, and the reasons for the others.
    """
    return cache_readable_examples(
        rows,
        model.model,
        processor,
        Path(args.cache_dir) / "features",
        frames=not args.train_vision_tower,
        titles=titles and args.train_text_layers == 0,
        max_unreadable=args.max_unreadable,
        processes=PartialState(),
    )


def load_extra_images(
    train: Dataset, model: OPTSGPreTrainedModel, processor: OPTSGProcessor, args: OPTSGTrainingArguments
) -> CachedFeatures | None:
    """Return further images for the training examples, with their features: `--extra_images` and augmented copies.

    Args:
        train: Training examples.
        model: Model with the towers.
        processor: Its processor.
        args: Training arguments.

    Returns:
        Examples with `title`, `tags` and the features of their images, `None` if there are none.

    Raises:
        ValueError: The training examples have no images to copy, or an error of [`load_tagging_dataset`].
    """
    sources = []
    if args.extra_images not in (None, "", "none"):
        name, configuration = args.extra_images, ""
        if not Path(name).exists():
            name, _, configuration = name.rpartition(":") if ":" in name else (name, "", "")
        options = {"config_name": configuration} if configuration else {}
        sources.append(load_tagging_dataset(name, split="train", cache_dir=args.dataset_dir, **options))
    folder = Path(args.cache_dir) / "features"
    with PartialState().main_process_first():
        sources += [changed_copies(train, number, folder) for number in range(args.num_image_copies)]
    if not sources:
        return None
    cached = [cache_examples(rows, model, processor, args, titles=False)[0].dataset for rows in sources]
    # Other columns may have other types.
    names = ["title", "tags", *FEATURE_COLUMNS, *(f"{name}_shape" for name in FEATURE_COLUMNS)]
    names = [name for name in names if all(name in rows.column_names for rows in cached)]
    examples = CachedFeatures(concatenate_datasets([rows.select_columns(names) for rows in cached]))
    logger.info(f"{len(examples)} extra images.")
    return examples


def has_evidence(model: OPTSGPreTrainedModel) -> bool:
    """Return whether a model pools evidence for a tag classifier."""
    encoder = getattr(model.model, "multimodal_encoder", None)
    return encoder is not None and encoder.evidence_pooler is not None


@torch.no_grad()
def fit_image_standardizer(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, examples: Sequence[Mapping], max_images: int = 4096
) -> None:
    """Fit the image standardiser to a random sample of training images.

    Args:
        model: Model with the towers. Models without an evidence pooler are not changed.
        processor: Its processor.
        examples: Training examples.
        max_images: Size of the sample.
    """
    if not has_evidence(model):
        return
    pooler = model.model.multimodal_encoder.evidence_pooler
    chosen = np.random.default_rng(0).permutation(len(examples))[:max_images]
    columns = ("image", "video", "frame_features", "image_features")
    collate, features = OPTSGDataCollator(processor), []
    with evaluation_mode(model):
        for start in range(0, len(chosen), 64):
            rows = [examples[int(index)] for index in chosen[start : start + 64]]
            rows = [{name: row[name] for name in columns if row.get(name) is not None} for row in rows]
            for batch in _collate_readable(collate, [row for row in rows if row]):
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                names = ("pixel_values", "frame_features", "image_features", "frame_mask")
                vision, _ = model.model.encode_inputs(**{name: batch.get(name) for name in names})
                features.append(vision.image_features)
    if features:
        pooler.standardizer.fit(torch.cat(features))


def _collate_readable(collate: OPTSGDataCollator, rows: list[dict]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield one batch with all rows, or one batch per readable row if any is unreadable."""
    if not rows:
        return
    try:
        yield collate(rows)
    except (ValueError, OSError):
        if len(rows) > 1:
            for row in rows:
                yield from _collate_readable(collate, [row])


def make_stream(
    stream_shards: Sequence[IterableDataset], train: Dataset, tags: Sequence[str], buffer_size: int
) -> TaggedStream:
    """Return the training examples of [`load_streams`] as a stream, and log if they are hardly shuffled.

    Args:
        stream_shards: The stream shards.
        train: Texts and `stream_shard` of the examples to train on.
        tags: Tags to train on.
        buffer_size: Rows in the shuffle buffers of all stream shards together.
    """
    count = Counter(train["stream_shard"])
    num_examples = [count[shard] for shard in range(len(stream_shards))]
    stream = TaggedStream(stream_shards, tags, num_examples, buffer_size)
    if stream.is_hardly_shuffled:
        logger.warning(
            "The stream has few files or row groups per stream shard: the examples come in nearly the same order in "
            "every epoch. Give a larger --shuffle_buffer_size, fewer --num_stream_shards, or Parquet files with more "
            "row groups."
        )
    return stream


def title_lengths(train: Dataset, processor: OPTSGProcessor) -> list[int]:
    """Return the number of tokens of each example's title.

    Raises:
        ValueError: There are no titles.
    """
    if "title" not in train.column_names:
        raise ValueError("--group_by_length: the examples have no titles.")
    lengths = []
    settings = {"truncation": processor.tokenizer.model_max_length < NO_MAX_LENGTH, "split_special_tokens": True}
    for batch in train.select_columns("title").iter(10_000):
        lengths += map(len, processor.tokenizer(batch["title"], **settings)["input_ids"])
    return lengths
