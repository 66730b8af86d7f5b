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
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from modeling_optsg import OPTSGDataCollator, TagEvaluator
from modeling_optsg.baselines.pooling import pool_items
from modeling_optsg.baselines.registry import SYSTEMS
from modeling_optsg.baselines.retrieval import ItemsWithBook, TagBook
from modeling_optsg.data.feature_cache import CachedFeatures, build_tag_table, cache_tower_features, digest
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.metrics import objective_value
from modeling_optsg.hub.push_trained import push_trained
from modeling_optsg.training import (
    LOCAL_ARGUMENTS,
    VALIDATION_ROWS,
    CollateReadable,
    GlobalBatches,
    Interrupted,
    MatchingMoves,
    RunState,
    RunStatus,
    SeededItems,
    StopSignal,
    StreamBatches,
    TaggedStream,
    TrainArguments,
    TrainingLog,
    Unreadable,
    build,
    end_workers,
    ignore_sigterm,
    items_digest,
    load_splits,
    load_streams,
    make_accelerator,
    micro_batches,
    parameter_groups,
    parse_arguments,
    prepare_model,
    prepare_training,
    refuse_other_run,
    refuse_unshared,
    samples,
    save_checkpoint,
    share_candidates,
    title_lengths,
    validate,
    weigh_losses,
    weighted_losses,
    whole_state,
    without_unreadable,
    without_untrainable_tags,
)
from modeling_optsg.training.text_tied_embeddings import plain_copy, tie_classes_to_text

logger = get_logger(__name__, log_level="INFO")

# Below the output folder: what a run goes on from, and how it is.
STATE = "state"


