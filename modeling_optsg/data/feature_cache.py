"""Outputs of frozen towers, computed once and kept on disk."""

import hashlib
import json
import os

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Value, concatenate_datasets
from torch.utils.data import Dataset as TorchDataset

from modeling_optsg.generation_optsg import evaluation_mode

from .collator import TagTable

TOKEN_DTYPE = np.float16
# Column of what cannot be read, and why.
UNREADABLE = "unreadable"


def digest(*parts) -> str:
    """Hash of modules' weights, of tensors, and of anything JSON can write."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def tokenizer_settings(tokenizer) -> dict:
    """What a tokenizer does, as JSON can write it, and not what it was last called with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    # Every call leaves its padding and truncation behind in the backend.
    settings = {name: value for name, value in settings.items() if name not in ("padding", "truncation")}
    return settings | {"model_max_length": tokenizer.model_max_length}


def cache_tower_features(
    dataset: Dataset,
    model,
    processor,
    cache_dir: str | os.PathLike,
    *,
    frames: bool = True,
    titles: bool = True,
    batch_size: int = 64,
    block_size: int = 4096,
    max_unreadable: int = 0,
    processes: PartialState | None = None,
) -> Dataset:
    """Replaces images and titles by what the model's frozen towers make of them.

    The result is kept in `cache_dir`, block by block, under names made of the rows, the towers' weights and the
    processor's settings: a second call reads it, one that was stopped goes on, a change of any of them makes a new
    one.

    Args:
        dataset: rows with `title`, and `image`, `video` or their `frame_features`.
        model: an [`OPTSGModel`], or any module with its `encode_frames` and `encode_text`.
        processor: its [`OPTSGProcessor`].
        frames, titles: which of the two towers is frozen.
        block_size: rows of a block.
        max_unreadable: so many examples may be broken. With it the result has a column `unreadable`, for an example that
            is the reason, and its features are `None`.
        processes: those that divide the blocks among them; all of them call it.

    Returns:
        The rows with `frame_features` and `title_features` as half-precision bytes beside their shapes; wrap it in
        [`CachedFeatures`] to read arrays.

    Raises:
        ValueError: more than `max_unreadable` examples cannot be read.
    """
    encoder = _TowerEncoder(dataset, model, processor, frames, titles, max_unreadable)
    fingerprint = digest(
        dataset._fingerprint,
        *([model.vision_tower, processor.image_processor.to_dict(), processor.num_frames] if encoder.frames else []),
        *([processor.num_frames] if encoder.given else []),
        *([model.text_tower, tokenizer_settings(processor.tokenizer)] if encoder.titles else []),
    )
    columns = [encoder.visual] if encoder.frames else []
    features = Features({name: feature for name, feature in dataset.features.items() if name not in columns})
    for name in encoder.made:
        features |= {name: Value("binary"), f"{name}_shape": [Value("int32")]}
    os.makedirs(cache_dir, exist_ok=True)
    # Bytes as stored: the processor opens them itself and names the row when one is broken.
    if encoder.visual is not None:
        dataset = dataset.cast_column(encoder.visual, type(dataset.features[encoder.visual])(decode=False))
    if not encoder.made:
        return dataset
    starts = range(0, max(len(dataset), 1), block_size)

    def block(index: int) -> Dataset:
        name = f"towers-{fingerprint}-{block_size}-{index:05d}-of-{len(starts):05d}.arrow"
        return dataset.select(range(starts[index], min(starts[index] + block_size, len(dataset)))).map(
            encoder,
            batched=True,
            batch_size=batch_size,
            remove_columns=columns,
            features=Features(features | {UNREADABLE: Value("string")}),
            new_fingerprint=f"{fingerprint}-{block_size}-{index}",
            cache_file_name=os.path.join(cache_dir, name),
            desc=f"Tower features, {index + 1} of {len(starts)}",
        )

    with evaluation_mode(model):
        if processes is not None and processes.num_processes > 1:
            for index in range(processes.process_index, len(starts), processes.num_processes):
                block(index)
            processes.wait_for_everyone()
        rows = concatenate_datasets([block(index) for index in range(len(starts))])
    _limit([reason for reason in rows[UNREADABLE] if reason is not None], max_unreadable)
    return rows if max_unreadable else rows.remove_columns(UNREADABLE)


def _limit(reasons: list[str], most: int) -> None:
    if len(reasons) > most:
        shown = "; ".join(list(dict.fromkeys(reasons))[:3])
        raise ValueError(f"{len(reasons)} examples cannot be read, more than {most}, such as: {shown}")


