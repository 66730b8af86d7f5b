"""Training examples that are read as streams: each step's are the same whichever processes and workers read them."""

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

from .sampling import SharedSteps, example_seed, micro_batches

# A shard of fewer files would give its examples in nearly the same order in every epoch.
FILES_PER_SHARD = 16
# Processes may have so much more than an even share of a step's examples before each reads everything instead.
UNEVEN = 0.1


class TaggedStream:
    """Examples of which some tags are trained on, in shards: streams that are read side by side, each by itself.

    An epoch's order says which shard each example is of, and each shard gives its examples in an order of its own. All shards
    end with the epoch, however many examples each has.

    Args:
        shards: of [`open_shards`]; examples are told apart by their `id`.
        tags: those trained on. Examples without any are left out.
        examples: how many of each shard have one.
        buffer_size: rows, of all shards, among which the next ones are drawn.

    Raises:
        ValueError: no row is trained on.
    """

    def __init__(
        self,
        shards: Sequence[datasets.IterableDataset],
        tags: Collection[str],
        examples: Sequence[int],
        buffer_size: int = 1000,
    ):
        if not sum(examples):
            raise ValueError("There are no examples to train on.")
        # Rows of other processes are passed over; nothing of them is decoded.
        self.shards, self.tags, self.examples = [undecoded(rows) for rows in shards], frozenset(tags), list(examples)
        self.buffer_size = max(1, buffer_size // len(shards))
        # The k-th of a shard's n examples has its place (k + 1/2) / n of the way through the epoch.
        way = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in self.examples])
        self.shard_of = np.repeat(np.arange(len(shards)), self.examples)[np.argsort(way, kind="stable")]

    def __len__(self) -> int:
        return len(self.shard_of)

    @property
    def is_hardly_shuffled(self) -> bool:
        """Whether examples come in nearly the same order in every epoch: of few files, and many more than the buffer."""
        return any(rows.num_shards < 4 and own > 4 * self.buffer_size for rows, own in zip(self.shards, self.examples))

    def __iter__(self) -> Iterator[dict]:
        return itertools.chain.from_iterable(self.epoch(shard, 0, 0) for shard in range(len(self.shards)))

    def epoch(self, shard: int, epoch: int, seed: int) -> Iterator[dict]:
        """Each example of a shard once, in an order of the epoch's own.

        Raises:
            ValueError: there are not as many as there were.
            OSError: a file is broken.
        """
        found = 0
        for row in self._rows(shard, epoch, seed):
            if tags := [tag for tag in row["tags"] if tag in self.tags]:
                found += 1
                if found > self.examples[shard]:
                    break
                # One number in every epoch, and no list of all examples anywhere.
                known = {
                    "example_index": example_seed(0, 0, row["id"]),
                    "example_seed": example_seed(seed, epoch, row["id"]),
                }
                yield {**row, "tags": tags, **known}
        if found != self.examples[shard]:
            more = "more" if found > self.examples[shard] else f"{found}"
            raise ValueError(
                f"A stream had {self.examples[shard]} examples to train on when it was first read, now {more}."
            )

    def _rows(self, shard: int, epoch: int, seed: int) -> Iterator[dict]:
        # One file after the other: others are read beside it, as other shards.
        rows = self.shards[shard].shuffle(seed=seed, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        rows.set_epoch(epoch)
        last = None
        try:
            # By `iter`, which gives every worker all rows, in the order that the process itself would read them in.
            for batch in rows.iter(1):
                row = {name: values[0] for name, values in batch.items()}
                last = row["id"]
                yield row
        except (OSError, ArrowException) as error:
            where = f"in part {shard + 1} of {len(self.shards)} of its files, " + (
                "before the first example" if last is None else f"after example {last}"
            )
            raise OSError(f"The stream cannot be read on, {where}: {error}") from error

    def divide(
        self, batch_size: int, num_processes: int, max_examples: int | None
    ) -> tuple[list[list[int]] | None, int, int]:
        """Which shards are whose, so that no process reads what another one trains on.

        Args: those of [`micro_batches`].

        Returns:
            Each process's shards, or `None` where every process must read all of them: there are too few, or some are
            so much longer that processes would wait for one another. Then how many parts each has in a step, and the
            most examples of a part.

        Raises:
            ValueError: there are fewer examples than a step's; see [`micro_batches`] too.
        """
        if batch_size > len(self):
            raise ValueError(f"A step cannot have {batch_size} examples: there are {len(self)}.")
        parts, even = micro_batches(batch_size, num_processes, max_examples), math.ceil(batch_size / num_processes)
        whole = (None, parts, math.ceil(even / parts))
        if not 1 < num_processes <= len(self.shards):
            return whole
        shares, sizes = [[] for _ in range(num_processes)], [0] * num_processes
        for shard in sorted(range(len(self.shards)), key=lambda shard: -self.examples[shard]):
            process = int(np.argmin(sizes))
            shares[process].append(shard)
            sizes[process] += self.examples[shard]
        least, most = batch_size, 0
        for shards in shares:
            passed = np.concatenate([[0], np.cumsum(np.tile(np.isin(self.shard_of, shards), 2))])
            # Of every batch there can be, wherever in an epoch it begins.
            counts = passed[batch_size : batch_size + len(self)] - passed[: len(self)]
            least, most = min(least, int(counts.min())), max(most, int(counts.max()))
        parts = 1 if max_examples is None else math.ceil(most / max_examples)
        if most > batch_size / num_processes * (1 + UNEVEN) + 1 or least < parts:
            return whole
        return shares, parts, math.ceil(most / parts)


class StreamBatches(SharedSteps, IterableDataset):
    """What [`GlobalBatches`] is for map-style examples: this process's examples of each step, from the step asked for on.

    A step's examples are the same for any number of processes and workers, none is seen twice or missed in an epoch, and
    none waits for another at an uneven end. Workers take turns with batches, and each reads what all of them need.

    Args: those of [`SharedSteps`], with a [`TaggedStream`] as `examples`, and
        shards: those whose examples are this process's, of [`TaggedStream.divide`]; all are read, and an even share is
            kept, if not given.

    Yields:
        lists of examples with `example_index` and `example_seed`.
    """

    def __init__(self, *args, shards: Sequence[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.shards = shards

    def __iter__(self) -> Iterator[list[dict]]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        shard_of = self.examples.shard_of
        epoch, passed = divmod(self.start * self.batch_size, len(shard_of))
        begin = np.bincount(shard_of[:passed], minlength=len(self.examples.shards)).tolist()
        rows = {
            shard: itertools.islice(self._epochs(shard, epoch), begin[shard], None)
            for shard in (range(len(begin)) if self.shards is None else self.shards)
        }
        for step in range(self.start, self.steps):
            shards = shard_of.take(range(step * self.batch_size, (step + 1) * self.batch_size), mode="wrap")
            own = self.own_places()
            if self.shards is not None:
                own = np.array_split(np.flatnonzero(np.isin(shards, self.shards)), self.parts)
            mine = {
                place: part
                for part, places in enumerate(own)
                if ((step - self.start) * self.parts + part) % workers == turn
                for place in places.tolist()
            }
            batches = {part: [] for part in sorted(set(mine.values()))}
            for place, shard in enumerate(shards.tolist()):
                if shard in rows:
                    row = next(rows[shard])
                    if place in mine:
                        batches[mine[place]].append(row)
            yield from batches.values()

    def _epochs(self, shard: int, first: int) -> Iterator[dict]:
        epochs = (self.examples.epoch(shard, epoch, self.seed) for epoch in itertools.count(first))
        return itertools.chain.from_iterable(epochs)


def open_shards(
    rows: datasets.IterableDataset, texts: datasets.IterableDataset, most: int, name: str
) -> tuple[list[datasets.IterableDataset], datasets.Dataset]:
    """Divides a stream's files among shards, and reads its texts.

    Args:
        rows: of [`load_tagging_dataset`], of one split; texts: of the same, with `texts_only`.
        most: shards there may be.
        name: what to call the dataset in errors.

    Returns:
        The shards; and `id`, `title`, `tags` and `shard` of every example.

    Raises:
        ValueError: there are no rows, or examples have no ids of their own: those without are numbered as they come, in
            each shard anew.
    """
    files = rows.num_shards
    divided, count = (rows, texts), 1
    if most > 1:
        if files < most * FILES_PER_SHARD:
            # Parquet can be read from each of its row groups on, in any order.
            divided = rows.reshard(), texts.reshard()
        count = min(most, divided[0].num_shards)
    shards, texts_of = ([some.shard(count, shard) for shard in range(count)] for some in divided)
    tables = []
    for shard, own in enumerate(texts_of):
        # As Arrow tables, a fifth of what they are as Python's own texts.
        for table in own.with_format("arrow").iter(1000):
            tables.append(table.append_column("shard", pa.array([shard] * len(table))))
    if not tables:
        raise ValueError(f"{name}: there are no rows to train on.")
    table = pa.concat_tables(tables)
    if missing := table["id"].null_count:
        if files > 1:
            raise ValueError(
                f"{name}: examples of a stream of several files need an `id`, by which they are known; {missing:,} of "
                f"{len(table):,} have none."
            )
        if count > 1:
            return open_shards(rows, texts, 1, name)
        # Of one file that is read from its beginning the numbers of rows stay.
        numbers = pa.array(map(str, range(len(table))), pa.string())
        table = table.set_column(0, "id", pc.coalesce(table["id"], numbers))
    if (different := pc.count_distinct(table["id"]).as_py()) < len(table):
        raise ValueError(
            f"{name}: examples of a stream are known by their `id`, and {len(table):,} of them have only {different:,} "
            "different ones."
        )
    return shards, datasets.Dataset(datasets.table.InMemoryTable(table))
