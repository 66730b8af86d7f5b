"""Trains OP-TSG, or another of the paper's systems, on a tagging benchmark or on a folder of one's own, or fine-tunes
a checkpoint there.

    accelerate launch examples/train.py --config examples/configs/optsg-icon-small.json --output_dir runs/icon
    accelerate launch examples/train.py --dataset my_images --checkpoint runs/icon --output_dir runs/mine

A frozen tower's outputs are computed once and kept in `--cache_dir`. A step sees `--train_batch_size` examples whatever the
number of processes. The state of the run is kept in `--output_dir`/state: started again with the same arguments after
it was stopped at any moment, it goes on, and ends with the same weights. SIGTERM writes the state, says "interrupted"
in state/status.json and ends the program. The checkpoint with the best validation F1 of what slots write greedily is
kept in `--output_dir`; at the end `pad_bias`, `fusion_weights` and `threshold` are fitted
on the validation examples, for both decodings.
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
from modeling_optsg.baselines.pooling import pool_examples
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.baselines.retrieval import ExamplesWithBook, TagBook
from modeling_optsg.data.feature_cache import CachedFeatures, build_tag_table, cache_tower_features, digest
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.metrics import metric_value
from modeling_optsg.hub.push_trained import push_trained
from modeling_optsg.training import (
    LOCAL_ARGUMENTS,
    VALIDATION_ROWS,
    CollateReadable,
    GlobalBatches,
    Interrupted,
    OPTSGTrainingArguments,
    RunState,
    RunStatus,
    SeededExamples,
    SlotChanges,
    StopSignal,
    StreamBatches,
    TaggedStream,
    TrainingLog,
    Unreadable,
    build,
    end_workers,
    examples_fingerprint,
    gather_candidates,
    global_loss_weights,
    ignore_sigterm,
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
    sample_predictions,
    save_checkpoint,
    title_lengths,
    validate,
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
    train_examples,
    validation,
    validation_examples,
    evaluator: TagEvaluator,
    arguments: OPTSGTrainingArguments,
    stop: StopSignal,
    data: str,
    lengths: list[int] | None = None,
) -> dict:
    """The training steps: the checkpoint with the best validation figure stays in `output_dir`. `data` tells the examples
    from those of another run; `lengths` are what a step's examples are to be alike in."""
    system, output_dir = MODEL_TYPES[arguments.model_type], Path(arguments.output_dir)
    if (batch_size := arguments.train_batch_size) > len(train_examples):
        # As many for each process, so that any number of parts can share them.
        batch_size = len(train_examples) // accelerator.num_processes * accelerator.num_processes or len(
            train_examples
        )
        logger.warning(f"There are no {arguments.train_batch_size} training examples: a step is {batch_size} of them.")
    total = max(1, round(arguments.num_train_epochs * len(train_examples) / batch_size))
    # There must be a checkpoint at the end.
    evaluate_at = {total, *(math.ceil(total * (i + 1) / arguments.eval_steps) for i in range(arguments.eval_steps))}
    sharing = (batch_size, accelerator.num_processes, arguments.per_device_train_batch_size)
    shards = None
    if isinstance(train_examples, TaggedStream):
        shards, parts, at_once = train_examples.divide(*sharing)
        if accelerator.num_processes > 1:
            read = "shares of the stream's files" if shards else "the whole stream, of which it keeps its share"
            logger.info(f"Each process reads {read}.")
    else:
        parts = micro_batches(*sharing)
        at_once = math.ceil(batch_size / accelerator.num_processes / parts)
    shared = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    shared += f", each in {parts} parts of at most {at_once}" if parts > 1 else ""
    logger.info(f"{total} steps of {batch_size} examples{shared}.")
    model = prepare_model(accelerator, model)
    rates = {
        name: getattr(arguments, name) for name in ("learning_rate", "tower_learning_rate", "embedding_lr_multiplier")
    }
    groups = parameter_groups(model, **rates, weight_decay=arguments.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(arguments.warmup_ratio * total), total)
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
    known = {"data": data, "examples_per_step": batch_size}
    state = RunState(accelerator, output_dir / STATE, arguments.settled() | known)
    progress = {"step": 0, "history": [], "best": -math.inf, "training_seconds": 0.0, "rate": 0.0, "sums": {}}
    progress["unreadable"] = {}
    if (saved := state.load(arguments.resume_from_checkpoint)) is None:
        state.clear()
    else:
        progress |= saved
        logger.info(f"Going on after step {progress['step']} of {total}.")
        if (
            arguments.resume_from_checkpoint != "auto"
            and Path(arguments.resume_from_checkpoint).resolve().parent != state.folder.resolve()
        ):
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
    readable = CollateReadable(collator, train_examples, arguments.max_unreadable + 1)
    settings = {"collate_fn": readable, "generator": torch.Generator().manual_seed(arguments.seed)}
    settings["worker_init_fn"] = ignore_sigterm
    share = {"process": accelerator.process_index, "num_processes": accelerator.num_processes, "parts": parts}
    place = (batch_size, total, arguments.seed)
    if isinstance(train_examples, TaggedStream):
        own = shards[accelerator.process_index] if shards else None
        order = StreamBatches(train_examples, *place, start=start, shards=own, **share)
        # One at least, that the next batch is read while this one is trained on.
        loader = DataLoader(order, batch_size=None, num_workers=max(1, arguments.dataloader_num_workers), **settings)
    else:
        order = GlobalBatches(len(train_examples), *place, start=start, lengths=lengths, **share)
        examples = SeededExamples(train_examples)
        loader = DataLoader(examples, batch_sampler=order, num_workers=arguments.dataloader_num_workers, **settings)
    log = TrainingLog(accelerator, output_dir / "training_log.jsonl", first - 1, total, progress["sums"])
    moves, unreadable = SlotChanges(), Unreadable(arguments.max_unreadable, progress["unreadable"])

    def evaluate(step: int) -> dict:
        plain = plain_copy(model, whole_state(model))
        pad_bias = {"pad_bias": -1.0} if system.has_pad else {}
        metrics, written = validate(
            accelerator,
            plain,
            processor,
            validation_examples,
            evaluator,
            arguments.metric_for_best_model,
            stop,
            **pad_bias,
        )
        if metric_value(metrics, arguments.metric_for_best_model) > progress["best"]:
            progress["best"] = metric_value(metrics, arguments.metric_for_best_model)
            if accelerator.is_main_process:
                save_checkpoint(plain, processor, output_dir, arguments.save_half_precision)
        return {"validation": metrics, "sample_predictions": sample_predictions(validation, written)}

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
        gather_candidates(accelerator, model.config, step_batches, tag_table, *drawn, weights)
        shares = global_loss_weights(accelerator, model.config, step_batches, weights)
        step_losses = Counter()
        for part, (batch, own_weights) in enumerate(zip(step_batches, shares)):
            last = accelerator.sync_gradients = part == parts - 1
            # The tied embeddings are computed once a part.
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped), parametrize.cached():
                with accelerator.autocast():
                    outputs = wrapped(**send_to_device(batch, accelerator.device))
                losses = weighted_losses(model.config, outputs, own_weights)
                # Gradients are averaged over the processes; the losses here add up.
                accelerator.backward(losses["loss"] * accelerator.num_processes)
            step_losses.update({name: loss.detach() for name, loss in losses.items()})
            followed = accelerator.is_main_process and collated[part].weight
            if followed and outputs.get("assignment") is not None and "tag_ids" in batch:
                moves.note(collated[part].examples, outputs.assignment, batch["tag_ids"])
        broken = unreadable.new({example: why for part in collated for example, why in part.unreadable.items()})
        count = torch.tensor(float(len(broken)), device=accelerator.device)
        *summed, num_broken = accelerator.reduce(torch.stack([*step_losses.values(), count]), "sum").tolist()
        step_losses = dict(zip(step_losses, summed))
        if num_broken:
            unreadable.note(broken)
        # DeepSpeed videos by itself and says nothing; a scaler passes over steps whose gradient is too large.
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
            regular = step == total or to_validate or (arguments.save_steps and step % arguments.save_steps == 0)
            if step > start and (stopped or regular):
                progress["step"] = step
                seconds = progress["training_seconds"] + time.perf_counter() - since
                now = {"training_seconds": seconds, "sums": dict(log.sums), "unreadable": unreadable.reasons}
                state.save(step, progress | now)
                stop.saved_step = step
            if stopped:
                raise Interrupted(step)
            if step % arguments.logging_steps == 0 or to_validate:
                row = {"step": step, "epoch": round(step * batch_size / len(train_examples), 3)}
                row |= log.means(progress["rate"]) | {"examples_per_second": round(progress["rate"], 1)}
                row["learning_rate"] = scheduler.get_last_lr()[0]
                if (moved := moves.share()) is not None:
                    row["slots_changed"] = round(moved, 4)
                if to_validate:
                    progress["training_seconds"] += time.perf_counter() - since
                    row |= {"training_seconds": round(progress["training_seconds"], 1), **evaluate(step)}
                    progress["history"].append(
                        {name: value for name, value in row.items() if name != "sample_predictions"}
                    )
                    seen, since = 0, time.perf_counter()
                log.write(row)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"Step {step}: {error} The same command would end here again: give a lower learning rate with --resume_from_checkpoint "
            "never, or with another output_dir. The last state and the best checkpoint are kept."
        ) from error
    finally:
        end_workers(batches)
    log.bar.close()
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "oversized_examples": collator.oversized_examples,
        "unreadable_examples": unreadable.reasons,
        "training_seconds": round(progress["training_seconds"], 1),
        "history": progress["history"],
    }


