"""Training items that are read as a stream, in the order and by the processes that map-style ones would be."""

from collections.abc import Collection, Iterator

import datasets
from torch.utils.data import IterableDataset

from dataset_scripts import undecoded

from .batches import SharedSteps, item_seed


class TaggedStream:
    """A stream of items, of which some tags are trained on.

    Args:
        rows: of [`load_tagging_dataset`] with `streaming=True`; items are told apart by their `id`.
        tags: those trained on. Items without any are left out.
        items: how many items have one.
        buffer_size: rows among which the next one is drawn.

    Raises:
        ValueError: no row is trained on.
    """

    def __init__(self, rows: datasets.IterableDataset, tags: Collection[str], items: int, buffer_size: int = 1000):
        if not items:
            raise ValueError("There are no items to train on.")
        # Rows of other processes are passed over; nothing of them is decoded.
        rows = undecoded(rows)
        self.rows, self.tags, self.items, self.buffer_size = rows, frozenset(tags), items, buffer_size

    def __len__(self) -> int:
        return self.items

    def __iter__(self) -> Iterator[dict]:
        return self.epoch(0, 0)

    def epoch(self, epoch: int, seed: int) -> Iterator[dict]:
        """Each item once, in an order of the epoch's own."""
        rows = self.rows.shuffle(seed=seed, buffer_size=self.buffer_size)
        rows.set_epoch(epoch)
        for row in rows:
            if tags := [tag for tag in row["tags"] if tag in self.tags]:
                # One number in every epoch, and no list of all items anywhere.
                known = {"item_index": item_seed(0, 0, row["id"]), "item_seed": item_seed(seed, epoch, row["id"])}
                yield {**row, "tags": tags, **known}


class StreamBatches(SharedSteps, IterableDataset):
    """What [`GlobalBatches`] is for map-style items: this process's items of each step, from the step asked for on.

    Every process reads the whole stream and keeps its share, so that a step's items are the same for any number of
    processes, none is seen twice or missed in an epoch, and none waits for another at an uneven end. Read it with one
    worker: several would divide the stream among them, and with none `datasets` shuffles in another order.

    Args: those of [`SharedSteps`], with a [`TaggedStream`] as `items`.

    Yields:
        lists of items with `item_index` and `item_seed`.
    """

    def __iter__(self) -> Iterator[list[dict]]:
        own = self.own_places()
        begin, end, cuts = int(own[0][0]), int(own[-1][-1]) + 1, [len(places) for places in own]
        epoch, passed = divmod(self.start * self.batch_size, len(self.items))
        kept, place, step = [], 0, self.start
        while step < self.steps:
            for number, row in enumerate(self.items.epoch(epoch, self.seed)):
                if number < passed:
                    continue
                if begin <= place < end:
                    kept.append(row)
                place += 1
                if place == self.batch_size:
                    taken = iter(kept)
                    yield from ([next(taken) for _ in range(count)] for count in cuts)
                    kept, place, step = [], 0, step + 1
                    if step == self.steps:
                        return
            epoch, passed = epoch + 1, 0