def learn(
    accelerator: Accelerator,
    model,
    processor,
    tag_table,
    train_items,
    validation,
    validation_items,
    evaluator: TagEvaluator,
    arguments: TrainArguments,
    stop: StopSignal,
    data: str,
    lengths: list[int] | None = None,
) -> dict:
    """The training steps: the checkpoint with the best validation figure stays in `output_dir`. `data` tells the items
    from those of another run; `lengths` are what a step's items are to be alike in."""
    system, output_dir = SYSTEMS[arguments.system], Path(arguments.output_dir)
    if (batch_size := arguments.batch_size) > len(train_items):
        # As many for each process, so that any number of parts can share them.
        batch_size = len(train_items) // accelerator.num_processes * accelerator.num_processes or len(train_items)
        logger.warning(f"There are no {arguments.batch_size} training items: a step is {batch_size} of them.")
    total = max(1, round(arguments.epochs * len(train_items) / batch_size))
    # There must be a checkpoint at the end.
    evaluate_at = {total, *(math.ceil(total * (i + 1) / arguments.evaluations) for i in range(arguments.evaluations))}
    sharing = (batch_size, accelerator.num_processes, arguments.process_batch_size)
    lanes = None
    if isinstance(train_items, TaggedStream):
        lanes, parts, at_once = train_items.divide(*sharing)
        if accelerator.num_processes > 1:
            read = "shares of the stream's files" if lanes else "the whole stream, of which it keeps its share"
            logger.info(f"Each process reads {read}.")
    else:
        parts = micro_batches(*sharing)
        at_once = math.ceil(batch_size / accelerator.num_processes / parts)
    shared = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    shared += f", each in {parts} parts of at most {at_once}" if parts > 1 else ""
    logger.info(f"{total} steps of {batch_size} items{shared}.")
    model = prepare_model(accelerator, model)
    rates = {name: getattr(arguments, name) for name in ("learning_rate", "tower_learning_rate", "token_rate")}
    groups = parameter_groups(model, **rates, weight_decay=arguments.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(arguments.warmup_share * total), total)
    wrapped, optimizer = prepare_training(
        accelerator,
        model,
        optimizer,
        micro_batch_size=at_once,
        max_grad_norm=arguments.max_grad_norm,
        mixed_precision=arguments.mixed_precision,
    )
    # The scheduler is stepped by hand, once a step whatever the number of processes.
    accelerator.register_for_checkpointing(scheduler)

    # Processes differ in what dropout hides, and in nothing else.
    set_seed(arguments.seed, device_specific=True)
    known = {"data": data, "items_a_step": batch_size}
    state = RunState(accelerator, output_dir / STATE, arguments.settled() | known)
    progress = {"step": 0, "history": [], "best": -math.inf, "training_seconds": 0.0, "rate": 0.0, "sums": {}}
    progress["unreadable"] = {}
    if (saved := state.load(arguments.resume)) is None:
        state.clear()
    else:
        progress |= saved
        logger.info(f"Going on after step {progress['step']} of {total}.")
        if arguments.resume != "auto" and Path(arguments.resume).resolve().parent != state.folder.resolve():
            # The checkpoint that was best is in the other run's folder.
            progress["best"] = -math.inf
    start = stop.saved_step = progress["step"]
    # A state is written before its step is logged and validated.
    first = max(start, 1)

    collator = OPTSGDataCollator(
        processor,
        tag_table,
        max_book_tokens=model.config.max_book_tokens if system.needs_book else None,
    )
    # A loader draws its workers' seeds: not from the state that dropout goes on from.
    readable = CollateReadable(collator, train_items, arguments.most_unreadable + 1)
    settings = {"collate_fn": readable, "generator": torch.Generator().manual_seed(arguments.seed)}
    settings["worker_init_fn"] = ignore_sigterm
    share = {"process": accelerator.process_index, "num_processes": accelerator.num_processes, "parts": parts}
    place = (batch_size, total, arguments.seed)
    if isinstance(train_items, TaggedStream):
        own = lanes[accelerator.process_index] if lanes else None
        order = StreamBatches(train_items, *place, start=start, lanes=own, **share)
        # One at least, that the next batch is read while this one is trained on.
        loader = DataLoader(order, batch_size=None, num_workers=max(1, arguments.num_workers), **settings)
    else:
        order = GlobalBatches(len(train_items), *place, start=start, lengths=lengths, **share)
        items = SeededItems(train_items)
        loader = DataLoader(items, batch_sampler=order, num_workers=arguments.num_workers, **settings)
    log = TrainingLog(accelerator, output_dir / "training_log.jsonl", first - 1, total, progress["sums"])
    moves, unreadable = MatchingMoves(), Unreadable(arguments.most_unreadable, progress["unreadable"])

    def evaluate(step: int) -> dict:
        plain = plain_copy(model, whole_state(model))
        pad_bias = {"pad_bias": -1.0} if system.has_pad else {}
        figures, written = validate(
            accelerator, plain, processor, validation_items, evaluator, arguments.objective, stop, **pad_bias
        )
        if objective_value(figures, arguments.objective) > progress["best"]:
            progress["best"] = objective_value(figures, arguments.objective)
            if accelerator.is_main_process:
                save_checkpoint(plain, processor, output_dir, arguments.half_precision_weights)
        return {"validation": figures, "samples": samples(validation, written)}

    towers = (model.model.vision_tower, model.model.text_tower)
    frozen_towers = [t for t in towers if t is not None and not any(p.requires_grad for p in t.parameters())]
    batches = iter(loader)
    seen, since = 0, time.perf_counter()

    def train_step(step: int) -> None:
        """One step; the losses of all processes go to the log."""
        wrapped.train()
        for tower in frozen_towers:
            # No dropout in it, and the statistics it came with.
            tower.eval()
        collated = [next(batches) for _ in range(parts)]
        step_batches = [part.batch for part in collated]
        weights, drawn = [part.weight for part in collated], (arguments.num_negatives, (arguments.seed, step))
        share_candidates(accelerator, model.config, step_batches, tag_table, *drawn, weights)
        shares = weigh_losses(accelerator, model.config, step_batches, weights)
        step_losses = Counter()
        for part, (batch, own_shares) in enumerate(zip(step_batches, shares)):
            last = accelerator.sync_gradients = part == parts - 1
            # The tied embeddings are computed once a part.
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped), parametrize.cached():
                with accelerator.autocast():
                    outputs = wrapped(**send_to_device(batch, accelerator.device))
                losses = weighted_losses(model.config, outputs, own_shares)
                # Gradients are averaged over the processes; the losses here add up.
                accelerator.backward(losses["loss"] * accelerator.num_processes)
            step_losses.update({name: loss.detach() for name, loss in losses.items()})
            followed = accelerator.is_main_process and collated[part].weight
            if followed and outputs.get("assignment") is not None and "tag_ids" in batch:
                moves.note(collated[part].items, outputs.assignment, batch["tag_ids"])
        broken = unreadable.new({item: why for part in collated for item, why in part.unreadable.items()})
        count = torch.tensor(float(len(broken)), device=accelerator.device)
        *summed, num_broken = accelerator.reduce(torch.stack([*step_losses.values(), count]), "sum").tolist()
        step_losses = dict(zip(step_losses, summed))
        if num_broken:
            unreadable.note(broken)
        # DeepSpeed clips by itself and says nothing; a scaler passes over steps whose gradient is too large.
        norm = accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        norm = 0.0 if norm is None or accelerator.scaler is not None else float(norm)
        if not math.isfinite(step_losses["loss"] + norm):
            raise FloatingPointError(f"The loss is {step_losses['loss']}, and its gradient {norm} long.")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.note(step_losses)

    try:
        for step in range(first, total + 1):
            if step > start:
                train_step(step)
                seen += batch_size
            if seen:
                progress["rate"] = seen / (time.perf_counter() - since)
            to_validate = step in evaluate_at
            if stopped := stop.anywhere(accelerator):
                logger.warning(f"Asked to stop after step {step} of {total}.")
            regular = step == total or to_validate or (arguments.save_every and step % arguments.save_every == 0)
            if step > start and (stopped or regular):
                progress["step"] = step
                seconds = progress["training_seconds"] + time.perf_counter() - since
                now = {"training_seconds": seconds, "sums": dict(log.sums), "unreadable": unreadable.reasons}
                state.save(step, progress | now)
                stop.saved_step = step
            if stopped:
                raise Interrupted(step)
            if step % arguments.log_every == 0 or to_validate:
                row = {"step": step, "epoch": round(step * batch_size / len(train_items), 3)}
                row |= log.means(progress["rate"]) | {"items_per_second": round(progress["rate"], 1)}
                row["learning_rate"] = scheduler.get_last_lr()[0]
                if (moved := moves.share()) is not None:
                    row["matching_moved"] = round(moved, 4)
                if to_validate:
                    progress["training_seconds"] += time.perf_counter() - since
                    row |= {"training_seconds": round(progress["training_seconds"], 1), **evaluate(step)}
                    progress["history"].append({name: value for name, value in row.items() if name != "samples"})
                    seen, since = 0, time.perf_counter()
                log.write(row)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"Step {step}: {error} The same command would end here again: give a lower learning rate with --resume "
            "never, or with another output_dir. The last state and the best checkpoint are kept."
        ) from error
    finally:
        end_workers(batches)
    log.bar.close()
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "oversized_items": collator.oversized_items,
        "unreadable_items": unreadable.reasons,
        "training_seconds": round(progress["training_seconds"], 1),
        "history": progress["history"],
    }


