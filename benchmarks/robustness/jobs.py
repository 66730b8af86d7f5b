"""Runs a function in a process of its own, and measures its time and memory."""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_SECONDS = 10.0
MAX_BYTES = 1_500_000_000
# A process that needs so much memory is ended before it fills the machine.
KILL_BYTES = 2 * MAX_BYTES
POLL_SECONDS = 0.01
MAKING_SECONDS = 120.0
TRACEBACKS = ("Traceback (most recent call last)", "Exception ignored in")


@dataclass(frozen=True)
class Job:
    """A process that has ended.

    Args:
        status: Its exit status; `None` if it was killed.
        output: Its standard output.
        errors: Its standard error.
        seconds: Wall time, without the time that it waited for a processor on a busy machine.
        peak_bytes: Largest resident memory of the process or of a child, including that of the imported libraries.
        ended_by: "exit", "hang", "memory" or the name of a signal.
    """

    status: int | None
    output: str
    errors: str
    seconds: float
    peak_bytes: int
    ended_by: str

    @property
    def failure(self) -> str | None:
        """A failure that needs no knowledge of the input: "hang", "memory", "crash" or "traceback"."""
        if self.ended_by in ("hang", "memory"):
            return self.ended_by
        if self.ended_by != "exit":
            return "crash"
        if self.peak_bytes > MAX_BYTES:
            return "memory"
        return "traceback" if any(text in self.output + self.errors for text in TRACEBACKS) else None

    @property
    def error(self) -> str:
        """The last line and place of a traceback, or the first error of optsg, or how the process ended."""
        lines = self.errors.strip().splitlines()
        if self.ended_by != "exit" or not lines:
            return f"ended by {self.ended_by} after {self.seconds:.1f} s"
        if self.failure != "traceback":
            # Before it, there may be warnings of libraries.
            return next((line for line in lines if line.startswith("optsg")), lines[0])
        places = re.findall(r"""/((?:optsg|modeling_optsg|dataset_scripts)/\S+)", line (\d+)""", self.errors)
        return lines[-1] + "".join(f" ({path}:{line})" for path, line in places[-1:])


def run(function: Callable[[], int | None], max_seconds: float = MAX_SECONDS) -> Job:
    """Run a function in a forked process, which has the imported libraries already.

    Args:
        function: Returns the exit status; `None` stands for 0.
        max_seconds: A process that runs longer hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _run_and_exit(function, output, errors)
        status, seconds, peak_bytes, ended_by = _wait(child, max_seconds)
        # Processes that the process started and left running are ended too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (output, errors) if path.exists()]
        return Job(
            os.WEXITSTATUS(status) if ended_by == "exit" else None,
            *(texts if len(texts) == 2 else ("", "")),
            seconds,
            peak_bytes,
            ended_by,
        )


def make(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a forked process, as JSON, so that its memory is not that of later jobs.

    Raises:
        RuntimeError: The function has failed.
    """
    job = run(lambda: print(json.dumps(function(), allow_nan=False)), MAKING_SECONDS)
    if job.status != 0:
        raise RuntimeError(f"An input cannot be made: {job.errors}")
    return json.loads(job.output)


def _run_and_exit(function: Callable[[], int | None], output: Path, errors: Path) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)
        for descriptor, path in ((1, output), (2, errors)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        status = function() or 0
    except SystemExit as error:
        # As Python's own exit: a text is printed, and the status is 1.
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


def _wait(child: int, max_seconds: float) -> tuple[int, float, int, str]:
    """Wait for a process; returns its raw status, its time, its largest memory, and how it ended."""
    start, waited, seconds, peak_bytes, ended_by = time.monotonic(), 0.0, 0.0, 0, None
    while True:
        peak_bytes = max(peak_bytes, _resident_bytes(child))
        waited = _seconds_without_processor(child) or waited
        found, status, usage = os.wait4(child, os.WNOHANG)
        if ended_by is None:
            seconds = max(time.monotonic() - start - waited, usage.ru_utime + usage.ru_stime)
        if found:
            if ended_by is None:
                ended_by = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "exit"
            return status, seconds, max(peak_bytes, usage.ru_maxrss * 1024), ended_by
        if ended_by is None and seconds > max_seconds:
            ended_by = "hang"
        elif ended_by is None and peak_bytes > KILL_BYTES:
            ended_by = "memory"
        if ended_by is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _seconds_without_processor(process: int) -> float:
    """Return how long a process was ready and waited for a processor, 0 if the system does not say."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _resident_bytes(process: int) -> int:
    """Return the resident memory of a process, or that of its largest child."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return max(pages * os.sysconf("SC_PAGE_SIZE"), *map(_resident_bytes, map(int, children)), 0)
