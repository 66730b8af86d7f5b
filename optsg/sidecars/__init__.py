"""Files that `optsg tag --write` makes beside images, or in a tree like theirs: one writer a kind.

What all of them keep to: the image is only read; what a person wrote stays; what this program wrote is on record,
so that it, and nothing else, is taken back (`ownership`); a file is the old one or the new one at any moment
(`whole_files`); a file whose record says that its tags came from this model, these settings and this image is done.
"""

from pathlib import Path

from .change import Change, SidecarError
from .places import SidecarPlaces

KINDS = ("xmp", "json", "txt", "csv", "parquet")


def make_writer(kind: str, places: SidecarPlaces, fingerprints, model: str, dry_run: bool):
    """The writer of one kind of file.

    Args:
        kind: one of `KINDS`.
        places: says where each file's sidecar is.
        fingerprints: a function that gives a `MediaFile` the text which changes with everything that its tags depend on.
        model: the model's name, for the record.
        dry_run: work everything out and write nothing.

    Raises:
        SidecarError: a table of this name is there and is not ours.
    """
    if kind in ("csv", "parquet"):
        from .table_file import TableFile

        return TableFile(Path(places.output or ".", f"tags.{kind}"), fingerprints, dry_run)
    if kind == "xmp":
        from .xmp_sidecar import XmpSidecars as Sidecars
    elif kind == "json":
        from .json_sidecar import JsonSidecars as Sidecars
    else:
        from .caption import Captions as Sidecars
    return Sidecars(places, fingerprints, model, dry_run)


__all__ = ["KINDS", "Change", "SidecarError", "SidecarPlaces", "make_writer"]
