"""Training from beginning to end: examples, model, steps, generation settings and the Hub."""

import contextlib
import copy
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.baselines.retrieval import BOOK_FOLDER
from modeling_optsg.data.feature_cache import digest
from modeling_optsg.data.training_summary import SUMMARY
from modeling_optsg.evaluation.metrics import TagEvaluator
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.hub.commits import HTTP_LOGGERS
from modeling_optsg.hub.push_checkpoint import push_trained
from modeling_optsg.processing_optsg import OPTSGProcessor

from .arguments import TOWER_DEFAULTS, OPTSGTrainingArguments, parse_arguments
from .checkpoints import save_checkpoint
from .data import (
    cache_examples,
    divide_examples,
    examples_fingerprint,
    load_examples,
    read_evaluated_dataset,
    read_given_datasets,
    title_lengths,
)
from .finishing import copy_notices, finish, finished_summary, fit_best_model
from .interruption import Interrupted, RunStatus, StopSignal
from .loop import TrainingLoop
from .neighbour_comparison import compare_with_neighbours
from .origin import describe_origin
from .preparation import PreparedTraining, prepare_training_run
from .processes import check_shared_folders, make_accelerator, start_trackers
from .run_lock import lock_run
from .run_state import STATE_FOLDER
from .sampling import num_micro_batches

TERMINATED = 143  # 128 + SIGTERM, as a shell reports it


