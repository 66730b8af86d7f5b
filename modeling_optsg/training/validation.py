"""How good a model is on the way."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..prediction import predict_tags
from ..tag_metrics import TagEvaluator


def validate(
    accelerator: Accelerator,
    model,
    processor,
    items: Sequence[Mapping],
    evaluator: TagEvaluator,
    objective: str,
    **generate_kwargs,
) -> tuple[dict, list[list[str]]]:
    """Figures at the best threshold, and the tags of each item there. All processes call it, each tags its share.

    Args:
        model: a whole one, in every process; items, evaluator, objective: see [`fit_generation_config`].
    """
    mine = range(accelerator.process_index, len(items), accelerator.num_processes)
    with accelerator.autocast():
        tags = predict_tags(model, processor, torch.utils.data.Subset(items, mine), **generate_kwargs)
    pairs = gather_object(list(zip(mine, tags, strict=True)))
    predictions = [tags for _, tags in sorted(pairs, key=lambda pair: pair[0])]
    threshold, figures = evaluator.best_threshold(predictions, objective)
    written = [[tag["tag"] for tag in own if tag["score"] >= threshold] for own in predictions]
    return {"threshold": threshold} | figures, written


def samples(rows, written: Sequence[Sequence[str]], count: int = 3) -> list[dict]:
    """A few items, always the same: their titles, their tags, and those written.

    Args:
        rows: of a dataset with `tags`.
    """
    places = range(0, len(rows), max(1, len(rows) // count))[:count]
    shown = rows.select_columns([name for name in ("id", "title", "tags") if name in rows.column_names])
    return [{**shown[place], "written": list(written[place])} for place in places]
