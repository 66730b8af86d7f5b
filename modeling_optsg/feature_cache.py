"""Outputs of frozen towers, computed once and kept on disk."""

import hashlib
import json
import os

import numpy as np
import torch
from datasets import Dataset, Features, Value
from torch.utils.data import Dataset as TorchDataset

from .data_collator import TagTable
from .tag_generation import evaluation_mode

TOKEN_DTYPE = np.float16


def _digest(*parts) -> str:
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


def _tokenizer_settings(tokenizer) -> dict:
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
) -> Dataset:
    """Replaces pictures and titles by what the model's frozen towers make of them.

    The result is kept in `cache_dir` under a name made of the rows, the towers' weights and the processor's settings:
    a second call reads it, a change of any of them makes a new one.

    Args:
        dataset: rows with `title`, and `image`, `video` or their `frame_features`.
        model: an [`OPTSGModel`], or any module with its `encode_frames` and `encode_text`.
        processor: its [`OPTSGProcessor`].
        frames, titles: which of the two towers is frozen.

    Returns:
        The rows with `frame_features` and `title_features` as half-precision bytes beside their shapes; wrap it in
        [`CachedFeatures`] to read arrays.
    """
    device = next(model.parameters()).device
    visual = next((name for name in ("image", "video") if name in dataset.column_names), None)
    given = visual is None and "frame_features" in dataset.column_names
    frames, titles = frames and visual is not None, titles and "title" in dataset.column_names
    fingerprint = _digest(
        dataset._fingerprint,
        *([model.vision_tower, processor.image_processor.to_dict(), processor.num_frames] if frames else []),
        *([processor.num_frames] if given else []),
        *([model.text_tower, _tokenizer_settings(processor.tokenizer)] if titles else []),
    )

    @torch.no_grad()
    def encode(rows):
        out = {}
        count = len(next(iter(rows.values())))
        if frames or given:
            column, argument = (visual, f"{visual}s") if frames else ("frame_features", "frame_features")
            present = [value is not None for value in rows[column]]
            features = [None] * count
            if any(present):
                batch = processor(**{argument: [v for v in rows[column] if v is not None]})
                tokens = model.encode_frames(batch["pixel_values"].to(device)) if frames else batch["frame_features"]
                lengths = batch["frame_mask"].sum(dim=1).tolist()
                encoded = iter(item[:length] for item, length in zip(tokens.cpu(), lengths))
                features = [next(encoded) if p else None for p in present]
            out |= _to_columns("frame_features", features)
        if titles:
            present = [bool(title and title.strip()) for title in rows["title"]]
            features = [None] * count
            if any(present):
                batch = processor(titles=[title for title, p in zip(rows["title"], present) if p])
                mask = batch["attention_mask"]
                tokens = model.encode_text(batch["input_ids"].to(device), mask.to(device)).cpu()
                encoded = iter(item[item_mask.bool()] for item, item_mask in zip(tokens, mask))
                features = [next(encoded) if p else None for p in present]
            out |= _to_columns("title_features", features)
        return out

    columns = [name for name, replaced in ((visual, frames),) if replaced]
    features = Features({name: feature for name, feature in dataset.features.items() if name not in columns})
    for name in [n for n, made in (("frame_features", frames or given), ("title_features", titles)) if made]:
        features |= {name: Value("binary"), f"{name}_shape": [Value("int32")]}
    os.makedirs(cache_dir, exist_ok=True)
    # Bytes as stored: the processor opens them itself and names the row when one is broken.
    if visual is not None:
        dataset = dataset.cast_column(visual, type(dataset.features[visual])(decode=False))
    if not frames and not given and not titles:
        return dataset
    with evaluation_mode(model):
        return dataset.map(
            encode,
            batched=True,
            batch_size=batch_size,
            remove_columns=columns,
            features=Features(features),
            new_fingerprint=fingerprint,
            cache_file_name=os.path.join(cache_dir, f"towers-{fingerprint}.arrow"),
            desc="Tower features",
        )


def _to_columns(name: str, features: list) -> dict[str, list]:
    arrays = [None if f is None else f.float().numpy().astype(TOKEN_DTYPE) for f in features]
    return {
        name: [None if a is None else a.tobytes() for a in arrays],
        f"{name}_shape": [None if a is None else list(a.shape) for a in arrays],
    }


class CachedFeatures(TorchDataset):
    """Rows of [`cache_tower_features`] with their features as arrays: `frame_features` `[frames, tokens, width]`
    (`[frames, width]` if they are the dataset's own) and `title_features` `[length, width]`, `None` for an item that
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
    fingerprint = _digest(tags, model.text_tower, _tokenizer_settings(processor.tokenizer))
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
