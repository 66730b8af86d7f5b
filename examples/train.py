"""Trains OP-TSG, or another of the paper's systems, on a tagging benchmark or on a folder of one's own, or fine-tunes
a checkpoint there.

    accelerate launch examples/train.py --preset examples/presets/optsg-icon-small.json --output_dir runs/icon
    accelerate launch examples/train.py --dataset my_pictures --checkpoint runs/icon --output_dir runs/mine

A frozen tower's outputs are computed once and kept in `--cache_dir`. A step sees `--batch_size` items whatever the
number of processes. The state of the run is kept in `--output_dir`/state: started again with the same arguments after
it was stopped at any moment, it goes on, and ends with the same weights. SIGTERM writes the state, says "interrupted"
in state/status.json and ends the program. The checkpoint with the best validation F1 of what slots write greedily is
kept in `--output_dir`; at the end `pad_bias`, `score_weights` and `threshold` are fitted
on the validation items, for both decodings.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    gather_object,
    send_to_device,
    set_seed,
)
from datasets import Dataset, Image, IterableDataset, Video
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser, get_cosine_schedule_with_warmup

from dataset_scripts import load_tagging_dataset
from modeling_optsg import (
    OPTSGDataCollator,
    OPTSGFeatureProcessor,
    OPTSGForTagGeneration,
    OPTSGPreTrainedModel,
    OPTSGProcessor,
    TagEvaluator,
    train_tag_tokenizer,
)
from modeling_optsg.feature_cache import CachedFeatures, build_tag_table, cache_tower_features
from modeling_optsg.feature_pooling import pool_items
from modeling_optsg.hub.commits import check_repo_id
from modeling_optsg.hub.trained import push_trained
from modeling_optsg.prediction import PAD_BIASES, fit_generation_config, predict_tags
from modeling_optsg.pretrained_towers import tower_folder
from modeling_optsg.systems import SYSTEMS
from modeling_optsg.tag_book import ItemsWithBook, TagBook
from modeling_optsg.tag_metrics import objective_value
from modeling_optsg.text_tying import plain_copy, tie_classes_to_text, tie_tokens_to_text
from modeling_optsg.training import (
    CollateReadable,
    GlobalBatches,
    MatchingMoves,
    RunState,
    SeededItems,
    StreamBatches,
    TaggedStream,
    TrainingLog,
    Unreadable,
    ignore_sigterm,
    micro_batches,
    share_candidates,
    weigh_losses,
    weighted_losses,
)
from modeling_optsg.training.run_state import write_json

logger = get_logger(__name__, log_level="INFO")

MOST_TAGS = 100
UNFITTED = {"pad_bias": 0.0, "threshold": 0.0, "score_weights": None, "logit_adjustment": None, "proposals": None}
LOCAL_ARGUMENTS = ("output_dir", "dataset_dir", "cache_dir", "push_to_hub", "hub_private", "hub_revision")
# The widest tables, a row a token or a tag, bear a coarser rounding than 16 bits.
EIGHT_BIT_TABLES = (
    "tag_decoder.token_embeddings.weight",
    "set_alignment.classifier.weights.weight",
    "model.text_tower.embeddings.word_embeddings.weight",
)
# Below the output folder: what a run goes on from, and how it is.
STATE = "state"
LOSS_PARTS = ("loss", "generation_loss", "alignment_loss", "set_loss")
# What a run may be resumed with other values of: nothing it ends with depends on them.
FREE_ARGUMENTS = (
    *LOCAL_ARGUMENTS,
    "preset",
    "process_batch_size",
    "num_workers",
    "save_every",
    "resume",
    "log_every",
    "trackers",
)


@dataclass
class TrainArguments:
    output_dir: str = field(metadata={"help": "Where the best checkpoint, its log and its summary go."})
    preset: str | None = field(
        default=None, metadata={"help": "JSON file of arguments; the command line overrides it."}
    )
    system: str = field(default="op-tsg", metadata={"help": f"Which system: {', '.join(SYSTEMS)}."})
    dataset: str = field(
        default="icon_tagging",
        metadata={"help": "A benchmark, a folder with a metadata file or of Parquet, or a Hub name."},
    )
    dataset_dir: str | None = field(default=None, metadata={"help": "Where datasets are built and looked for."})
    cache_dir: str = field(default="~/.cache/optsg", metadata={"help": "Where tower outputs are kept."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "Fine-tune this checkpoint instead of starting anew."}
    )
    vision_tower: str = field(
        default="efficientnet-lite0",
        metadata={"help": "A packaged tower, folder or Hub name; none: the dataset has frame features."},
    )
    text_tower: str = field(default="all-minilm-l6-v2", metadata={"help": "A packaged tower, folder or Hub name."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the pictures; the tower's own if not given."}
    )
    tune_vision: bool = field(default=False, metadata={"help": "Train the vision tower too."})
    tune_text: bool = field(default=False, metadata={"help": "Train the text tower too."})
    num_frames: int = field(default=8, metadata={"help": "Most frames of a clip."})
    max_tag_tokens: int = field(default=16, metadata={"help": "Longer training tags are left out, and counted."})
    tag_vocab_size: int = field(default=6000, metadata={"help": "Size of the tag tokenizer that is trained."})
    config: str = field(default="{}", metadata={"help": "JSON of further OPTSGConfig fields."})
    validation_share: float = field(
        default=0.1, metadata={"help": "Share of the training items set aside where there is no validation split."}
    )
    train_share: float = field(
        default=1.0, metadata={"help": "Share of the training items that is used, the same ones whatever the seed."}
    )
    epochs: float = 10.0
    batch_size: int = field(default=64, metadata={"help": "Items a step, over all processes."})
    process_batch_size: int | None = field(
        default=None, metadata={"help": "Most items a process computes at once; the rest of its share follows."}
    )
    learning_rate: float = 6e-4
    tower_learning_rate: float = 2e-5
    token_scale: float = field(
        default=0.06,
        metadata={"help": "Spread of token embeddings, tied to the text tower's features; 0: free, at random."},
    )
    token_rate: float = field(
        default=0.3,
        metadata={"help": "Learning rate of token embeddings and classes, as a share: keeps what they begin with."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute layers anew in the backward pass: less memory, more time."}
    )
    weight_decay: float = 0.05
    warmup_share: float = field(default=0.05, metadata={"help": "Share of the steps in which the rate rises."})
    max_grad_norm: float = 1.0
    num_negatives: int = field(default=2000, metadata={"help": "Training tags added to a batch's in the alignment."})
    evaluations: int = field(default=5, metadata={"help": "Validations during training, evenly spaced."})
    objective: str = field(
        default="full_f1",
        metadata={"help": "Validation figure the best checkpoint and the fit go by; a+b: the mean."},
    )
    alternatives: int = field(
        default=1,
        metadata={"help": "Tags a slot may contribute, by beam search; pad_bias and threshold are fitted so."},
    )
    proposals: int = field(
        default=50,
        metadata={"help": "Train tags that suit an item as a whole and are candidates beside what its slots write."},
    )
    pad_biases: list[float] = field(
        default_factory=lambda: list(PAD_BIASES), metadata={"help": "Values of pad_bias the fit tries."}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    half_precision_weights: bool = field(
        default=False,
        metadata={"help": "Save 16-bit weights, tables of tokens and tags 8-bit; they load as 32-bit."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read items as a stream instead of building them and caching what frozen towers make of them."
        },
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Streamed items among which the next is drawn."})
    most_unreadable: int = field(default=100, metadata={"help": "Items that cannot be read, before the run stops."})
    num_workers: int = 0
    save_every: int = field(default=500, metadata={"help": "Steps between two states of the run; 0: none."})
    resume: str = field(
        default="auto", metadata={"help": "auto: where the run was stopped; never: anew; or a state's folder."}
    )
    log_every: int = field(default=100, metadata={"help": "Steps between two rows of training_log.jsonl."})
    trackers: list[str] = field(default_factory=list, metadata={"help": "Of accelerate, such as tensorboard."})
    push_to_hub: str | None = field(default=None, metadata={"help": "At the end, publish it as this model, org/name."})
    hub_private: bool = field(default=False, metadata={"help": "Make a new model on the Hub private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Publish on this branch, not on main."})
    seed: int = 0


def parse_arguments(argv=None) -> TrainArguments:
    parser = HfArgumentParser(TrainArguments)
    preset, _ = parser.parse_known_args(argv)
    if preset.preset:
        values = json.loads(Path(preset.preset).read_text(encoding="utf-8"))
        if unknown := set(values) - set(TrainArguments.__dataclass_fields__):
            parser.error(f"{preset.preset} sets unknown arguments: {', '.join(sorted(unknown))}")
        values = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in values.items()}
        parser.set_defaults(**values)
    arguments = parser.parse_args_into_dataclasses(argv)[0]
    if arguments.system not in SYSTEMS:
        parser.error(f"--system {arguments.system} is unknown; expected one of {', '.join(SYSTEMS)}")
    if arguments.push_to_hub:
        try:
            check_repo_id(arguments.push_to_hub)
        except ValueError as error:
            parser.error(f"--push_to_hub: {error}")
    if not 0 < arguments.train_share <= 1:
        parser.error(f"--train_share {arguments.train_share} must be above 0 and at most 1")
    return arguments


def load_streams(arguments: TrainArguments) -> tuple[IterableDataset, Dataset, Dataset]:
    """The training items as a stream, the tags of all of them, and the validation items."""
    if arguments.train_share < 1 or SYSTEMS[arguments.system].needs_book or not SYSTEMS[arguments.system].learns:
        raise ValueError(
            f"--streaming goes with whole splits and no book; not with {arguments.system} or --train_share."
        )
    streams = load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir, streaming=True)
    if "validation" not in streams:
        raise ValueError(f"--streaming needs a validation split; {arguments.dataset} has {list(streams)}.")
    tags = [item_tags for table in streams["train"].select_columns(["tags"]).iter(1000) for item_tags in table["tags"]]
    known = Dataset.from_dict({"tags": tags})
    validation = streams["validation"]
    for column, feature in validation.features.items():
        if isinstance(feature, (Image, Video)):
            validation = validation.cast_column(column, type(feature)(decode=False))
    return streams["train"], known, Dataset.from_list(list(validation), features=validation.features)


def load_splits(arguments: TrainArguments) -> tuple[Dataset, Dataset]:
    dataset = load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir)
    train, validation = dataset["train"], dataset.get("validation")
    if validation is None:
        parts = train.train_test_split(test_size=arguments.validation_share, seed=arguments.seed)
        train, validation = parts["train"], parts["test"]
        logger.info(f"No validation split: {len(validation)} of the training items are set aside.")
    if arguments.train_share < 1:
        train = train.shuffle(seed=0).select(range(math.ceil(arguments.train_share * len(train))))
    return train, validation


def without_untrainable_tags(train: Dataset, processor: OPTSGProcessor) -> Dataset:
    """Leaves out tags longer than the decoder allows and items without tags, and says how many."""
    tags = sorted({tag for item_tags in train["tags"] for tag in item_tags})
    ids = (
        processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"] if tags else []
    )
    too_long = {tag for tag, tokens in zip(tags, ids, strict=True) if len(tokens) > processor.max_tag_tokens}
    if too_long:
        logger.warning(
            f"{len(too_long)} of {len(tags)} training tags are longer than max_tag_tokens={processor.max_tag_tokens} "
            f"tokens and are left out: {sorted(too_long)[:5]} …"
        )
        train = train.map(lambda item: {"tags": [tag for tag in item["tags"] if tag not in too_long]})
    tagged = [index for index, item_tags in enumerate(train["tags"]) if item_tags]
    if not tagged:
        raise ValueError("No training item has a tag; the column `tags` holds each item's list of tags.")
    if len(tagged) < len(train):
        logger.warning(f"{len(train) - len(tagged)} of {len(train)} training items have no tags and are left out.")
        train = train.select(tagged)
    oversized = sum(len(set(item_tags)) > processor.num_prompts for item_tags in train["tags"])
    if oversized:
        logger.warning(
            f"{oversized} of {len(train)} training items have more than num_prompts={processor.num_prompts} tags; "
            "a random choice of them is used each time."
        )
    return train


def build(
    arguments: TrainArguments, train: Dataset, validation: Dataset
) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    system = SYSTEMS[arguments.system]
    counts = Counter(tag for tags in train["tags"] for tag in set(tags))
    # What makes a system what it is comes last: a preset for all of them may give the number of slots.
    config = json.loads(arguments.config) | dict(system.config)
    if arguments.tune_text and not system.needs_classes:
        # Train tags are compared with by features computed once; a tower that learns has none.
        config["set_alignment"] = False
    if arguments.checkpoint:
        if system.needs_classes:
            raise ValueError(
                f"{arguments.system} knows its own training tags only: it cannot be fine-tuned on others."
            )
        model = system.model.from_pretrained(arguments.checkpoint, **config)
        processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
        # What the checkpoint was trained on stays known: a tag of it is no novelty of the fine-tuned model.
        processor.train_tags = dict(Counter(processor.train_tags) + counts)
        # What was fitted is not what is to be trained.
        for name, value in UNFITTED.items():
            setattr(model.generation_config, name, value)
        if isinstance(model, OPTSGForTagGeneration) and model.config.set_alignment:
            model.set_tag_classes(*tag_classes(processor.tag_tokenizer, counts, processor.max_tag_tokens))
        return model, processor
    vision, text = (
        None if name == "none" else tower_folder(name, Path(arguments.cache_dir) / "towers")
        for name in (arguments.vision_tower, arguments.text_tower)
    )
    if vision is None:
        config["frame_feature_size"] = feature_width(validation)
    tag_tokenizer = train_tag_tokenizer((t for tags in train["tags"] for t in tags), arguments.tag_vocab_size)
    ids, class_counts = tag_classes(tag_tokenizer, counts, arguments.max_tag_tokens)
    if system.needs_classes:
        config["num_tag_classes"] = len(ids)
    model = system.model.from_vision_text_pretrained(
        vision, text, tag_vocab_size=len(tag_tokenizer), max_tag_tokens=arguments.max_tag_tokens, **config
    )
    if system.needs_classes or (isinstance(model, OPTSGForTagGeneration) and model.config.set_alignment):
        model.set_tag_classes(ids, class_counts)
    settings = {
        "num_frames": arguments.num_frames,
        # Most tags of an item in training, which is all that a system without slots needs it for.
        "num_prompts": model.config.num_prompts if model.config.num_prompts > 1 else MOST_TAGS,
        "max_tag_tokens": arguments.max_tag_tokens,
        "train_tags": dict(counts),
    }
    tokenizer = AutoTokenizer.from_pretrained(text)
    if vision is None:
        processor = OPTSGFeatureProcessor(tokenizer, tag_tokenizer, **settings)
    else:
        image_processor = AutoImageProcessor.from_pretrained(vision)
        if arguments.image_size:
            image_processor.size = {"height": arguments.image_size, "width": arguments.image_size}
        processor = OPTSGProcessor(image_processor, tokenizer, tag_tokenizer, **settings)
    if arguments.token_scale and hasattr(model, "tag_decoder"):
        tie_tokens_to_text(model.eval(), processor, arguments.token_scale)
    return model, processor


def feature_width(rows: Dataset) -> int:
    """Width of a dataset's own frame features."""
    if "frame_features" not in rows.column_names:
        raise ValueError(f"--vision_tower none needs a column frame_features; there are {rows.column_names}.")
    given = next(
        (f for f in rows.select_columns("frame_features").with_format("numpy") if f["frame_features"] is not None),
        None,
    )
    if given is None:
        raise ValueError("--vision_tower none: no item has frame features.")
    return given["frame_features"].shape[-1]


