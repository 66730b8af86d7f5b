"""A record that grows line by line and survives being cut off."""

import json
import os

from .change import SidecarError
from .whole_files import read_whole, write_whole


class Journal:
    """JSON objects by name, the latest of each; the last line may be torn, since a killed run writes it last.

    Args:
        path: of a file with one JSON object a line; made when the first is added.

    Raises:
        SidecarError: the file cannot be read, or a line before the last is not of a journal.
    """

    def __init__(self, path: str):
        self.path = path
        self.entries: dict[str, dict] = {}
        data = read_whole(path) or b""
        *lines, torn = data.split(b"\n")
        # What is there, and what of it is whole lines.
        self.on_disk, self.size = len(data), len(data) - len(torn)
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self.entries[entry["name"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise SidecarError(f"{path}: line {number} is not of this record; mend or remove it") from error
        self.superseded = len(lines) - len(self.entries)

    def get(self, name: str) -> dict:
        """The latest entry of a name; an empty one if there is none."""
        return self.entries.get(name, {})

    def is_behind(self) -> bool:
        """Whether somebody else has written to the file meanwhile."""
        try:
            return os.path.getsize(self.path) != self.on_disk
        except OSError:
            return self.on_disk > 0

    def add(self, name: str, entry: dict, durable: bool = True):
        """Writes an entry, down to the disk if `durable`.

        Raises:
            SidecarError: there is no room or no right, or another run writes to it; the journal is as it was.
        """
        if self.is_behind():
            raise SidecarError(f"{self.path} is being written to by another run")
        if self.superseded > 2 * len(self.entries) + 100:
            write_whole(self.path, b"".join(map(_line, self.entries.values())))
            self.superseded, self.size = 0, os.path.getsize(self.path)
            self.on_disk = self.size
        entry = {"name": name, **entry}
        line = _line(entry)
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self.size)
                try:
                    file.write(line)
                    file.flush()
                    if durable:
                        os.fsync(file.fileno())
                except OSError:
                    file.truncate(self.size)
                    raise
        except OSError as error:
            raise SidecarError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.superseded += name in self.entries
        self.entries[name] = entry
        self.size += len(line)
        self.on_disk = self.size


def _line(entry: dict) -> bytes:
    # Escapes in ASCII: names of files need not be Unicode.
    return json.dumps(entry).encode() + b"\n"
