"""Batches in a training loop: with the items they are of, and without those that cannot be read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from accelerate.utils import gather_object


@dataclass
class CollatedItems:
    """
    Args:
        items: index of each item of the batch.
        batch: what the collator made of them.
        unreadable: items that were left out, by their `id` or else their index, and why.
        weight: 0 where the batch stands in for one of which nothing could be read.
    """

    items: list[int]
    batch: dict
    unreadable: dict[int | str, str] = field(default_factory=dict)
    weight: float = 1.0


class CollateReadable:
    """Collates items with `item_index`; those that the collator refuses are left out. A batch that loses all of them
    is made of the first of all items that can be read, and its `weight` is 0: other processes wait for this one's
    part, and what stands in must not depend on what came before.

    Args:
        collator: an [`OPTSGDataCollator`].
        items: all of them.
        most_tries: at most so many are looked at for one that can be read.

    Raises:
        ValueError: none of a batch's items can be read, and none of those looked at.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping]], dict], items: Iterable[Mapping], most_tries: int = 100):
        self.collator, self.items, self.most_tries = collator, items, most_tries
        # An item that is known to be good, and the one that stands in.
        self.company = self.stand_in = None

    def __call__(self, items: Sequence[Mapping]) -> CollatedItems:
        readable, unreadable = list(items), {}
        try:
            batch = self.collator(readable)
        except (ValueError, OSError):
            readable = []
            for item in items:
                # Beside one that is known to be good: features of another width are wrong only in company.
                company = readable[-1:] or ([self.company] if self.company is not None else [])
                try:
                    self.collator([*company, item])
                    readable.append(item)
                except (ValueError, OSError) as error:
                    unreadable[item.get("id", item["item_index"])] = str(error)
            if not readable:
                if self.stand_in is None and not self._find_stand_in():
                    reason = next(iter(unreadable.values()))
                    raise ValueError(
                        f"None of the {len(items)} items of a batch can be read, nor others that were tried: {reason}"
                    ) from None
                return CollatedItems([], self.collator([self.stand_in]), unreadable, weight=0.0)
            batch = self.collator(readable)
        self.company = readable[0]
        return CollatedItems([item["item_index"] for item in readable], batch, unreadable)

    def _find_stand_in(self) -> bool:
        for item in islice(iter(self.items), self.most_tries):
            item = {**item, "item_seed": 0}
            try:
                self.collator([item])
            except (ValueError, OSError):
                continue
            self.stand_in = item
            return True
        return False


class Unreadable:
    """Items that were left out in any process, each once, up to a limit.

    Args:
        most: so many items may be; what is wrong with more is wrong with the data.
        reasons: why, by item, of those known already.
    """

    def __init__(self, most: int, reasons: Mapping[str, str] | None = None):
        self.most, self.reasons = most, dict(reasons or {})

    def new(self, reasons: Mapping) -> dict[str, str]:
        """Those of this process's items that are not known yet."""
        # As text, for they are kept as the keys of JSON.
        return {str(item): reason for item, reason in reasons.items() if str(item) not in self.reasons}

    def note(self, reasons: Mapping[str, str]) -> None:
        """Takes up what any process has found. All processes call it in the same step.

        Raises:
            ValueError: there are too many of them.
        """
        self.reasons |= {item: reason for own in gather_object([dict(reasons)]) for item, reason in own.items()}
        if len(self.reasons) > self.most:
            shown = "; ".join(list(dict.fromkeys(self.reasons.values()))[:3])
            raise ValueError(
                f"{len(self.reasons)} training items could not be read, more than most_unreadable={self.most}, such "
                f"as: {shown}"
            )
