"""JSON sidecars (`photo.jpg.optsg.json`): every tag with its probability and whether it is novel.

A person's tags may stand among ours, as `{"tag": "..."}` or plain text; ours are those in `written`. The name is not
`photo.jpg.json`, because Google Takeout calls files of its own that.
"""

import json
import os

from ..media_files import MediaFile
from .change import Change, SidecarError
from .ownership import reconcile
from .places import Place, SidecarPlaces
from .whole_files import only_here, read_whole, write_whole

SUFFIX = ".optsg.json"
VERSION = 1


class JsonSidecars:
    """Writes each file's tags into its JSON sidecar."""

    kind = "json"

    def __init__(self, places: SidecarPlaces, fingerprints, model: str, dry_run: bool):
        self.places, self.fingerprints, self.model, self.dry_run = places, fingerprints, model, dry_run

    def done(self, file: MediaFile) -> bool:
        """Whether the sidecar is on record as made of this model, these settings and this file.

        Raises:
            SidecarError: the sidecar cannot be read or must not be written.
        """
        place = self.places.of(file, SUFFIX, "full")
        data, _ = _read(place)
        done = os.path.lexists(place.path) and data.get("fingerprint") == self.fingerprints(file)
        if not done:
            self.places.check_writable(place)
        return done

    def write(self, file: MediaFile, tags: list[dict]) -> Change:
        """Brings the sidecar up to date with `tags` (see `reconcile`).

        Raises:
            SidecarError: the sidecar cannot be read or must not be written; it is as it was.
        """
        place = self.places.of(file, SUFFIX, "full")
        with only_here(os.path.dirname(place.path)):
            sidecar, before = _read(place)
            entries = {_text(entry): entry for entry in sidecar.get("tags", [])}
            written, declined = sidecar.get("written", []), sidecar.get("declined", [])
            given = {tag["tag"]: tag for tag in tags}
            owned = reconcile(list(entries), written, declined, list(given))
            theirs = [entry for text, entry in entries.items() if text not in written]
            ours = [{**_dictionary(entries.get(tag)), **_rounded(given[tag])} for tag in owned.ours]
            new = {
                **sidecar,
                "optsg": VERSION,
                "model": self.model,
                "title": file.title,
                "tags": theirs + ours,
                "written": owned.ours,
                "declined": owned.declined,
                "fingerprint": self.fingerprints(file),
            }
            change = Change(place.path, owned.added, owned.removed, written=new != sidecar or before is None)
            if change.written and not self.dry_run:
                text = json.dumps(new, ensure_ascii=False, indent=1) + "\n"
                # A lone surrogate, of a file name that is not Unicode, becomes JSON's own escape of it.
                write_whole(place.path, text.encode("utf-8", "backslashreplace"))
        return change


def _read(place: Place) -> tuple[dict, bytes | None]:
    """What the sidecar holds, and its bytes if it is there."""
    before = read_whole(place.path)
    path, data = (place.path, before) if before is not None or not place.begin_from else (place.begin_from, None)
    data = read_whole(path) if data is None else data
    if data is None:
        return {}, None
    try:
        sidecar = json.loads(data.decode("utf-8-sig"))
        if not isinstance(sidecar, dict) or sidecar.get("optsg") != VERSION:
            raise ValueError(f'expected an object with "optsg": {VERSION}')
        for name in ("tags", "written", "declined"):
            if not isinstance(sidecar.get(name, []), list):
                raise ValueError(f'"{name}" is not a list')
        for entry in [*sidecar.get("tags", []), *sidecar.get("written", []), *sidecar.get("declined", [])]:
            if not isinstance(_text(entry), str):
                raise ValueError(f"{entry!r} is not a tag")
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"{path} is left as it is: it is not a sidecar of this program: {error}") from error
    return sidecar, before


def _text(entry):
    return entry.get("tag") if isinstance(entry, dict) else entry


def _rounded(tag: dict) -> dict:
    # What a batch's other files change in a score is beyond this; a file that says nothing new must not change.
    return {**tag, "score": round(tag["score"], 4)}


def _dictionary(entry) -> dict:
    return entry if isinstance(entry, dict) else {}
