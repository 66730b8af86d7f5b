"""Checksums of files, to detect those that were damaged after they were written."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dataset_scripts.file_hash import file_sha256

from .atomic_files import write_text
from .process_logging import get_logger

logger = get_logger(__name__)

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder, at any depth, to `CHECKSUMS` in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    found = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    write_text(folder / CHECKSUMS, json.dumps(found, indent=1, allow_nan=False) + "\n")


def find_damage(folder: Path) -> list[str]:
    """Compare a folder with the checksums in it.

    Args:
        folder: A folder that [`write_checksums`] was called for.

    Returns:
        For each file that is missing or was changed, a sentence that names it. Further files are ignored.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        named = sorted((folder / name, digest) for name, digest in expected.items())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"{folder / CHECKSUMS} is missing or damaged"]
    problems = []
    for path, digest in named:
        try:
            if file_sha256(path) != digest:
                problems.append(f"{path} was changed")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror or error})")
    return problems


@contextlib.contextmanager
def lock_cached(path: Path) -> Iterator[None]:
    """Lock a cached file or folder while it is checked and computed.

    Another process that needs it waits, and then finds it complete. The system releases the lock when the process
    ends, however it ends.
    """
    lock = FileLock(f"{path}.lock")
    # A read-only folder, or a file system without locks, is used without them.
    with contextlib.suppress(OSError, NotImplementedError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info(f"Waiting for another process to compute {path}.")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def checksum_path(path: Path) -> Path:
    """Return the path of the checksum of a cached file."""
    return path.with_name(f"{path.name}.sha256")


def record_checksum(path: Path) -> None:
    """Write the checksum of a cached file that is complete."""
    write_text(checksum_path(path), file_sha256(path) + "\n")


def is_cached(path: Path) -> bool:
    """Return whether a cached file exists and has its checksum. A damaged file is reported and deleted.

    A file without a checksum is deleted, too: it may be incomplete. Call this within [`lock_cached`].
    """
    if not path.exists():
        return False
    recorded = checksum_path(path)
    expected = recorded.read_bytes().strip() if recorded.exists() else None
    if expected == file_sha256(path).encode():
        return True
    reason = "it has no checksum" if expected is None else "it was changed after it was written"
    logger.warning(f"{path} is computed again: {reason}.")
    path.unlink()
    return False
