"""Reads a folder of images or videos without a metadata file as a tagging dataset."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets

from .column_names import USUAL_NAMES, ColumnNames
from .media_suffixes import METADATA_NAMES, RAW_SUFFIXES, is_left_out, media_kind
from .tag_separators import choose_caption_separator, split_caption
from .tagging_columns import distinct_tags
from .tagging_folder import SPLIT_NAMES, make_splits

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
MAX_CAPTION_BYTES = 2**20
USE_METADATA = f"Describe the files in a metadata file ({', '.join(METADATA_NAMES)})."


def load_plain_folder(folder: str | os.PathLike, names: ColumnNames = USUAL_NAMES) -> datasets.DatasetDict:
    """Read images and videos whose tags are in captions or in the names of folders.

    The tags of `1.jpg` are in `1.txt`, separated by line breaks and by commas, or by `|` or `;` if more captions
    contain it. If no file has a caption, the tag of a file is the name of its folder, as in `cat/1.jpg`. Warnings say
    so. Splits are sub-folders, as in `train/1.jpg` or `train/cat/1.jpg`.

    Args:
        folder: The folder.
        names: `tag_separator` sets the separator in captions. There are no columns to name.

    Returns:
        The splits with the columns `id` (the path), `image` and/or `video` (undecoded), `title` (empty) and `tags`.

    Raises:
        ValueError: There are no images or videos, or their tags or splits are not clear; a file is a link out of the
            folder, or cannot be read; or `names` does not apply.
    """
    root = Path(folder)
    if unused := [name for name in names.given() if name != "tag_separator"]:
        raise ValueError(f"{', '.join(unused)}: {root} has no columns. {USE_METADATA}")
    paths = list(_find_media(root))
    if not paths:
        raise ValueError(
            f"{root} contains no images, no videos, no Parquet files and none of {', '.join(METADATA_NAMES)}"
        )
    splits = _split_of_files(paths, root)
    files = _find_captions(paths)
    captions = {path: text for path in files if (text := _read_caption(files[path], root)) is not None}
    if captions:
        tags = _read_captions(captions, paths, root, names.tag_separator)
    elif names.tag_separator:
        raise ValueError(f"tag_separator: {root} has no captions to split")
    else:
        tags = _folder_tags(paths, root)
    by_split: dict[str, list[dict]] = {split: [] for split in dict.fromkeys(SPLIT_NAMES.values())}
    for path in paths:
        name = path.relative_to(root).as_posix()
        example = {"id": name, "path": str(path.absolute()), "title": "", "tags": tags[path]}
        by_split[splits[path]].append(example)
    return make_splits({split: own for split, own in by_split.items() if own})


def _find_media(root: Path) -> Iterator[Path]:
    def report(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    raw = 0
    for folder, folders, names in os.walk(root, onerror=report):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not is_left_out(name))
        for name in sorted(names):
            path = Path(folder, name)
            if name in METADATA_NAMES:
                raise ValueError(f"{path} is too deep: a metadata file belongs in {root}, or in a folder of a split")
            if not name.startswith(".") and media_kind(name):
                _check_inside(path, root)
                yield path
            raw += path.suffix.lower() in RAW_SUFFIXES
    if raw:
        logger.warning("%s: raw files are not read (%d); export them as JPEG", root, raw)


def _check_inside(path: Path, root: Path) -> None:
    """Check that a file exists and is not a link to a file elsewhere, which an export would publish."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of {root}; only files inside it are read")


def _split_of_files(paths: list[Path], root: Path) -> dict[Path, str]:
    """Return the split of each file: that of its folder, or `train` if no folder is named after a split."""
    first = {path: path.relative_to(root).parts[0].casefold() for path in paths}
    named = {name for name in first.values() if name in SPLIT_NAMES}
    if not named:
        return dict.fromkeys(paths, "train")
    if others := [path for path in paths if first[path] not in SPLIT_NAMES]:
        raise ValueError(
            f"{root} has folders of splits ({', '.join(sorted(named))}), and files outside them, such as "
            f"{others[0].relative_to(root)}. Move these files. {USE_METADATA}"
        )
    if twice := [split for split, number in Counter(SPLIT_NAMES[name] for name in named).items() if number > 1]:
        raise ValueError(f"{root}: several of the folders {', '.join(sorted(named))} are the {twice[0]} split")
    return {path: SPLIT_NAMES[name] for path, name in first.items()}


def _find_captions(paths: list[Path]) -> dict[Path, Path]:
    """Return the caption file of each file that has one, whose suffix may be in capitals."""
    found = {}
    for folder in {path.parent for path in paths}:
        for name in sorted(os.listdir(folder)):
            if Path(name).suffix.lower() == CAPTION_SUFFIX:
                found[folder / Path(name).stem] = folder / name
    return {path: found[path.with_suffix("")] for path in paths if path.with_suffix("") in found}


def _read_caption(caption: Path, root: Path) -> str | None:
    """Return the text of a caption file, `None` for a broken link."""
    if not caption.exists():
        return None
    _check_inside(caption, root)
    if caption.stat().st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"{caption}: larger than {MAX_CAPTION_BYTES:,} bytes, so it is not a caption")
    try:
        return caption.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{caption}: not readable as UTF-8 text ({error})") from error


def _read_captions(
    captions: dict[Path, str], paths: list[Path], root: Path, given: str | None
) -> dict[Path, list[str]]:
    """Return the tags of each file; none for a file without a caption."""
    separator, message = choose_caption_separator(captions.values(), given)
    if message:
        logger.warning("%s: %s", root, message)
    tags = {path: [] for path in paths}
    for path, text in captions.items():
        tags[path] = distinct_tags(split_caption(text, separator))
    if not any(tags.values()):
        raise ValueError(
            f"{root}: no caption contains a tag, such as {next(iter(captions)).with_suffix(CAPTION_SUFFIX)}"
        )
    if missing := len(paths) - len(captions):
        logger.warning(
            "%s: %s no caption and therefore no tags. The names of folders are not used as tags, because other files "
            "have captions, such as %s",
            root, "1 file has" if missing == 1 else f"{missing:,} files have",
            next(iter(captions)).with_suffix(CAPTION_SUFFIX).relative_to(root),
        )  # fmt: skip
    return tags


def _folder_tags(paths: list[Path], root: Path) -> dict[Path, list[str]]:
    """Return the name of each file's folder."""
    has_splits = any(path.relative_to(root).parts[0].casefold() in SPLIT_NAMES for path in paths)
    depth = 3 if has_splits else 2
    for path in paths:
        if (found := len(path.relative_to(root).parts)) != depth:
            problem = "is in no folder that names its tag" if found < depth else "is in nested folders"
            raise ValueError(
                f"{path.relative_to(root)} {problem}. {USE_METADATA} Or write its tags to "
                f"{path.with_suffix(CAPTION_SUFFIX).name} next to it."
            )
    tags = {path: distinct_tags([path.parent.name]) for path in paths}
    names = dict.fromkeys(tag for own in tags.values() for tag in own)
    if len(names) == 1:
        raise ValueError(f"{root}: all files are in folders named {next(iter(names))!r}. {USE_METADATA}")
    logger.warning(
        "%s: without metadata and captions, the names of the folders are the tags: %s%s",
        root, ", ".join(list(names)[:5]), ", …" if len(names) > 5 else "",
    )  # fmt: skip
    return tags
