"""Tags for images and videos, in the browser and for other programs: `python app.py`.

`OPTSG_MODEL` names another model, a folder or a Hub name.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from interface import build, launch_settings  # noqa: E402
from limits import Limits  # noqa: E402
from tagging import Tagger  # noqa: E402
from upload_folder import UploadFolder  # noqa: E402

HERE = Path(__file__).resolve().parent
# In a clone of the repository the weights lie beside this folder. The Hub name is where they are to be published;
# there is nothing under it yet.
SHIPPED, PUBLISHED = HERE.parent / "checkpoints" / "optsg-icon-small", "org/optsg-icon-small"


def main() -> None:
    limits = Limits()
    # Stopped by its host it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    model = os.environ.get("OPTSG_MODEL") or (str(SHIPPED) if SHIPPED.is_dir() else PUBLISHED)
    uploads = UploadFolder(keep_seconds=60 * limits.keep_minutes + 120)
    tagger = Tagger(model, limits)
    try:
        tagger.reader.wait()
        build(tagger, limits, HERE / "examples").launch(**launch_settings(limits, uploads, HERE))
    finally:
        tagger.reader.stop()
        uploads.remove()


if __name__ == "__main__":
    main()
