"""What a step looks at and what it minimises, the same for any number of processes."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def micro_batches(batch_size: int, num_processes: int, max_examples: int | None) -> int:
    """How many parts of a global batch each process computes one after the other.

    Args:
        batch_size: examples of a step, over all processes.
        max_examples: most examples that fit a process at once; no limit if not given.

    Raises:
        ValueError: a process's part would have no example.
    """
    if batch_size < num_processes:
        raise ValueError(f"A batch of {batch_size} examples cannot be shared by {num_processes} processes.")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"A process computes at least one example at once, not {max_examples}.")
    parts = 1 if max_examples is None else math.ceil(math.ceil(batch_size / num_processes) / max_examples)
    if parts * num_processes > batch_size:
        raise ValueError(
            f"{batch_size} examples cannot be shared by {num_processes} processes in {parts} parts each; choose a batch "
            "that they divide, or a larger per_device_train_batch_size."
        )
    return parts


class SharedSteps:
    """The steps of a training, and what of each is one process's.

    A step's examples are divided among processes and parts in order, so what a step sees depends on `seed` alone.

    Args:
        examples: how many examples there are, or what has so many.
        batch_size: examples of a step, over all processes.
        steps: of the whole training.
        parts: how many parts each process has in a step (see [`micro_batches`]); one batch is yielded for each.
        start: steps that are done already.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(
        self,
        examples,
        batch_size: int,
        steps: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        parts: int = 1,
        start: int = 0,
    ):
        if not (examples if isinstance(examples, int) else len(examples)):
            raise ValueError("There are no examples to train on.")
        self.examples, self.batch_size, self.steps, self.seed = examples, batch_size, steps, seed
        self.process, self.num_processes, self.parts, self.start = process, num_processes, parts, start

    def own_places(self) -> list[np.ndarray]:
        """For each of this process's parts the places of its examples among a step's."""
        shares = np.array_split(np.arange(self.batch_size), self.num_processes * self.parts)
        return shares[self.process * self.parts : (self.process + 1) * self.parts]


class GlobalBatches(SharedSteps, Sampler):
    """Batches of (example, seed) for one process, from the step asked for to the last.

    Examples come epoch after epoch, each epoch in an order of its own, and every `batch_size` of them are a step's: no
    example is seen twice or missed in an epoch, and the last batch is as large as the others.

    Args: those of [`SharedSteps`], with the number of examples, and
        lengths: of the examples; those of a step are then of like length, as `transformers` groups them.

    Yields:
        lists of pairs for [`SeededExamples`].
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
                if place // self.examples != epoch:
                    epoch = place // self.examples
                    order = self._order(epoch)
                example = int(order[place % self.examples])
                pairs.append((example, example_seed(self.seed, epoch, example)))
            for places in own:
                yield [pairs[place] for place in places]

    def _order(self, epoch: int) -> Sequence[int]:
        random = np.random.default_rng([self.seed, epoch])
        if self.lengths is None:
            return random.permutation(self.examples)
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first examples of an epoch fill up the last step of the one before; groups begin with the next.
        begun = -epoch * self.examples % self.batch_size
        return order[self.examples - begun :] + order[: self.examples - begun]


def example_seed(seed: int, epoch: int, example: int | str) -> int:
    """The seed of an example's random choices in an epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{example}".encode(), digest_size=7).digest(), "big")


class SeededExamples(Dataset):
    """Examples of a map-style dataset with what [`GlobalBatches`] says of them, as `example_index` and `example_seed`."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        example, seed = pair
        return {**self.examples[example], "example_index": example, "example_seed": seed}