class _TowerEncoder:
    """Rows with features instead of images and titles; those that cannot be read say why instead."""

    def __init__(self, dataset: Dataset, model, processor, frames: bool, titles: bool, max_unreadable: int):
        self.model, self.processor, self.max_unreadable = model, processor, max_unreadable
        self.visual = next((name for name in ("image", "video") if name in dataset.column_names), None)
        # Whether the dataset has features of its own.
        self.given = self.visual is None and "frame_features" in dataset.column_names
        self.frames, self.titles = frames and self.visual is not None, titles and "title" in dataset.column_names
        self.made = ["frame_features"] * (self.frames or self.given) + ["title_features"] * self.titles
        self.unreadable: list[str] = []

    @torch.no_grad()
    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        try:
            return self._encode(rows)
        except (ValueError, OSError):
            encoded = [
                self._encode_one({name: values[place : place + 1] for name, values in rows.items()})
                for place in range(_count(rows))
            ]
            return {name: [row[name][0] for row in encoded] for name in encoded[0]}

    def _encode_one(self, row: dict[str, list]) -> dict[str, list]:
        try:
            return self._encode(row)
        except (ValueError, OSError) as error:
            self.unreadable.append(f"{row['id'][0]}: {error}" if "id" in row else str(error))
            _limit(self.unreadable, self.max_unreadable)
            nothing = {column: [None] for name in self.made for column in (name, f"{name}_shape")}
            return nothing | {UNREADABLE: self.unreadable[-1:]}

    def _encode(self, rows: dict[str, list]) -> dict[str, list]:
        out, count, device = {}, _count(rows), next(self.model.parameters()).device
        if "frame_features" in self.made:
            column, argument = (
                (self.visual, f"{self.visual}s") if self.frames else ("frame_features", "frame_features")
            )
            present = [value is not None for value in rows[column]]
            features = [None] * count
            if any(present):
                batch = self.processor(**{argument: [value for value in rows[column] if value is not None]})
                tokens = batch["frame_features"] if self.given else None
                if self.frames:
                    tokens = self.model.encode_frames(batch["pixel_values"].to(device))
                lengths = batch["frame_mask"].sum(dim=1).tolist()
                encoded = iter(example[:length] for example, length in zip(tokens.cpu(), lengths))
                features = [next(encoded) if p else None for p in present]
            out |= _to_columns("frame_features", features)
        if self.titles:
            present = [bool(title and title.strip()) for title in rows["title"]]
            features = [None] * count
            if any(present):
                batch = self.processor(titles=[title for title, p in zip(rows["title"], present) if p])
                mask = batch["attention_mask"]
                tokens = self.model.encode_text(batch["input_ids"].to(device), mask.to(device)).cpu()
                encoded = iter(example[example_mask.bool()] for example, example_mask in zip(tokens, mask))
                features = [next(encoded) if p else None for p in present]
            out |= _to_columns("title_features", features)
        return out | {UNREADABLE: [None] * count}


def _count(rows: dict[str, list]) -> int:
    return len(next(iter(rows.values())))


def _to_columns(name: str, features: list) -> dict[str, list]:
    arrays = [None if f is None else f.float().numpy().astype(TOKEN_DTYPE) for f in features]
    return {
        name: [None if a is None else a.tobytes() for a in arrays],
        f"{name}_shape": [None if a is None else list(a.shape) for a in arrays],
    }


class CachedFeatures(TorchDataset):
    """Rows of [`cache_tower_features`] with their features as arrays: `frame_features` `[frames, tokens, width]`
    (`[frames, width]` if they are the dataset's own) and `title_features` `[length, width]`, `None` for an example that
    has none."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.names = [n for n in ("frame_features", "title_features") if f"{n}_shape" in dataset.column_names]

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        row = self.dataset[index]
        for name in self.names:
            shape = row.pop(f"{name}_shape")
            row[name] = (
                None if shape is None else np.frombuffer(row[name], TOKEN_DTYPE).reshape(shape).astype(np.float32)
            )
        return row


def build_tag_table(
    tags: list[str], model, processor, cache_dir: str | os.PathLike, batch_size: int = 256
) -> TagTable:
    """The [`TagTable`] of training tags under a frozen text tower, kept in `cache_dir` likewise."""
    fingerprint = digest(tags, model.text_tower, tokenizer_settings(processor.tokenizer))
    path = os.path.join(cache_dir, f"tags-{fingerprint}.npy")
    if not os.path.exists(path):
        device = next(model.parameters()).device
        parts = []
        with torch.no_grad(), evaluation_mode(model):
            for start in range(0, len(tags), batch_size):
                batch = processor.encode_tags(tags[start : start + batch_size])
                names = ("tag_text_input_ids", "tag_text_attention_mask")
                parts.append(model.embed_tags(*(batch[name].to(device) for name in names)).cpu())
        os.makedirs(cache_dir, exist_ok=True)
        unfinished = f"{path}.{os.getpid()}.npy"
        np.save(unfinished, torch.cat(parts).float().numpy().astype(TOKEN_DTYPE))
        os.replace(unfinished, path)
    input_ids = processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return TagTable(tags, input_ids, torch.from_numpy(np.load(path)))
