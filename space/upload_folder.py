"""Where Gradio keeps what it is sent, and its end."""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path


class UploadFolder:
    """A folder of this process alone. Gradio's `delete_cache` deletes what it knows of; an upload that breaks off
    leaves a file it does not, and every file a folder of its own."""

    def __init__(self, keep_seconds: float, every_seconds: float = 60):
        self.path = tempfile.mkdtemp(prefix="optsg-space-")
        self.keep_seconds = keep_seconds
        os.environ["GRADIO_TEMP_DIR"] = self.path
        self.stopped = threading.Event()
        self.every_seconds = every_seconds
        threading.Thread(target=self._sweep_on, daemon=True).start()

    def sweep(self) -> None:
        """Deletes what is older than `keep_seconds`."""
        oldest = time.time() - self.keep_seconds
        for path in sorted(Path(self.path).rglob("*"), reverse=True):
            try:
                if path.lstat().st_mtime < oldest:
                    # A folder that is not empty stays.
                    path.rmdir() if path.is_dir() else path.unlink()
            except OSError:
                continue

    def _sweep_on(self) -> None:
        while not self.stopped.wait(self.every_seconds):
            self.sweep()

    def remove(self) -> None:
        self.stopped.set()
        shutil.rmtree(self.path, ignore_errors=True)
