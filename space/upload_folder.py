"""The temporary folder for uploads."""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a killed process keeps its folder.
    fcntl = None

PREFIX = "optsg-space-"
# The process that owns a folder holds a lock on this file. The system releases it when the process ends.
LOCK_NAME = ".lock"
# A process that was killed before it locked its folder leaves one without a lock.
UNLOCKED_SECONDS = 3600


class UploadFolder:
    """A temporary folder that deletes old uploads.

    Gradio's `delete_cache` deletes only complete uploads. This class also deletes what interrupted uploads leave, and
    the folders of killed processes.

    Args:
        keep_seconds: Age at which a file is deleted.
        sweep_seconds: Time between two sweeps.
    """

    def __init__(self, keep_seconds: float, sweep_seconds: float = 60):
        remove_abandoned_folders()
        self.path, self.lock = _locked_folder()
        self.keep_seconds = keep_seconds
        self.sweep_seconds = sweep_seconds
        self.stopped = threading.Event()
        os.environ["GRADIO_TEMP_DIR"] = self.path
        threading.Thread(target=self._sweep_repeatedly, daemon=True).start()

    def sweep(self) -> None:
        """Delete files and empty folders older than `keep_seconds`."""
        oldest = time.time() - self.keep_seconds
        for path in sorted(Path(self.path).rglob("*"), reverse=True):
            try:
                if path.lstat().st_mtime < oldest and path.name != LOCK_NAME:
                    # rmdir keeps folders that are not empty.
                    path.rmdir() if path.is_dir() else path.unlink()
            except OSError:
                continue

    def _sweep_repeatedly(self) -> None:
        while not self.stopped.wait(self.sweep_seconds):
            self.sweep()

    def remove(self) -> None:
        """Stop the sweeps and delete the folder."""
        self.stopped.set()
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)


def remove_abandoned_folders() -> None:
    """Delete the upload folders of this user whose processes were killed."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = folder / LOCK_NAME
        try:
            # Another user could put a link or a folder of the same name there.
            if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
                continue
            if not lock.is_file() and time.time() - folder.lstat().st_mtime < UNLOCKED_SECONDS:
                continue
            descriptor = _lock(lock)
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_folder() -> tuple[str, int | None]:
    """Make a folder and lock it. Another process may take a folder for abandoned before it is locked."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        try:
            lock = _lock(Path(path, LOCK_NAME))
        except (BlockingIOError, FileNotFoundError):
            continue
        if lock is None or os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a file, and return its descriptor.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
