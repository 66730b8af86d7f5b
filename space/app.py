"""Serves a page and an API that tag images and videos: `python app.py`.

The environment variable `OPTSG_MODEL` selects another model: a folder or a name on the Hub. `OPTSG_BOOK` selects a
book: its folder, or the folder or Hub name of a checkpoint with a book.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Before torch is loaded. When several threads end, MKL may otherwise release their memory in an endless loop.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")

from interface import build, launch_settings  # noqa: E402
from limits import Limits  # noqa: E402
from tagging import Tagger  # noqa: E402
from upload_folder import UploadFolder  # noqa: E402

HERE = Path(__file__).resolve().parent
# A clone of the repository holds the weights in SHIPPED. They are to be published under the name PUBLISHED, which does
# not exist yet.
SHIPPED, PUBLISHED = HERE.parent / "checkpoints" / "optsg-icon-small", "org/optsg-icon-small"


def main() -> None:
    """Serve until the process is stopped, then delete all uploads."""
    limits = Limits()
    # The host stops the process with SIGTERM; the default handler would skip the clean-up below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uploads, tagger = UploadFolder(keep_seconds=60 * limits.keep_minutes + 120), None
    try:
        model = os.environ.get("OPTSG_MODEL") or (str(SHIPPED) if SHIPPED.is_dir() else PUBLISHED)
        tagger = Tagger(model, limits, os.environ.get("OPTSG_BOOK") or None)
        tagger.reader.wait_until_ready()
        build(tagger, limits, HERE / "examples").launch(**launch_settings(limits, uploads, HERE))
    finally:
        if tagger is not None:
            tagger.reader.stop()
        uploads.remove()


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stop:
        # Python would wait for the threads that answer requests, and the host kills a process that does not end soon.
        os._exit(stop.code if isinstance(stop.code, int) else 1)