def tag_classes(tag_tokenizer, counts: Counter, max_tag_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Token ids and counts of the train tags, in the order of the tag table: without those too long."""
    ids = tag_tokenizer(sorted(counts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    kept = [(tokens, counts[tag]) for tag, tokens in zip(sorted(counts), ids) if len(tokens) <= max_tag_tokens]
    return [tokens for tokens, _ in kept], [count for _, count in kept]


def parameter_groups(model: OPTSGPreTrainedModel, arguments: TrainArguments) -> list[dict]:
    """Towers and token embeddings have learning rates of their own; norms, biases and embeddings are not decayed."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = "_tower." in name
            decayed = parameter.ndim > 1 and not any(part in name for part in ("positions", "modalities", "queries"))
            rate = arguments.tower_learning_rate if tower else arguments.learning_rate
            linear_head = isinstance(getattr(model, "classifier", None), torch.nn.Linear)
            if "token_embeddings" in name or ("classifier" in name and not linear_head):
                rate, decayed = arguments.learning_rate * arguments.token_rate, False
            groups.setdefault((rate, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": arguments.weight_decay if decayed else 0.0}
        for (rate, decayed), parameters in groups.items()
    ]


def save_checkpoint(model: OPTSGPreTrainedModel, processor: OPTSGProcessor, folder: Path, half: bool) -> None:
    """File by file, each there as a whole: only the weights differ from one checkpoint of a run to the next."""
    state_dict = None
    if half:
        # Buffers are batch-norm statistics, whose small variances 16 bits lose; `dtype` in config.json stays float32,
        # so that the weights are used in 32 bits.
        buffers = {name for name, _ in model.named_buffers()}
        tied = set(model.all_tied_weights_keys)
        state_dict = {
            name: tensor.to(torch.float8_e4m3fn if name in EIGHT_BIT_TABLES else torch.float16)
            if tensor.is_floating_point() and name not in buffers
            else tensor
            for name, tensor in model.state_dict().items()
            if name not in tied
        }
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".partial-*"):
        shutil.rmtree(left)
    with TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        model.save_pretrained(partial, state_dict=state_dict)
        processor.save_pretrained(partial)
        for path in (path for path in Path(partial).rglob("*") if path.is_file()):
            final = folder / path.relative_to(partial)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)


