"""What a writer did, or would do, and how it says that it cannot."""

from dataclasses import dataclass, field


class SidecarError(Exception):
    """A sidecar that cannot be read or must not be written; the message names it and says why."""


@dataclass
class Change:
    """
    Args:
        path: the file written, or that would be.
        added, removed: tags that came and went.
        written: whether the file's bytes change.
        notes: kinds of remarks, each counted over the run: what was left out, which other file was used.
    """

    path: str
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    written: bool = False
    notes: list[str] = field(default_factory=list)
