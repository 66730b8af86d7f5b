"""What a step looks at and what it minimises, the same for any number of processes."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def micro_batches(batch_size: int, num_processes: int, most_items: int | None) -> int:
    """How many parts of a global batch each process computes one after the other.

    Args:
        batch_size: items of a step, over all processes.
        most_items: most items that fit a process at once; no limit if not given.

    Raises:
        ValueError: a process's part would have no item.
    """
    if batch_size < num_processes:
        raise ValueError(f"A batch of {batch_size} items cannot be shared by {num_processes} processes.")
    if most_items is not None and most_items < 1:
        raise ValueError(f"A process computes at least one item at once, not {most_items}.")
    parts = 1 if most_items is None else math.ceil(math.ceil(batch_size / num_processes) / most_items)
    if parts * num_processes > batch_size:
        raise ValueError(
            f"{batch_size} items cannot be shared by {num_processes} processes in {parts} parts each; choose a batch "
            "that they divide, or a larger process_batch_size."
        )
    return parts


class SharedSteps:
    """The steps of a training, and what of each is one process's.

    A step's items are divided among processes and parts in order, so what a step sees depends on `seed` alone.

    Args:
        items: how many items there are, or what has so many.
        batch_size: items of a step, over all processes.
        steps: of the whole training.
        parts: how many parts each process has in a step (see [`micro_batches`]); one batch is yielded for each.
        start: steps that are done already.

    Raises:
        ValueError: there are no items.
    """

    def __init__(
        self,
        items,
        batch_size: int,
        steps: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        parts: int = 1,
        start: int = 0,
    ):
        if not (items if isinstance(items, int) else len(items)):
            raise ValueError("There are no items to train on.")
        self.items, self.batch_size, self.steps, self.seed = items, batch_size, steps, seed
        self.process, self.num_processes, self.parts, self.start = process, num_processes, parts, start

    def own_places(self) -> list[np.ndarray]:
        """For each of this process's parts the places of its items among a step's."""
        shares = np.array_split(np.arange(self.batch_size), self.num_processes * self.parts)
        return shares[self.process * self.parts : (self.process + 1) * self.parts]


class GlobalBatches(SharedSteps, Sampler):
    """Batches of (item, seed) for one process, from the step asked for to the last.

    Items come epoch after epoch, each epoch in an order of its own, and every `batch_size` of them are a step's: no
    item is seen twice or missed in an epoch, and the last batch is as large as the others.

    Args: those of [`SharedSteps`], with the number of items, and
        lengths: of the items; those of a step are then of like length, as `transformers` groups them.

    Yields:
        lists of pairs for [`SeededItems`].
    """

    def __init__(self, *args, lengths: Sequence[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths = lengths

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        own = self.own_places()
        for step in range(self.start, self.steps):
            pairs = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.items != epoch:
                    epoch = place // self.items
                    order = self._order(epoch)
                item = int(order[place % self.items])
                pairs.append((item, item_seed(self.seed, epoch, item)))
            for places in own:
                yield [pairs[place] for place in places]

    def _order(self, epoch: int) -> Sequence[int]:
        random = np.random.default_rng([self.seed, epoch])
        if self.lengths is None:
            return random.permutation(self.items)
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first items of an epoch fill up the last step of the one before; groups begin with the next.
        begun = -epoch * self.items % self.batch_size
        return order[self.items - begun :] + order[: self.items - begun]


def item_seed(seed: int, epoch: int, item: int | str) -> int:
    """The seed of an item's random choices in an epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{item}".encode(), digest_size=7).digest(), "big")


class SeededItems(Dataset):
    """Items of a map-style dataset with what [`GlobalBatches`] says of them, as `item_index` and `item_seed`."""

    def __init__(self, items):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        item, seed = pair
        return {**self.items[item], "item_index": item, "item_seed": seed}
