"""Train OP-TSG or a baseline on a tagging dataset, or fine-tune a checkpoint.

    accelerate launch examples/train.py --config examples/configs/optsg-icon-small.json --output_dir runs/icon
    accelerate launch examples/train.py --dataset my_images --checkpoint runs/icon --output_dir runs/mine

The best checkpoint, its fitted generation settings, the log and the summary are written to `--output_dir`. To resume a
stopped run, run the same command again. On SIGTERM, the program saves the state of the run and exits.
"""

import logging
import time
from collections import Counter
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from modeling_optsg import TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.baselines.retrieval import ExampleRetriever, ExamplesWithBook
from modeling_optsg.data.feature_cache import build_tag_table
from modeling_optsg.hub.commits import HTTP_LOGGERS
from modeling_optsg.hub.push_checkpoint import push_trained
from modeling_optsg.training import (
    STATE_FOLDER,
    OPTSGTrainer,
    OPTSGTrainingArguments,
    RunStatus,
    StopSignal,
    augment_images,
    build_model,
    cache_examples,
    check_shared_folders,
    class_embeddings,
    examples_fingerprint,
    finish,
    fit_best_model,
    fit_image_standardizer,
    initialize_classes_from_text,
    is_finished,
    load_classifier,
    load_examples,
    load_extra_images,
    make_accelerator,
    make_stream,
    num_micro_batches,
    parse_arguments,
    prepare_for_device,
    start_trackers,
    title_lengths,
    warm_up_image_evidence,
    without_untrainable_tags,
)


def make_evaluator(train: Dataset, validation: Dataset) -> TagEvaluator:
    """Return the evaluator of the validation examples."""
    return TagEvaluator(validation["tags"], Counter(tag for own in train["tags"] for tag in set(own)))


def run(accelerator: Accelerator, args: OPTSGTrainingArguments, status: RunStatus, stop_signal: StopSignal) -> None:
    """Train from beginning to end, or from the last saved state."""
    started = time.perf_counter()
    # Fail early if the batch size is invalid.
    num_micro_batches(args.train_batch_size, accelerator.num_processes, args.per_device_train_batch_size)
    set_seed(args.seed)

    # The examples and the model.
    with accelerator.main_process_first():
        stream_shards, train, validation = load_examples(args)
        model, processor = build_model(args, train, validation)
        train = without_untrainable_tags(train, processor)
    make_evaluator(train, validation).check_metric(args.metric_for_best_model)  # before the towers run
    model.to(accelerator.device)
    tags = sorted({tag for example_tags in train["tags"] for tag in example_tags})

    with accelerator.main_process_first():
        tag_table = build_tag_table(tags, model.model, processor, Path(args.cache_dir) / "features")
    if args.embedding_init_std and class_embeddings(model) is not None:
        initialize_classes_from_text(model, tag_table.features, init_title=not args.checkpoint)
    load_classifier(model, args)

    # The outputs of frozen towers are computed once and cached.
    eval_dataset, validation, unreadable = cache_examples(validation, model, processor, args)
    if args.streaming:
        train_dataset = make_stream(stream_shards, train, tags, args.shuffle_buffer_size)
    else:
        train_dataset, train, unreadable_train = cache_examples(train, model, processor, args)
        unreadable |= unreadable_train
    fit_image_standardizer(model, processor, eval_dataset if args.streaming else train_dataset)

    prepare_for_device(model, args, accelerator.device)
    book, model_type = None, MODEL_TYPES[args.model_type]
    if model_type.needs_book:
        book = ExampleRetriever.from_examples(train["title"], train["tags"], train_dataset, model.config)
        train_dataset = ExamplesWithBook(train_dataset, book, model.config, processor.tag_tokenizer, train["title"])
        eval_dataset = ExamplesWithBook(eval_dataset, book, model.config, processor.tag_tokenizer)
    elif model_type.is_trained and not args.streaming:
        extra_images = load_extra_images(train, model, processor, args)
        with accelerator.main_process_first():
            warm_up_image_evidence(model, args, tags, train_dataset, extra_images)
        train_dataset = augment_images(train_dataset, extra_images, model, args)

    # Training.
    status.set("running")
    evaluator = make_evaluator(train, validation)
    trainer = OPTSGTrainer(
        model,
        args,
        accelerator=accelerator,
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        evaluator=evaluator,
        tag_table=tag_table,
        lengths=title_lengths(train, processor) if args.group_by_length else None,
        data_fingerprint=examples_fingerprint(train, validation, stream_shards),
        stop_signal=stop_signal,
    )
    results = trainer.train()
    accelerator.wait_for_everyone()

    # Generation settings, the summary and the Hub.
    if accelerator.is_main_process:
        status.set("fitting")
        model, fits = fit_best_model(args, processor, eval_dataset, evaluator, accelerator.device)
        if book is not None:
            book.save(Path(args.output_dir) / "book")
        summary = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "examples": {"train": len(train), "validation": len(validation)},
            "unreadable_examples": unreadable | results.pop("unreadable_examples", {}),
            "seconds": round(time.perf_counter() - started, 1),
            **results,
            "fits": fits,
        }
        finish(args, status, summary)
        if args.push_to_hub:
            push_trained(args.output_dir, args.push_to_hub, private=args.hub_private_repo, revision=args.hub_revision)
    accelerator.end_training()


def main(args: OPTSGTrainingArguments) -> None:
    """Train unless the run is finished, and write its status for other programs."""
    args.cache_dir = str(Path(args.cache_dir).expanduser())
    accelerator, args.mixed_precision = make_accelerator(
        args.mixed_precision, log_with=args.report_to or None, project_dir=args.output_dir
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in HTTP_LOGGERS:
        # They log every request, some with signed URLs.
        logging.getLogger(name).setLevel(logging.WARNING)
    # accelerate logs every file of every saved state.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    status = RunStatus(Path(args.output_dir, STATE_FOLDER, "status.json"))
    if is_finished(args, status):
        return
    accelerator.wait_for_everyone()
    with status.follow(), StopSignal() as stop_signal:
        status.set("preparing")
        check_shared_folders(accelerator, args.output_dir, args.cache_dir)
        start_trackers(accelerator, args.report_to, vars(args))
        run(accelerator, args, status, stop_signal)


if __name__ == "__main__":
    main(parse_arguments())
