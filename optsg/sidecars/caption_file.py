"""Captions (`photo.txt`): the tags of an image in one line, comma and space between, as image generators train on.

A caption has no room for a record of whose tag is whose, so each folder has one, `.optsg-captions.jsonl`.
"""

import codecs
import hashlib
import os

from ..media_files import MediaFile
from .change import Change, SidecarError
from .journal import Journal
from .ownership import reconcile
from .places import Place, SidecarPlaces
from .whole_files import only_here, read_whole, write_whole

RECORD_NAME = ".optsg-captions.jsonl"
COMMA_NOTE = "tags with a comma or a line end are left out: a caption would split them"


class Captions:
    """Writes each file's tags into its caption's first line; further lines are a person's."""

    kind = "txt"

    def __init__(self, places: SidecarPlaces, fingerprints, model: str, dry_run: bool):
        self.places, self.fingerprints, self.model, self.dry_run = places, fingerprints, model, dry_run
        self.journals: dict[str, Journal] = {}

    def done(self, file: MediaFile) -> bool:
        """Whether the caption is on record as made of this model, these settings and this file.

        Raises:
            SidecarError: the caption cannot be read or must not be written.
        """
        place = self.places.of(file, ".txt", "stem")
        data, entry = self._read(place)
        done = data is not None and entry.get("fingerprint") == self.fingerprints(file)
        if not done:
            self.places.check_writable(place)
        return done

    def write(self, file: MediaFile, tags: list[dict]) -> Change:
        """Brings the caption up to date with `tags` (see `reconcile`).

        Raises:
            SidecarError: the caption cannot be read or must not be written; it is as it was.
        """
        place = self.places.of(file, ".txt", "stem")
        folder, name = os.path.split(place.path)
        with only_here(folder):
            data, entry = self._read(place)
            source = data
            if data is None and place.begin_from:
                source = read_whole(place.begin_from)
            caption = _Caption(source if source is not None else b"\n", place.path)
            given = [tag["tag"].strip() for tag in tags if not set(tag["tag"]) & set(",\n\r")]
            owned = reconcile(caption.tags(), entry.get("written", []), entry.get("declined", []), given)
            new = caption.changed(owned.added, owned.removed)
            change = Change(place.path, owned.added, owned.removed, written=new != data)
            if len(given) < len(tags):
                change.notes.append(COMMA_NOTE)
            record = {"written": owned.ours, "declined": owned.declined, "fingerprint": self.fingerprints(file)}
            if self.dry_run or (not change.written and record == {k: entry.get(k) for k in record}):
                return change
            # Two files cannot change at once: the record comes first and says how to tell whether the caption did.
            journal = self._journal(folder)
            intent = {**record, "before": _digest(data), "after": _digest(new), "earlier": entry}
            if change.written:
                journal.add(name, intent)
                write_whole(place.path, new)
            journal.add(name, record, durable=not change.written)
        return change

    def _journal(self, folder: str) -> Journal:
        if folder not in self.journals or self.journals[folder].is_behind():
            self.journals[folder] = Journal(os.path.join(folder, RECORD_NAME))
        return self.journals[folder]

    def _read(self, place: Place) -> tuple[bytes | None, dict]:
        """The caption's bytes, if it is there, and what is on record of it: nothing, if it is not."""
        folder, name = os.path.split(place.path)
        data = read_whole(place.path)
        if data is None:
            if place.begin_from:
                _Caption(read_whole(place.begin_from) or b"", place.begin_from)
            return None, {}
        caption = _Caption(data, place.path)
        entry = self._journal(folder).get(name)
        if "after" not in entry:
            return data, entry
        # The run that wrote this was cut off between record and caption, or right after both.
        if _digest(data) == entry["after"]:
            return data, entry
        if _digest(data) == entry["before"]:
            return data, entry["earlier"]
        # And then a person changed the caption: what is missing was perhaps never written, so not deleted.
        ours = [*entry["written"], *entry["earlier"].get("written", [])]
        written = [tag for tag in caption.tags() if tag in ours]
        return data, {"written": written, "declined": entry["earlier"].get("declined", [])}


class _Caption:
    """A caption's text; what is not changed keeps its spaces, line ends and byte-order mark.

    Raises:
        SidecarError: it is not UTF-8.
    """

    def __init__(self, data: bytes, path: str):
        self.mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        try:
            text = data[len(self.mark) :].decode()
        except UnicodeDecodeError as error:
            raise SidecarError(f"{path} is left as it is: it is not UTF-8 text: {error}") from error
        line, end, rest = text.partition("\n")
        self.line, self.rest = line.rstrip("\r"), line[len(line.rstrip("\r")) :] + end + rest

    def tags(self) -> list[str]:
        return [piece.strip() for piece in self.line.split(",") if piece.strip()]

    def changed(self, added: list[str], removed: list[str]) -> bytes:
        line = self.line
        if removed:
            pieces = line.split(",")
            left = [piece for piece in pieces if piece.strip() not in removed]
            line = ",".join(left) if any(map(str.strip, left)) else ""
            line = line.lstrip() if pieces[0].strip() in removed else line
        if added:
            line = line.rstrip().removesuffix(",")
            line = ", ".join([line, *added] if line.strip() else added)
        return self.mark + (line + self.rest).encode()


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
