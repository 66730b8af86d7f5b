"""XMP sidecars: tags in `dc:subject`, and in `digiKam:TagsList` for programs that read no other list.

The sidecar also holds a record, in a namespace of this program. It consists of lists of text only, the one form that
all XMP libraries preserve:

| list | content |
|---|---|
| `Tags` | the tags in `dc:subject` that belong to this program |
| `Probabilities` | the probability of each of them |
| `Novel` | those of them that are not in the label vocabulary |
| `Listed` | the tags in `digiKam:TagsList` that belong to this program |
| `Declined` | keys of tags of this program that the user deleted |
| `Unlisted` | keys of tags that the user deleted from `digiKam:TagsList` only |
| `Run` | fingerprint and model |
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..media_files import MediaFile
from .embedded import EmbeddedMetadata, read_embedded
from .files import lock_folder, read_file, replace_file
from .locations import SidecarLocation, SidecarLocator
from .reconciliation import Reconciliation, reconcile, tag_key
from .writer import Change, Fingerprint, SidecarError, TagWriter
from .xmp_packet import NEW_PACKET, XmpPacket, is_xml_text

SUFFIX = ".xmp"
SUBJECT = ("http://purl.org/dc/elements/1.1/", "dc", "subject")
TAGS_LIST = ("http://www.digikam.org/ns/1.0/", "digiKam", "TagsList")
HIERARCHY = ("http://ns.adobe.com/lightroom/1.0/", "lr", "hierarchicalSubject")
LAST_KEYWORDS = ("http://ns.microsoft.com/photo/1.0/", "MicrosoftPhoto", "LastKeywordXMP")
# digiKam reads only the first of its lists that is not empty, and these come after TagsList.
HIDDEN_BY_TAGS_LIST = (
    HIERARCHY,
    ("http://ns.iview-multimedia.com/mediapro/1.0/", "mediapro", "CatalogSets"),
    ("http://ns.acdsee.com/iptc/1.0/", "acdsee", "categories"),
)
RECORD = ("urn:x-optsg:1.0/", "optsg")
RECORD_LISTS = ("Tags", "Probabilities", "Novel", "Listed", "Declined", "Unlisted", "Run")
HIERARCHY_REMARK = (
    "added no tags to the keyword hierarchy (lr:hierarchicalSubject, mediapro:CatalogSets or acdsee:categories), "
    "which some programs read instead of dc:subject"
)
NOT_XML_REMARK = "left out tags with control characters, which XML cannot hold"


class XmpSidecarWriter(TagWriter):
    """Writes each file's tags into its XMP sidecar; see `make_writer` for the arguments."""

    def __init__(self, locator: SidecarLocator, fingerprint: Fingerprint, model: str, dry_run: bool):
        self.locator, self.fingerprint, self.model, self.dry_run = locator, fingerprint, model, dry_run

    def is_done(self, file: MediaFile) -> bool:
        """See `TagWriter.is_done`."""
        location = self._locate(file)
        data = read_file(location.path)
        if data is None:
            if location.template:
                _parse(location.template, read_file(location.template))
            self.locator.check_writable(location)
            return False
        run = _read_list(_parse(location.path, data), location.path, (*RECORD, "Run"))
        done = bool(run) and run[0] == self.fingerprint(file)
        if not done:
            self.locator.check_writable(location)
        return done

    def needs_metadata(self, file: MediaFile) -> bool:
        """See `TagWriter.needs_metadata`."""
        location = self._locate(file)
        return location.template is None and not os.path.lexists(location.path)

    def write(
        self, file: MediaFile, tags: list[dict], title: str | None = None, embedded: EmbeddedMetadata | None = None
    ) -> Change:
        """See `TagWriter.write`."""
        location = self._locate(file)
        with lock_folder(os.path.dirname(location.path)):
            source, before = location.path, read_file(location.path)
            remarks = [location.remark]
            if before is None and location.template:
                source, before = location.template, read_file(location.template)
            if before is None:
                embedded = embedded or read_embedded(file)
                source, before = file.path, embedded.packet
                remarks.append(embedded.remark)
            packet = _parse(source, before)
            change = self._merge(packet, source, tags, self.fingerprint(file))
            if change is None:  # no tags, now or earlier
                return Change(location.path)
            if source == file.path and embedded.error:
                raise SidecarError(
                    f"{location.path} was not written, because it would hide the metadata inside the file from other "
                    f"programs: {embedded.error}; repair the file, or use another format of --write"
                )
            change.path = location.path
            change.remarks += filter(None, remarks)
            after = packet.to_bytes()
            change.written = after != before or source != location.path
            if change.written and not self.dry_run:
                _parse(location.path, after)  # a sidecar that cannot be read back must not replace another
                replace_file(location.path, after)
        return change

    def _locate(self, file: MediaFile) -> SidecarLocation:
        return self.locator.locate(file, SUFFIX, self.locator.naming, either=True)

    def _merge(self, packet: XmpPacket, path: str, tags: list[dict], fingerprint: str) -> Change | None:
        """Edit the packet so that it holds the tags and the record. Without either, return `None`."""
        fields = _KeywordFields.read(packet, path)
        predicted = {tag["tag"].strip(): tag for tag in tags if is_xml_text(tag["tag"])}
        result = _reconcile_subject(fields, list(predicted))
        if not result.ours and not any(fields.record.values()):
            return None
        packet.change(*SUBJECT, result.added, result.removed)

        listed = _tags_to_list(fields, result.ours)
        current = fields.tags_list or []
        added = [tag for tag in listed if tag not in current]
        removed = [tag for tag in current if tag in fields.our_list and tag not in listed]
        packet.change(*TAGS_LIST, added, removed, kind="Seq")

        record = {
            "Tags": result.ours,
            "Probabilities": [f"{predicted[tag]['score']:.4f}" for tag in result.ours],
            "Novel": [tag for tag in result.ours if predicted[tag]["novel"]],
            "Listed": listed,
            "Declined": result.declined,
            "Unlisted": sorted(fields.unlisted_keys),
            "Run": [fingerprint, self.model],
        }
        if record != fields.record:
            packet.replace(*RECORD, record)
        remarks = [NOT_XML_REMARK] if len(predicted) < len(tags) else []
        remarks += [HIERARCHY_REMARK] if fields.has_hierarchy else []
        return Change(path, result.added, result.removed, remarks=remarks)