class Interrupted(Exception):
    """The program was asked to stop; the state of the run is saved."""


def learn(
    accelerator: Accelerator,
    model,
    processor,
    tag_table,
    train_items,
    validation_items,
    evaluator,
    arguments,
) -> dict:
    """The training steps: the checkpoint with the best validation figure stays in `output_dir`."""
    system, output_dir = SYSTEMS[arguments.system], Path(arguments.output_dir)
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments), betas=(0.9, 0.98), fused=True)
    total = max(1, round(arguments.epochs * len(train_items) / arguments.batch_size))
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(arguments.warmup_share * total), total)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # The scheduler is stepped by hand, once a step whatever the number of processes.
    accelerator.register_for_checkpointing(scheduler)
    evaluate_at = {math.ceil(total * (i + 1) / arguments.evaluations) for i in range(arguments.evaluations)}

    own_arguments = {name: value for name, value in vars(arguments).items() if name not in FREE_ARGUMENTS}
    state = RunState(accelerator, output_dir / STATE, own_arguments)
    state.listen()
    parts = micro_batches(arguments.batch_size, accelerator.num_processes, arguments.process_batch_size)
    logger.info(
        f"{arguments.batch_size} items a step: {accelerator.num_processes} processes, each in {parts} parts of about "
        f"{arguments.batch_size / accelerator.num_processes / parts:.0f} items; {total} steps."
    )
    # Processes differ in what dropout hides, and in nothing else.
    set_seed(arguments.seed, device_specific=True)
    progress = state.load(arguments.resume)
    if progress is None:
        state.clear()
        progress = {"step": 0, "history": [], "best": -math.inf, "training_seconds": 0.0, "sums": {}}
    else:
        logger.info(f"Going on after step {progress['step']} of {total}.")
    start, history, best = progress["step"], progress["history"], progress["best"]
    training_seconds, sums = progress["training_seconds"], Counter(progress["sums"])

    share = {"process": accelerator.process_index, "num_processes": accelerator.num_processes, "parts": parts}
    collator = OPTSGDataCollator(
        processor,
        tag_table,
        max_book_tokens=model.config.max_book_tokens if system.needs_book else None,
    )
    # A loader draws its workers' seeds: not from the state that dropout goes on from.
    settings = {"collate_fn": CollateReadable(collator), "generator": torch.Generator().manual_seed(arguments.seed)}
    settings["worker_init_fn"] = ignore_sigterm
    place = (len(train_items), arguments.batch_size, total, arguments.seed)
    if isinstance(train_items, TaggedStream):
        order = StreamBatches(train_items, *place[1:], start=start, **share)
        # One worker, whatever is asked: several would divide the stream, and none shuffles in another order.
        loader = DataLoader(order, batch_size=None, num_workers=1, **settings)
    else:
        order = GlobalBatches(*place, start=start, **share)
        items = SeededItems(train_items)
        loader = DataLoader(items, batch_sampler=order, num_workers=arguments.num_workers, **settings)
    log = TrainingLog(accelerator, output_dir / "training_log.jsonl", start)
    moves, unreadable = MatchingMoves(), Unreadable(arguments.most_unreadable)

    def validate(plain) -> dict:
        mine = range(accelerator.process_index, len(validation_items), accelerator.num_processes)
        with accelerator.autocast():
            subset = torch.utils.data.Subset(validation_items, mine)
            tags = predict_tags(plain, processor, subset, **({"pad_bias": -1.0} if system.has_pad else {}))
        pairs = gather_object(list(zip(mine, tags, strict=True)))
        predictions = [tags for _, tags in sorted(pairs, key=lambda pair: pair[0])]
        threshold, figures = evaluator.best_threshold(predictions, arguments.objective)
        return {"threshold": threshold} | figures

    def save(step: int) -> None:
        seconds = training_seconds + time.perf_counter() - since
        own = {"history": history, "best": best, "training_seconds": seconds, "sums": dict(sums)}
        state.save(step, own)

    bar = tqdm(total=total, initial=start, desc="Training", disable=not accelerator.is_local_main_process)
    if accelerator.is_main_process:
        set_status(output_dir, "running", step=start, steps=total)
    batches = iter(loader)
    towers = (model.model.vision_tower, model.model.text_tower)
    frozen_towers = [t for t in towers if t is not None and not any(p.requires_grad for p in t.parameters())]
    seen, since = 0, time.perf_counter()
    for step in range(start + 1, total + 1):
        wrapped.train()
        for tower in frozen_towers:
            # No dropout in it, and the statistics it came with.
            tower.eval()
        collated = [next(batches) for _ in range(parts)]
        for part in collated:
            unreadable.note(part.unreadable)
        step_batches = [part.batch for part in collated]
        negatives = (arguments.num_negatives, (arguments.seed, step))
        share_candidates(accelerator, step_batches, tag_table, *negatives)
        shares = weigh_losses(accelerator, model.config, step_batches, [part.weight for part in collated])
        step_losses = Counter()
        for part, (batch, own_shares) in enumerate(zip(step_batches, shares)):
            last = part == parts - 1
            # The tied embeddings are computed once a part.
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped), parametrize.cached():
                outputs = wrapped(**send_to_device(batch, accelerator.device))
                losses = weighted_losses(model.config, outputs, own_shares)
                # Gradients are averaged over the processes; the losses here add up.
                accelerator.backward(losses["loss"] * accelerator.num_processes)
            step_losses.update({name: loss.item() for name, loss in losses.items()})
            followed = accelerator.is_main_process and collated[part].weight
            if followed and outputs.get("assignment") is not None and "tag_ids" in batch:
                moves.note(collated[part].items, outputs.assignment, batch["tag_ids"])
        summed = accelerator.reduce(torch.tensor(list(step_losses.values()), device=accelerator.device), "sum")
        step_losses = dict(zip(step_losses, summed.tolist()))
        if not math.isfinite(step_losses["loss"]):
            raise FloatingPointError(
                f"The loss is {step_losses['loss']} at step {step}; lower the learning rate. The last state of the "
                "run is kept; --resume never begins anew."
            )
        norm = accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        if accelerator.scaler is None and not torch.isfinite(norm):
            raise FloatingPointError(f"The gradient is no number at step {step}; lower the learning rate.")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seen += arguments.batch_size
        sums.update(step_losses, steps=1)
        bar.update()
        rate = seen / (time.perf_counter() - since)
        if step % arguments.log_every == 0 or step in evaluate_at:
            means = {part: round(sums[part] / sums["steps"], 6) for part in LOSS_PARTS if part in sums}
            sums.clear()
            bar.set_postfix({part: f"{loss:.3g}" for part, loss in means.items()} | {"items/s": f"{rate:.0f}"})
            row = {"step": step, "epoch": round(step * arguments.batch_size / len(train_items), 3), **means}
            row |= {"items_per_second": round(rate, 1), "learning_rate": scheduler.get_last_lr()[0]}
            if (moved := moves.share()) is not None:
                row["matching_moved"] = round(moved, 4)
            if step in evaluate_at:
                training_seconds += time.perf_counter() - since
                plain = plain_copy(model)
                figures = validate(plain)
                row |= {"training_seconds": round(training_seconds, 1), "validation": figures}
                history.append(row)
                bar.write(
                    f"step {step}: {', '.join(f'{part} {loss:.3f}' for part, loss in means.items())}, "
                    f"{rate:.0f} items/s; validation Full {figures['full_f1']:.1f} / Rare {figures['rare_f1']:.1f} / "
                    f"Common {figures['common_f1']:.1f}, micro {figures['micro_f1']:.1f}"
                )
                if objective_value(figures, arguments.objective) > best:
                    best = objective_value(figures, arguments.objective)
                    if accelerator.is_main_process:
                        save_checkpoint(plain, processor, output_dir, arguments.half_precision_weights)
                seen, since = 0, time.perf_counter()
            log.write(row)
        if stop := state.stop_asked():
            logger.warning(f"Asked to stop after step {step} of {total}.")
        if stop or step == total or (arguments.save_every and step % arguments.save_every == 0):
            save(step)
        if stop and step < total:
            raise Interrupted(step)
    bar.close()
    state.stop_listening()
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "oversized_items": collator.oversized_items,
        "unreadable_items": dict(unreadable.reasons),
        "training_seconds": round(training_seconds, 1),
        "history": history,
    }


