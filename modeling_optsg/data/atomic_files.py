"""Files that are there as a whole or as they were before, whenever the program or the machine stops."""

import json
import os
import shutil
from pathlib import Path

PARTIAL = ".partial"


def cannot_be_written(what: str, folder: Path, error: Exception) -> OSError:
    """An error that says where, and how much room there is, in place of those that libraries raise."""
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(
        f"{folder}: {what} could not be written ({type(error).__name__}: {error}). {free:,.0f} MiB are free there; "
        "what was complete before is kept, and goes on with --resume auto."
    )


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file."""
    # Several processes may have something to say.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """[`sync`] for all that is in a folder, at any depth."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
