"""Benchmarks that are released as annotation files beside a folder of media or of their features."""

import hashlib
import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from dataset_scripts import annotation_files

from .annotation_files import read_annotations

logger = logging.getLogger(__name__)

ROWS_PER_TABLE = 2000
COMPRESSIONS = ("", ".gz", ".zst")
WIDTH_SAMPLE = 50
FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".h5")
WHEN_MISSING = ("skip", "keep")


@dataclass
class AnnotatedMediaConfig(datasets.BuilderConfig):
    """
    Args:
        files: of each split the annotation file's name, without a compression's suffix.
        title_fields: fields of an annotation that may be its title, by the name under which `title` chooses one.
        title: which of them.
        visual: "video", "image" or "frame_features"; `None` for whichever folder `data_dir` holds.
        missing: what becomes of an example whose media or feature file is not there: "skip" or "keep" it without.
        check_media: whether images and videos are opened (not decoded) to see that they are such; milliseconds each.
        categories: whether annotations have a `category`.
    """

    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    title_fields: dict[str, str] = field(default_factory=dict)
    title: str | None = None
    visual: str | None = None
    missing: str = "skip"
    check_media: bool = True
    categories: bool = False


class AnnotatedMedia(datasets.ArrowBasedBuilder):
    """Reads annotations example by example, finds each example's file by its id, and writes rows of `id`, `title`, `tags`, and
    `video`, `image` or `frame_features`.

    In `data_dir` lie the annotation files (plain, `.gz` or `.zst`; a JSON list or JSON lines) and, where there are
    any, the folders of `MEDIA`: a file in them is named by its example's id. Examples that cannot be used are left out,
    counted by reason, and logged; `left_out` holds the counts of each split.

    Raises:
        ValueError: an annotation file is broken, none of its examples can be used, or a configuration's value is unknown.
        FileNotFoundError: `data_dir`, an annotation file or the folder that `visual` asks for is not there.
    """

    BUILDER_CONFIG_CLASS = AnnotatedMediaConfig
    ID_FIELD: str
    # What may be looked at -> the folder it lies in and the suffixes of its files.
    MEDIA: dict[str, tuple[str, tuple[str, ...]]]

    def __init__(self, *args, **kwargs):
        self.left_out: dict[str, dict[str, int]] = {}
        super().__init__(*args, **kwargs)

    def _create_builder_config(self, *args, **kwargs):
        config, _ = super()._create_builder_config(*args, **kwargs)
        if config.data_dir is None:
            raise FileNotFoundError(f"{self.name} is not distributed openly: give data_dir, the folder of its files")
        folder = Path(config.data_dir).expanduser().resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir={folder} is no folder")
        if config.missing not in WHEN_MISSING:
            raise ValueError(f"missing={config.missing!r} must be one of {WHEN_MISSING}")
        config.title = config.title or next(iter(config.title_fields))
        if config.title not in config.title_fields:
            raise ValueError(f"title={config.title!r} must be one of {sorted(config.title_fields)}")
        present = [visual for visual, (name, _) in self.MEDIA.items() if (folder / name).is_dir()]
        if config.visual is None:
            config.visual = present[0] if present else "none"
        elif config.visual not in (*self.MEDIA, "none"):
            raise ValueError(f"visual={config.visual!r} must be one of {(*self.MEDIA, 'none')}")
        elif config.visual != "none" and config.visual not in present:
            raise FileNotFoundError(
                f"visual={config.visual!r} needs the folder {folder / self.MEDIA[config.visual][0]}"
            )
        config.data_dir = str(folder)
        # Without this a changed file would give the rows of the cache, made of the file as it was.
        digest = hashlib.sha256()
        for module in (__file__, annotation_files.__file__, inspect.getfile(type(self))):
            digest.update(Path(module).read_bytes())
        for path in self._annotation_files(config).values():
            status = path.stat()
            digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}".encode())
        if config.visual != "none":
            with os.scandir(folder / self.MEDIA[config.visual][0]) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    status = entry.stat(follow_symlinks=False)
                    digest.update(f"{entry.name}:{status.st_size}:{status.st_mtime_ns}".encode())
        choices = f"{config.title}-{config.visual}-{config.missing}-{config.check_media}"
        return config, f"{config.name}-{choices}-{digest.hexdigest()[:16]}"

    def _annotation_files(self, config) -> dict[str, Path]:
        """The splits whose files are there; at least one must be."""
        folder, found = Path(config.data_dir), {}
        for split, names in config.files.items():
            tried = [folder / f"{name}{compression}" for name in names for compression in COMPRESSIONS]
            if there := [path for path in tried if path.is_file()]:
                found[split] = there[0]
        if not found:
            wanted = sorted(name for names in config.files.values() for name in names)
            raise FileNotFoundError(f"{folder} holds none of {', '.join(wanted)}, plain or as .gz or .zst")
        return found

    def _info(self):
        text = datasets.Value("string")
        features = {"id": text, "title": text, "tags": datasets.List(text)}
        if self.config.categories:
            features["category"] = datasets.Value("int32")
        visual = {
            "video": datasets.Video(decode=False),
            "image": datasets.Image(),
            "frame_features": datasets.List(datasets.List(datasets.Value("float32"))),
        }
        if self.config.visual in visual:
            features[self.config.visual] = visual[self.config.visual]
        return datasets.DatasetInfo(features=datasets.Features(features))

    def download_and_prepare(self, *args, **kwargs):
        super().download_and_prepare(*args, **kwargs)
        # Beside the rows: who loads them from the cache is to know too what they lack.
        path = Path(self.cache_dir, "left_out.json")
        if self.left_out:
            path.write_text(json.dumps(self.left_out, indent=1), encoding="utf-8")
        elif path.is_file():
            self.left_out = json.loads(path.read_text(encoding="utf-8"))
            for split, reasons in self.left_out.items():
                if reasons:
                    logger.warning("%s %s: left out: %s", self.name, split, _listed(reasons))

    def _split_generators(self, dl_manager):
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"path": str(path), "split": str(split)})
            for split, path in self._annotation_files(self.config).items()
        ]

    def _generate_tables(self, path: str, split: str) -> Iterator[tuple[int, pa.Table]]:
        left_out, rows, written = Counter(), [], 0
        for row in self._rows(Path(path), left_out):
            rows.append(row)
            if len(rows) == ROWS_PER_TABLE:
                yield written, self._table(rows)
                written, rows = written + len(rows), []
        if rows:
            yield written, self._table(rows)
            written += len(rows)
        self.left_out[split] = dict(left_out)
        if left_out:
            logger.warning("%s: %s rows; left out: %s", path, f"{written:,}", _listed(left_out))
        if not written:
            raise ValueError(f"{path}: none of its examples can be used: {dict(left_out) or 'there are none'}")

    def _table(self, rows: list[dict]) -> pa.Table:
        # Rows are made as Arrow stores them: encoding each by its features takes most of the time.
        return pa.Table.from_pylist(rows, schema=self.info.features.arrow_schema)

    def _rows(self, path: Path, left_out: Counter) -> Iterator[dict]:
        seen, visual = set(), self.config.visual
        title_field, find = self.config.title_fields[self.config.title], self._finder()
        for example in read_annotations(path):
            name = example.get(self.ID_FIELD)
            if isinstance(name, int) and not isinstance(name, bool):
                name = str(name)
            if not _is_text(name) or not name.strip():
                left_out[f"examples without {self.ID_FIELD}"] += 1
                continue
            if name in seen:
                left_out[f"examples of a {self.ID_FIELD} that was there before"] += 1
                continue
            seen.add(name)
            tags = self._tags(example.get("tag", example.get("tags")), left_out)
            if not tags:
                left_out["examples without tags"] += 1
                continue
            title = example.get(title_field)
            row = {"id": name, "title": title.strip() if _is_text(title) else "", "tags": tags}
            if self.config.categories:
                category = example.get("category")
                known = isinstance(category, int) and not isinstance(category, bool) and abs(category) < 2**31
                row["category"] = category if known else None
            if visual != "none":
                row[visual], problem = find(name)
                if problem:
                    left_out[f"examples {problem}" if self.config.missing == "skip" else f"files {problem}"] += 1
                    if self.config.missing == "skip":
                        continue
                if visual == "frame_features" and row[visual] is not None:
                    row[visual] = list(row[visual])
            yield row

    @staticmethod
    def _tags(values, left_out: Counter) -> list[str]:
        if not isinstance(values, list):
            return []
        texts = [value.strip() for value in values if _is_text(value)]
        tags = list(dict.fromkeys(text for text in texts if text))
        left_out["tags that are no text"] += len(values) - len(texts)
        left_out["empty tags"] += texts.count("")
        left_out["tags an example has twice"] += len(texts) - texts.count("") - len(tags)
        for reason in [reason for reason, count in left_out.items() if not count]:
            del left_out[reason]
        return tags

    def _finder(self) -> Callable[[str], tuple[object, str | None]]:
        """A function from an id to what is looked at and what is wrong with it."""
        if self.config.visual == "none":
            return lambda example: (None, None)
        name, suffixes = self.MEDIA[self.config.visual]
        folder = Path(self.config.data_dir, name).resolve()
        # One look at the folder instead of one for each suffix of each example; of two files the earlier suffix.
        files: dict[str, str] = {}
        with os.scandir(folder) as entries:
            named = [entry.name for entry in entries if entry.name.lower().endswith(suffixes)]
        for file in sorted(named, key=lambda file: suffixes.index(os.path.splitext(file)[1].lower()), reverse=True):
            files[os.path.splitext(file)[0]] = file
        width = _usual_width(folder, files) if self.config.visual == "frame_features" else None

        def find(example: str):
            # An id is a file's name, never a way out of the folder.
            if example in (".", "..") or "/" in example or os.sep in example or "\0" in example:
                return None, "whose id is no file name"
            path = folder / files[example] if example in files else None
            if path is None or not path.exists():
                return None, f"whose file is not in {name}/"
            if not path.resolve().is_relative_to(folder):
                return None, f"whose file is a link out of {name}/"
            if self.config.visual != "frame_features":
                if self.config.check_media and (problem := _problem(path, self.config.visual)):
                    logger.info("%s: %s", path, problem)
                    return None, f"whose {self.config.visual} cannot be opened"
                return {"bytes": None, "path": str(path)}, None
            try:
                features = read_features(path)
            except ImportError:
                raise
            except Exception as error:  # Each format has its own for a file that is damaged.
                logger.info("%s: %s", path, error)
                return None, "whose features cannot be read"
            if features.shape[1] != width:
                return None, f"whose features are not {width} wide, as most are"
            return features, None

        return find


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda own: -own[1]))


