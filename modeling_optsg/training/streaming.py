"""Streamed training examples whose steps do not depend on the processes and workers that read them.

A *stream shard* is a group of files, or of Parquet row groups, that is read from its beginning to its end on its own.
It may contain several of the shards that `datasets` divides a stream into, which are called files here.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ArrowException
from torch.utils.data import IterableDataset, get_worker_info

from dataset_scripts import undecoded
from modeling_optsg.seeded_random import example_seed

from .sampling import StepPartition, num_micro_batches

# A stream shard of fewer files would give its examples in nearly the same order in every epoch.
FILES_PER_SHARD = 16
# How far a process's part of a step may exceed an even part before every process reads the whole stream instead.
MAX_IMBALANCE = 0.1


class TaggedStream:
    """Streamed examples in stream shards.

    The order of an epoch says which stream shard each example comes from, and each stream shard has an order of its
    own. All of them end with the epoch, whatever their sizes.

    Args:
        stream_shards: From [`open_stream_shards`]. Examples are identified by their `id`.
        tags: Tags to train on. Examples without any of them are left out.
        num_examples: Number of examples in each stream shard that have such a tag.
        buffer_size: Rows in the shuffle buffers of all stream shards together.

    Raises:
        ValueError: There are no examples to train on.
    """

    def __init__(
        self,
        stream_shards: Sequence[datasets.IterableDataset],
        tags: Collection[str],
        num_examples: Sequence[int],
        buffer_size: int = 1000,
    ):
        if not sum(num_examples):
            raise ValueError("There are no examples to train on.")
        # Rows that another process trains on are skipped without decoding them.
        self.stream_shards = [undecoded(rows) for rows in stream_shards]
        self.tags, self.num_examples = frozenset(tags), list(num_examples)
        self.buffer_size = max(1, buffer_size // len(stream_shards))
        # Example k of n in a stream shard comes after (k + 1/2) / n of the epoch.
        times = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in self.num_examples])
        order = np.argsort(times, kind="stable")
        self.shard_of_position = np.repeat(np.arange(len(stream_shards)), self.num_examples)[order]

    def __len__(self) -> int:
        return len(self.shard_of_position)

    @property
    def is_hardly_shuffled(self) -> bool:
        """Whether the order is nearly the same in every epoch: few files with many more rows than the buffer."""
        return any(
            rows.num_shards < 4 and count > 4 * self.buffer_size
            for rows, count in zip(self.stream_shards, self.num_examples)
        )

    def __iter__(self) -> Iterator[dict]:
        return itertools.chain.from_iterable(self.epoch(shard, 0, 0) for shard in range(len(self.stream_shards)))

    def epoch(self, shard: int, epoch: int, seed: int) -> Iterator[dict]:
        """Yield each example of a stream shard once, in the order of the epoch.

        Raises:
            ValueError: The number of examples has changed.
            OSError: A file is broken.
        """
        expected, found = self.num_examples[shard], 0
        for row in self._rows(shard, epoch, seed):
            if tags := [tag for tag in row["tags"] if tag in self.tags]:
                found += 1
                if found > expected:
                    break
                # A hash of the id is the same in every epoch, without a list of all examples.
                seeds = {
                    "example_index": example_seed(0, 0, row["id"]),
                    "example_seed": example_seed(seed, epoch, row["id"]),
                }
                yield {**row, "tags": tags, **seeds}
        if found != expected:
            more = "more" if found > expected else f"{found}"
            raise ValueError(f"A stream had {expected} examples to train on when it was first read, now {more}.")

    def _rows(self, shard: int, epoch: int, seed: int) -> Iterator[dict]:
        # One file after the other: stream shards are already read in parallel.
        rows = self.stream_shards[shard].shuffle(seed=seed, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        rows.set_epoch(epoch)
        last = None
        try:
            # `datasets` would divide plain iteration among workers; `iter` gives each of them every row.
            for batch in rows.iter(1):
                row = {name: values[0] for name, values in batch.items()}
                last = row["id"]
                yield row
        except (OSError, ArrowException) as error:
            position = "before the first example" if last is None else f"after example {last}"
            raise OSError(
                f"The stream cannot be read in stream shard {shard + 1} of {len(self.stream_shards)}, {position}: "
                f"{error}"
            ) from error

    def assign_shards(
        self, batch_size: int, num_processes: int, max_examples: int | None
    ) -> tuple[list[list[int]] | None, int, int]:
        """Divide the stream shards among processes, so that none reads what another one trains on.

        Args:
            batch_size: Examples per step, over all processes.
            num_processes: Number of processes.
            max_examples: Maximum number of examples per forward pass; `None` for no limit.

        Returns:
            The stream shards of each process, or `None` if every process must read all of them because there are too
            few or they are too uneven; the number of micro-batches per step; the maximum size of a micro-batch.

        Raises:
            ValueError: A step needs more examples than there are, or a micro-batch would be empty.
        """
        if batch_size > len(self):
            raise ValueError(f"A step cannot have {batch_size} examples: there are {len(self)}.")
        micro_batches = num_micro_batches(batch_size, num_processes, max_examples)
        undivided = (None, micro_batches, math.ceil(math.ceil(batch_size / num_processes) / micro_batches))
        if not 1 < num_processes <= len(self.stream_shards):
            return undivided
        # The largest stream shard goes to the process with the fewest examples so far.
        assigned, sizes = [[] for _ in range(num_processes)], [0] * num_processes
        for shard in sorted(range(len(self.stream_shards)), key=lambda shard: -self.num_examples[shard]):
            process = int(np.argmin(sizes))
            assigned[process].append(shard)
            sizes[process] += self.num_examples[shard]
        counts = np.concatenate([self._examples_per_step(shards, batch_size) for shards in assigned])
        smallest, largest = int(counts.min()), int(counts.max())
        micro_batches = 1 if max_examples is None else math.ceil(largest / max_examples)
        if largest > batch_size / num_processes * (1 + MAX_IMBALANCE) + 1 or smallest < micro_batches:
            return undivided
        return assigned, micro_batches, math.ceil(largest / micro_batches)

    def _examples_per_step(self, shards: Sequence[int], batch_size: int) -> np.ndarray:
        """Return the examples from these stream shards in every possible step, wherever in an epoch it begins."""
        is_own = np.tile(np.isin(self.shard_of_position, shards), 2)
        passed = np.concatenate([[0], np.cumsum(is_own)])
        return passed[batch_size : batch_size + len(self)] - passed[: len(self)]


class StreamBatches(StepPartition, IterableDataset):
    """Batches of one process from a stream, from step `start` to the last.

    The examples of a step are the same for any number of processes and workers. Each example is seen exactly once per
    epoch. Workers take turns with batches, and each of them reads what all of them need.

    Args:
        args: Arguments of [`StepPartition`], with a [`TaggedStream`] as `examples`.
        stream_shards: Stream shards of this process, from [`TaggedStream.assign_shards`]. If `None`, the process reads
            all of them and keeps an even part of each step.
        kwargs: Arguments of [`StepPartition`].

    Yields:
        Lists of examples with `example_index` and `example_seed`.
    """

    def __init__(self, *args: object, stream_shards: Sequence[int] | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.own_shards = stream_shards

    def __iter__(self) -> Iterator[list[dict]]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self._rows_from_start()
        for step in range(self.start, self.steps):
            positions = range(step * self.batch_size, (step + 1) * self.batch_size)
            shards = self.examples.shard_of_position.take(positions, mode="wrap")
            # Position in the step -> micro-batch, for the batches whose turn it is.
            wanted = {
                position: micro_batch
                for micro_batch, own in enumerate(self._micro_batch_positions(shards))
                if ((step - self.start) * self.micro_batches + micro_batch) % workers == turn
                for position in own.tolist()
            }
            batches = {micro_batch: [] for micro_batch in sorted(set(wanted.values()))}
            for position, shard in enumerate(shards.tolist()):
                if shard in rows:
                    row = next(rows[shard])
                    if position in wanted:
                        batches[wanted[position]].append(row)
            yield from batches.values()

    def _rows_from_start(self) -> dict[int, Iterator[dict]]:
        """Return an endless iterator for each stream shard to read, from this training's first example on."""
        shard_of_position = self.examples.shard_of_position
        epoch, passed = divmod(self.start * self.batch_size, len(shard_of_position))
        skipped = np.bincount(shard_of_position[:passed], minlength=len(self.examples.stream_shards)).tolist()
        shards = range(len(skipped)) if self.own_shards is None else self.own_shards
        return {shard: itertools.islice(self._epochs(shard, epoch), skipped[shard], None) for shard in shards}

    def _micro_batch_positions(self, shards: np.ndarray) -> list[np.ndarray]:
        if self.own_shards is None:
            return self.own_positions()
        return np.array_split(np.flatnonzero(np.isin(shards, self.own_shards)), self.micro_batches)

    def _epochs(self, shard: int, first: int) -> Iterator[dict]:
        epochs = (self.examples.epoch(shard, epoch, self.seed) for epoch in itertools.count(first))
        return itertools.chain.from_iterable(epochs)