def read_user_keywords(packet: XmpPacket) -> tuple[list[str], set[str]]:
    """Return the keywords of an XMP document that are not tags of this program, and the keys of those that are.

    In hierarchical lists, a path such as `Places|Rome` or `Places/Rome` counts as its last part. A malformed
    `lr:hierarchicalSubject` or `MicrosoftPhoto:LastKeywordXMP` is ignored.

    Args:
        packet: The document, of a sidecar or an image.

    Raises:
        ValueError: `dc:subject` or `digiKam:TagsList` is not a list.
    """
    try:
        fields = _KeywordFields.read(packet, "")
    except SidecarError as error:
        raise ValueError(str(error.__cause__)) from error
    ours = _keys(fields.our_subject) | _keys(fields.our_list)
    hierarchy = [path.rpartition("|")[2] for path in _read_other_list(packet, HIERARCHY)]
    listed = [path.rpartition("/")[2] for path in (*fields.user_list, *fields.last_keywords)]
    # Other programs copy our tags into their own fields. Such a copy does not make a tag the user's.
    return [*fields.user_subject, *(tag for tag in (*listed, *hierarchy) if tag_key(tag) not in ours)], ours


@dataclass(frozen=True)
class _KeywordFields:
    """The keyword fields of a sidecar and the record of the last run.

    Args:
        subject: `dc:subject`.
        tags_list: `digiKam:TagsList`; `None` if there is none.
        last_keywords: `MicrosoftPhoto:LastKeywordXMP`.
        hierarchy_keys: Keys of the last parts of the paths in `lr:hierarchicalSubject`.
        has_hierarchy: Whether there is a list that a new `digiKam:TagsList` would hide.
        record: The lists of the record by name, each empty if there is none.
    """

    subject: list[str]
    tags_list: list[str] | None
    last_keywords: list[str]
    hierarchy_keys: set[str]
    has_hierarchy: bool
    record: dict[str, list[str]]

    @classmethod
    def read(cls, packet: XmpPacket, path: str) -> "_KeywordFields":
        return cls(
            subject=_read_list(packet, path, SUBJECT) or [],
            tags_list=_read_list(packet, path, TAGS_LIST),
            last_keywords=_read_other_list(packet, LAST_KEYWORDS),
            hierarchy_keys=_leaf_keys(_read_other_list(packet, HIERARCHY), "|"),
            has_hierarchy=any(packet.has_property(*name[::2]) for name in HIDDEN_BY_TAGS_LIST),
            record={name: _read_list(packet, path, (*RECORD, name)) or [] for name in RECORD_LISTS},
        )

    @property
    def our_subject(self) -> list[str]:
        """Tags that the last run had in `dc:subject`."""
        return self.record["Tags"]

    @property
    def our_list(self) -> list[str]:
        """Tags that the last run had in `digiKam:TagsList`."""
        return self.record["Listed"]

    @property
    def user_subject(self) -> list[str]:
        return [tag for tag in self.subject if tag not in self.our_subject]

    @property
    def user_list(self) -> list[str]:
        return [tag for tag in self.tags_list or [] if tag not in self.our_list]

    @property
    def user_paths(self) -> list[str]:
        """The user's keywords outside `digiKam:TagsList`, as paths where there are any."""
        paths = [path for path in self.last_keywords if tag_key(path) not in _keys(self.our_subject)]
        parts = _keys(part for path in paths for part in path.split("/"))
        return [*(tag for tag in self.user_subject if tag_key(tag) not in parts), *paths]

    @property
    def deleted_keys(self) -> set[str]:
        """Keys of tags that the user deleted from `digiKam:TagsList` since the last run."""
        return _keys(self.our_list) - _keys(self.tags_list or [])

    @property
    def unlisted_keys(self) -> set[str]:
        """Keys of the user's keywords that the user does not want in `digiKam:TagsList`."""
        return _keys(self.user_paths) & (self.deleted_keys | set(self.record["Unlisted"]))


