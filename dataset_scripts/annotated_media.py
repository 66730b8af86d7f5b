"""Builds benchmarks that are released as annotation files and a folder of media or of their features."""

import hashlib
import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from . import annotation_files, frame_features, media_folder, tagging_columns
from .annotation_files import read_annotations
from .media_folder import MediaFolder, UnusableMediaError
from .tagging_columns import MEDIA_COLUMNS, TEXT_COLUMNS, distinct_tags

logger = logging.getLogger(__name__)

ROWS_PER_TABLE = 2000
COMPRESSION_SUFFIXES = ("", ".gz", ".zst")
MISSING_MEDIA_POLICIES = ("skip", "keep")
VISUAL_COLUMNS = datasets.Features(
    {**MEDIA_COLUMNS, "frame_features": datasets.List(datasets.List(datasets.Value("float32")))}
)


@dataclass
class AnnotatedMediaConfig(datasets.BuilderConfig):
    """Configuration of [`AnnotatedMedia`].

    Args:
        files: The annotation files that each split may have, without a suffix for compression.
        title_fields: The fields of an annotation that may be its title, by the values that `title` accepts.
        title: Which of them is used; the first one by default.
        visual: "video", "image", "frame_features", or "none" for titles alone. By default it follows from the folders
            in `data_dir`.
        missing: Whether to "skip" or "keep" an example whose media or feature file cannot be used.
        check_media: Whether images and videos are opened, which takes milliseconds and decodes nothing.
        categories: Whether annotations have a `category`.
    """

    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    title_fields: dict[str, str] = field(default_factory=dict)
    title: str | None = None
    visual: str | None = None
    missing: str = "skip"
    check_media: bool = True
    categories: bool = False


