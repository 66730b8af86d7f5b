"""How much the matching of prompts and tags still changes from epoch to epoch."""

from collections.abc import Sequence

import numpy as np
import torch


class MatchingMoves:
    """Remembers in which slot each item's tags were, and counts those that are in another one now.

    Args:
        most_items: so many items are followed, those seen first: items come shuffled, and what is remembered of
            millions would fill the memory.
    """

    def __init__(self, most_items: int = 20_000):
        self.most_items = most_items
        self.slots: dict[int, dict[int, int]] = {}
        self.moved = self.seen = 0

    def note(self, items: Sequence[int], assignment: torch.Tensor, tag_ids: torch.Tensor) -> None:
        """
        Args:
            items: the batch's items.
            assignment: `[batch, num_prompts]`, the candidate of each prompt, -1 for [PAD].
            tag_ids: `[tags]`, what each candidate is called from batch to batch.
        """
        assignment, tag_ids = assignment.cpu().numpy(), tag_ids.cpu().numpy()
        for item, row in zip(items, assignment, strict=True):
            if item not in self.slots and len(self.slots) >= self.most_items:
                continue
            places = np.flatnonzero(row >= 0)
            now = dict(zip(tag_ids[row[places]].tolist(), places.tolist()))
            before = self.slots.get(item)
            if before is not None:
                again = now.keys() & before.keys()
                self.seen += len(again)
                self.moved += sum(now[tag] != before[tag] for tag in again)
            self.slots[item] = now

    def share(self) -> float | None:
        """Share of the tags seen again since the last call that have changed slots; `None` if there were none."""
        share = self.moved / self.seen if self.seen else None
        self.moved = self.seen = 0
        return share
