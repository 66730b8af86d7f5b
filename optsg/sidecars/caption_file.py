"""Captions (`photo.txt`): the tags of an image on one line, separated by commas, as image generators expect them.

A caption has no place for a record of which tags this program added. Each folder has one, `.optsg-captions.jsonl`.

A caption that is a link may lead to any file. The link is replaced by a file, and its target is never changed.
"""

import codecs
import hashlib
import os
from dataclasses import replace

from ..media_files import OWN_PREFIX, MediaFile
from .embedded import EmbeddedMetadata
from .files import check_writable, lock_folder, read_file, replace_file
from .journal import Journal, is_list_of
from .locations import SidecarLocation, SidecarLocator
from .reconciliation import reconcile
from .writer import Change, Fingerprint, SidecarError, TagWriter

SUFFIX = ".txt"
RECORD_NAME = f"{OWN_PREFIX}captions.jsonl"
LINK_REMARK = "replaced captions that are links"
OUTSIDE_REMARK = f"{LINK_REMARK} out of the folder, without reading their targets"
SEPARATOR_REMARK = "left out tags with a comma or a line break, which a caption cannot hold"


class CaptionWriter(TagWriter):
    """Writes each file's tags into the first line of its caption; see `make_writer` for the arguments."""

    def __init__(self, locator: SidecarLocator, fingerprint: Fingerprint, model: str, dry_run: bool):
        self.locator, self.fingerprint, self.dry_run = locator, fingerprint, dry_run
        self.journals: dict[str, Journal] = {}

    def is_done(self, file: MediaFile) -> bool:
        """See `TagWriter.is_done`."""
        location = self._locate(file)
        data, entry = self._read(location)
        done = data is not None and entry.get("fingerprint") == self.fingerprint(file)
        if not done and os.path.islink(location.path):
            check_writable(os.path.dirname(location.path))
        elif not done:
            self.locator.check_writable(location)
        return done

    def write(
        self, file: MediaFile, tags: list[dict], title: str | None = None, embedded: EmbeddedMetadata | None = None
    ) -> Change:
        """See `TagWriter.write`."""
        location = self._locate(file)
        with lock_folder(os.path.dirname(location.path)):
            before, entry = self._read(location)
            source = read_file(location.template) if before is None and location.template else before
            caption = _Caption(source if source is not None else b"\n", location.path)
            predicted = [tag["tag"].strip() for tag in tags if not set(tag["tag"]) & set(",\n\r")]
            result = reconcile(caption.tags(), entry.get("generated", []), entry.get("declined", []), predicted)
            if not result.ours and not entry:  # no tags, now or earlier
                return Change(location.path)
            after = caption.edit(result.added, result.removed)
            change = Change(location.path, result.added, result.removed, written=after != before)
            if location.remark:
                change.remarks.append(location.remark)
            if len(predicted) < len(tags):
                change.remarks.append(SEPARATOR_REMARK)
            record = {"generated": result.ours, "declined": result.declined, "fingerprint": self.fingerprint(file)}
            if not self.dry_run:
                self._save(location.path, before, after, record, entry)
        return change

    def _locate(self, file: MediaFile) -> SidecarLocation:
        """Return the location of a caption; the target of a link in the folder is the template of the new file."""
        location = self.locator.locate(file, SUFFIX, "stem", replaces_links=True)
        if os.path.islink(location.path):
            location = replace(location, template=location.path, remark=LINK_REMARK)
        if location.template is None:
            return location
        if not self.locator.is_inside(file, location.template):
            return replace(location, template=None, remark=OUTSIDE_REMARK)
        # A broken link has no text.
        target = os.path.realpath(location.template)
        return replace(location, template=target if os.path.isfile(target) else None)

    def _save(self, path: str, before: bytes | None, after: bytes, record: dict, entry: dict) -> None:
        """Write the caption and its record.

        Two files cannot change at the same time. The record is written first and says how to find out whether the
        caption was written too.
        """
        folder, name = os.path.split(path)
        written = after != before
        if not written and record == {key: entry.get(key) for key in record}:
            return
        journal = self._journal(folder)
        if written:
            journal.add(name, {**record, "before": _digest(before), "after": _digest(after), "earlier": entry})
            replace_file(path, after, follow_link=False)
        journal.add(name, record, durable=not written)

    def _journal(self, folder: str) -> Journal:
        if folder not in self.journals or self.journals[folder].is_outdated():
            self.journals[folder] = Journal(os.path.join(folder, RECORD_NAME), _is_valid)
        return self.journals[folder]

    def _read(self, location: SidecarLocation) -> tuple[bytes | None, dict]:
        """Return the bytes of the caption, if it exists, and its record; both are checked."""
        folder, name = os.path.split(location.path)
        data = None if os.path.islink(location.path) else read_file(location.path)
        if data is None:
            if location.template:
                _Caption(read_file(location.template) or b"", location.template)
            return None, {}
        caption = _Caption(data, location.path)
        return data, _resolve(self._journal(folder).get(name), data, caption)


def _is_valid(entry: dict) -> bool:
    """Return whether an entry of the record has the form that `CaptionWriter._save` gives it."""
    lists = all(is_list_of(str, entry[name]) for name in ("generated", "declined"))
    if not lists or not isinstance(entry.get("fingerprint", ""), str):
        return False
    if "after" not in entry:
        return True
    earlier = entry["earlier"]
    digests = isinstance(entry["after"], str) and isinstance(entry["before"], str | None)
    return digests and isinstance(earlier, dict) and (not earlier or _is_valid(earlier))


def _resolve(entry: dict, data: bytes, caption: "_Caption") -> dict:
    """Return the record that is valid for a caption, also if a run was killed while writing it."""
    if "after" not in entry or _digest(data) == entry["after"]:
        return entry
    if _digest(data) == entry["before"]:
        return entry["earlier"]
    # A user changed the caption after the run was killed. A recorded tag that is missing may never have been written,
    # so it does not count as deleted.
    recorded = [*entry["generated"], *entry["earlier"].get("generated", [])]
    generated = [tag for tag in caption.tags() if tag in recorded]
    return {"generated": generated, "declined": entry["earlier"].get("declined", [])}


class _Caption:
    """The text of a caption. Edits keep all other spaces, line ends and the byte-order mark.

    Raises:
        SidecarError: The caption is not UTF-8.
    """

    def __init__(self, data: bytes, path: str):
        self.byte_order_mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        try:
            text = data[len(self.byte_order_mark) :].decode()
        except UnicodeDecodeError as error:
            raise SidecarError(f"{path} was not changed: it is not UTF-8 text: {error}") from error
        line, end, rest = text.partition("\n")
        self.line = line.rstrip("\r")
        self.rest = line[len(self.line) :] + end + rest

    def tags(self) -> list[str]:
        return [piece.strip() for piece in self.line.split(",") if piece.strip()]

    def edit(self, added: list[str], removed: list[str]) -> bytes:
        line = _remove(self.line, removed) if removed else self.line
        if added:
            line = line.rstrip().removesuffix(",")
            line = ", ".join([line, *added] if line.strip() else added)
        return self.byte_order_mark + (line + self.rest).encode()


def _remove(line: str, removed: list[str]) -> str:
    pieces = line.split(",")
    kept = [piece for piece in pieces if piece.strip() not in removed]
    line = ",".join(kept) if any(map(str.strip, kept)) else ""
    return line.lstrip() if pieces[0].strip() in removed else line


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
