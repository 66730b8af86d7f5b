"""Outputs of frozen towers, computed once and kept on disk."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Value, concatenate_datasets
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from dataset_scripts import undecoded
from modeling_optsg.base_models import OPTSGTowers
from modeling_optsg.data.checksums import checksum_path, is_cached, lock_cached, record_checksum
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.processing_optsg import OPTSGProcessor

from .collator import TagTable

logger = get_logger(__name__)

FEATURE_DTYPE = np.float16
FEATURE_COLUMNS = ("frame_features", "image_features", "title_features")
# The column with the reason why an example cannot be read.
UNREADABLE = "unreadable"
# The pixels of a batch, which are not kept.
PIXELS = "pixels"


def digest(*parts: object) -> str:
    """Hashes the weights of modules, and anything else as JSON."""
    sha256 = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in sorted(part.state_dict().items()):
                sha256.update(name.encode())
                sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            sha256.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sha256.hexdigest()[:32]


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the vocabulary and the settings of a tokenizer as JSON data."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    # Each call of a tokenizer changes the padding and the truncation of its backend.
    settings = {name: value for name, value in settings.items() if name not in ("padding", "truncation")}
    return settings | {"model_max_length": tokenizer.model_max_length}


def image_settings(processor: OPTSGProcessor) -> dict | None:
    """Return the settings of a processor's image processor as JSON data, `None` if it has no image processor."""
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        return None
    # A saved processor names its code here.
    return {name: value for name, value in image_processor.to_dict().items() if name != "auto_map"}


def cache_tower_features(
    dataset: Dataset,
    model: OPTSGTowers,
    processor: OPTSGProcessor,
    cache_dir: str | os.PathLike,
    *,
    frames: bool = True,
    titles: bool = True,
    batch_size: int = 64,
    block_size: int = 4096,
    max_unreadable: int = 0,
    processes: PartialState | None = None,
) -> Dataset:
    """Replace images and titles with the features that the frozen towers compute from them.

    Features are cached in `cache_dir`, block by block, those of each tower in separate files. The names of the files
    depend on the rows, the weights of the tower and the settings of the processor: a second call reads the files, an
    interrupted call is resumed at the first missing block, and other rows, weights or settings have separate files.
    Unreadable examples are tried again in each call. Each file has its checksum next to it; a damaged file is reported
    and computed again.

    Args:
        dataset: Rows with `title`, and `image`, `video` or `frame_features`.
        model: A model whose `encode_frames` and `encode_text` run the towers.
        processor: The processor of the model.
        cache_dir: Folder of the files.
        frames: Whether the vision tower is frozen, so that its features can be cached.
        titles: Whether the text tower is frozen, so that its features can be cached.
        batch_size: Rows per forward pass.
        block_size: Rows per file.
        max_unreadable: Maximum number of unreadable examples. If it is not 0, the result has the column `unreadable`:
            the reason for an unreadable example, whose features are `None`, and `None` for all others.
        processes: The processes that divide the blocks among themselves. All of them must call this function.

    Returns:
        The rows with `FEATURE_COLUMNS` as the bytes of half-precision arrays, and the shapes of these arrays;
        [`CachedFeatures`] reads them.

    Raises:
        ValueError: More than `max_unreadable` examples cannot be read.
    """
    if frames and titles and "title" in dataset.column_names and _visual_columns(dataset):
        # Separate files, so that models with the same vision tower share its features.
        settings = {"batch_size": batch_size, "block_size": block_size, "processes": processes}
        images = cache_tower_features(
            dataset, model, processor, cache_dir, titles=False, max_unreadable=max_unreadable, **settings
        )
        texts = cache_tower_features(dataset.select_columns("title"), model, processor, cache_dir, **settings)
        return concatenate_datasets([images, texts.remove_columns("title")], axis=1)
    encoder = _TowerEncoder(dataset, model, processor, frames, titles, max_unreadable)
    fingerprint = encoder.fingerprint(dataset._fingerprint)
    if encoder.visual_columns:
        # The processor opens the stored bytes itself, and names the file in errors.
        dataset = undecoded(dataset)
    if not encoder.feature_columns:
        return dataset
    os.makedirs(cache_dir, exist_ok=True)
    blocks = _Blocks(dataset, encoder, fingerprint, Path(cache_dir), batch_size, block_size)
    with evaluation_mode(model):
        if processes is not None and processes.num_processes > 1:
            for index in range(processes.process_index, len(blocks), processes.num_processes):
                blocks.compute(index)
            processes.wait_for_everyone()
            rows = [blocks.read(index) for index in range(len(blocks))]
        else:
            rows = [blocks.compute(index) for index in range(len(blocks))]
        rows = concatenate_datasets(rows)
    _check_unreadable([reason for reason in rows[UNREADABLE] if reason is not None], max_unreadable)
    return rows if max_unreadable else rows.remove_columns(UNREADABLE)


