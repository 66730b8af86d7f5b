"""Whose tag is whose: what to add to a list that a person edits too, and what to take back from it."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


def key(tag: str) -> str:
    """What two spellings of one tag have in common: letter case, white space and Unicode composition are left out."""
    return " ".join(unicodedata.normalize("NFC", tag).casefold().split())


@dataclass(frozen=True)
class Ownership:
    """
    Args:
        ours: tags this program now answers for, in the model's order.
        added, removed: what has to change in the list.
        declined: keys of tags that a person deleted after this program had written them; they are not written again.
    """

    ours: list[str]
    added: list[str]
    removed: list[str]
    declined: list[str]


def reconcile(
    current: list[str],
    written: list[str],
    declined: Iterable[str],
    given: list[str],
    elsewhere: Iterable[str] = (),
    gone: Iterable[str] = (),
) -> Ownership:
    """Decides what to do with a list of tags that this program and a person both write to.

    A tag in the list is ours only if it is on record as written by us, letter for letter; any other is a person's and
    stays, and is not written a second time in another spelling. A tag on record that is no longer in the list was
    deleted by a person. One that is ours and not given any more is removed.

    Args:
        current: the list as it stands.
        written: what is on record as ours.
        declined: keys of what a person deleted before.
        given: the model's tags now, the most probable first.
        elsewhere: keys of tags that a person has in other fields.
        gone: keys of tags that a person deleted from other fields.
    """
    theirs = {key(tag) for tag in current if tag not in written}
    present = {key(tag) for tag in current}
    deleted = {key(tag) for tag in written} - present
    refused = (set(declined) | deleted | set(gone)) - theirs
    taken = theirs | set(elsewhere) | refused
    ours = []
    for tag in given:
        if key(tag) not in taken:
            ours.append(tag)
            taken.add(key(tag))
    return Ownership(
        ours=ours,
        added=[tag for tag in ours if tag not in current],
        removed=[tag for tag in current if tag in written and tag not in ours],
        declined=sorted(refused),
    )
