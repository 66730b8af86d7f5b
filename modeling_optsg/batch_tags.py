"""The tags of a batch: given for each example, and made unique for the tag alignment."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Padding of labels, as everywhere in the library.
NO_LABEL = -100


def check_labels(labels: torch.Tensor | None, **tag_inputs: torch.Tensor | None) -> bool:
    """Return whether there are labels, and check their shape.

    Args:
        labels: `[batch, max tags per example, max length]`, or `None`.
        tag_inputs: Other arguments that describe the tags.

    Raises:
        ValueError: `labels` have another shape, or there are other tag inputs without them.
    """
    if labels is None:
        if given := sorted(name for name, value in tag_inputs.items() if value is not None):
            raise ValueError(
                f"{', '.join(given)} come without labels. `Trainer` removes the labels with label_smoothing_factor, "
                "which these losses do not support: leave it at 0. To generate tags, call generate() without tags."
            )
        return False
    if labels.ndim != 3:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected [batch, max tags per example, max length], the tokens "
            "of each example's tags, as processor(tags=...) and OPTSGDataCollator make them."
        )
    return True


@dataclass(frozen=True)
class BatchTags:
    """The different tags of a batch, those of the examples before the negatives.

    Args:
        input_ids: `[tags, max length]`, tokens of each tag without [SEP], padded with 0.
        lengths: `[tags]`, number of tokens of each tag.
        labels: `[batch, max tags per example]`, which of the tags an example has, -100 for padding.
        first: `[tags]`, where each tag occurs first among the flattened tags of the examples and the negatives.
        num_own: Number of tags that an example has. The others are negatives.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    first: torch.Tensor
    num_own: int

    @classmethod
    def from_labels(cls, labels: torch.Tensor, negatives: torch.Tensor | None = None) -> "BatchTags":
        """Collect the different tags.

        Args:
            labels: `[batch, max tags per example, max length]`, tokens of each example's tags, -100 for padding.
            negatives: `[..., max length]`, tokens of other tags, -100 for padding.

        Raises:
            ValueError: No example has a tag.
        """
        rows = labels.flatten(0, 1)
        num_rows = len(rows)
        if negatives is not None:
            negatives = negatives.flatten(0, -2).to(rows.device)
            width = max(rows.shape[1], negatives.shape[1])
            rows = torch.cat([F.pad(r, (0, width - r.shape[1]), value=NO_LABEL) for r in (rows, negatives)])
        places = (rows >= 0).any(dim=1).nonzero().flatten()
        if not len(places) or places[0] >= num_rows:
            raise ValueError("No example of the batch has a tag; leave examples without tags out.")
        different, index = torch.unique(rows[places], dim=0, return_inverse=True)
        # In the order of their first occurrence, so that the tags of the examples come before the negatives.
        first = places.new_full((len(different),), len(rows)).scatter_reduce(0, index, places, "amin")
        order = first.argsort()
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        own = labels.new_full((len(rows),), NO_LABEL)
        own[places] = rank[index]
        first, different = first[order], different[order]
        return cls(
            input_ids=different.clamp(min=0),
            lengths=(different >= 0).sum(dim=1),
            labels=own[:num_rows].view(labels.shape[:2]),
            first=first,
            num_own=int((first < num_rows).sum()),
        )

    def select(self, values: torch.Tensor, negatives: torch.Tensor | None = None) -> torch.Tensor:
        """Select one row for each tag.

        Args:
            values: `[batch, max tags per example, ...]`.
            negatives: `[..., width]`, for the negatives. Without them, only the tags of the examples are selected.

        Returns:
            `[tags, ...]`.
        """
        values = values.flatten(0, 1)
        if negatives is None:
            return values[self.first[: self.num_own]]
        return torch.cat([values, negatives.flatten(0, -2).to(values)])[self.first]

    def own_index(self, assignment: torch.Tensor) -> torch.Tensor:
        """Return the assigned tags as indices into the tags of their example.

        Args:
            assignment: `[batch, num_prompts]`, indices into the different tags, -1 for [PAD].
        """
        matches = assignment[:, :, None] == self.labels[:, None, :]
        return matches.int().argmax(dim=-1).masked_fill(assignment < 0, -1)