def open_stream_shards(
    rows: datasets.IterableDataset, texts: datasets.IterableDataset, max_shards: int, name: str
) -> tuple[list[datasets.IterableDataset], datasets.Dataset]:
    """Divide the files of a stream among stream shards, and read its texts.

    Args:
        rows: One split from [`load_tagging_dataset`].
        texts: The same split, loaded with `texts_only`.
        max_shards: Maximum number of stream shards.
        name: Name of the dataset in error messages.

    Returns:
        The stream shards; and `id`, `title`, `tags` and `stream_shard` of every example.

    Raises:
        ValueError: There are no rows, or the examples have no unique ids. A missing id can only be replaced by the
            row's number if there is a single file.
    """
    divided, count = (rows, texts), 1
    if max_shards > 1:
        if rows.num_shards < max_shards * FILES_PER_SHARD:
            # Row groups of Parquet files can be read in any order.
            divided = rows.reshard(), texts.reshard()
        count = min(max_shards, divided[0].num_shards)
    stream_shards, text_shards = ([some.shard(count, shard) for shard in range(count)] for some in divided)
    tables = []
    for shard, own in enumerate(text_shards):
        # Arrow tables need a fifth of the memory of Python strings.
        for table in own.with_format("arrow").iter(1000):
            tables.append(table.append_column("stream_shard", pa.array([shard] * len(table))))
    if not tables:
        raise ValueError(f"{name}: there are no rows to train on.")
    table = pa.concat_tables(tables)
    if missing := table["id"].null_count:
        if rows.num_shards > 1:
            raise ValueError(
                f"{name}: examples of a stream of several files need an `id` that identifies them; {missing:,} of "
                f"{len(table):,} have none."
            )
        if count > 1:
            return open_stream_shards(rows, texts, 1, name)
        # In one file that is read from its beginning, row numbers are stable.
        numbers = pa.array(map(str, range(len(table))), pa.string())
        table = table.set_column(0, "id", pc.coalesce(table["id"], numbers))
    if (unique := pc.count_distinct(table["id"]).as_py()) < len(table):
        raise ValueError(
            f"{name}: examples of a stream are identified by their `id`, but {len(table):,} of them have only "
            f"{unique:,} different ones."
        )
    return stream_shards, datasets.Dataset(datasets.table.InMemoryTable(table))