def _reconcile_subject(fields: _KeywordFields, predicted: list[str]) -> Reconciliation:
    ours = _keys(fields.our_subject)
    # Other programs copy our tags into their own fields. Such a copy does not make a tag the user's.
    in_other_fields = (fields.hierarchy_keys | _leaf_keys(fields.user_list + fields.last_keywords, "/")) - ours
    return reconcile(
        fields.subject,
        fields.our_subject,
        fields.record["Declined"],
        predicted,
        in_other_fields=in_other_fields,
        deleted_elsewhere=fields.deleted_keys & ours,
    )


def _tags_to_list(fields: _KeywordFields, ours: list[str]) -> list[str]:
    """Return the tags that this program should have in `digiKam:TagsList`.

    Programs that read this list read no other, so it also needs the user's keywords. If the user or another program
    writes to the list, completing it is up to them. A new list would hide an existing hierarchy.
    """
    if fields.tags_list is None and (not ours or (fields.has_hierarchy and not fields.our_list)):
        return []
    our_list, user_list, unlisted = fields.our_list, fields.user_list, fields.unlisted_keys
    mirrored = [
        tag for tag in fields.user_paths if tag_key(tag) not in unlisted and (tag in our_list or not user_list)
    ]
    users = _keys(user_list)
    return [tag for tag in dict.fromkeys([*mirrored, *ours]) if tag_key(tag) not in users]


def _parse(path: str, data: bytes | None) -> XmpPacket:
    try:
        return XmpPacket(NEW_PACKET if data is None else data)
    except ValueError as error:
        raise SidecarError(f"{path} was not changed: {error}") from error


def _read_list(packet: XmpPacket, path: str, name: tuple[str, str, str]) -> list[str] | None:
    try:
        return packet.read_list(name[0], name[2])
    except ValueError as error:
        raise SidecarError(f"{path} was not changed: {error}") from error


def _read_other_list(packet: XmpPacket, name: tuple[str, str, str]) -> list[str]:
    try:
        return packet.read_list(name[0], name[2]) or []
    except ValueError:
        return []  # it is only read, so a malformed one does no harm


def _leaf_keys(paths: list[str], separator: str) -> set[str]:
    return _keys(path.rpartition(separator)[2] for path in paths)


def _keys(tags: Iterable[str]) -> set[str]:
    return {tag_key(tag) for tag in tags}
