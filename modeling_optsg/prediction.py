"""Tags for many items, and the fit of `pad_bias` and `threshold` on validation items."""

from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm

from .data_collator import OPTSGDataCollator
from .tag_metrics import TagEvaluator

MODALITY_COLUMNS = {"picture": ("image", "video", "frame_features"), "title": ("title", "title_features")}
PAD_BIASES = (0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -4.0)


def predict_tags(
    model,
    processor,
    items: Sequence[Mapping],
    *,
    batch_size: int = 64,
    modalities: Sequence[str] = ("picture", "title"),
    progress: bool = True,
    **generate_kwargs,
) -> list[list[dict]]:
    """Tags of many items.

    Args:
        items: anything [`OPTSGDataCollator`] makes batches of; ground-truth tags are not looked at.
        modalities: what the model may look at, "picture", "title" or both.
        generate_kwargs: of `generate`.

    Returns:
        For each item its tags as `{"tag", "score", "novel"}`, best first. An item that has none of the modalities gets
        no tags.
    """
    if unknown := set(modalities) - set(MODALITY_COLUMNS):
        raise ValueError(f"modalities={sorted(unknown)} are unknown; expected some of {sorted(MODALITY_COLUMNS)}.")
    columns = {column for modality in modalities for column in MODALITY_COLUMNS[modality]}
    collate = OPTSGDataCollator(processor)
    predictions = [[] for _ in range(len(items))]
    for start in tqdm(range(0, len(items), batch_size), desc="Tagging", disable=not progress, leave=False):
        rows = {}
        for index in range(start, min(start + batch_size, len(items))):
            row = {name: value for name, value in items[index].items() if name in columns}
            if any(value is not None and not (isinstance(value, str) and not value.strip()) for value in row.values()):
                rows[index] = row
        if not rows:
            continue
        batch = {name: value.to(model.device) for name, value in collate(list(rows.values())).items()}
        for index, tags in zip(rows, processor.batch_decode(model.generate(**batch, **generate_kwargs))):
            predictions[index] = tags
    return predictions


def fit_generation_config(
    model,
    processor,
    items: Sequence[Mapping],
    evaluator: TagEvaluator,
    *,
    decoding: str,
    objective: str = "full_f1",
    pad_biases: Sequence[float] = PAD_BIASES,
    **predict_kwargs,
) -> dict:
    """Finds the `pad_bias` and the `threshold` with the largest validation figure and puts them into the model's
    `generation_config`, for one decoding.

    Args:
        items: validation items; evaluator: a [`TagEvaluator`] made of their tags.
        objective: a figure of [`TagEvaluator.score`].
        pad_biases: the values tried, each with its own decoding of all items; for each every threshold is looked at.

    Returns:
        `pad_bias`, `threshold`, the validation figures there (`validation`), and the best of every `pad_bias`
        (`tried`).
    """
    tried = []
    with torch.no_grad():
        for pad_bias in pad_biases:
            predictions = predict_tags(
                model, processor, items, decoding=decoding, pad_bias=pad_bias, threshold=0.0, **predict_kwargs
            )
            threshold, figures = evaluator.best_threshold(predictions, objective)
            tried.append({"pad_bias": pad_bias, "threshold": threshold, "validation": figures})
    best = max(tried, key=lambda row: row["validation"][objective])
    for name in ("pad_bias", "threshold"):
        fitted = getattr(model.generation_config, name, None)
        fitted = fitted if isinstance(fitted, dict) else {}
        setattr(model.generation_config, name, fitted | {decoding: best[name]})
    return best | {"tried": tried}
