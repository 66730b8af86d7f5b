"""Files that are there as a whole or as they were before, whenever the program or the machine stops."""

import json
import os
from pathlib import Path

PARTIAL = ".partial"


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file."""
    # Several processes may have something to say.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
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
