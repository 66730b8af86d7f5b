"""Decides which tags to add to a list that a user also edits, and which to remove from it."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


def tag_key(tag: str) -> str:
    """Return what all spellings of a tag share: letter case, white space and Unicode composition are normalised."""
    return " ".join(unicodedata.normalize("NFC", tag).casefold().split())


@dataclass(frozen=True)
class Reconciliation:
    """The result of [`reconcile`].

    Args:
        ours: Tags in the new list that belong to this program, in the model's order.
        added: Tags to add to the list.
        removed: Tags to remove from the list.
        declined: Keys of tags that this program added and the user deleted; they are not added again.
    """

    ours: list[str]
    added: list[str]
    removed: list[str]
    declined: list[str]


def reconcile(
    current: list[str],
    recorded: list[str],
    declined: Iterable[str],
    predicted: list[str],
    in_other_fields: Iterable[str] = (),
    deleted_elsewhere: Iterable[str] = (),
) -> Reconciliation:
    """Merge the model's tags into a list of tags that this program and a user both edit.

    A tag in the list belongs to this program only if it is recorded with the same spelling. All others belong to the
    user: they stay, and are not added in another spelling. If a recorded tag is not in the list, the user deleted it.
    A tag of this program that is no longer predicted is removed.

    Args:
        current: The list now.
        recorded: Tags that earlier runs added to it.
        declined: Keys of tags that the user deleted before earlier runs.
        predicted: The model's tags now, the most probable first.
        in_other_fields: Keys of the user's tags in other fields.
        deleted_elsewhere: Keys of tags that the user deleted from other fields.
    """
    users = {tag_key(tag) for tag in current if tag not in recorded}
    present = {tag_key(tag) for tag in current}
    deleted = {tag_key(tag) for tag in recorded} - present
    refused = (set(declined) | deleted | set(deleted_elsewhere)) - users
    taken = users | set(in_other_fields) | refused
    ours = []
    for tag in predicted:
        if tag_key(tag) not in taken:
            ours.append(tag)
            taken.add(tag_key(tag))
    return Reconciliation(
        ours=ours,
        added=[tag for tag in ours if tag not in current],
        removed=[tag for tag in current if tag in recorded and tag not in ours],
        declined=sorted(refused),
    )
