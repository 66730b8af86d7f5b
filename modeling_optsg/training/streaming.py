"""Training items that are read as streams: each step's are the same whichever processes and workers read them."""

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

from .sampling import SharedSteps, item_seed, micro_batches

# A lane of fewer files would give its items in nearly the same order in every epoch.
FILES_OF_A_LANE = 16
# Processes may have so much more than an even share of a step's items before each reads everything instead.
UNEVEN = 0.1


class TaggedStream:
    """Items of which some tags are trained on, in lanes: streams that are read side by side, each by itself.

    An epoch's order says which lane each item is of, and each lane gives its items in an order of its own. All lanes
    end with the epoch, however many items each has.

    Args:
        lanes: of [`open_lanes`]; items are told apart by their `id`.
        tags: those trained on. Items without any are left out.
        items: how many of each lane have one.
        buffer_size: rows, of all lanes, among which the next ones are drawn.

    Raises:
        ValueError: no row is trained on.
    """

    def __init__(
        self,
        lanes: Sequence[datasets.IterableDataset],
        tags: Collection[str],
        items: Sequence[int],
        buffer_size: int = 1000,
    ):
        if not sum(items):
            raise ValueError("There are no items to train on.")
        # Rows of other processes are passed over; nothing of them is decoded.
        self.lanes, self.tags, self.items = [undecoded(rows) for rows in lanes], frozenset(tags), list(items)
        self.buffer_size = max(1, buffer_size // len(lanes))
        # The k-th of a lane's n items has its place (k + 1/2) / n of the way through the epoch.
        way = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in self.items])
        self.lane_of = np.repeat(np.arange(len(lanes)), self.items)[np.argsort(way, kind="stable")]

    def __len__(self) -> int:
        return len(self.lane_of)

    @property
    def is_hardly_shuffled(self) -> bool:
        """Whether items come in nearly the same order in every epoch: of few files, and many more than the buffer."""
        return any(rows.num_shards < 4 and own > 4 * self.buffer_size for rows, own in zip(self.lanes, self.items))

    def __iter__(self) -> Iterator[dict]:
        return itertools.chain.from_iterable(self.epoch(lane, 0, 0) for lane in range(len(self.lanes)))

    def epoch(self, lane: int, epoch: int, seed: int) -> Iterator[dict]:
        """Each item of a lane once, in an order of the epoch's own.

        Raises:
            ValueError: there are not as many as there were.
            OSError: a file is broken.
        """
        found = 0
        for row in self._rows(lane, epoch, seed):
            if tags := [tag for tag in row["tags"] if tag in self.tags]:
                found += 1
                if found > self.items[lane]:
                    break
                # One number in every epoch, and no list of all items anywhere.
                known = {"item_index": item_seed(0, 0, row["id"]), "item_seed": item_seed(seed, epoch, row["id"])}
                yield {**row, "tags": tags, **known}
        if found != self.items[lane]:
            more = "more" if found > self.items[lane] else f"{found}"
            raise ValueError(f"A stream had {self.items[lane]} items to train on when it was first read, now {more}.")

    def _rows(self, lane: int, epoch: int, seed: int) -> Iterator[dict]:
        # One file after the other: others are read beside it, as other lanes.
        rows = self.lanes[lane].shuffle(seed=seed, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        rows.set_epoch(epoch)
        last = None
        try:
            # By `iter`, which gives every worker all rows, in the order that the process itself would read them in.
            for batch in rows.iter(1):
                row = {name: values[0] for name, values in batch.items()}
                last = row["id"]
                yield row
        except (OSError, ArrowException) as error:
            where = f"in part {lane + 1} of {len(self.lanes)} of its files, " + (
                "before the first item" if last is None else f"after item {last}"
            )
            raise OSError(f"The stream cannot be read on, {where}: {error}") from error

    def divide(
        self, batch_size: int, num_processes: int, most_items: int | None
    ) -> tuple[list[list[int]] | None, int, int]:
        """Which lanes are whose, so that no process reads what another one trains on.

        Args: those of [`micro_batches`].

        Returns:
            Each process's lanes, or `None` where every process must read all of them: there are too few, or some are
            so much longer that processes would wait for one another. Then how many parts each has in a step, and the
            most items of a part.

        Raises:
            ValueError: there are fewer items than a step's; see [`micro_batches`] too.
        """
        if batch_size > len(self):
            raise ValueError(f"A step cannot have {batch_size} items: there are {len(self)}.")
        parts, even = micro_batches(batch_size, num_processes, most_items), math.ceil(batch_size / num_processes)
        whole = (None, parts, math.ceil(even / parts))
        if not 1 < num_processes <= len(self.lanes):
            return whole
        shares, sizes = [[] for _ in range(num_processes)], [0] * num_processes
        for lane in sorted(range(len(self.lanes)), key=lambda lane: -self.items[lane]):
            process = int(np.argmin(sizes))
            shares[process].append(lane)
            sizes[process] += self.items[lane]
        least, most = batch_size, 0
        for lanes in shares:
            passed = np.concatenate([[0], np.cumsum(np.tile(np.isin(self.lane_of, lanes), 2))])
            # Of every batch there can be, wherever in an epoch it begins.
            counts = passed[batch_size : batch_size + len(self)] - passed[: len(self)]
            least, most = min(least, int(counts.min())), max(most, int(counts.max()))
        parts = 1 if most_items is None else math.ceil(most / most_items)
        if most > batch_size / num_processes * (1 + UNEVEN) + 1 or least < parts:
            return whole
        return shares, parts, math.ceil(most / parts)


class StreamBatches(SharedSteps, IterableDataset):
    """What [`GlobalBatches`] is for map-style items: this process's items of each step, from the step asked for on.

    A step's items are the same for any number of processes and workers, none is seen twice or missed in an epoch, and
    none waits for another at an uneven end. Workers take turns with batches, and each reads what all of them need.

    Args: those of [`SharedSteps`], with a [`TaggedStream`] as `items`, and
        lanes: those whose items are this process's, of [`TaggedStream.divide`]; all are read, and an even share is
            kept, if not given.

    Yields:
        lists of items with `item_index` and `item_seed`.
    """

    def __init__(self, *args, lanes: Sequence[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lanes = lanes

    def __iter__(self) -> Iterator[list[dict]]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane_of = self.items.lane_of
        epoch, passed = divmod(self.start * self.batch_size, len(lane_of))
        begin = np.bincount(lane_of[:passed], minlength=len(self.items.lanes)).tolist()
        rows = {
            lane: itertools.islice(self._epochs(lane, epoch), begin[lane], None)
            for lane in (range(len(begin)) if self.lanes is None else self.lanes)
        }
        for step in range(self.start, self.steps):
            lanes = lane_of.take(range(step * self.batch_size, (step + 1) * self.batch_size), mode="wrap")
            own = self.own_places()
            if self.lanes is not None:
                own = np.array_split(np.flatnonzero(np.isin(lanes, self.lanes)), self.parts)
            mine = {
                place: part
                for part, places in enumerate(own)
                if ((step - self.start) * self.parts + part) % workers == turn
                for place in places.tolist()
            }
            batches = {part: [] for part in sorted(set(mine.values()))}
            for place, lane in enumerate(lanes.tolist()):
                if lane in rows:
                    row = next(rows[lane])
                    if place in mine:
                        batches[mine[place]].append(row)
            yield from batches.values()

    def _epochs(self, lane: int, first: int) -> Iterator[dict]:
        epochs = (self.items.epoch(lane, epoch, self.seed) for epoch in itertools.count(first))
        return itertools.chain.from_iterable(epochs)


def open_lanes(
    rows: datasets.IterableDataset, texts: datasets.IterableDataset, most: int, name: str
) -> tuple[list[datasets.IterableDataset], datasets.Dataset]:
    """Divides a stream's files among lanes, and reads its texts.

    Args:
        rows: of [`load_tagging_dataset`], of one split; texts: of the same, with `texts_only`.
        most: lanes there may be.
        name: what to call the dataset in errors.

    Returns:
        The lanes; and `id`, `title`, `tags` and `lane` of every item.

    Raises:
        ValueError: there are no rows, or items have no ids of their own: those without are numbered as they come, in
            each lane anew.
    """
    files = rows.num_shards
    divided, count = (rows, texts), 1
    if most > 1:
        if files < most * FILES_OF_A_LANE:
            # Parquet can be read from each of its row groups on, in any order.
            divided = rows.reshard(), texts.reshard()
        count = min(most, divided[0].num_shards)
    lanes, texts_of = ([some.shard(count, lane) for lane in range(count)] for some in divided)
    tables = []
    for lane, own in enumerate(texts_of):
        # As Arrow tables, a fifth of what they are as Python's own texts.
        for table in own.with_format("arrow").iter(1000):
            tables.append(table.append_column("lane", pa.array([lane] * len(table))))
    if not tables:
        raise ValueError(f"{name}: there are no rows to train on.")
    table = pa.concat_tables(tables)
    if missing := table["id"].null_count:
        if files > 1:
            raise ValueError(
                f"{name}: items of a stream of several files need an `id`, by which they are known; {missing:,} of "
                f"{len(table):,} have none."
            )
        if count > 1:
            return open_lanes(rows, texts, 1, name)
        # Of one file that is read from its beginning the numbers of rows stay.
        numbers = pa.array(map(str, range(len(table))), pa.string())
        table = table.set_column(0, "id", pc.coalesce(table["id"], numbers))
    if (different := pc.count_distinct(table["id"]).as_py()) < len(table):
        raise ValueError(
            f"{name}: items of a stream are known by their `id`, and {len(table):,} of them have only {different:,} "
            "different ones."
        )
    return lanes, datasets.Dataset(datasets.table.InMemoryTable(table))