def remember(model, processor, tag_table, train, train_items, output_dir: Path) -> dict:
    """What a system without steps does instead: it takes the training items in as they are."""
    classes = [[tag_table.index[tag] for tag in dict.fromkeys(tags)] for tags in train["tags"]]
    model.remember(*pool_items(train_items, model.config), classes)
    save_checkpoint(model, processor, output_dir)
    return {"trained_parameters": 0, "training_seconds": 0.0, "history": []}


def run(accelerator: Accelerator, arguments: TrainArguments, status: RunStatus, stop: StopSignal) -> None:
    started = time.perf_counter()
    system = SYSTEMS[arguments.system]
    # Before anything that takes time.
    micro_batches(arguments.batch_size, accelerator.num_processes, arguments.process_batch_size)
    output_dir, cache_dir = Path(arguments.output_dir), Path(arguments.cache_dir)
    set_seed(arguments.seed)
    with accelerator.main_process_first():
        lanes, train, validation = (load_streams if arguments.streaming else load_splits)(arguments)
        model, processor = build(arguments, train, validation)
        train = without_untrainable_tags(train, processor)
    model.model.vision_tower and model.model.vision_tower.requires_grad_(arguments.tune_vision)
    model.model.text_tower.requires_grad_(arguments.tune_text)
    model.to(accelerator.device)
    tags = sorted({tag for item_tags in train["tags"] for tag in item_tags})

    frozen = {"frames": not arguments.tune_vision, "titles": not arguments.tune_text}
    frozen |= {"most_unreadable": arguments.most_unreadable, "processes": PartialState()}
    features = cache_tower_features(validation, model.model, processor, cache_dir / "features", **frozen)
    validation, features, unreadable = without_unreadable(validation, features)
    validation_items = CachedFeatures(features)
    if lanes is None:
        features = cache_tower_features(train, model.model, processor, cache_dir / "features", **frozen)
        train, features, reasons = without_unreadable(train, features)
        unreadable |= reasons
        train_items = CachedFeatures(features)
    else:
        count = Counter(train["lane"])
        items = [count[lane] for lane in range(len(lanes))]
        train_items = TaggedStream(lanes, tags, items, arguments.shuffle_buffer)
        if train_items.is_hardly_shuffled:
            logger.warning(
                "The stream has few files, or row groups of them, for its lanes: items come in nearly the same order "
                "in every epoch. Give a larger --shuffle_buffer, fewer --stream_lanes, or Parquet of more row groups."
            )
    tag_table = None
    if not arguments.tune_text:
        with accelerator.main_process_first():
            tag_table = build_tag_table(tags, model.model, processor, cache_dir / "features")
        classes = getattr(model, "set_alignment", None) or getattr(model.config, "text_classes", False)
        if classes and arguments.token_scale:
            tie_classes_to_text(model, tag_table.features, begin_title=not arguments.checkpoint)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    book = None
    if system.needs_book:
        book = TagBook.of_items(train["title"], train["tags"], train_items, model.config)
        train_items = ItemsWithBook(train_items, book, model.config, own_titles=train["title"])
        validation_items = ItemsWithBook(validation_items, book, model.config)
    evaluator = TagEvaluator(validation["tags"], Counter(tag for tags in train["tags"] for tag in set(tags)))
    if accelerator.device.type == "cpu":
        # On a CPU plain attention trains a fifth faster than sdpa at these lengths.
        model.set_attn_implementation("eager")

    trained = {}
    if system.learns:
        status.set("running")
        data = items_digest(train, validation)
        if len(set(gather_object([data]))) > 1:
            raise ValueError(f"Processes see different items under the name {arguments.dataset}.")
        if lanes:
            data = digest(data, [rows.num_shards for rows in lanes])
        lengths = title_lengths(train, processor) if arguments.group_by_length else None
        known = (train_items, validation, validation_items, evaluator, arguments, stop, data, lengths)
        with stop.only_noted():
            trained = learn(accelerator, model, processor, tag_table, *known)
    elif accelerator.is_main_process:
        trained = remember(model, processor, tag_table, train, train_items, output_dir)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        status.set("fitting")
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
            "unreadable_items": unreadable | trained.pop("unreadable_items", {}),
            "seconds": round(time.perf_counter() - started, 1),
            **trained,
            "fits": fits,
        }
        (output_dir / "training_summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        status.set("finished")
        for step in (output_dir / STATE).glob("step-*"):
            shutil.rmtree(step)
        (output_dir / VALIDATION_ROWS).unlink(missing_ok=True)
        for decoding, fit in fits.items():
            logger.info(
                f"{decoding}: pad_bias {fit.get('pad_bias')}, threshold {fit['threshold']}, validation Full "
                f"{fit['validation']['full_f1']:.1f}, micro {fit['validation']['micro_f1']:.1f}"
            )
        if arguments.push_to_hub:
            where = {"private": arguments.hub_private, "revision": arguments.hub_revision}
            push_trained(output_dir, arguments.push_to_hub, **where)
    accelerator.end_training()


def is_finished(arguments: TrainArguments, status: RunStatus) -> bool:
    """
    Raises:
        ValueError: a run with other arguments is.
    """
    summary = Path(arguments.output_dir, "training_summary.json")
    if arguments.resume != "auto" or status.read().get("status") != "finished" or not summary.exists():
        return False
    own = arguments.settled()
    saved = json.loads(summary.read_text(encoding="utf-8"))["arguments"]
    refuse_other_run({name: saved.get(name) for name in own}, own, arguments.output_dir)
    return True


def main(arguments: TrainArguments) -> None:
    arguments.cache_dir = str(Path(arguments.cache_dir).expanduser())
    accelerator, arguments.mixed_precision = make_accelerator(
        arguments.mixed_precision, log_with=arguments.trackers or None, project_dir=arguments.output_dir
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # It tells of every file of every state.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    status = RunStatus(Path(arguments.output_dir, STATE, "status.json"))
    if is_finished(arguments, status):
        logger.info(
            f"{arguments.output_dir} is finished with these arguments; --resume never trains it anew, as on data that "
            "has changed."
        )
        return
    accelerator.wait_for_everyone()
    with status.follow(), StopSignal() as stop:
        status.set("preparing")
        refuse_unshared(accelerator, arguments.output_dir, arguments.cache_dir)
        if arguments.trackers:
            # `accelerate` passes over those that are not installed.
            there = {tracker.value for tracker in accelerator.log_with}
            if missing := sorted(set(arguments.trackers) - there):
                raise ValueError(f"--trackers {' '.join(missing)}: not installed.")
            given = {name: value for name, value in vars(arguments).items() if isinstance(value, str | int | float)}
            accelerator.init_trackers("optsg", given)
        run(accelerator, arguments, status, stop)


if __name__ == "__main__":
    main(parse_arguments())
