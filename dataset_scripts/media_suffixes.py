"""Which files of a folder are images, videos and metadata, by their names."""

import os

IMAGE_SUFFIXES = frozenset(
    (
        ".apng .avif .bmp .dib .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .jpx .pbm .pgm .png .pnm .ppm "
        ".tga .tif .tiff .webp"
    ).split()
)
VIDEO_SUFFIXES = frozenset(".3gp .avi .flv .gif .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def media_kind(path: str) -> str | None:
    """Return "image" or "video" by the suffix of a path, `None` for other files."""
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None
