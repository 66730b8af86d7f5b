"""Batches in a training loop: with the items they are of, and without those that cannot be read."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class CollatedItems:
    """
    Args:
        items: index of each item of the batch.
        batch: what the collator made of them.
        unreadable: why items were left out.
        weight: 0 where the batch stands in for one of which nothing could be read.
    """

    items: list[int]
    batch: dict
    unreadable: list[str] = field(default_factory=list)
    weight: float = 1.0


class CollateReadable:
    """Collates items with `item_index`; those that the collator refuses are left out. A batch that loses all of them
    is made of the last item that could be read, whose `weight` is then 0: other processes wait for this one's part.

    Args:
        collator: an [`OPTSGDataCollator`].

    Raises:
        ValueError: none of a batch's items can be read, and none could before.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping]], dict]):
        self.collator = collator
        self.spare = None

    def __call__(self, items: Sequence[Mapping]) -> CollatedItems:
        readable, unreadable = list(items), []
        try:
            batch = self.collator(readable)
        except (ValueError, OSError):
            readable = []
            for item in items:
                # Beside one that is known to be good: features of another width are wrong only in company.
                company = readable[-1:] or ([self.spare] if self.spare is not None else [])
                try:
                    self.collator([*company, item])
                    readable.append(item)
                except (ValueError, OSError) as error:
                    unreadable.append(str(error))
            if not readable and self.spare is None:
                raise ValueError(f"None of the {len(items)} items of a batch can be read: {unreadable[0]}") from None
            if not readable:
                return CollatedItems([], self.collator([self.spare]), unreadable, weight=0.0)
            batch = self.collator(readable)
        self.spare = readable[0]
        return CollatedItems([item["item_index"] for item in readable], batch, unreadable)


class Unreadable:
    """Counts what was left out, up to a limit.

    Args:
        most: so many items may be; what is wrong with more is wrong with the data.
    """

    def __init__(self, most: int):
        self.most, self.reasons = most, Counter()

    def note(self, reasons: Sequence[str]) -> None:
        """
        Raises:
            ValueError: there are too many of them.
        """
        self.reasons.update(reasons)
        if self.reasons.total() > self.most:
            shown = "; ".join(reason for reason, _ in self.reasons.most_common(3))
            raise ValueError(f"{self.reasons.total()} training items could not be read, such as: {shown}")
