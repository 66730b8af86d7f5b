"""Training steps whose examples do not depend on the number of processes."""

import math
from collections.abc import Iterator, Mapping, Sequence, Sized

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from modeling_optsg.seeded_random import example_seed


def num_micro_batches(batch_size: int, num_processes: int, max_examples: int | None) -> int:
    """Return the number of micro-batches per process and step.

    Args:
        batch_size: Examples per step, over all processes.
        num_processes: Number of processes.
        max_examples: Maximum number of examples per forward pass; `None` for no limit.

    Raises:
        ValueError: A micro-batch would be empty.
    """
    if batch_size < num_processes:
        raise ValueError(f"A batch of {batch_size} examples is too small for {num_processes} processes.")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"per_device_train_batch_size must be at least 1, not {max_examples}.")
    count = 1 if max_examples is None else math.ceil(math.ceil(batch_size / num_processes) / max_examples)
    if count * num_processes > batch_size:
        raise ValueError(
            f"{batch_size} examples cannot be divided among {num_processes} processes with {count} micro-batches "
            "each; choose a train_batch_size that they divide, or a larger per_device_train_batch_size."
        )
    return count


class StepPartition:
    """Training steps, and the examples of each step that belong to one process.

    The examples of a step are divided among processes and micro-batches in order, so the content of a step depends
    only on `seed`.

    Args:
        examples: Number of examples, or a collection of examples.
        batch_size: Examples per step, over all processes.
        steps: Number of steps of the whole training.
        seed: Seed of the order.
        process: Index of this process.
        num_processes: Number of processes.
        micro_batches: Number of micro-batches per process and step (see [`num_micro_batches`]). One batch is yielded
            for each micro-batch.
        start: Number of finished steps.

    Raises:
        ValueError: There are no examples.
    """

    def __init__(
        self,
        examples: int | Sized,
        batch_size: int,
        steps: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        micro_batches: int = 1,
        start: int = 0,
    ):
        if not (examples if isinstance(examples, int) else len(examples)):
            raise ValueError("There are no examples to train on.")
        self.examples, self.batch_size, self.steps, self.seed = examples, batch_size, steps, seed
        self.process, self.num_processes, self.micro_batches = process, num_processes, micro_batches
        self.start = start

    def own_positions(self) -> list[np.ndarray]:
        """Return, for each micro-batch of this process, the positions of its examples in a step."""
        positions = np.array_split(np.arange(self.batch_size), self.num_processes * self.micro_batches)
        return positions[self.process * self.micro_batches : (self.process + 1) * self.micro_batches]


class GlobalBatches(StepPartition, Sampler):
    """Batch sampler of one process for map-style examples, from step `start` to the last.

    Every epoch has its own order. A step takes the next `batch_size` examples and may continue into the next epoch.
    Each example is therefore used exactly once per epoch, and all batches have the same size.

    Args:
        args: Arguments of [`StepPartition`], with the number of examples.
        lengths: Length of each example. If given, each step consists of examples of similar length, with the
            grouping of `transformers`.
        kwargs: Arguments of [`StepPartition`].

    Yields:
        Lists of `(index, seed)` for [`SeededExamples`].
    """

    def __init__(self, *args: object, lengths: Sequence[int] | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.lengths = lengths

    def __len__(self) -> int:
        return (self.steps - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            pairs = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.examples != epoch:
                    epoch = position // self.examples
                    order = self._order(epoch)
                index = int(order[position % self.examples])
                pairs.append((index, example_seed(self.seed, epoch, index)))
            for positions in self.own_positions():
                yield [pairs[position] for position in positions]

    def _order(self, epoch: int) -> Sequence[int]:
        random = np.random.default_rng([self.seed, epoch])
        if self.lengths is None:
            return random.permutation(self.examples)
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first examples of an epoch complete the last step of the previous epoch. Groups begin after them.
        used = -epoch * self.examples % self.batch_size
        return order[self.examples - used :] + order[: self.examples - used]


class SeededExamples(Dataset):
    """Map-style examples indexed by the pairs of [`GlobalBatches`].

    Each example gets its pair as `example_index` and `example_seed`.
    """

    def __init__(self, examples: Sequence[Mapping]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        index, seed = pair
        return {**self.examples[index], "example_index": index, "example_seed": seed}
