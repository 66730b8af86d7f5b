"""A record file that is appended to line by line, so that a killed run loses at most its last line."""

import json
import os
from collections.abc import Callable

from .files import read_file, replace_file
from .writer import SidecarError


class Journal:
    """JSON objects by name, the latest of each. The last line may be incomplete, since a killed run writes it last.

    Args:
        path: Path of a file with one JSON object per line; created when the first entry is added.
        is_valid: Whether an entry has the content that the caller needs.

    Raises:
        SidecarError: The file cannot be read, is a link, or a line before the last is not a valid entry.
    """

    def __init__(self, path: str, is_valid: Callable[[dict], bool]):
        # Entries would be appended to the target, which may be any file.
        if os.path.islink(path):
            raise SidecarError(f"{path} is a link; remove it")
        self.path = path
        self.entries: dict[str, dict] = {}
        data = read_file(path) or b""
        *lines, incomplete = data.split(b"\n")
        self.file_size = len(data)
        self.valid_size = len(data) - len(incomplete)
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["name"], str) or not is_valid(entry):
                    raise ValueError("it has another content")
                self.entries[entry["name"]] = entry
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise SidecarError(f"{path}: line {number} is not a valid entry; repair or remove it") from error
        self.superseded = len(lines) - len(self.entries)

    def get(self, name: str) -> dict:
        """Return the latest entry with this name, or an empty one."""
        return self.entries.get(name, {})

    def is_outdated(self) -> bool:
        """Return whether another run has written to the file since it was read."""
        try:
            return os.path.getsize(self.path) != self.file_size
        except OSError:
            return self.file_size > 0

    def add(self, name: str, entry: dict, durable: bool = True) -> None:
        """Append an entry.

        Args:
            name: Name of the entry; it replaces an earlier entry with the same name.
            entry: A JSON object.
            durable: Wait until the entry is on the disk.

        Raises:
            SidecarError: The file cannot be written (disk full, no permission), or another run writes to it. The
                journal is unchanged.
        """
        if self.is_outdated():
            raise SidecarError(f"another run is writing to {self.path}")
        if self.superseded > 2 * len(self.entries) + 100:
            self._compact()
        entry = {"name": name, **entry}
        line = _encode(entry)
        try:
            self._append(line, durable)
        except OSError as error:
            raise SidecarError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.superseded += name in self.entries
        self.entries[name] = entry
        self.file_size = self.valid_size = self.valid_size + len(line)

    def _compact(self) -> None:
        replace_file(self.path, b"".join(map(_encode, self.entries.values())))
        self.superseded = 0
        self.file_size = self.valid_size = os.path.getsize(self.path)

    def _append(self, line: bytes, durable: bool) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self.valid_size)
            try:
                file.write(line)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(self.valid_size)
                raise


def _encode(entry: dict) -> bytes:
    # ASCII escapes, since file names need not be valid Unicode.
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def is_list_of(kind: type, value: object) -> bool:
    """Return whether a JSON value is a list whose entries all have a type."""
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)