def _is_text(value) -> bool:
    """Whether a value is text that can be written: JSON can spell half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _usual_width(folder: Path, files: Mapping[str, str]) -> int | None:
    """The width that most of some feature files have: one file of another must not decide for all."""
    widths = Counter()
    for name in sorted(files)[:: max(1, len(files) // WIDTH_SAMPLE)]:
        try:
            widths[read_features(folder / files[name]).shape[1]] += 1
        except ImportError:
            raise
        except Exception:
            continue
    return widths.most_common(1)[0][0] if widths else None


def _problem(path: Path, visual: str) -> str | None:
    """What is wrong with an image or video as far as opening it tells."""
    try:
        if visual == "image":
            Image.open(path).close()
        else:
            from modeling_optsg.video_utils import check_video

            check_video(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None


def read_features(path: Path) -> np.ndarray:
    """Frame features `[frames, width]`, float32, of one example; of an archive the first array.

    Raises:
        ValueError: they have another number of dimensions, no frame, or are not finite.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        features = np.load(path, allow_pickle=False)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            features = archive[archive.files[0]] if archive.files else np.zeros(0)
    elif suffix == ".pt":
        import pickle

        import torch

        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"no tensor that is safe to load: {error}") from None
        features = loaded.detach().float().numpy() if isinstance(loaded, torch.Tensor) else np.zeros(0)
    else:
        try:
            import h5py
        except ImportError as error:
            raise ModuleNotFoundError(f"{path} needs h5py: pip install 'optsg[h5]'") from error

        with h5py.File(path) as archive:
            found = next((entry for entry in archive.values() if isinstance(entry, h5py.Dataset)), None)
            features = np.zeros(0) if found is None else found[()]
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features of shape {features.shape}; expected [frames, width]")
    features = features.astype(np.float32)
    # What is cached in training has 16 bits.
    if not (np.abs(features) <= np.finfo(np.float16).max).all():
        raise ValueError("features are not finite, or beyond 65,504")
    return features
