"""Checkpoints of a running training: complete or not there at all."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from modeling_optsg.data.atomic_files import PARTIAL, cannot_be_written, sync, sync_all, write_json

PROGRESS = "progress.json"


class RunState:
    """Keeps a training's state in `folder`, so that it can go on after it was stopped at any moment.

    A checkpoint is written beside the last one under another name and then renamed; only after that are older ones
    taken away. It holds what `accelerate` saves of what was prepared (model, optimiser, scaler, each process's random
    states), the schedule, and `progress`: the step and whatever else the loop needs. Parameters that are not trained
    are left out.

    Args:
        accelerator: after `prepare`.
        folder: made if it is not there.
        arguments: what the run was started with; a checkpoint of another run is refused.
        keep: how many checkpoints are kept.
    """

    def __init__(self, accelerator: Accelerator, folder: str | os.PathLike, arguments: dict, keep: int = 2):
        self.accelerator, self.folder, self.keep = accelerator, Path(folder), keep
        self.arguments = json.loads(json.dumps(arguments))
        kind = accelerator.distributed_type
        # How what was prepared is divided among processes: others cannot read it.
        self.divided = kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None
        accelerator.register_save_state_pre_hook(self._leave_out_frozen)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int, progress: dict) -> None:
        """Writes the checkpoint of a step. All processes call it.

        Raises:
            OSError: the disk is full or not to be written on; earlier checkpoints stay, and nothing of this one.
        """
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.accelerator.is_main_process:
            # Those that killed runs have left, of whichever step.
            for left in self.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial), safe_serialization=False)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                known = {"step": step, "arguments": self.arguments, "divided": self.divided}
                write_json(partial / PROGRESS, known | progress)
                # Before it has its name, which must not stand for bytes that are not on the disk yet.
                sync_all(partial)
        except Exception as error:
            # torch has errors of its own for a full disk, which is not to stay full of this.
            shutil.rmtree(partial, ignore_errors=True)
            raise cannot_be_written(f"the state of step {step}", self.folder, error) from error
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync(self.folder)
            others = [path for path in self.checkpoints() if path != final]
            for path in others:
                # Later ones are of what was gone back from.
                if path.name > final.name or path in others[: len(others) - self.keep + 1]:
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in found if path.suffix != PARTIAL and (path / PROGRESS).is_file())

    def load(self, resume: str) -> dict | None:
        """Goes back to a checkpoint and returns its progress.

        Args:
            resume: "auto", the last complete one or `None`; "never"; or a checkpoint's folder.

        Raises:
            FileNotFoundError: the folder is no checkpoint.
            ValueError: it belongs to a run with other arguments.
        """
        if resume == "never":
            return None
        if resume == "auto":
            if not (found := self.checkpoints()):
                return None
            path = found[-1]
        else:
            path = Path(resume)
            if not (path / PROGRESS).is_file():
                raise FileNotFoundError(f"{path} is no checkpoint of a running training: it has no {PROGRESS}.")
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        saved, divided = progress.pop("arguments"), progress.pop("divided", None)
        if divided != self.divided:
            raise ValueError(f"{path} was written under {divided or 'no'} division of the model, not {self.divided}.")
        refuse_other_run(saved, self.arguments, path)
        self.accelerator.load_state(str(path))
        return progress

    def clear(self) -> None:
        """Takes all checkpoints away: the training is finished, or begins anew."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and self.folder.is_dir():
            for path in self.folder.glob("step-*"):
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    # Frozen towers, many times larger than what is trained, come from the base they were taken from.

    def _leave_out_frozen(self, models, weights, output_dir) -> None:
        # Sharded models are saved by `accelerate` itself, and come without weights here.
        for model, state in zip(models, weights):
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            for name in frozen & state.keys():
                del state[name]

    def _load_trained(self, models, input_dir) -> None:
        # What is left in the list `accelerate` would load by itself, and miss what was left out.
        while models:
            model = models.pop()
            name = "pytorch_model.bin" if not models else f"pytorch_model_{len(models)}.bin"
            state = torch.load(Path(input_dir, name), map_location="cpu", weights_only=True)
            # Names as they are without the wrapper of several processes: their number may have changed.
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            plain = self.accelerator.unwrap_model(model)
            missing, unexpected = plain.load_state_dict(state, strict=False)
            trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
            if lacking := sorted(trained & set(missing)) + sorted(unexpected):
                raise ValueError(f"{input_dir} does not fit this model: {', '.join(lacking[:5])} …")


def refuse_other_run(saved: dict, arguments: dict, name: str | os.PathLike) -> None:
    """
    Args:
        saved: what another run was started with; arguments: what this one is.
        name: what is left of the other.

    Raises:
        ValueError: they differ.
    """
    if other := sorted(key for key in saved.keys() | arguments.keys() if saved.get(key) != arguments.get(key)):
        changed = ", ".join(f"{key} {saved.get(key)!r} (now {arguments.get(key)!r})" for key in other if key != "data")
        if "data" in other:
            changed = ", ".join(filter(None, [changed, "other training or validation examples"]))
        raise ValueError(
            f"{name} is of a run with {changed}. Give the arguments it was started with, another output_dir, or "
            "--resume_from_checkpoint never."
        )
