"""Batches for training: items in, tensors out, each tag of a batch once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass
class TagTable:
    """Training tags with all that is known of them in advance.

    Args:
        tags: the tags, each once.
        input_ids: token ids of each under the tag tokenizer, without [SEP].
        features: `[tags, text width]`, pooled text-tower features (so: the text tower is frozen).
    """

    tags: Sequence[str]
    input_ids: Sequence[Sequence[int]]
    features: torch.Tensor

    def __post_init__(self):
        self.index = {tag: index for index, tag in enumerate(self.tags)}


class OPTSGDataCollator:
    """Makes batches of items for `OPTSGForTagGeneration.forward`, in a training loop or in `transformers.Trainer`
    (with `remove_unused_columns=False`).

    An item is a mapping with any of `image`, `video` or `frame_features` (`[frames, width]` or
    `[frames, tokens, width]`), `title` or `title_features` (`[length, text width]`), and `tags`. Of an item with more
    tags than prompts a random `num_prompts` are taken each time; how often that happened is in `oversized_items` and
    is logged.

    Args:
        processor: an [`OPTSGProcessor`].
        tag_table: tags known in advance; without it tags are tokenised batch by batch.
        num_negatives: with a table, so many random training tags are added to the batch's as
            negatives of the alignment.
        seed: of the sampling of tags and negatives.
    """

    def __init__(self, processor, tag_table: TagTable | None = None, num_negatives: int = 0, seed: int = 0):
        if num_negatives and tag_table is None:
            raise ValueError(f"num_negatives={num_negatives} needs a tag_table to take them from.")
        self.processor = processor
        self.tag_table = tag_table
        self.num_negatives = num_negatives
        self.random = np.random.default_rng(seed)
        self.oversized_items = 0

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        tags = [self._sample(list(dict.fromkeys(item["tags"]))) for item in items] if "tags" in items[0] else None
        batch = self._precomputed(items)
        raw = {
            "images": [item.get("image") for item in items] if "image" in items[0] else None,
            "videos": [item.get("video") for item in items] if "video" in items[0] else None,
            "titles": [item.get("title") for item in items]
            if "title" in items[0] and "title_features" not in batch
            else None,
            "tags": tags if self.tag_table is None else None,
        }
        if "frame_features" in batch:
            raw["images"] = raw["videos"] = None
        if any(value is not None for value in raw.values()):
            batch |= self.processor(**raw, return_tensors="pt")
        if tags is not None and self.tag_table is not None:
            batch |= self._tags_from_table(tags)
        return batch

    def _sample(self, tags: list[str]) -> list[str]:
        most = self.processor.num_prompts
        if len(tags) <= most:
            return tags
        self.oversized_items += 1
        if self.oversized_items == 1:
            logger.warning(
                f"An item has {len(tags)} tags, more than the {most} prompts: a random {most} are used each time. "
                "Further ones are counted in `oversized_items`."
            )
        return [tags[index] for index in self.random.choice(len(tags), most, replace=False)]

    def _precomputed(self, items) -> dict[str, torch.Tensor]:
        batch = {}
        for name, mask_name in (("frame_features", "frame_mask"), ("title_features", "attention_mask")):
            given = [item.get(name) for item in items]
            if all(features is None for features in given):
                continue
            tensors = [None if features is None else torch.as_tensor(features).float() for features in given]
            if name == "frame_features":
                tensors = [t[:, None] if t is not None and t.ndim == 2 else t for t in tensors]
            width = next(t.shape[1:] for t in tensors if t is not None)
            tensors = [torch.zeros(0, *width) if t is None else t for t in tensors]
            batch[name] = pad_sequence(tensors, batch_first=True)
            batch[mask_name] = pad_sequence([torch.ones(len(t)) for t in tensors], batch_first=True).bool()
        return batch

    def _tags_from_table(self, tags: list[list[str]]) -> dict[str, torch.Tensor]:
        table = self.tag_table
        rows = [[table.index[tag] for tag in item_tags] for item_tags in tags]
        used = list(dict.fromkeys(row for item_rows in rows for row in item_rows))
        place = {row: index for index, row in enumerate(used)}
        candidates = used
        if self.num_negatives:
            drawn = self.random.choice(len(table.tags), min(self.num_negatives, len(table.tags)), replace=False)
            candidates = used + [row for row in drawn.tolist() if row not in place]
        input_ids = [torch.tensor(table.input_ids[row]) for row in used]
        return {
            "tag_input_ids": pad_sequence(input_ids, batch_first=True),
            "tag_lengths": torch.tensor([len(ids) for ids in input_ids]),
            "tag_features": table.features[candidates].float(),
            "labels": pad_sequence(
                [torch.tensor([place[row] for row in item_rows]) for item_rows in rows],
                batch_first=True,
                padding_value=-100,
            ),
        }
