"""The files that `optsg tag --write` writes next to images, or in a tree like theirs: one module per format.

All formats follow the same rules. Images and videos are only read. A user's own entries stay. The program records
which tags it added, and removes only those (`reconciliation`). Files are replaced atomically (`files`). A file is done
if its record names this model, these settings and this content.
"""

from pathlib import Path

from .locations import SidecarLocator
from .writer import Change, Fingerprint, SidecarError, TagWriter

FORMATS = ("xmp", "json", "txt", "csv", "parquet")


def make_writer(
    file_format: str, locator: SidecarLocator, fingerprint: Fingerprint, model: str, dry_run: bool
) -> TagWriter:
    """Make the writer of a format.

    Args:
        file_format: One of `FORMATS`.
        locator: Chooses the path of each file's sidecar.
        fingerprint: Returns a text that changes whenever the tags of a file may change.
        model: Name of the model, for the record.
        dry_run: Compute all changes, but write nothing.

    Raises:
        SidecarError: There is already a table with this name that this program did not write.
    """
    if file_format in ("csv", "parquet"):
        from .table_file import TableWriter

        return TableWriter(Path(locator.output or ".", f"tags.{file_format}"), fingerprint, dry_run)
    if file_format == "xmp":
        from .xmp_sidecar import XmpSidecarWriter as SidecarWriter
    elif file_format == "json":
        from .json_sidecar import JsonSidecarWriter as SidecarWriter
    else:
        from .caption_file import CaptionWriter as SidecarWriter
    return SidecarWriter(locator, fingerprint, model, dry_run)


__all__ = ["FORMATS", "Change", "SidecarError", "SidecarLocator", "TagWriter", "make_writer"]
