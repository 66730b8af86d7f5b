"""Reads a folder of images or videos without a metadata file as a tagging dataset."""

import logging
import os
from collections import Counter
from pathlib import Path

import datasets

from .media_suffixes import METADATA_NAMES, media_kind
from .tag_separators import describe_separator, find_separator, split_tags
from .tagging_columns import MEDIA_COLUMNS, TEXT_COLUMNS, distinct_tags
from .tagging_folder import SPLIT_NAMES

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"


def load_plain_folder(folder: str | os.PathLike) -> datasets.DatasetDict:
    """Read images and videos whose tags are in captions or in the names of folders.

    The tags of `1.jpg` are in `1.txt`, separated by commas, or one on each line. If the folder has no such file, the
    tag of a file is the name of its folder, as in `cat/1.jpg`; a warning says so. Splits are sub-folders, as in
    `train/cat/1.jpg`.

    Returns:
        The splits with the columns `id` (the path), `image` and/or `video` (undecoded), `title` (empty) and `tags`.

    Raises:
        ValueError: There are no images or videos, or neither captions nor folders with names.
    """
    root = Path(folder)
    paths = _find_media(root)
    if not paths:
        raise ValueError(f"{root} contains no images or videos")
    captions = {path: _read_caption(path) for path in paths}
    first = {path: path.relative_to(root).parts[0] for path in paths}
    has_splits = set(first.values()) <= set(SPLIT_NAMES)
    if any(text is not None for text in captions.values()):
        tags = _split_captions(captions, root)
    else:
        tags = {path: [path.parent.name] for path in paths}
        if any(path.parent == root or (has_splits and path.parent.parent == root) for path in paths):
            raise ValueError(
                f"{root} has no tags: add a metadata file ({', '.join(METADATA_NAMES)}), captions such as "
                f"{paths[0].with_suffix(CAPTION_SUFFIX).name} next to {paths[0].name}, or folders named after the tags"
            )
        names = Counter(own for (own,) in tags.values())
        logger.warning(
            "%s: without metadata and captions, the names of the folders are the tags: %s%s",
            root, ", ".join(list(names)[:5]), ", …" if len(names) > 5 else "",
        )  # fmt: skip
    splits: dict[str, list[Path]] = {split: [] for split in dict.fromkeys(SPLIT_NAMES.values())}
    for path in paths:
        splits[SPLIT_NAMES[first[path]] if has_splits else "train"].append(path)
    kinds = {media_kind(str(path)) for path in paths}
    media = {kind: feature for kind, feature in MEDIA_COLUMNS.items() if kind in kinds}
    features = datasets.Features({"id": TEXT_COLUMNS["id"], **media, **TEXT_COLUMNS})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(_columns(own, tags, root, features), features)
            for split, own in splits.items()
            if own
        }
    )


def _find_media(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".") and media_kind(name)]
    return found


def _read_caption(path: Path) -> str | None:
    """Return the caption of a file, `None` without one.

    Raises:
        ValueError: The caption cannot be read.
    """
    caption = path.with_suffix(CAPTION_SUFFIX)
    if not caption.is_file():
        return None
    try:
        return caption.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{caption}: not readable as UTF-8 text ({error})") from error


def _split_captions(captions: dict[Path, str | None], root: Path) -> dict[Path, list[str]]:
    """Return the tags of each file; none for a file without a caption."""
    lines = {path: (text or "").splitlines() for path, text in captions.items()}
    separator = find_separator(line for own in lines.values() for line in own)
    if separator != "," and (message := describe_separator(separator)):
        logger.warning("%s: %s", root, message)
    if missing := sum(text is None for text in captions.values()):
        logger.warning("%s: %s files have no caption", root, f"{missing:,}")
    return {
        path: distinct_tags(tag for line in own for tag in split_tags(line, separator)) for path, own in lines.items()
    }


def _columns(
    paths: list[Path], tags: dict[Path, list[str]], root: Path, features: datasets.Features
) -> dict[str, list]:
    columns = {"id": [path.relative_to(root).as_posix() for path in paths], "title": [""] * len(paths)}
    columns["tags"] = [tags[path] for path in paths]
    for kind in features.keys() & MEDIA_COLUMNS.keys():
        columns[kind] = [str(path.absolute()) if media_kind(str(path)) == kind else None for path in paths]
    return {name: columns[name] for name in features}
