"""States of a running training: each is complete or not there at all."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from modeling_optsg.data.atomic_files import PARTIAL, cannot_be_written, sync, sync_all, write_text
from modeling_optsg.data.checksums import CHECKSUMS, find_damage, write_checksums
from modeling_optsg.data.process_logging import get_logger

logger = get_logger(__name__)

# Folder of the states and of status.json, in the output folder.
STATE_FOLDER = "state"
PROGRESS = "progress.json"


@dataclass
class TrainingProgress:
    """Progress of a training, saved with its state.

    Args:
        step: Last step that is done.
        best_metric: Best value of `metric_for_best_model` so far, `None` before the first validation.
        training_seconds: Time spent in training steps.
        examples_per_second: Current speed.
        loss_sums: Sums of the losses since the last row of the log, and the number of steps.
        unreadable: Reasons for the training examples that were left out.
        log_history: Rows of the log that have validation metrics.
        callbacks: Attributes of callbacks; see [`TrainingCallbacks.saved_states`].
    """

    step: int = 0
    best_metric: float | None = None
    training_seconds: float = 0.0
    examples_per_second: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    log_history: list[dict] = field(default_factory=list)
    callbacks: dict[str, dict] = field(default_factory=dict)


class RunState:
    """Saved states of a training, to resume it after it was stopped at any moment.

    A state is written under a temporary name and then renamed. Only then are older ones deleted. It holds the model,
    the optimizer, the gradient scaler and the random states, as `accelerate` saves them, and a `progress` of the
    training loop. Frozen parameters are left out. Checksums detect a file that was damaged later: the state before is
    then loaded.

    Args:
        accelerator: After `prepare`.
        folder: Folder of the states.
        arguments: Arguments of the run. States of a run with other arguments are refused.
        keep: Number of states to keep.
    """

    def __init__(self, accelerator: Accelerator, folder: str | os.PathLike, arguments: dict, keep: int = 2):
        self.accelerator, self.folder, self.keep = accelerator, Path(folder), keep
        self.arguments = json.loads(json.dumps(arguments, allow_nan=False))
        kind = accelerator.distributed_type
        # A sharded state cannot be read with another strategy.
        self.strategy = kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None
        accelerator.register_save_state_pre_hook(self._drop_frozen)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int, progress: Mapping) -> None:
        """Save the state of a step. All processes call this.

        Raises:
            OSError: The folder cannot be written to. Earlier states stay, and nothing of this one.
        """
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.accelerator.is_main_process:
            for left_over in self.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left_over, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial), safe_serialization=False)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                run = {"step": step, "arguments": self.arguments, "strategy": self.strategy}
                # An attribute of a callback may be inf, and only this class reads the file.
                content = json.dumps({**progress, **run}, indent=1, allow_nan=True)
                write_text(partial / PROGRESS, content + "\n")
                write_checksums(partial)
                # Written before the renaming, so the final name never refers to incomplete files.
                sync_all(partial)
        except Exception as error:
            # Not only OSError, because torch raises its own errors if the disk is full.
            shutil.rmtree(partial, ignore_errors=True)
            raise cannot_be_written(f"the state of step {step}", self.folder, error) from error
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync(self.folder)
            self._delete_others(final)
        self.accelerator.wait_for_everyone()

    def _delete_others(self, latest: Path) -> None:
        others = [path for path in self.checkpoints() if path != latest]
        for path in others:
            # Later states exist if the run was resumed from an earlier one.
            if path.name > latest.name or path in others[: len(others) - self.keep + 1]:
                shutil.rmtree(path)

    def checkpoints(self) -> list[Path]:
        """Return the folders of the complete states, oldest first. Files in them may be damaged."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in found if path.suffix != PARTIAL and path.is_dir())

    def load(self, resume_from_checkpoint: str) -> dict | None:
        """Load a state.

        Args:
            resume_from_checkpoint: "auto" for the last state that is not damaged, "never" for none, or the folder of a
                state.

        Returns:
            Its progress; `None` if there is no state.

        Raises:
            FileNotFoundError: The folder does not contain a state.
            ValueError: The state is damaged, or belongs to a run with other arguments or another distributed strategy.
                With "auto": all states are damaged.
        """
        if resume_from_checkpoint == "never":
            return None
        if resume_from_checkpoint == "auto":
            candidates = self.checkpoints()[::-1]
            if not candidates:
                return None
        else:
            candidates = [Path(resume_from_checkpoint)]
            if not (candidates[0] / PROGRESS).is_file():
                raise FileNotFoundError(
                    f"{candidates[0]} does not contain the state of a training: {PROGRESS} is missing."
                )
        path = self._first_intact(candidates)
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        saved, strategy = progress.pop("arguments"), progress.pop("strategy")
        if strategy != self.strategy:
            raise ValueError(
                f"{path} was saved with the strategy {strategy or 'DDP'}; it cannot be resumed with "
                f"{self.strategy or 'DDP'}."
            )
        check_same_run(saved, self.arguments, path)
        self.accelerator.load_state(str(path))
        return progress

    def _first_intact(self, candidates: list[Path]) -> Path:
        """Return the first state without damage. All processes call this; the main process reads the files.

        Raises:
            ValueError: All are damaged.
        """
        found, damage = None, []
        for path in candidates if self.accelerator.is_main_process else ():
            if not os.path.lexists(path / CHECKSUMS) and (path / PROGRESS).is_file():
                # Earlier versions wrote none.
                logger.warning(f"The state {path.name} has no {CHECKSUMS}, so damage in it is not detected.")
                found = path
                break
            if not (problems := find_damage(path)):
                found = path
                break
            damage.append(f"The state {path.name} is damaged: {', '.join(problems)}.")
        found, damage = broadcast_object_list([found, damage])
        if found is None:
            raise ValueError(
                f"{' '.join(damage)} There is no other state to resume from. To start over, give "
                "--resume_from_checkpoint never."
            )
        for message in damage:
            logger.warning(f"{message} The training resumes from {found.name}.")
        return found

    def clear(self) -> None:
        """Delete all states. All processes call this."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            delete_states(self.folder)
        self.accelerator.wait_for_everyone()

    # Frozen towers are many times larger than the trained parameters, and come from the base model.

    def _drop_frozen(self, models: list, weights: list, output_dir: str) -> None:
        # Sharded models are saved by accelerate itself, and come without weights here.
        for model, state in zip(models, weights):
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            for name in frozen & state.keys():
                del state[name]

    def _load_trained(self, models: list, input_dir: str) -> None:
        # accelerate would load the models that stay in the list, and fail on the missing frozen parameters.
        while models:
            model = models.pop()
            name = "pytorch_model.bin" if not models else f"pytorch_model_{len(models)}.bin"
            state = torch.load(Path(input_dir, name), map_location="cpu", weights_only=True)
            # Without DDP's prefix: the number of processes may have changed.
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            plain = self.accelerator.unwrap_model(model)
            missing, unexpected = plain.load_state_dict(state, strict=False)
            trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
            if wrong := sorted(trained & set(missing)) + sorted(unexpected):
                raise ValueError(f"{input_dir} does not fit this model: {', '.join(wrong[:5])} …")


def delete_states(folder: Path) -> None:
    """Delete all states in a folder, complete or not."""
    for path in folder.glob("step-*"):
        shutil.rmtree(path)


def check_same_run(saved: Mapping, arguments: Mapping, name: str | os.PathLike) -> None:
    """Check that two runs have the same arguments and data.

    Args:
        saved: Arguments of a saved run.
        arguments: Arguments of this run.
        name: Name of the saved run in the error message.

    Raises:
        ValueError: They differ.
    """
    if different := sorted(key for key in saved.keys() | arguments.keys() if saved.get(key) != arguments.get(key)):
        changes = [f"{key} {saved.get(key)!r} (now {arguments.get(key)!r})" for key in different if key != "data"]
        if "data" in different:
            changes.append("other training or validation examples")
        raise ValueError(
            f"{name} belongs to a run with {', '.join(changes)}. Give the arguments of that run, another output_dir, "
            "or --resume_from_checkpoint never."
        )
