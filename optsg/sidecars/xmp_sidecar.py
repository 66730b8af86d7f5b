"""XMP sidecars: tags in `dc:subject`, and in `digiKam:TagsList` for programs that read no other list.

On record in the sidecar, in a namespace of our own, are lists of text only, the one form that every XMP library leaves
as it is: `Tags` (what is ours in `dc:subject`), `Probabilities` (of each), `Novel` (those of them not among the
training tags), `Listed` (what is ours in `digiKam:TagsList`), `Declined` (what of ours a person deleted), `Unlisted`
(what a person took out of `digiKam:TagsList` only), `Run` (fingerprint and model).
"""

import os

from ..media_files import MediaFile
from .change import Change, SidecarError
from .ownership import key, reconcile
from .places import SidecarPlaces
from .whole_files import only_here, read_whole, write_whole
from .xmp_packet import NEW_PACKET, XmpPacket, is_xml_text

SUBJECT = ("http://purl.org/dc/elements/1.1/", "dc", "subject")
TAGS_LIST = ("http://www.digikam.org/ns/1.0/", "digiKam", "TagsList")
HIERARCHY = ("http://ns.adobe.com/lightroom/1.0/", "lr", "hierarchicalSubject")
RECORD = ("urn:x-optsg:1.0/", "optsg")
HIDDEN_NOTE = (
    "sidecars have lr:hierarchicalSubject, which some programs read instead of dc:subject; it is left as it is"
)
NOT_XML_NOTE = "tags with control characters are left out: XML cannot hold them"


class XmpSidecars:
    """Writes each file's tags into its XMP sidecar."""

    kind = "xmp"

    def __init__(self, places: SidecarPlaces, fingerprints, model: str, dry_run: bool):
        self.places, self.fingerprints, self.model, self.dry_run = places, fingerprints, model, dry_run

    def done(self, file: MediaFile) -> bool:
        """Whether the sidecar is on record as made of this model, these settings and this file.

        Raises:
            SidecarError: the sidecar cannot be read or must not be written.
        """
        place = self.places.of(file, ".xmp", self.places.names, either=True)
        data = read_whole(place.path)
        if data is None:
            # Told now whether it will do, before time is spent on the image.
            _packet(place.begin_from, read_whole(place.begin_from) if place.begin_from else None)
            self.places.check_writable(place)
            return False
        run = _examples(_packet(place.path, data), place.path, (*RECORD, "Run"))
        done = bool(run) and run[0] == self.fingerprints(file)
        if not done:
            self.places.check_writable(place)
        return done

    def write(self, file: MediaFile, tags: list[dict]) -> Change:
        """Brings the sidecar up to date with `tags` (see `reconcile`).

        Raises:
            SidecarError: the sidecar cannot be read or must not be written; it is as it was.
        """
        place = self.places.of(file, ".xmp", self.places.names, either=True)
        with only_here(os.path.dirname(place.path)):
            data = read_whole(place.path)
            source = place.path
            if data is None and place.begin_from:
                source, data = place.begin_from, read_whole(place.begin_from)
            packet = _packet(source, data)
            change = self._merge(packet, source, tags, self.fingerprints(file))
            change.path = place.path
            if place.note:
                change.notes.append(place.note)
            new = packet.to_bytes()
            change.written = new != data or source != place.path
            if change.written and not self.dry_run:
                _packet(place.path, new)  # never replace a sidecar by one that cannot be read back
                write_whole(place.path, new)
        return change

    def _merge(self, packet: XmpPacket, path: str, tags: list[dict], fingerprint: str) -> Change:
        def examples(*name):
            return _examples(packet, path, name)

        subject, listed, hierarchy = examples(*SUBJECT) or [], examples(*TAGS_LIST), _leaves(examples(*HIERARCHY), "|")
        record_names = ("Tags", "Listed", "Declined", "Unlisted")
        ours, ours_listed, declined, unlisted = (examples(*RECORD, name) or [] for name in record_names)
        scores = {tag["tag"].strip(): tag for tag in tags if is_xml_text(tag["tag"])}
        theirs_listed = [tag for tag in listed or [] if tag not in ours_listed]
        # Other programs copy our tags into fields of theirs: that alone makes no person's tag of them.
        elsewhere = (hierarchy | _leaves(theirs_listed, "/")) - {key(tag) for tag in ours}
        gone = {key(tag) for tag in ours_listed} - {key(tag) for tag in listed or []}
        owned = reconcile(subject, ours, declined, list(scores), elsewhere, gone & {key(tag) for tag in ours})
        packet.change(*SUBJECT, owned.added, owned.removed)

        # Who reads digiKam:TagsList reads no other list, so it must have the person's tags too. A list that others
        # write to is theirs to complete; and to make one beside a hierarchy would hide the hierarchy.
        theirs = [tag for tag in subject if tag not in ours]
        refused = {key(tag) for tag in theirs} & (gone | set(unlisted))
        mirrored = [t for t in theirs if key(t) not in refused and (t in ours_listed or not theirs_listed)]
        wanted = [*mirrored, *owned.ours] if listed is not None or ours_listed or not hierarchy else []
        taken = {key(tag) for tag in theirs_listed}
        wanted = [tag for tag in dict.fromkeys(wanted) if key(tag) not in taken]
        wanted = wanted if owned.ours or listed is not None else []
        current = listed or []
        removed = [tag for tag in current if tag in ours_listed and tag not in wanted]
        packet.change(*TAGS_LIST, [tag for tag in wanted if tag not in current], removed, kind="Seq")

        record = {
            "Tags": owned.ours,
            "Probabilities": [f"{scores[tag]['score']:.4f}" for tag in owned.ours],
            "Novel": [tag for tag in owned.ours if scores[tag]["novel"]],
            "Listed": wanted,
            "Declined": owned.declined,
            "Unlisted": sorted(refused),
            "Run": [fingerprint, self.model],
        }
        if any(record[name] != (examples(*RECORD, name) or []) for name in record):
            packet.replace(*RECORD, record)
        notes = [NOT_XML_NOTE] if len(scores) < len(tags) else []
        notes += [HIDDEN_NOTE] if hierarchy else []
        return Change(path, owned.added, owned.removed, notes=notes)


def _packet(path: str | None, data: bytes | None) -> XmpPacket:
    try:
        return XmpPacket(NEW_PACKET if data is None else data)
    except ValueError as error:
        raise SidecarError(f"{path} is left as it is: {error}") from error


def _examples(packet: XmpPacket, path: str, name: tuple[str, str, str]) -> list[str] | None:
    try:
        return packet.items(name[0], name[2])
    except ValueError as error:
        if name == HIERARCHY:
            return None
        raise SidecarError(f"{path} is left as it is: {error}") from error


def _leaves(paths: list[str] | None, separator: str) -> set[str]:
    return {key(path.rpartition(separator)[2]) for path in paths or []}
