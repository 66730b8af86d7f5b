"""Files that are the old one or the new one at any moment, whatever happens while they are written."""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator

from filelock import FileLock, Timeout

from .change import SidecarError

LOCK_SECONDS = 60
# Not through a link that somebody has put there under the unfinished file's name.
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def read_whole(path: str) -> bytes | None:
    """A file's bytes, or `None` if there is no such file.

    Raises:
        SidecarError: it cannot be read, or is a link to nothing.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        if os.path.islink(path):
            raise SidecarError(f"{path} is a link to nothing; mend or remove it") from None
        return None
    except OSError as error:
        raise SidecarError(f"{path} cannot be read: {error.strerror or error}") from error


def check_writable(folder: str):
    """
    Raises:
        SidecarError: files cannot be made in a folder, or the folder not in the next one above that is there.
    """
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise SidecarError(f"{folder} cannot be written into: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SidecarError(f"{folder} cannot be written into: no right to change {there}")


def write_whole(path: str, data: bytes):
    """Replaces a file, or makes it: under another name, down to the disk, then in its place.

    Mode and, where allowed, owner stay. A link stays one: what it points to is replaced.

    Raises:
        SidecarError: it is write-protected, or cannot be written (no room, no right); what was there before is there.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    # One name a file, so that what a killed run leaves is taken over by the next; short, since `name` may be long.
    partial = os.path.join(folder, f".optsg-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.partial")
    try:
        os.makedirs(folder, exist_ok=True)
        try:
            before = os.stat(target)
        except FileNotFoundError:
            before = None
        # Replacing needs only the folder's permission, but who protects a file means the file.
        if before is not None and not before.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            raise SidecarError(f"{path} is write-protected; it is left as it is")
        try:
            with open(os.open(partial, _WRITE, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if before is not None:
                if hasattr(os, "chown"):
                    with contextlib.suppress(PermissionError):
                        os.chown(partial, before.st_uid, before.st_gid)
                os.chmod(partial, stat.S_IMODE(before.st_mode))
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise SidecarError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def only_here(folder: str) -> Iterator[None]:
    """Keeps other runs of this program, on this machine, from writing into `folder` meanwhile.

    Raises:
        SidecarError: another run holds the folder for a minute.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    # Not in the folder itself: people look into it.
    locks = os.path.join(tempfile.gettempdir(), f"optsg-locks-{os.getuid() if hasattr(os, 'getuid') else ''}")
    lock = FileLock(os.path.join(locks, f"{name}.lock"), timeout=LOCK_SECONDS)
    try:
        os.makedirs(locks, mode=0o700, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise SidecarError(f"{folder} is being written to by another run") from error
    except OSError as error:
        raise SidecarError(f"{locks} cannot hold locks: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
