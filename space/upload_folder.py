"""The temporary folder for uploads."""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path


class UploadFolder:
    """A temporary folder that deletes old uploads.

    Gradio's `delete_cache` deletes only complete uploads. This class also deletes what interrupted uploads leave.

    Args:
        keep_seconds: Age at which a file is deleted.
        sweep_seconds: Time between two sweeps.
    """

    def __init__(self, keep_seconds: float, sweep_seconds: float = 60):
        self.path = tempfile.mkdtemp(prefix="optsg-space-")
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
                if path.lstat().st_mtime < oldest:
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
