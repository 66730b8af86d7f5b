"""Tags for many items, and the fit of decoding settings on validation items."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm

from .data_collator import OPTSGDataCollator
from .tag_metrics import TagEvaluator, objective_value

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
    collate = OPTSGDataCollator(processor, max_book_tokens=getattr(model.config, "max_book_tokens", None))
    predictions = [[] for _ in range(len(items))]
    for start in tqdm(range(0, len(items), batch_size), desc="Tagging", disable=not progress, leave=False):
        rows = {}
        for index in range(start, min(start + batch_size, len(items))):
            row = {name: value for name, value in items[index].items() if name in columns}
            if any(value is not None and not (isinstance(value, str) and not value.strip()) for value in row.values()):
                # What neighbours have is no modality of the item's own.
                rows[index] = row | {name: items[index][name] for name in ("book_tags",) if name in items[index]}
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
    decoding: str | None = None,
    objective: str = "full_f1",
    grid: Mapping[str, Sequence] | None = None,
    **predict_kwargs,
) -> dict:
    """Finds the settings with the largest validation figure, the threshold among them, and puts them into the model's
    `generation_config`.

    Args:
        items: validation items; evaluator: a [`TagEvaluator`] made of their tags.
        decoding: the decoding they are fitted for and kept under; `None` for a model that knows only one.
        objective: a figure of [`TagEvaluator.score`], or the mean of several, as in `"full_f1+micro_f1"`.
        grid: the values of each argument of `generate` that are tried, every combination with its own prediction of
            all items; `PAD_BIASES` of `pad_bias` if not given. For each, every threshold is looked at.

    Returns:
        The best settings by name with `threshold`, the validation figures there (`validation`), and the best of every
        combination (`tried`).
    """
    grid = {"pad_bias": PAD_BIASES} if grid is None else dict(grid)
    fixed = predict_kwargs | ({} if decoding is None else {"decoding": decoding})
    tried = []
    with torch.no_grad():
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values))
            predictions = predict_tags(model, processor, items, threshold=0.0, **fixed, **settings)
            threshold, figures = evaluator.best_threshold(predictions, objective)
            tried.append(settings | {"threshold": threshold, "validation": figures})
    best = max(tried, key=lambda row: objective_value(row["validation"], objective))
    for name in (*grid, "threshold"):
        value = best[name]
        if decoding is not None:
            fitted = getattr(model.generation_config, name, None)
            value = (fitted if isinstance(fitted, dict) else {}) | {decoding: value}
        setattr(model.generation_config, name, value)
    return best | {"tried": tried}
