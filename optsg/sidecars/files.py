"""Reads, replaces and locks files. A stopped run never leaves a partly written file."""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator

from ..media_files import OWN_PREFIX
from .writer import SidecarError

LOCK_SECONDS = 60
# Opening a named pipe without this flag would wait for the other end.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
# O_NOFOLLOW: an attacker could create a link with the name of the partial file.
_WRITE_FLAGS = (
    os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_WAIT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
)
_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def read_file(path: str) -> bytes | None:
    """Read a file, or return `None` if it does not exist.

    Raises:
        SidecarError: The file cannot be read, is a broken link, or is not a regular file but a named pipe or a device.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SidecarError(f"{path} is not a regular file; move it")
            return file.read()
    except FileNotFoundError:
        if os.path.islink(path):
            raise SidecarError(f"{path} is a broken link; repair or remove it") from None
        return None
    except OSError as error:
        raise SidecarError(f"{path} cannot be read: {error.strerror or error}") from error


def check_writable(folder: str) -> None:
    """Check that files can be created in a folder, which may not exist yet.

    Raises:
        SidecarError: The folder or its next existing parent is not a folder, or is not writable.
    """
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise SidecarError(f"{folder} is not writable: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SidecarError(f"{folder} is not writable: no permission to change {existing}")


def replace_file(path: str, data: bytes, follow_link: bool = True) -> None:
    """Create or replace a file atomically.

    The data are first written to a partial file in the same folder, which then replaces the old file. The mode is
    kept. The owner is kept if permissions allow it.

    Args:
        path: Path of the file.
        data: Its new content.
        follow_link: If the path is a link, replace its target; otherwise the link itself is replaced by a file.

    Raises:
        SidecarError: The file is write-protected or cannot be written (disk full, no permission). It is unchanged.
    """
    target = os.path.realpath(path)
    if not follow_link and os.path.islink(path):
        target = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    folder, name = os.path.split(target)
    # The name is fixed, so the next run overwrites the partial file of a killed run. A hash is never too long.
    partial = os.path.join(folder, f"{OWN_PREFIX}{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.partial")
    try:
        os.makedirs(folder, exist_ok=True)
        before = None
        with contextlib.suppress(FileNotFoundError):
            # The target of a link that is replaced keeps its mode and its owner to itself.
            before = None if os.path.islink(target) else os.stat(target)
        # Replacing a file requires only permission for the folder, so the protection of the file is checked here.
        if before is not None and not before.st_mode & _ANY_WRITE:
            raise SidecarError(f"{path} is write-protected and was not changed")
        try:
            _write_partial(partial, data, before)
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise SidecarError(f"{path} cannot be written: {error.strerror or error}") from error


def _write_partial(path: str, data: bytes, before: os.stat_result | None) -> None:
    with open(os.open(path, _WRITE_FLAGS, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if before is not None:
        if hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):
                os.chown(path, before.st_uid, before.st_gid)
        os.chmod(path, stat.S_IMODE(before.st_mode))


def _check_private(folder: str) -> None:
    """Check that a folder in the shared temporary folder belongs to the user alone. Windows has one for each user."""
    if not hasattr(os, "getuid"):
        return
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise SidecarError(f"{folder} is not a folder that only you can use; remove it")


@contextlib.contextmanager
def lock_folder(folder: str) -> Iterator[None]:
    """Prevents other runs of this program on this machine from writing to a folder.

    Raises:
        SidecarError: Another run held the lock for a minute, or another user may change the folder of the locks.
    """
    # Imported here to keep `optsg --help` fast.
    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    # The locks are in a temporary folder to keep them out of the photo folders.
    locks = os.path.join(tempfile.gettempdir(), f"optsg-locks-{os.getuid() if hasattr(os, 'getuid') else ''}")
    lock = FileLock(os.path.join(locks, f"{name}.lock"), timeout=LOCK_SECONDS)
    try:
        os.makedirs(locks, mode=0o700, exist_ok=True)
        _check_private(locks)
        lock.acquire()
    except Timeout as error:
        raise SidecarError(f"another run is writing into {folder}") from error
    except OSError as error:
        raise SidecarError(f"{locks} cannot hold locks: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
