"""What becomes of a run: noticed signals, and a file for those who see no exit code."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger

from modeling_optsg.data.atomic_files import write_json

logger = get_logger(__name__, log_level="INFO")


class Interrupted(BaseException):
    """The program was asked to stop.

    Args:
        step: the last one whose state is saved, 0 if none is.
    """

    def __init__(self, step: int = 0):
        super().__init__(f"Asked to stop; the state of step {step} is saved." if step else "Asked to stop.")
        self.step = step


class RunStatus:
    """Says in a JSON file how a run is: "preparing", "running", "fitting", "interrupted" (started again it goes on),
    "failed" or "finished"."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict:
        """What the file says; nothing if there is none."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def set(self, status: str, **details) -> None:
        """Writes the file; of several processes the first one does. "failed" stays until the run is prepared again: a
        launcher asks the others to stop because one has failed."""
        last = self.read().get("status")
        # A stop or an error after the end, in the publishing, makes no unfinished run of it.
        settled = status != "preparing" and last in ("failed", "finished")
        if PartialState().is_main_process and not settled:
            self._write(status, details)

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Says of what is run in it that it was interrupted or has failed, in whichever process that was.
        [`Interrupted`] ends here; other errors go on."""
        try:
            yield
        except Interrupted as stop:
            self.set("interrupted", step=stop.step)
            logger.info("Stopped; the same command, with --resume_from_checkpoint auto, goes on from here.")
        except BaseException as error:
            # Not to hide it behind another one: the disk may be full.
            with contextlib.suppress(OSError):
                # The others fail because one has, and say so later.
                if self.read().get("status") not in ("failed", "finished"):
                    process = PartialState().process_index
                    self._write("failed", {"error": _in_short(error), "process": process})
            raise

    def _write(self, status: str, details: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"status": status, **details})


def _in_short(error: BaseException) -> str:
    """Without the traceback that a loader's worker puts into what it says."""
    text = str(error).strip()
    if "\nOriginal Traceback (most recent call last):\n" not in text:
        return f"{type(error).__name__}: {text}"
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] + 1 :])


# The launchers' marks: `accelerate`'s for one process, and `torchrun`'s.
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK")


class StopSignal:
    """SIGTERM: [`Interrupted`] at once, or noted for the end of a step where there is a state to save. On Linux it
    comes too when a launcher ends without passing it on, as `accelerate launch` does with one process."""

    def __init__(self):
        self.noted, self.at_once, self.saved_step = False, True, 0
        self._before = signal.SIG_DFL

    def __enter__(self):
        self._before = signal.signal(signal.SIGTERM, self._note)
        if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, signum, frame):
        self.noted = True
        if self.at_once:
            raise Interrupted(self.saved_step)

    @contextlib.contextmanager
    def only_noted(self) -> Iterator[None]:
        """In it the signal stops nothing by itself; ask [`anywhere`]."""
        self.at_once = False
        try:
            yield
        finally:
            self.at_once = True
        if self.noted:
            raise Interrupted(self.saved_step)

    def anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all processes must ask in the same step."""
        if accelerator.num_processes == 1:
            return self.noted
        noted = torch.tensor(float(self.noted), device=accelerator.device)
        return bool(accelerator.reduce(noted, "sum").item())


def ignore_sigterm(worker: int) -> None:
    """For a data loader's workers: who stops a run signals its whole process group, but the run itself ends them,
    with [`end_workers`]."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers(batches: Iterator) -> None:
    """Ends the workers of a loader's iterator, whatever became of the training. Python ends what is left of them with
    SIGTERM when the program ends, and would wait for ever for those that ignore it."""
    # What the iterator does when it is forgotten, which one in the traceback of an error is not.
    getattr(batches, "_shutdown_workers", lambda: None)()
    for worker in multiprocessing.active_children():
        worker.kill()
