"""Files that are complete or unchanged, whenever the program or the machine stops."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial"


def cannot_be_written(what: str, folder: Path, error: Exception) -> OSError:
    """Make an error that names the folder and its free space.

    Args:
        what: What could not be written, in words.
        folder: The folder it should have been written to.
        error: The library's error.
    """
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(
        f"{folder}: {what} could not be written ({type(error).__name__}: {error}). {free:,.0f} MiB are free there. "
        "Files completed before are kept; --resume_from_checkpoint auto resumes from them."
    )


@contextlib.contextmanager
def os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raise an `OSError` that names the file if safetensors cannot write it, such as on a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file.

    Raises:
        ValueError: The value contains NaN or inf, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    # The process id, because several processes may write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path, is_windows: bool = os.name == "nt") -> None:
    """Wait until a file, or the list of a folder's files, is on the disk.

    Args:
        path: The file or folder.
        is_windows: Whether folders cannot be opened, and files only synchronised if they are opened for writing.
    """
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Call [`sync`] for everything in a folder, at any depth."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