class _Blocks:
    """The rows with features, in blocks with one file each."""

    def __init__(
        self,
        dataset: Dataset,
        encoder: "_TowerEncoder",
        fingerprint: str,
        cache_dir: Path,
        batch_size: int,
        block_size: int,
    ) -> None:
        self.dataset, self.encoder, self.fingerprint = dataset, encoder, fingerprint
        self.cache_dir, self.batch_size, self.block_size = cache_dir, batch_size, block_size
        self.removed_columns = encoder.visual_columns if encoder.encodes_frames else []
        kept = {name: feature for name, feature in dataset.features.items() if name not in self.removed_columns}
        self.features = Features(kept)
        for name in encoder.feature_columns:
            self.features |= {name: Value("binary"), f"{name}_shape": [Value("int32")]}
        self.features |= {UNREADABLE: Value("string")}

    def __len__(self) -> int:
        return max(-(-len(self.dataset) // self.block_size), 1)

    def compute(self, index: int) -> Dataset:
        """Compute a block, or read it from its file and try its unreadable rows again."""
        path = self._path(index)
        with lock_cached(path):
            if is_cached(path):
                self._encode_unreadable(index)
                return self.read(index)
            rows = self.read(index)
            record_checksum(path)
            return rows

    def read(self, index: int) -> Dataset:
        """Read a block from its file, or compute it."""
        description = "Tower features" + (f", {index + 1} of {len(self)}" if len(self) > 1 else "")
        return self._encode(self._rows(index), self._path(index), self._fingerprint(index), description)

    def _encode_unreadable(self, index: int) -> None:
        """Encode the unreadable rows of a block again, and replace its file if that changes anything."""
        path, rows = self._path(index), self._rows(index)
        cached = self.read(index)
        reasons = cached[UNREADABLE][:]
        unreadable = [row for row, reason in enumerate(reasons) if reason is not None]
        if not unreadable:
            return
        part, whole = (path.with_name(f"{path.name}.{os.getpid()}.{name}") for name in ("part", "whole"))
        for left_over in (part, whole):
            left_over.unlink(missing_ok=True)
        description = f"Unreadable examples, {index + 1} of {len(self)}"
        again = self._encode(rows.select(unreadable), part, f"{self._fingerprint(index)}-again", description)
        if again[UNREADABLE][:] != [reasons[row] for row in unreadable]:
            order = np.arange(len(cached))
            order[unreadable] = len(cached) + np.arange(len(unreadable))
            merged = concatenate_datasets([cached, again]).select(order)
            merged.flatten_indices(cache_file_name=str(whole), new_fingerprint=self._fingerprint(index))
            checksum_path(path).unlink(missing_ok=True)
            os.replace(whole, path)
            record_checksum(path)
        part.unlink()

    def _encode(self, rows: Dataset, path: Path, fingerprint: str, description: str) -> Dataset:
        return rows.map(
            self.encoder,
            batched=True,
            batch_size=self.batch_size,
            remove_columns=self.removed_columns,
            features=Features(self.features),
            new_fingerprint=fingerprint,
            cache_file_name=str(path),
            desc=description,
        )

    def _rows(self, index: int) -> Dataset:
        start = index * self.block_size
        return self.dataset.select(range(start, min(start + self.block_size, len(self.dataset))))

    def _path(self, index: int) -> Path:
        name = f"towers-{self.fingerprint}-{self.block_size}-{index:05d}-of-{len(self):05d}.arrow"
        return self.cache_dir / name

    def _fingerprint(self, index: int) -> str:
        return f"{self.fingerprint}-{self.block_size}-{index}"


def _check_unreadable(reasons: list[str], max_unreadable: int) -> None:
    if len(reasons) > max_unreadable:
        shown = "; ".join(list(dict.fromkeys(reasons))[:3])
        raise ValueError(f"{len(reasons)} examples cannot be read, more than {max_unreadable}, such as: {shown}")


class _TowerEncoder:
    """Replaces images and titles of rows with features; unreadable rows get a reason instead."""

    def __init__(
        self,
        dataset: Dataset,
        model: OPTSGTowers,
        processor: OPTSGProcessor,
        frames: bool,
        titles: bool,
        max_unreadable: int,
    ) -> None:
        self.model, self.processor, self.max_unreadable = model, processor, max_unreadable
        self.visual_columns = _visual_columns(dataset)
        self.has_frame_features = not self.visual_columns and "frame_features" in dataset.column_names
        self.encodes_frames = frames and bool(self.visual_columns)
        self.encodes_titles = titles and "title" in dataset.column_names
        self.feature_columns = ["frame_features"] * (self.encodes_frames or self.has_frame_features)
        self.feature_columns += ["image_features"] * self.encodes_frames
        self.feature_columns += ["title_features"] * self.encodes_titles
        self.unreadable: list[str] = []

    def fingerprint(self, rows_fingerprint: str) -> str:
        """Hashes all that the features depend on."""
        model, processor = self.model, self.processor
        parts = [rows_fingerprint]
        if self.encodes_frames:
            parts += [model.vision_tower, image_settings(processor), processor.num_frames]
            parts += [model.config.vision_feature_layers]
            parts += [self.visual_columns] if len(self.visual_columns) > 1 else []
        if self.has_frame_features:
            parts += [processor.num_frames]
        if self.encodes_titles:
            parts += [model.text_tower, tokenizer_settings(processor.tokenizer)]
        return digest(*parts)

    @torch.no_grad()
    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        if self.encodes_frames:
            # Pillow and PyAV release the interpreter while they decode.
            with ThreadPoolExecutor() as pool:
                rows = rows | {PIXELS: list(pool.map(self._read, *(rows[name] for name in self.visual_columns)))}
        try:
            return self._encode(rows)
        except (ValueError, OSError):
            encoded = [
                self._encode_one({name: values[index : index + 1] for name, values in rows.items()})
                for index in range(_num_rows(rows))
            ]
            return {name: [row[name][0] for row in encoded] for name in encoded[0]}

    def _read(self, *values: object) -> torch.Tensor | Exception | None:
        """Read the image or the video of a row; `None` for a row with neither."""
        files = {name: value for name, value in zip(self.visual_columns, values, strict=True) if value is not None}
        try:
            return self.processor.read_pixels(**files) if files else None
        except (ValueError, OSError) as error:
            return error

    def _encode_one(self, row: dict[str, list]) -> dict[str, list]:
        try:
            return self._encode(row)
        except (ValueError, OSError) as error:
            self.unreadable.append(f"{row['id'][0]}: {error}" if "id" in row else str(error))
            _check_unreadable(self.unreadable, self.max_unreadable)
            nothing = {column: [None] for name in self.feature_columns for column in (name, f"{name}_shape")}
            return nothing | {UNREADABLE: self.unreadable[-1:]}

    def _encode(self, rows: dict[str, list]) -> dict[str, list]:
        encoded = {}
        if self.encodes_frames:
            encoded |= self._encode_frames(rows[PIXELS])
        elif self.has_frame_features:
            encoded |= _to_columns("frame_features", self._sample_frames(rows["frame_features"]))
        if self.encodes_titles:
            encoded |= _to_columns("title_features", self._encode_titles(rows["title"]))
        return encoded | {UNREADABLE: [None] * _num_rows(rows)}

    def _encode_frames(self, values: list[torch.Tensor | Exception | None]) -> dict[str, list]:
        if error := next((value for value in values if isinstance(value, Exception)), None):
            raise error
        present = [value for value in values if value is not None]
        if not present:
            return _to_columns("frame_features", values) | _to_columns("image_features", values)
        batch = self.processor(pixel_values=present)
        mask = batch["frame_mask"]
        features = self.model.encode_frames(batch["pixel_values"].to(self._device), mask.to(self._device))
        images = iter(features.image_features.cpu())
        frames = _to_columns("frame_features", _spread(values, features.frame_features.cpu(), mask))
        return frames | _to_columns("image_features", [None if value is None else next(images) for value in values])

    def _sample_frames(self, values: list) -> list[torch.Tensor | None]:
        present = [value for value in values if value is not None]
        if not present:
            return values
        batch = self.processor(frame_features=present)
        return _spread(values, batch["frame_features"], batch["frame_mask"])

    def _encode_titles(self, titles: list[str | None]) -> list[torch.Tensor | None]:
        titles = [title if title and title.strip() else None for title in titles]
        present = [title for title in titles if title is not None]
        if not present:
            return titles
        batch = self.processor(titles=present)
        input_ids, mask = batch["input_ids"], batch["attention_mask"]
        features = self.model.encode_text(input_ids.to(self._device), mask.to(self._device)).cpu()
        return _spread(titles, features, mask)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _visual_columns(dataset: Dataset) -> list[str]:
    return [name for name in ("image", "video") if name in dataset.column_names]


def _num_rows(rows: dict[str, list]) -> int:
    return len(next(iter(rows.values())))


def _spread(values: list, features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor | None]:
    """Give each value that is not `None` the next features, without padding."""
    unpadded = (example[example_mask.bool()] for example, example_mask in zip(features, mask))
    return [None if value is None else next(unpadded) for value in values]


def _to_columns(name: str, features: list[torch.Tensor | None]) -> dict[str, list]:
    arrays = [None if f is None else f.float().numpy().astype(FEATURE_DTYPE) for f in features]
    return {
        name: [None if a is None else a.tobytes() for a in arrays],
        f"{name}_shape": [None if a is None else list(a.shape) for a in arrays],
    }


class CachedFeatures(TorchDataset):
    """Reads the rows of [`cache_tower_features`], with their features as arrays.

    `frame_features` are `[frames, tokens, width]` (`[frames, width]` if they come with the dataset), `image_features`
    `[image_feature_size]`, and `title_features` `[length, width]`; they are `None` for an example that has none.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.names = [n for n in FEATURE_COLUMNS if f"{n}_shape" in dataset.column_names]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        row = self.dataset[index]
        for name in self.names:
            shape = row.pop(f"{name}_shape")
            if shape is not None:
                row[name] = np.frombuffer(row[name], FEATURE_DTYPE).reshape(shape).astype(np.float32)
        return row


def cache_readable_examples(
    dataset: Dataset, model: OPTSGTowers, processor: OPTSGProcessor, cache_dir: str | os.PathLike, **kwargs: object
) -> tuple[CachedFeatures, Dataset, dict[str, str]]:
    """Compute or read tower features, and leave out the examples that cannot be read.

    Args:
        dataset, model, processor, cache_dir: See [`cache_tower_features`].
        kwargs: Further arguments of [`cache_tower_features`].

    Returns:
        The readable examples with their features, the same rows without them, and the reasons for the others.

    Raises:
        ValueError: More than `max_unreadable` examples cannot be read.
    """
    features = cache_tower_features(dataset, model, processor, cache_dir, **kwargs)
    rows, features, reasons = without_unreadable(dataset, features)
    return CachedFeatures(features), rows, reasons


def without_unreadable(rows: Dataset, features: Dataset) -> tuple[Dataset, Dataset, dict[str, str]]:
    """Leave out examples that [`cache_tower_features`] could not read, and log how many.

    Args:
        rows: The examples.
        features: Their features.

    Returns:
        The rows and the features that are left, and the reasons for the others by `id` or else by row number.
    """
    if UNREADABLE not in features.column_names:
        return rows, features, {}
    broken = {index: reason for index, reason in enumerate(features[UNREADABLE]) if reason is not None}
    features = features.remove_columns(UNREADABLE)
    if not broken:
        return rows, features, {}
    ids = rows["id"] if "id" in rows.column_names else range(len(rows))
    reasons = {str(ids[index]): reason for index, reason in broken.items()}
    logger.warning(
        f"{len(broken)} of {len(rows)} examples cannot be read and are left out, for example: {broken[min(broken)]}"
    )
    kept = [index for index in range(len(rows)) if index not in broken]
    return rows.select(kept), features.select(kept), reasons


def build_tag_table(
    tags: list[str], model: OPTSGTowers, processor: OPTSGProcessor, cache_dir: str | os.PathLike, batch_size: int = 256
) -> TagTable:
    """Build the [`TagTable`] of training tags with a frozen text tower; its features are cached in `cache_dir`."""
    fingerprint = digest(tags, model.text_tower, tokenizer_settings(processor.tokenizer))
    path = Path(cache_dir, f"tags-{fingerprint}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_cached(path):
        if not is_cached(path):
            device = next(model.parameters()).device
            parts = []
            with torch.no_grad(), evaluation_mode(model):
                for start in range(0, len(tags), batch_size):
                    batch = processor.encode_tags(tags[start : start + batch_size])
                    names = ("tag_text_input_ids", "tag_text_attention_mask")
                    parts.append(model.embed_tags(*(batch[name].to(device) for name in names)).cpu())
            partial = f"{path}.{os.getpid()}.npy"
            np.save(partial, torch.cat(parts).float().numpy().astype(FEATURE_DTYPE))
            os.replace(partial, path)
            record_checksum(path)
    input_ids = processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return TagTable(tags, input_ids, torch.from_numpy(np.load(path)))