class AnnotatedMedia(datasets.ArrowBasedBuilder):
    """Reads annotations example by example and finds the media of each by its id.

    `data_dir` contains the annotation files (JSON lists or JSON lines, plain, `.gz` or `.zst`) and, optionally, the
    folders of `MEDIA`. Rows have `id`, `title`, `tags`, and `video`, `image` or `frame_features`. Examples and tags
    that cannot be used are left out, counted by reason and logged; `left_out` has the counts of each split.

    Raises:
        ValueError: An annotation file is damaged, a split has no usable example, or an option has an unknown value.
        FileNotFoundError: `data_dir`, the annotation files or the folder that `visual` needs are missing.
    """

    BUILDER_CONFIG_CLASS = AnnotatedMediaConfig
    ID_FIELD: str
    # Values of `visual`, with the folder in `data_dir` and the suffixes of its files.
    MEDIA: dict[str, tuple[str, tuple[str, ...]]]

    def __init__(self, *args: Any, **kwargs: Any):
        self.left_out: dict[str, dict[str, int]] = {}
        super().__init__(*args, **kwargs)

    def download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        """Build the dataset or find it in the cache, and set `left_out`."""
        super().download_and_prepare(*args, **kwargs)
        # Kept in the cache, so that loading from it reports the same counts.
        path = Path(self.cache_dir, "left_out.json")
        if self.left_out:
            path.write_text(json.dumps(self.left_out, indent=1, allow_nan=False), encoding="utf-8")
        elif path.is_file():
            self.left_out = json.loads(path.read_text(encoding="utf-8"))
            for split, counts in self.left_out.items():
                if counts:
                    logger.warning("%s %s: left out %s", self.name, split, _describe(counts))

    def _create_builder_config(self, *args: Any, **kwargs: Any) -> tuple[AnnotatedMediaConfig, str]:
        config, _ = super()._create_builder_config(*args, **kwargs)
        if config.data_dir is None:
            raise FileNotFoundError(f"{self.name} cannot be downloaded: give data_dir, the folder of its files")
        folder = Path(config.data_dir).expanduser().resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir={folder} is not a folder")
        config.data_dir = str(folder)
        if config.missing not in MISSING_MEDIA_POLICIES:
            raise ValueError(f"missing={config.missing!r} must be one of {MISSING_MEDIA_POLICIES}")
        config.title = config.title or next(iter(config.title_fields))
        if config.title not in config.title_fields:
            raise ValueError(f"title={config.title!r} must be one of {sorted(config.title_fields)}")
        config.visual = self._choose_visual(config.visual, folder)
        options = f"{config.title}-{config.visual}-{config.missing}-{config.check_media}"
        return config, f"{config.name}-{options}-{self._fingerprint(config)}"

    def _choose_visual(self, visual: str | None, folder: Path) -> str:
        present = [kind for kind, (name, _) in self.MEDIA.items() if (folder / name).is_dir()]
        if visual is None:
            return present[0] if present else "none"
        if visual not in (*self.MEDIA, "none"):
            raise ValueError(f"visual={visual!r} must be one of {(*self.MEDIA, 'none')}")
        if visual != "none" and visual not in present:
            raise FileNotFoundError(f"visual={visual!r} needs the folder {folder / self.MEDIA[visual][0]}")
        return visual

    def _fingerprint(self, config: AnnotatedMediaConfig) -> str:
        """Return a hash of the code and the files; without it, changed files would give the rows of the cache."""
        digest = hashlib.sha256()
        modules = [module.__file__ for module in (annotation_files, frame_features, media_folder, tagging_columns)]
        for path in (__file__, *modules, inspect.getfile(type(self))):
            digest.update(Path(path).read_bytes())
        for path in self._annotation_files(config).values():
            status = path.stat()
            digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}".encode())
        if config.visual != "none":
            with os.scandir(Path(config.data_dir, self.MEDIA[config.visual][0])) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    status = entry.stat(follow_symlinks=False)
                    digest.update(f"{entry.name}:{status.st_size}:{status.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def _annotation_files(self, config: AnnotatedMediaConfig) -> dict[str, Path]:
        """Return the annotation file of each split that has one; at least one split must."""
        folder, found = Path(config.data_dir), {}
        for split, names in config.files.items():
            candidates = [folder / f"{name}{suffix}" for name in names for suffix in COMPRESSION_SUFFIXES]
            if present := [path for path in candidates if path.is_file()]:
                found[split] = present[0]
        if not found:
            names = sorted(name for names in config.files.values() for name in names)
            raise FileNotFoundError(f"{folder} contains none of {', '.join(names)}, plain, .gz or .zst")
        return found

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features(TEXT_COLUMNS)
        if self.config.categories:
            features["category"] = datasets.Value("int32")
        if self.config.visual in VISUAL_COLUMNS:
            features[self.config.visual] = VISUAL_COLUMNS[self.config.visual]
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"path": str(path), "split": str(split)})
            for split, path in self._annotation_files(self.config).items()
        ]

    def _generate_tables(self, path: str, split: str) -> Iterator[tuple[int, pa.Table]]:
        left_out, rows, count = Counter(), [], 0
        for row in self._rows(Path(path), left_out):
            rows.append(row)
            if len(rows) == ROWS_PER_TABLE:
                yield count, self._table(rows)
                count, rows = count + len(rows), []
        if rows:
            yield count, self._table(rows)
            count += len(rows)
        self.left_out[split] = dict(left_out)
        if left_out:
            logger.warning("%s: %s rows; left out %s", path, f"{count:,}", _describe(left_out))
        if not count:
            reasons = f"left out {_describe(left_out)}" if left_out else "the file has none"
            raise ValueError(f"{path}: no example can be used; {reasons}")

    def _table(self, rows: list[dict]) -> pa.Table:
        # Rows have Arrow's own types already: encoding them by `datasets` would take most of the time.
        return pa.Table.from_pylist(rows, schema=self.info.features.arrow_schema)

    def _rows(self, path: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        visual, media, seen = self.config.visual, None, set()
        if visual != "none":
            name, suffixes = self.MEDIA[visual]
            media = MediaFolder(Path(self.config.data_dir, name), visual, suffixes, self.config.check_media)
        for annotation in read_annotations(path):
            row = self._text_row(annotation, seen, left_out)
            if row is None:
                continue
            if media is not None:
                try:
                    found = media.read(row["id"])
                    row[visual] = list(found) if isinstance(found, np.ndarray) else found
                except UnusableMediaError as error:
                    if self.config.missing == "skip":
                        left_out[f"examples {error}"] += 1
                        continue
                    left_out[f"{visual} of examples {error}"] += 1
                    row[visual] = None
            yield row

    def _text_row(self, annotation: dict, seen: set[str], left_out: Counter[str]) -> dict[str, Any] | None:
        """Return a row without its media, or `None` for an example that is left out."""
        example_id = annotation.get(self.ID_FIELD)
        if isinstance(example_id, int) and not isinstance(example_id, bool):
            example_id = str(example_id)
        if not _is_text(example_id) or not example_id.strip():
            left_out[f"examples without {self.ID_FIELD}"] += 1
            return None
        if example_id in seen:
            left_out[f"examples with a repeated {self.ID_FIELD}"] += 1
            return None
        seen.add(example_id)
        tags = _clean_tags(annotation.get("tag", annotation.get("tags")), left_out)
        if not tags:
            left_out["examples without tags"] += 1
            return None
        title = annotation.get(self.config.title_fields[self.config.title])
        row = {"id": example_id, "title": title.strip() if _is_text(title) else "", "tags": tags}
        if self.config.categories:
            category = annotation.get("category")
            is_valid = isinstance(category, int) and not isinstance(category, bool) and abs(category) < 2**31
            row["category"] = category if is_valid else None
        return row


def _clean_tags(values: Any, left_out: Counter[str]) -> list[str]:
    if not isinstance(values, list):
        return []
    texts = [value for value in values if _is_text(value)]
    num_empty = sum(not text.strip() for text in texts)
    tags = distinct_tags(texts)
    counts = {
        "tags that are not text": len(values) - len(texts),
        "empty tags": num_empty,
        "repeated tags": len(texts) - num_empty - len(tags),
    }
    left_out.update({reason: count for reason, count in counts.items() if count})
    return tags


def _is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can encode: JSON can contain one half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(counts: Mapping[str, int]) -> str:
    most_frequent_first = sorted(counts.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{count:,} {reason}" for reason, count in most_frequent_first)
