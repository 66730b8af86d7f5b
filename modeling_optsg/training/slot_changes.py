"""How much the matching of prompts and tags still changes from epoch to epoch."""

from collections.abc import Sequence

import numpy as np
import torch


class SlotChanges:
    """Remembers in which slot each example's tags were, and counts those that are in another one now.

    Args:
        max_examples: so many examples are followed, those seen first: examples come shuffled, and what is remembered of
            millions would fill the memory.
    """

    def __init__(self, max_examples: int = 20_000):
        self.max_examples = max_examples
        self.slots: dict[int, dict[int, int]] = {}
        self.moved = self.seen = 0

    def note(self, examples: Sequence[int], assignment: torch.Tensor, tag_ids: torch.Tensor) -> None:
        """
        Args:
            examples: the batch's examples.
            assignment: `[batch, num_prompts]`, the candidate of each prompt, -1 for [PAD].
            tag_ids: `[tags]`, what each candidate is called from batch to batch.
        """
        assignment, tag_ids = assignment.cpu().numpy(), tag_ids.cpu().numpy()
        for example, row in zip(examples, assignment, strict=True):
            if example not in self.slots and len(self.slots) >= self.max_examples:
                continue
            places = np.flatnonzero(row >= 0)
            now = dict(zip(tag_ids[row[places]].tolist(), places.tolist()))
            before = self.slots.get(example)
            if before is not None:
                again = now.keys() & before.keys()
                self.seen += len(again)
                self.moved += sum(now[tag] != before[tag] for tag in again)
            self.slots[example] = now

    def share(self) -> float | None:
        """Share of the tags seen again since the last call that have changed slots; `None` if there were none."""
        share = self.moved / self.seen if self.seen else None
        self.moved = self.seen = 0
        return share
