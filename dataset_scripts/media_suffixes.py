"""Which files of a folder are images, videos and metadata, by their names, and which folders are left out."""

import fnmatch
import os

IMAGE_SUFFIXES = frozenset(
    (
        ".apng .avif .bmp .dib .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .jpx .jxl .pbm .pgm .png .pnm .ppm "
        ".tga .tif .tiff .webp"
    ).split()
)
VIDEO_SUFFIXES = frozenset(
    (".3g2 .3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv").split()
)
# Pillow reads some of these as TIFF files and returns the thumbnail that they contain.
RAW_SUFFIXES = frozenset(
    (
        ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl "
        ".sr2 .srf .srw .x3f"
    ).split()
)
# Folders in which NAS boxes, desktops, photo and archive programs keep thumbnails, deleted files and their own copies.
# Hidden ones are left out anyway.
LEFT_OUT_FOLDERS = ("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found")
LEFT_OUT_FOLDERS += ("*.photoslibrary", "*.lrdata", "*.lrlibrary", "__MACOSX")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def media_kind(path: str) -> str | None:
    """Return "image" or "video" by the suffix of a path, `None` for other files."""
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def is_left_out(folder: str) -> bool:
    """Return whether a folder with this name has no images of its own, but thumbnails or deleted files."""
    return any(fnmatch.fnmatchcase(folder.casefold(), pattern.casefold()) for pattern in LEFT_OUT_FOLDERS)
