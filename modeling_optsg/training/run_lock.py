"""A lock that keeps a second training run out of a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from modeling_optsg.data.process_logging import get_logger

logger = get_logger(__name__)

LOCK_NAME = "run.lock"


@contextlib.contextmanager
def lock_run(accelerator: Accelerator, folder: Path, output_dir: str) -> Iterator[None]:
    """Lock the folder of a training's states. All processes call this, and the main process holds the lock.

    The system releases the lock when the process ends, however it ends.

    Args:
        accelerator: The accelerator.
        folder: Folder of the states.
        output_dir: Name of the training in the error message.

    Raises:
        RuntimeError: Another process holds the lock.
    """
    lock, refusal = FileLock(folder / LOCK_NAME, timeout=0), None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            refusal = (
                f"Another process is training in {output_dir}. Wait until it has ended, or give another output_dir."
            )
        except (OSError, NotImplementedError) as error:
            logger.warning(f"{folder} cannot be locked ({error}): do not start a second run there.")
    [refusal] = broadcast_object_list([refusal])
    if refusal is not None:
        raise RuntimeError(refusal)
    try:
        yield
    finally:
        lock.release()