class OPTSGTrainer:
    """Train OP-TSG or a baseline on tagged images and videos, or fine-tune a checkpoint.

    The arguments have the names of `transformers.Trainer`, and the same callbacks can be used. Unlike there, a
    training step is the same for any number of processes: `args.train_batch_size` examples are divided among processes
    and micro-batches, and the losses are means over all of them. The state of the run is saved in
    `args.output_dir`/state. A run that was stopped at any moment, resumed with the same arguments, ends with the same
    weights.

    Args:
        model: The model to fine-tune. By default, `args` says what to start from: a checkpoint or pretrained towers.
        args: Training arguments. Default: those of `OPTSGTrainingArguments("trainer_output")`.
        train_dataset: Training examples with the column `tags` and at least one of `title`, `image`, `video` and
            `frame_features`. `args` can name other columns, such as `tags_column`, and the separator of tags that are
            text. By default, `args.dataset` is loaded.
            With a `train_dataset`, `args.dataset` is only its name in the model card, and there is none by default.
        eval_dataset: Validation examples. By default, one tenth of `train_dataset` is set aside
            (`args.validation_ratio`).
        processing_class: Processor of `model`.
        callbacks: Callbacks of `transformers`, such as [`~transformers.EarlyStoppingCallback`]. See
            [`TrainingCallbacks`].

    Raises:
        ValueError: The arguments contradict one another, for example a model without its processor.

    Example:

        >>> import tempfile
        >>> from datasets import Dataset
        >>> from modeling_optsg import OPTSGTrainer, OPTSGTrainingArguments
        >>> rows = [{"title": f"bus {n}", "tags": ["bus", "vehicle"]} for n in range(8)]
        >>> args = OPTSGTrainingArguments(
        ...     tempfile.mkdtemp(), checkpoint="checkpoints/optsg-icon-small", num_train_epochs=1
        ... )
        >>> trainer = OPTSGTrainer(args=args, train_dataset=Dataset.from_list(rows))
        >>> trainer.train()["examples"]
        step 1: loss ...
        {'train': 5, 'validation': 3}
    """

    def __init__(
        self,
        model: OPTSGPreTrainedModel | None = None,
        args: OPTSGTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: OPTSGProcessor | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        args = OPTSGTrainingArguments("trainer_output") if args is None else copy.copy(args)
        if (model is None) != (processing_class is None):
            raise ValueError("Give both a model and its processing_class, or neither.")
        if model is not None and (args.checkpoint or not isinstance(model, MODEL_TYPES[args.model_type].model)):
            raise ValueError(
                f"The model is a {type(model).__name__}; that is not possible with "
                + (f"checkpoint={args.checkpoint!r}." if args.checkpoint else f"model_type={args.model_type!r}.")
            )
        if model is not None:
            # The model has its own towers.
            for name, default in TOWER_DEFAULTS.items():
                if getattr(args, name) == default:
                    setattr(args, name, None)
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if rows is not None and not isinstance(rows, Dataset):
                raise ValueError(
                    f"The {name} is a {type(rows).__name__}; give a datasets.Dataset, such as one of its splits."
                )
            if rows is not None and not len(rows):
                raise ValueError(f"The {name} has no examples.")
        if train_dataset is None and eval_dataset is not None:
            raise ValueError("An eval_dataset needs a train_dataset.")
        if train_dataset is not None and args.streaming:
            raise ValueError("A train_dataset cannot be streamed; give the name of the dataset in args.dataset.")
        args.cache_dir = str(Path(args.cache_dir).expanduser())
        self.accelerator, args.mixed_precision = make_accelerator(
            args.mixed_precision, log_with=args.report_to or None, project_dir=args.output_dir
        )
        # What is fine-tuned. A model that was not loaded has an empty name.
        self.checkpoint = args.checkpoint or (model.name_or_path if model is not None else None) or None
        self.model, self.args, self.processing_class = model, args, processing_class
        # `model` is the best checkpoint later, and the training changes the given model.
        self._given = None if model is None else (model, processing_class)
        self._given_digest = "" if model is None else digest(model)
        self.train_dataset, self.eval_dataset, self.callbacks = train_dataset, eval_dataset, list(callbacks)
        self.status = RunStatus(Path(args.output_dir, STATE_FOLDER, "status.json"))

    def add_callback(self, callback: TrainerCallback) -> None:
        """Add a callback."""
        self.callbacks.append(callback)

    def train(self) -> dict:
        """Train the model, from the last saved state of the run if there is one.

        The best checkpoint, its fitted generation settings, the log and the summary are written to `args.output_dir`.
        Afterwards `model` is the best checkpoint.

        Returns:
            The content of `training_summary.json`, among it `training_seconds`, `history` (the log's rows with
            validation metrics) and `fits`, the fitted settings and the validation metrics of each decoding.

        Raises:
            Interrupted: The program was asked to stop (SIGTERM), and the state of the run is saved.
            FloatingPointError: The loss or the gradient is not finite.
            ValueError: There are no examples or no tags, the saved state belongs to another run, or too many examples
                cannot be read.
            OSError: A state or a checkpoint cannot be written.
            RuntimeError: Another process is training in the folder.
        """
        with _shown_messages():
            summary = self.run()
        self._load_best()
        return summary

    def run(self) -> dict:
        """Train as [`train`] does, without loading the best checkpoint afterwards."""
        # Python handles signals in the main thread only.
        is_main = threading.current_thread() is threading.main_thread()
        # First, because a second training must not change the status of the one that is running.
        lock = lock_run(self.accelerator, self.status.path.parent, self.args.output_dir)
        with lock, self.status.follow(), StopSignal() if is_main else contextlib.nullcontext() as stop_signal:
            if self.args.streaming:
                # The examples are read only for a training run.
                if (summary := finished_summary(self.args, self.status)) is not None:
                    return summary
                return self._train(stop_signal)
            with self.accelerator.main_process_first():
                _, *examples = self._load_examples()
            data = examples_fingerprint(*examples) + self._given_digest
            if (summary := finished_summary(self.args, self.status, data)) is not None:
                return summary
            return self._train(stop_signal, data, examples)

    def evaluate(self, eval_dataset: Dataset | None = None) -> dict[str, float | None]:
        """Return the metrics of the model with its fitted generation settings.

        Args:
            eval_dataset: Examples to evaluate. Default: the validation examples of the training. The columns are those
                of the training examples, or those of [`load_tagging_dataset`].

        Raises:
            ValueError: There is no model yet.
        """
        self._check_model()
        if eval_dataset is None:
            rows = self._load_examples()[2]
        else:
            rows = read_evaluated_dataset(eval_dataset, self.train_dataset, self.args)
        examples, rows, _ = cache_examples(rows, self.model, self.processing_class, self.args)
        counts = self.processing_class.label_vocabulary
        return TagEvaluator(rows["tags"], counts).score(predict_tags(self.model, self.processing_class, examples))

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Save the model and its processor.

        Args:
            output_dir: Folder to save them in. Default: `args.output_dir`, where [`train`] has saved them already.

        Raises:
            ValueError: There is no model yet.
        """
        self._check_model()
        if self.accelerator.is_main_process:
            folder = Path(output_dir or self.args.output_dir)
            save_checkpoint(self.model, self.processing_class, folder, self.args.save_half_precision)

    def push_to_hub(self, repo_id: str, private: bool = False, revision: str | None = None) -> None:
        """Push the trained model, its settings and a model card to the Hub.

        Args:
            repo_id: Repository, as org/name.
            private: Create the repository as private.
            revision: Branch. Default: main.
        """
        if self.accelerator.is_main_process:
            push_trained(self.args.output_dir, repo_id, private=private, revision=revision)

    def _check_model(self) -> None:
        if self.model is None:
            raise ValueError("There is no model yet; call train() first, or give a model.")

    def _load_best(self) -> None:
        """Load the best checkpoint, with its fitted generation settings."""
        self.model = MODEL_TYPES[self.args.model_type].model.from_pretrained(self.args.output_dir)
        self.model.to(self.accelerator.device)
        self.processing_class = OPTSGProcessor.from_pretrained(self.args.output_dir)

    def _train(
        self, stop_signal: StopSignal | None, data: str | None = None, examples: Sequence[Dataset] | None = None
    ) -> dict:
        accelerator, started = self.accelerator, time.perf_counter()
        self.status.set("preparing")
        check_shared_folders(accelerator, self.args.output_dir, self.args.cache_dir)
        start_trackers(accelerator, self.args.report_to, vars(self.args))
        stream_shards = None
        if examples is None:
            with accelerator.main_process_first():
                stream_shards, *examples = self._load_examples()
        train, validation = examples
        self.args = args = self.args.for_examples(len(train))
        # Fail before the towers run if the batch size is invalid.
        num_micro_batches(args.train_batch_size, accelerator.num_processes, args.per_device_train_batch_size)
        set_seed(args.seed)
        prepared = prepare_training_run(args, accelerator, train, validation, stream_shards, self._given)

        # Before the training, because a checkpoint may be deleted meanwhile.
        origin = describe_origin(args, prepared.model, self.checkpoint)
        self.status.set("running")
        loop = TrainingLoop(
            prepared.model,
            args,
            accelerator=accelerator,
            processing_class=prepared.processor,
            train_dataset=prepared.train_dataset,
            eval_dataset=prepared.eval_dataset,
            evaluator=prepared.evaluator,
            tag_table=prepared.tag_table,
            lengths=title_lengths(prepared.train, prepared.processor) if args.group_by_length else None,
            data_fingerprint=examples_fingerprint(prepared.train, prepared.validation, stream_shards)
            + self._given_digest,
            stop_signal=stop_signal,
            callbacks=self.callbacks,
        )
        results = loop.run()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.status.set("fitting")
            self._finish(prepared, origin | {"data": data}, results, started)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return json.loads(Path(args.output_dir, SUMMARY).read_text(encoding="utf-8"))

    def _load_examples(self) -> tuple[list[IterableDataset] | None, Dataset, Dataset]:
        """Return stream shards, training examples and validation examples."""
        if self.train_dataset is None:
            return load_examples(self.args)
        given = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        names = {"train_dataset": "train", "eval_dataset": "validation"}
        splits = {names[origin]: rows for origin, rows in read_given_datasets(given, self.args).items()}
        return None, *divide_examples(splits, self.args)

    def _finish(self, prepared: PreparedTraining, origin: dict, results: dict, started: float) -> None:
        """Fit the generation settings of the best checkpoint, write the summary and push the model to the Hub."""
        args, device = self.args, self.accelerator.device
        model, fits = fit_best_model(args, prepared.processor, prepared.eval_dataset, prepared.evaluator, device)
        if prepared.book is not None:
            prepared.book.save(Path(args.output_dir) / BOOK_FOLDER)
        knn = compare_with_neighbours(args, model, prepared.processor, *prepared.encoded, prepared.evaluator, fits)
        # A step has all the examples if there are fewer than that.
        args = copy.copy(args)
        args.train_batch_size = results.pop("train_batch_size", args.train_batch_size)
        unreadable = prepared.unreadable | results.pop("unreadable_examples", {})
        summary = {
            **origin,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "examples": {"train": len(prepared.train), "validation": len(prepared.validation)},
            "unreadable_examples": unreadable,
            "seconds": round(time.perf_counter() - started, 1),
            **results,
            "fits": fits,
            "nearest_neighbours": knn,
        }
        copy_notices(self.checkpoint, args.output_dir)
        finish(args, self.status, summary)
        if args.push_to_hub:
            push_trained(args.output_dir, args.push_to_hub, private=args.hub_private_repo, revision=args.hub_revision)


@contextlib.contextmanager
def _shown_messages() -> Iterator[None]:
    """Print the messages of this package, unless the program has configured logging."""
    logger, handler = logging.getLogger("modeling_optsg"), logging.StreamHandler()
    if logger.hasHandlers():
        yield
        return
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train as a command line says. See [`parse_arguments`].

    Returns:
        0, or `TERMINATED` if the run was asked to stop; the same command resumes it.
    """
    args = parse_arguments(argv, prog)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in HTTP_LOGGERS:
        # They log every request, some with signed URLs.
        logging.getLogger(name).setLevel(logging.WARNING)
    # accelerate logs every file of every saved state.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    try:
        OPTSGTrainer(args=args).run()
    except Interrupted:
        return TERMINATED
    return 0


def run_command(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Train as [`main`] does. An error is printed as one line.

    Returns:
        The exit status: that of [`main`], or 2 after an error.
    """
    try:
        return main(argv, prog)
    except (ImportError, OSError, RuntimeError, ValueError, FloatingPointError) as error:
        text = " ".join(str(error).split())
        text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
        print(f"{prog}: {text}", file=sys.stderr)
        return 2