def fit_knn(model, processor, tag_table, train, train_examples, output_dir: Path) -> dict:
    """What a system without steps does instead: it takes the training examples in as they are."""
    classes = [[tag_table.index[tag] for tag in dict.fromkeys(tags)] for tags in train["tags"]]
    model.fit(*pool_examples(train_examples, model.config), classes)
    save_checkpoint(model, processor, output_dir)
    return {"trained_parameters": 0, "training_seconds": 0.0, "history": []}


def run(accelerator: Accelerator, arguments: OPTSGTrainingArguments, status: RunStatus, stop: StopSignal) -> None:
    started = time.perf_counter()
    system = MODEL_TYPES[arguments.model_type]
    # Before anything that takes time.
    micro_batches(arguments.train_batch_size, accelerator.num_processes, arguments.per_device_train_batch_size)
    output_dir, cache_dir = Path(arguments.output_dir), Path(arguments.cache_dir)
    set_seed(arguments.seed)
    with accelerator.main_process_first():
        shards, train, validation = (load_streams if arguments.streaming else load_splits)(arguments)
        model, processor = build(arguments, train, validation)
        train = without_untrainable_tags(train, processor)
    model.model.vision_tower and model.model.vision_tower.requires_grad_(arguments.train_vision_tower)
    model.model.text_tower.requires_grad_(arguments.train_text_tower)
    model.to(accelerator.device)
    tags = sorted({tag for example_tags in train["tags"] for tag in example_tags})

    frozen = {"frames": not arguments.train_vision_tower, "titles": not arguments.train_text_tower}
    frozen |= {"max_unreadable": arguments.max_unreadable, "processes": PartialState()}
    features = cache_tower_features(validation, model.model, processor, cache_dir / "features", **frozen)
    validation, features, unreadable = without_unreadable(validation, features)
    validation_examples = CachedFeatures(features)
    if shards is None:
        features = cache_tower_features(train, model.model, processor, cache_dir / "features", **frozen)
        train, features, reasons = without_unreadable(train, features)
        unreadable |= reasons
        train_examples = CachedFeatures(features)
    else:
        count = Counter(train["shard"])
        examples = [count[shard] for shard in range(len(shards))]
        train_examples = TaggedStream(shards, tags, examples, arguments.shuffle_buffer_size)
        if train_examples.is_hardly_shuffled:
            logger.warning(
                "The stream has few files, or row groups of them, for its shards: examples come in nearly the same order "
                "in every epoch. Give a larger --shuffle_buffer_size, fewer --num_stream_shards, or Parquet of more row groups."
            )
    tag_table = None
    if not arguments.train_text_tower:
        with accelerator.main_process_first():
            tag_table = build_tag_table(tags, model.model, processor, cache_dir / "features")
        classes = getattr(model, "tag_classifier", None) or getattr(model.config, "cosine_classifier", False)
        if classes and arguments.embedding_init_std:
            tie_classes_to_text(model, tag_table.features, begin_title=not arguments.checkpoint)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    book = None
    if system.needs_book:
        book = TagBook.of_examples(train["title"], train["tags"], train_examples, model.config)
        train_examples = ExamplesWithBook(train_examples, book, model.config, own_titles=train["title"])
        validation_examples = ExamplesWithBook(validation_examples, book, model.config)
    evaluator = TagEvaluator(validation["tags"], Counter(tag for tags in train["tags"] for tag in set(tags)))
    if accelerator.device.type == "cpu":
        # On a CPU plain attention trains a fifth faster than sdpa at these lengths.
        model.set_attn_implementation("eager")

    trained = {}
    if system.learns:
        status.set("running")
        data = examples_fingerprint(train, validation)
        if len(set(gather_object([data]))) > 1:
            raise ValueError(f"Processes see different examples under the name {arguments.dataset}.")
        if shards:
            data = digest(data, [rows.num_shards for rows in shards])
        lengths = title_lengths(train, processor) if arguments.group_by_length else None
        known = (train_examples, validation, validation_examples, evaluator, arguments, stop, data, lengths)
        with stop.only_noted():
            trained = learn(accelerator, model, processor, tag_table, *known)
    elif accelerator.is_main_process:
        trained = fit_knn(model, processor, tag_table, train, train_examples, output_dir)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        status.set("fitting")
        model = system.model.from_pretrained(output_dir).to(accelerator.device)
        system.set_search(model, arguments.num_return_sequences, arguments.num_candidates)
        fits = {
            decoding or "only": fit_generation_config(
                model,
                processor,
                validation_examples,
                evaluator,
                decoding=decoding,
                objective=arguments.metric_for_best_model,
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
            "examples": {"train": len(train), "validation": len(validation)},
            "unreadable_examples": unreadable | trained.pop("unreadable_examples", {}),
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
            where = {"private": arguments.hub_private_repo, "revision": arguments.hub_revision}
            push_trained(output_dir, arguments.push_to_hub, **where)
    accelerator.end_training()


def is_finished(arguments: OPTSGTrainingArguments, status: RunStatus) -> bool:
    """
    Raises:
        ValueError: a run with other arguments is.
    """
    summary = Path(arguments.output_dir, "training_summary.json")
    if arguments.resume_from_checkpoint != "auto" or status.read().get("status") != "finished" or not summary.exists():
        return False
    own = arguments.settled()
    saved = json.loads(summary.read_text(encoding="utf-8"))["arguments"]
    refuse_other_run({name: saved.get(name) for name in own}, own, arguments.output_dir)
    return True


def main(arguments: OPTSGTrainingArguments) -> None:
    arguments.cache_dir = str(Path(arguments.cache_dir).expanduser())
    accelerator, arguments.mixed_precision = make_accelerator(
        arguments.mixed_precision, log_with=arguments.report_to or None, project_dir=arguments.output_dir
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # It tells of every file of every state.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    status = RunStatus(Path(arguments.output_dir, STATE, "status.json"))
    if is_finished(arguments, status):
        logger.info(
            f"{arguments.output_dir} is finished with these arguments; --resume_from_checkpoint never trains it anew, as on data that "
            "has changed."
        )
        return
    accelerator.wait_for_everyone()
    with status.follow(), StopSignal() as stop:
        status.set("preparing")
        refuse_unshared(accelerator, arguments.output_dir, arguments.cache_dir)
        if arguments.report_to:
            # `accelerate` passes over those that are not installed.
            there = {tracker.value for tracker in accelerator.log_with}
            if missing := sorted(set(arguments.report_to) - there):
                raise ValueError(f"--report_to {' '.join(missing)}: not installed.")
            given = {name: value for name, value in vars(arguments).items() if isinstance(value, str | int | float)}
            accelerator.init_trackers("optsg", given)
        run(accelerator, arguments, status, stop)


if __name__ == "__main__":
    main(parse_arguments())
