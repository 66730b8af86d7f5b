"""JSON sidecars (`photo.jpg.optsg.json`): every tag with its probability and whether it is novel.

A user may add tags as `{"tag": "..."}` or as plain text. The tags of this program are those in `generated`. The suffix
is not `.json` because Google Takeout uses that for its own files.
"""

import json
import os
from typing import Any

from ..media_files import MediaFile
from .embedded import EmbeddedMetadata
from .files import lock_folder, read_file, replace_file
from .locations import SidecarLocation, SidecarLocator
from .reconciliation import reconcile
from .writer import Change, Fingerprint, SidecarError, TagWriter

SUFFIX = ".optsg.json"
VERSION = 1
SCORE_DIGITS = 4


class JsonSidecarWriter(TagWriter):
    """Writes each file's tags into its JSON sidecar; see `make_writer` for the arguments."""

    def __init__(self, locator: SidecarLocator, fingerprint: Fingerprint, model: str, dry_run: bool):
        self.locator, self.fingerprint, self.model, self.dry_run = locator, fingerprint, model, dry_run

    def is_done(self, file: MediaFile) -> bool:
        """See `TagWriter.is_done`."""
        location = self.locator.locate(file, SUFFIX, "full")
        sidecar, _ = _read(location)
        done = os.path.lexists(location.path) and sidecar.get("fingerprint") == self.fingerprint(file)
        if not done:
            self.locator.check_writable(location)
        return done

    def write(
        self, file: MediaFile, tags: list[dict], title: str | None = None, embedded: EmbeddedMetadata | None = None
    ) -> Change:
        """See `TagWriter.write`."""
        location = self.locator.locate(file, SUFFIX, "full")
        with lock_folder(os.path.dirname(location.path)):
            sidecar, before = _read(location)
            if not tags and before is None:
                return Change(location.path)
            merged, change = self._merge(location.path, sidecar, file, tags, title or file.title)
            change.written = merged != sidecar or before is None
            if change.written and not self.dry_run:
                text = json.dumps(merged, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
                # "backslashreplace": a file name that is not valid Unicode becomes a JSON escape.
                replace_file(location.path, text.encode("utf-8", "backslashreplace"))
        return change

    def _merge(
        self, path: str, sidecar: dict, file: MediaFile, tags: list[dict], title: str | None
    ) -> tuple[dict, Change]:
        entries = {_tag_text(entry): entry for entry in sidecar.get("tags", [])}
        recorded = sidecar.get("generated", [])
        predicted = {tag["tag"]: tag for tag in tags}
        result = reconcile(list(entries), recorded, sidecar.get("declined", []), list(predicted))
        users = [entry for text, entry in entries.items() if text not in recorded]
        ours = [{**_as_dict(entries.get(tag)), **_round_score(predicted[tag])} for tag in result.ours]
        merged = {
            **sidecar,
            "optsg": VERSION,
            "model": self.model,
            "title": title,
            "tags": users + ours,
            "generated": result.ours,
            "declined": result.declined,
            "fingerprint": self.fingerprint(file),
        }
        return merged, Change(path, result.added, result.removed)


def _read(location: SidecarLocation) -> tuple[dict, bytes | None]:
    """Read a sidecar, or its template if it does not exist.

    Returns:
        The sidecar's content, empty if there is neither, and the bytes of the sidecar itself if it exists.
    """
    path = location.path
    before = data = read_file(path)
    if data is None and location.template:
        path, data = location.template, read_file(location.template)
    if data is None:
        return {}, None
    try:
        sidecar = json.loads(data.decode("utf-8-sig"))
        _check(sidecar)
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"{path} was not changed: it is not a JSON sidecar of optsg: {error}") from error
    return sidecar, before


def _check(sidecar: Any) -> None:
    # Python reads NaN, which is not JSON and could not be written again.
    json.dumps(sidecar, allow_nan=False)
    if not isinstance(sidecar, dict) or sidecar.get("optsg") != VERSION:
        raise ValueError(f'expected an object with "optsg": {VERSION}')
    lists = {name: sidecar.get(name, []) for name in ("tags", "generated", "declined")}
    for name, entries in lists.items():
        if not isinstance(entries, list):
            raise ValueError(f'"{name}" is not a list')
    for name, entries in lists.items():
        for entry in entries:
            if not isinstance(_tag_text(entry) if name == "tags" else entry, str):
                raise ValueError(f'"{name}" contains {entry!r}, which is not a tag')


def _tag_text(entry: Any) -> Any:
    return entry.get("tag") if isinstance(entry, dict) else entry


def _as_dict(entry: Any) -> dict:
    return entry if isinstance(entry, dict) else {}


def _round_score(tag: dict) -> dict:
    # The other files of a batch change a score in its last digits. Without rounding, sidecars would change too.
    return {**tag, "score": round(tag["score"], SCORE_DIGITS)}