def remember(model, processor, tag_table, train: Dataset, train_items, arguments) -> dict:
    """What a system without steps does instead: it takes the training items in as they are."""
    classes = [[tag_table.index[tag] for tag in dict.fromkeys(tags)] for tags in train["tags"]]
    model.remember(*pool_items(train_items, model.config), classes)
    save_checkpoint(model, processor, Path(arguments.output_dir), half=False)
    return {"trained_parameters": 0, "training_seconds": 0.0, "history": []}


def main(arguments: TrainArguments) -> None:
    started = time.perf_counter()
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.trackers or None,
        project_dir=arguments.output_dir,
        # Buffers, such as what is tied to text, are the same in all processes and stay so.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
            # The others wait while the first builds the dataset and looks at every picture.
            InitProcessGroupKwargs(timeout=timedelta(days=2)),
        ],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"{accelerator.distributed_type.value}: models are not divided here yet; use MULTI_GPU.")
    if arguments.trackers:
        accelerator.init_trackers(
            "optsg", {k: v for k, v in vars(arguments).items() if isinstance(v, str | int | float)}
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # It tells of every file of every state.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    set_seed(arguments.seed)
    output_dir, cache_dir = Path(arguments.output_dir), Path(arguments.cache_dir).expanduser()
    arguments.cache_dir = str(cache_dir)

    with accelerator.main_process_first():
        if arguments.streaming:
            stream, train, validation = load_streams(arguments)
        else:
            train, validation = load_splits(arguments)
        model, processor = build(arguments, train, validation)
        train = without_untrainable_tags(train, processor)
        model.model.vision_tower and model.model.vision_tower.requires_grad_(arguments.tune_vision)
        model.model.text_tower.requires_grad_(arguments.tune_text)
        model.to(accelerator.device)
        frozen = {"frames": not arguments.tune_vision, "titles": not arguments.tune_text}
        cached = [validation] if arguments.streaming else [train, validation]
        *train_items, validation_items = (
            CachedFeatures(cache_tower_features(split, model.model, processor, cache_dir / "features", **frozen))
            for split in cached
        )
        if arguments.streaming:
            tags = {tag for item_tags in train["tags"] for tag in item_tags}
            train_items = TaggedStream(stream, tags, len(train), arguments.shuffle_buffer)
        else:
            (train_items,) = train_items
        tag_table = None
        if not arguments.tune_text:
            tags = sorted({tag for item_tags in train["tags"] for tag in item_tags})
            tag_table = build_tag_table(tags, model.model, processor, cache_dir / "features")
            classes = getattr(model, "set_alignment", None) or getattr(model.config, "text_classes", False)
            if classes and arguments.token_scale:
                tie_classes_to_text(model, tag_table.features, begin_title=not arguments.checkpoint)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    system = SYSTEMS[arguments.system]
    book = None
    if system.needs_book:
        book = TagBook.of_items(train["title"], train["tags"], train_items, model.config)
        train_items = ItemsWithBook(train_items, book, model.config, own_titles=train["title"])
        validation_items = ItemsWithBook(validation_items, book, model.config)
    train_counts = Counter(tag for tags in train["tags"] for tag in set(tags))
    evaluator = TagEvaluator(validation["tags"], train_counts)
    if accelerator.device.type == "cpu":
        # On a CPU plain attention trains a fifth faster than sdpa at these lengths.
        model.set_attn_implementation("eager")

    if system.learns:
        trained = learn(accelerator, model, processor, tag_table, train_items, validation_items, evaluator, arguments)
    elif accelerator.is_main_process:
        trained = remember(model, processor, tag_table, train, train_items, arguments)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        model = system.model.from_pretrained(output_dir).to(accelerator.device)
        system.set_search(model, arguments.alternatives, arguments.proposals)
        fits = {
            decoding or "only": fit_generation_config(
                model,
                processor,
                validation_items,
                evaluator,
                decoding=decoding,
                objective=arguments.objective,
                grid=system.grid(arguments.pad_biases),
            )
            for decoding in system.decodings
        }
        model.generation_config.save_pretrained(output_dir)
        if book is not None:
            book.save(output_dir / "book")
        summary = {
            # Where things lay on this machine is of no use to anybody else.
            "arguments": {name: value for name, value in vars(arguments).items() if name not in LOCAL_ARGUMENTS},
            "parameters": sum(p.numel() for p in model.parameters()),
            "items": {"train": len(train), "validation": len(validation)},
            "seconds": round(time.perf_counter() - started, 1),
            **trained,
            "fits": fits,
        }
        (output_dir / "training_summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        set_status(output_dir, "finished")
        for step in (output_dir / STATE).glob("step-*"):
            shutil.rmtree(step)
        for decoding, fit in fits.items():
            logger.info(
                f"{decoding}: pad_bias {fit.get('pad_bias')}, threshold {fit['threshold']}, validation Full "
                f"{fit['validation']['full_f1']:.1f}, micro {fit['validation']['micro_f1']:.1f}"
            )
        if arguments.push_to_hub:
            where = {"private": arguments.hub_private, "revision": arguments.hub_revision}
            push_trained(output_dir, arguments.push_to_hub, **where)
    accelerator.end_training()


def set_status(output_dir: Path, status: str, **details) -> None:
    """Says in state/status.json how the run is, for those who see no exit code: "running", "interrupted" (started
    again it goes on), "failed" or "finished"."""
    (output_dir / STATE).mkdir(parents=True, exist_ok=True)
    write_json(output_dir / STATE / "status.json", {"status": status, **details})


def run(arguments: TrainArguments) -> None:
    """Like `main`, but says what became of it."""
    output_dir = Path(arguments.output_dir)
    try:
        main(arguments)
    except Interrupted as stop:
        if PartialState().is_main_process:
            set_status(output_dir, "interrupted", step=stop.args[0])
        logger.info("Stopped; the same command goes on from here.")
    except BaseException as error:
        # Not to hide it behind another one: the disk may be full.
        with contextlib.suppress(OSError):
            if PartialState().is_main_process:
                set_status(output_dir, "failed", error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    run(parse_arguments())
