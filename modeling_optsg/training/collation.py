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
    is made of an item that can be read, the `weight` of which is then 0: other processes wait for this one's part.

    Args:
        collator: an [`OPTSGDataCollator`].
        items: all of them, among which such an item is looked for when a batch of before had none.
        most_tries: at most so many are looked at.

    Raises:
        ValueError: none of a batch's items can be read, and none of those looked at.
    """

    def __init__(
        self, collator: Callable[[Sequence[Mapping]], dict], items: Iterable[Mapping] = (), most_tries: int = 100
    ):
        self.collator, self.items, self.most_tries = collator, items, most_tries
        self.spare = None

    def __call__(self, items: Sequence[Mapping]) -> CollatedItems:
        readable, unreadable = list(items), {}
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
                    unreadable[item.get("id", item["item_index"])] = str(error)
            if not readable:
                if self.spare is None and not self._find_spare():
                    reason = next(iter(unreadable.values()))
                    raise ValueError(
                        f"None of the {len(items)} items of a batch can be read, nor others that were tried: {reason}"
                    ) from None
                return CollatedItems([], self.collator([self.spare]), unreadable, weight=0.0)
            batch = self.collator(readable)
        self.spare = readable[0]
        return CollatedItems([item["item_index"] for item in readable], batch, unreadable)

    def _find_spare(self) -> bool:
        for item in islice(iter(self.items), self.most_tries):
            try:
                self.collator([item])
            except (ValueError, OSError):
                continue
            self.spare = item
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
