"""Callbacks of `transformers` in the training loop."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from .arguments import OPTSGTrainingArguments
from .run_state import TrainingProgress


class TrainingCallbacks:
    """Calls `transformers.TrainerCallback`s with the arguments that `transformers.Trainer` gives them.

    The events are `on_train_begin`, `on_step_begin`, `on_step_end`, `on_log`, `on_evaluate`, `on_save` and
    `on_train_end`. Of the control's flags, `should_training_stop`, `should_evaluate` and `should_save` are followed.

    Args:
        callbacks: The callbacks. [`~transformers.EarlyStoppingCallback`] and others with a `state` continue where a
            resumed run was stopped.
        args: Training arguments.
        accelerator: Its accelerator. All processes call the events in the same step.
        model: The model in training.
        processing_class: Its processor.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        args: OPTSGTrainingArguments,
        accelerator: Accelerator,
        **arguments: object,
    ):
        # As in `transformers.Trainer`, a class stands for an object that it makes.
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.args, self.accelerator, self.arguments = args, accelerator, arguments
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=accelerator.is_local_main_process, is_world_process_zero=accelerator.is_main_process
        )

    def plan(self, total_steps: int, batch_size: int) -> None:
        """Tell the callbacks how long the training is."""
        self.state.max_steps, self.state.train_batch_size = total_steps, batch_size
        self.state.num_train_epochs = self.args.num_train_epochs

    def call(self, event: str, progress: TrainingProgress, step: int, epoch: float, **arguments: object) -> None:
        """Call an event of all callbacks.

        Args:
            event: Name of the event, such as `"on_step_end"`.
            progress: Progress of the training.
            step: Number of steps done.
            epoch: Number of epochs done.
            arguments: Further arguments of the event.
        """
        if not self.callbacks:
            return
        self.state.global_step, self.state.epoch = step, epoch
        self.state.log_history = progress.log_history
        if progress.log_history:
            self.state.best_metric, self.state.best_model_checkpoint = progress.best_metric, self.args.output_dir
        arguments = self.arguments | arguments
        for callback in self.callbacks:
            changed = getattr(callback, event)(self.args, self.state, self.control, **arguments)
            self.control = self.control if changed is None else changed

    def take(self, flag: str) -> bool:
        """Return whether a callback of any process has set a flag of the control, and clear it.

        A training run that is to stop stays so.
        """
        if not self.callbacks:
            return False
        value = bool(getattr(self.control, flag))
        if self.accelerator.num_processes > 1:
            value = bool(self.accelerator.reduce(torch.tensor(float(value), device=self.accelerator.device)).item())
        setattr(self.control, flag, value and flag == "should_training_stop")
        return value

    def saved_states(self) -> dict[str, dict]:
        """Return what a resumed run continues with: attributes of callbacks by class name, and of the control."""
        stateful = [callback for callback in self.callbacks if isinstance(callback, ExportableState)]
        states = {type(callback).__name__: callback.state()["attributes"] for callback in stateful}
        return states | {"TrainerControl": {"should_training_stop": self.control.should_training_stop}}

    def load_states(self, states: Mapping[str, Mapping]) -> None:
        """Set the attributes that [`saved_states`] returned."""
        for target in (*self.callbacks, self.control):
            for name, value in states.get(type(target).__name__, {}).items():
                setattr(target, name, value)
