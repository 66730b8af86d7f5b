"""The training loop."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.pooling import pool_examples
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.collator import OPTSGDataCollator, TagTable
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.evaluation.metrics import TagEvaluator, metric_value
from modeling_optsg.processing_optsg import OPTSGProcessor

from .arguments import OPTSGTrainingArguments
from .callbacks import TrainingCallbacks
from .checkpoints import delete_extra_files, save_checkpoint
from .image_changes import ImageChangingCollator
from .image_word_heads import embed_image_words
from .interruption import Interrupted, StopSignal, end_workers, ignore_sigterm
from .lora import adapter_states
from .losses import gather_candidates, global_loss_weights, weighted_losses
from .optimizer import parameter_groups
from .processes import full_state_dict, prepare_model, prepare_training
from .run_state import STATE_FOLDER, RunState, TrainingProgress
from .sampling import GlobalBatches, SeededExamples, num_micro_batches
from .streaming import StreamBatches, TaggedStream
from .text_tied_embeddings import copy_without_text_tying
from .training_log import SlotChanges, TrainingLog
from .unreadable_examples import CollatedBatch, SkippingCollator, UnreadableExamples
from .validation import sample_predictions, validate

logger = get_logger(__name__)


class TrainingLoop:
    """The steps of a training run, with any number of processes, which can be resumed after an interruption.

    [`OPTSGTrainer`] prepares model and examples, and runs the loop.

    Args:
        model: The model to train. Frozen towers stay in evaluation mode.
        args: Training arguments.
        accelerator: From [`make_accelerator`].
        processing_class: Processor of the model.
        train_dataset: Map-style examples such as [`CachedFeatures`], [`AugmentedImages`], or a [`TaggedStream`].
        eval_dataset: Map-style validation examples.
        evaluator: Evaluator made of the tags of `eval_dataset`.
        tag_table: Text features of all training tags. `None` to compute those of each batch with the text tower.
        lengths: Lengths of the training examples. If given, each step consists of examples of similar length.
        data_fingerprint: Hash of the data. A state of a run with other data is not resumed.
        stop_signal: SIGTERM handler. When it has received the signal, the state is saved and [`Interrupted`] raised.
        callbacks: See [`TrainingCallbacks`].
    """

    def __init__(
        self,
        model: OPTSGPreTrainedModel,
        args: OPTSGTrainingArguments,
        *,
        accelerator: Accelerator,
        processing_class: OPTSGProcessor,
        train_dataset: Sequence[Mapping] | TaggedStream,
        eval_dataset: Sequence[Mapping],
        evaluator: TagEvaluator,
        tag_table: TagTable | None = None,
        lengths: Sequence[int] | None = None,
        data_fingerprint: str = "",
        stop_signal: StopSignal | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.model, self.args, self.accelerator = model, args, accelerator
        # Fail before training, not afterwards.
        evaluator.check_metric(args.metric_for_best_model)
        self.processing_class, self.tag_table, self.evaluator = processing_class, tag_table, evaluator
        self.train_dataset, self.eval_dataset, self.lengths = train_dataset, eval_dataset, lengths
        self.data_fingerprint, self.stop_signal = data_fingerprint, stop_signal or StopSignal()
        self.model_type, self.output_dir = MODEL_TYPES[args.model_type], Path(args.output_dir)
        self.progress = TrainingProgress()
        self.callbacks = TrainingCallbacks(
            callbacks, args, accelerator, model=model, processing_class=processing_class
        )

    def run(self) -> dict:
        """Train the model, from the last saved state of the run if there is one.

        Returns:
            `trained_parameters`, `train_batch_size` as it was used, `training_seconds`, `history` (the log's rows with
            validation metrics), and how many examples had too many tags or could not be read.

        Raises:
            Interrupted: The run was asked to stop, and its state is saved.
            FloatingPointError: The loss or the gradient is not finite.
            ValueError: The saved state belongs to another run, or too many examples cannot be read.
            OSError: A state or a checkpoint cannot be written.
        """
        if not self.model_type.is_trained:
            return self._fit_examples()
        with self.stop_signal.deferred():
            self._plan_steps()
            self._prepare()
            self._resume()
            batches = iter(self._data_loader())
            self._call("on_train_begin", self.start)
            self._restart_timer()
            try:
                self._train_to_last_step(batches)
            finally:
                end_workers(batches)
            self.log.close()
            self._call("on_train_end", self.progress.step)
        return {
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "train_batch_size": self.batch_size,
            "oversized_examples": self.collator.oversized_examples,
            "unreadable_examples": self.unreadable.reasons,
            "training_seconds": round(self.progress.training_seconds, 1),
            "history": self.progress.log_history,
        }

    def evaluate(self) -> dict:
        """Validate the model, and save it if it is the best so far. All processes call this.

        Returns:
            `validation`, the metrics at the best threshold, and `sample_predictions`, the predictions for a few
            examples.
        """
        model = self._exported_model()
        metrics, predicted = validate(
            self.accelerator,
            model,
            self.processing_class,
            self.eval_dataset,
            self.evaluator,
            self.args.metric_for_best_model,
            self.stop_signal,
            **({"pad_bias": -1.0} if self.model_type.has_pad else {}),
        )
        metric = self.args.metric_for_best_model
        value = metric_value(metrics, metric)
        named = {f"eval_{name}": figure for name, figure in metrics.items()} | {f"eval_{metric}": value}
        self._call("on_evaluate", self.progress.step, metrics=named)
        if self.progress.best_metric is None or value > self.progress.best_metric:
            self.progress.best_metric = value
            self.save(model)
        return {"validation": metrics, "sample_predictions": sample_predictions(self.eval_dataset, predicted)}

    def save(self, model: OPTSGPreTrainedModel | None = None) -> None:
        """Save the model and its processor in `args.output_dir`. All processes call this.

        Args:
            model: An unsharded model with plain embeddings. Default: a copy of the model in training.
        """
        model = self._exported_model() if model is None else model
        adapters = adapter_states(self.model) if self.args.save_adapter else None
        if self.accelerator.is_main_process:
            save_checkpoint(model, self.processing_class, self.output_dir, self.args.save_half_precision, adapters)

    def _exported_model(self) -> OPTSGPreTrainedModel:
        model = copy_without_text_tying(self.model, full_state_dict(self.model))
        if any(parameter.requires_grad for parameter in self.model.model.text_tower.parameters()):
            embed_image_words(model.model, self.processing_class.tokenizer)
        return model

    def _fit_examples(self) -> dict:
        """Fit a model without trained parameters, the kNN baseline, to the training examples."""
        if self.accelerator.is_main_process:
            tags = self.train_dataset.dataset["tags"]
            classes = [[self.tag_table.index[tag] for tag in dict.fromkeys(own)] for own in tags]
            self.model.fit(*pool_examples(self.train_dataset, self.model.config), classes)
            delete_extra_files(self.output_dir)
            save_checkpoint(self.model, self.processing_class, self.output_dir)
        return {"trained_parameters": 0, "training_seconds": 0.0, "history": []}

    def _plan_steps(self) -> None:
        """Choose the number of steps, and divide a step among processes and micro-batches."""
        examples, processes = len(self.train_dataset), self.accelerator.num_processes
        self.batch_size = self.args.train_batch_size
        if self.batch_size > examples:
            # The same number for each process, so that any number of micro-batches can share them.
            self.batch_size = examples // processes * processes or examples
            logger.warning(
                f"There are only {examples} training examples: a step has {self.batch_size}, not "
                f"{self.args.train_batch_size}."
            )
        self.total_steps = max(1, round(self.args.num_train_epochs * examples / self.batch_size))
        self.eval_steps = self.args.evaluation_steps(self.total_steps)
        division = (self.batch_size, processes, self.args.per_device_train_batch_size)
        self.own_shards = None
        if isinstance(self.train_dataset, TaggedStream):
            shards, self.micro_batches, self.micro_batch_size = self.train_dataset.assign_shards(*division)
            if shards is not None:
                self.own_shards = shards[self.accelerator.process_index]
            if processes > 1:
                read = "stream shards of its own" if shards else "the whole stream and keeps its part of each step"
                logger.info(f"Each process reads {read}.")
        else:
            self.micro_batches = num_micro_batches(*division)
            self.micro_batch_size = math.ceil(self.batch_size / processes / self.micro_batches)
        details = f", {processes} processes" if processes > 1 else ""
        if self.micro_batches > 1:
            details += f", {self.micro_batches} micro-batches of at most {self.micro_batch_size} examples per process"
        epochs = f"{self.args.num_train_epochs:g} epochs"
        logger.info(f"{self.total_steps} steps of {self.batch_size} examples, {epochs}{details}.")
        self.callbacks.plan(self.total_steps, self.batch_size)

    def _prepare(self) -> None:
        """Make the optimizer, the schedule and the wrapped model."""
        args = self.args
        # For example frozen towers, the lower layers of a partly trained tower, or a loaded tag classifier.
        self.frozen_modules = _frozen_modules(self.model)
        # Batches are too small to estimate new statistics, which would also differ between processes.
        self.frozen_modules += [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        self.model = prepare_model(self.accelerator, self.model)
        groups = parameter_groups(
            self.model,
            learning_rate=args.learning_rate,
            tower_learning_rate=args.tower_learning_rate,
            embedding_lr_multiplier=args.embedding_lr_multiplier,
            weight_decay=args.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        warmup_steps = math.ceil(args.warmup_ratio * self.total_steps)
        self.scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, self.total_steps)
        self.wrapped_model, self.optimizer = prepare_training(
            self.accelerator,
            self.model,
            optimizer,
            micro_batch_size=self.micro_batch_size,
            max_grad_norm=args.max_grad_norm,
            mixed_precision=args.mixed_precision,
        )
        # Not prepared: a prepared scheduler would take one step per process.
        self.accelerator.register_for_checkpointing(self.scheduler)

    def _resume(self) -> None:
        """Load the last state of the run if there is one, and open the log after it."""
        # Processes differ only in the random choices of dropout.
        set_seed(self.args.seed, device_specific=True)
        run = self.args.result_arguments() | {"data": self.data_fingerprint, "examples_per_step": self.batch_size}
        self.run_state = RunState(self.accelerator, self.output_dir / STATE_FOLDER, run)
        checkpoint = self.args.resume_from_checkpoint
        if (saved := self.run_state.load(checkpoint)) is None:
            self.run_state.clear()
            if self.accelerator.is_main_process:
                delete_extra_files(self.output_dir)
        else:
            self.progress = TrainingProgress(**saved)
            self.callbacks.load_states(self.progress.callbacks)
            logger.info(f"Resuming after step {self.progress.step} of {self.total_steps}.")
            if checkpoint != "auto" and Path(checkpoint).resolve().parent != self.run_state.folder.resolve():
                # The best checkpoint so far is in the folder of another run.
                self.progress.best_metric = None
        self.start = self.stop_signal.saved_step = self.progress.step
        log_path, last_row = self.output_dir / "training_log.jsonl", max(self.start, 1) - 1
        saved = (self.progress.loss_sums, self.progress.log_history)
        self.log = TrainingLog(self.accelerator, log_path, last_row, self.total_steps, *saved)
        self.slot_changes = SlotChanges()
        self.unreadable = UnreadableExamples(self.args.max_unreadable, self.progress.unreadable)

    def _data_loader(self) -> DataLoader:
        """Return a loader of the micro-batches of this process that are left."""
        self.collator = OPTSGDataCollator(self.processing_class, self.tag_table)
        collate = self.collator
        if self.args.train_vision_tower and self.args.augment_images:
            collate = ImageChangingCollator(collate)
        plain_examples = getattr(self.train_dataset, "examples", self.train_dataset)
        settings = {
            "collate_fn": SkippingCollator(collate, plain_examples, self.args.max_unreadable + 1),
            # The seeds of the workers must not change the random state of dropout.
            "generator": torch.Generator().manual_seed(self.args.seed),
            "worker_init_fn": ignore_sigterm,
        }
        steps = (self.batch_size, self.total_steps, self.args.seed)
        partition = {
            "process": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
            "micro_batches": self.micro_batches,
            "start": self.start,
        }
        if isinstance(self.train_dataset, TaggedStream):
            batches = StreamBatches(self.train_dataset, *steps, stream_shards=self.own_shards, **partition)
            # At least one worker, to read the next batch during a step.
            workers = max(1, self.args.dataloader_num_workers)
            return DataLoader(batches, batch_size=None, num_workers=workers, **settings)
        batches = GlobalBatches(len(self.train_dataset), *steps, lengths=self.lengths, **partition)
        examples, workers = self.train_dataset, self.args.dataloader_num_workers
        if not isinstance(examples, SeededExamples):
            examples = SeededExamples(examples)
        return DataLoader(examples, batch_sampler=batches, num_workers=workers, **settings)

    def _train_to_last_step(self, batches: Iterator[CollatedBatch]) -> None:
        # A state is saved before its step is logged and validated, so a resumed run does that first.
        for step in range(max(self.start, 1), self.total_steps + 1):
            is_new = step > self.start
            if is_new:
                self._call("on_step_begin", step - 1)
                try:
                    self._training_step(step, [next(batches) for _ in range(self.micro_batches)])
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"Step {step}: {error} The same command would fail again: give a lower --learning_rate with "
                        "--resume_from_checkpoint never, or with another --output_dir. The last state and the best "
                        "checkpoint are kept."
                    ) from error
                self._examples_timed += self.batch_size
                seconds = time.perf_counter() - self._timer_start
                self.progress.examples_per_second = self._examples_timed / seconds
                self.progress.step = step
                self._call("on_step_end", step)
            is_ended = self.callbacks.take("should_training_stop")
            is_evaluated = self.callbacks.take("should_evaluate") or step in self.eval_steps or is_ended
            if is_stopped := self.stop_signal.any_process(self.accelerator):
                logger.warning(f"Asked to stop after step {step} of {self.total_steps}.")
            is_saved = self.callbacks.take("should_save") or is_evaluated
            is_saved = is_saved or (self.args.save_steps and step % self.args.save_steps == 0)
            if is_new and (is_stopped or is_saved):
                self._save_state(step)
            if is_stopped:
                raise Interrupted(step)
            if is_evaluated or step % self.args.logging_steps == 0:
                self._log_step(step, is_evaluated)
            if is_ended or self.callbacks.take("should_training_stop"):
                logger.info(f"A callback ended the training after step {step} of {self.total_steps}.")
                break

    def _call(self, event: str, step: int, **arguments: object) -> None:
        """Call an event of the callbacks after a number of steps."""
        self.callbacks.call(event, self.progress, step, step * self.batch_size / len(self.train_dataset), **arguments)

    def _training_step(self, step: int, batches: Sequence[CollatedBatch]) -> None:
        """Update the weights once, with the gradients of all micro-batches of all processes."""
        self.wrapped_model.train()
        for module in self.frozen_modules:
            module.training = False
        inputs, weights = [batch.inputs for batch in batches], [batch.weight for batch in batches]
        seed, config = (self.args.seed, step), self.model.config
        gather_candidates(self.accelerator, config, inputs, self.tag_table, self.args.num_negatives, seed, weights)
        loss_weights = global_loss_weights(self.accelerator, config, inputs, weights)
        losses = Counter()
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            losses.update(self._forward_backward(batch, loss_weights[index], synchronize=is_last))
        losses = self._reduce(losses, batches)
        # DeepSpeed limits the norm itself and does not return it. A scaler skips steps with infinite gradients.
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        norm = 0.0 if norm is None or self.accelerator.scaler is not None else float(norm)
        if not math.isfinite(losses["loss"] + norm):
            raise FloatingPointError(f"The loss is {losses['loss']} and the gradient norm is {norm}.")
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.log.record(losses)

    def _forward_backward(
        self, batch: CollatedBatch, loss_weights: Mapping[str, float], synchronize: bool
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of a micro-batch, and return what it contributes to the step's losses.

        Args:
            batch: The micro-batch.
            loss_weights: Its factors from [`global_loss_weights`].
            synchronize: Reduce the gradients over all processes, after the last micro-batch of a step.
        """
        self.accelerator.sync_gradients = synchronize
        context = contextlib.nullcontext() if synchronize else self.accelerator.no_sync(self.wrapped_model)
        # Text-tied embeddings are computed once per micro-batch.
        with context, parametrize.cached():
            with self.accelerator.autocast():
                outputs = self.wrapped_model(**send_to_device(batch.inputs, self.accelerator.device))
            losses = weighted_losses(self.model.config, outputs, loss_weights)
            # Gradients are averaged over processes, but these losses must be added.
            self.accelerator.backward(losses["loss"] * self.accelerator.num_processes)
        if self.accelerator.is_main_process and batch.weight:
            if outputs.get("assignment") is not None:
                self.slot_changes.record(batch.example_indices, outputs.assignment, batch.inputs["labels"])
        return {name: loss.detach() for name, loss in losses.items()}

    def _reduce(self, losses: Mapping[str, torch.Tensor], batches: Sequence[CollatedBatch]) -> dict[str, float]:
        """Add the losses of all processes, and record unreadable examples if any process found some."""
        found = {example: why for batch in batches for example, why in batch.unreadable.items()}
        found = self.unreadable.not_recorded(found)
        count = torch.tensor(float(len(found)), device=self.accelerator.device)
        *sums, total_found = self.accelerator.reduce(torch.stack([*losses.values(), count]), "sum").tolist()
        if total_found:
            self.unreadable.record(found)
        return dict(zip(losses, sums))

    def _restart_timer(self) -> None:
        self._examples_timed, self._timer_start = 0, time.perf_counter()

    def _save_state(self, step: int) -> None:
        self.progress.step = step
        self.progress.loss_sums, self.progress.unreadable = dict(self.log.sums), self.unreadable.reasons
        self.progress.callbacks = self.callbacks.saved_states()
        seconds = self.progress.training_seconds + time.perf_counter() - self._timer_start
        self.run_state.save(step, asdict(self.progress) | {"training_seconds": seconds})
        self.stop_signal.saved_step = step
        self._call("on_save", step)

    def _log_step(self, step: int, is_evaluated: bool) -> None:
        """Write a row of the log, after a validation if `is_evaluated`."""
        rate = self.progress.examples_per_second
        row = {"step": step, "epoch": round(step * self.batch_size / len(self.train_dataset), 3)}
        row |= self.log.mean_losses(rate) | {"examples_per_second": round(rate, 1)}
        row["learning_rate"] = self.scheduler.get_last_lr()[0]
        if (ratio := self.slot_changes.ratio()) is not None:
            row["slots_changed"] = round(ratio, 4)
        if is_evaluated:
            self.progress.training_seconds += time.perf_counter() - self._timer_start
            row |= {"training_seconds": round(self.progress.training_seconds, 1), **self.evaluate()}
            history = {name: value for name, value in row.items() if name != "sample_predictions"}
            self.progress.log_history.append(history)
            self._restart_timer()
        self.log.write(row)
        self._call("on_log", step, logs={name: value for name, value in row.items() if name != "sample_predictions"})


def _frozen_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules without any trained parameter, and what they contain; dropout belongs to its parent."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        children = [child for child in module.children() if any(True for _ in child.parameters())]
        return [frozen for child in children for frozen in _frozen_modules(child)]
    return list(module.modules())
