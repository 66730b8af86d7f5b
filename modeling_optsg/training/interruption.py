"""Interruptions: SIGTERM, the status of a run for programs that do not see its exit code, and lost workers."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator, PartialState

from modeling_optsg.data.atomic_files import write_json
from modeling_optsg.data.process_logging import get_logger

logger = get_logger(__name__)

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
# Environment variables set by `accelerate launch` and by `torchrun`.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK")


class Interrupted(BaseException):
    """The program was asked to stop.

    Args:
        step: Last step whose state is saved; 0 for none.
    """

    def __init__(self, step: int = 0):
        super().__init__(f"Asked to stop; the state of step {step} is saved." if step else "Asked to stop.")
        self.step = step


class RunStatus:
    """Status of a run in a JSON file.

    It is "preparing", "running", "fitting", "interrupted" (the same command resumes it), "failed" or "finished". It is
    read as "damaged" if the file is damaged.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict:
        """Return the content of the file; an empty dict if there is no file."""
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            # The states do not depend on it, and the next status replaces it.
            logger.warning(f"{self.path} is damaged. It will be written again.")
            return {"status": "damaged"}
        return content

    def set(self, status: str, **details: object) -> None:
        """Write the status, in the main process.

        "failed" and "finished" are kept until the run is prepared again: a launcher stops the other processes when
        one has failed, and an error while publishing does not make a run unfinished.
        """
        is_final = status != "preparing" and self.read().get("status") in ("failed", "finished")
        if PartialState().is_main_process and not is_final:
            self._write(status, details)

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Write "interrupted" or "failed" if an exception ends the block, in whichever process."""
        try:
            yield
        except Interrupted as stop:
            self.set("interrupted", step=stop.step)
            logger.info("Stopped. The same command resumes this run (--resume_from_checkpoint auto).")
            raise
        except BaseException as error:
            # An error here, as on a full disk, must not hide the original one.
            with contextlib.suppress(OSError):
                # The first error is the cause; the other processes fail after it.
                if self.read().get("status") not in ("failed", "finished"):
                    process = PartialState().process_index
                    self._write("failed", {"error": _short_message(error), "process": process})
            raise

    def _write(self, status: str, details: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"status": status, **details})


def _short_message(error: BaseException) -> str:
    """Return an error's type and message, without the traceback that a data loader worker includes in it."""
    text = str(error).strip()
    if "\nOriginal Traceback (most recent call last):\n" not in text:
        return f"{type(error).__name__}: {text}"
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] + 1 :])


class StopSignal:
    """Handler of SIGTERM, as a context manager.

    The signal raises [`Interrupted`] at once, or within [`deferred`] only sets `received`, so that a training run can
    finish its step and save its state. On Linux the signal also arrives when a launcher ends without passing it on, as
    `accelerate launch` does with one process.
    """

    def __init__(self):
        self.received, self.saved_step = False, 0
        self._is_deferred, self._previous_handler = False, signal.SIG_DFL

    def __enter__(self) -> "StopSignal":
        self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
        if sys.platform == "linux" and any(name in os.environ for name in LAUNCHER_VARIABLES):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        if not self._is_deferred:
            raise Interrupted(self.saved_step)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record the signal in this block, and raise [`Interrupted`] at its end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received:
            raise Interrupted(self.saved_step)

    def any_process(self, accelerator: Accelerator) -> bool:
        """Return whether any process received the signal. All processes call this in the same step."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.reduce(received, "sum").item())


def ignore_sigterm(worker: int) -> None:
    """Ignore SIGTERM in a data loader worker.

    Schedulers signal the whole process group, but the main process still needs its workers for the step at hand. It
    ends them with [`end_workers`].
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers(batches: Iterator) -> None:
    """End the workers of a data loader's iterator.

    At exit, Python would send SIGTERM to workers that are left and wait forever for those that ignore it.
    """
    # The program that called the training may have other processes.
    workers = list(getattr(batches, "_workers", ()))
    # An iterator does this when it is deleted, but the traceback of an error keeps it alive.
    getattr(batches, "_shutdown_workers", lambda: None)()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
