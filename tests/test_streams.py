"""Streamed training examples: the same steps for any number of processes and workers."""

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.packaged_modules.parquet import parquet
from torch.utils.data import DataLoader

from dataset_scripts import load_tagging_dataset
from dataset_scripts.tagging_columns import TEXT_COLUMNS
from modeling_optsg.training import StreamBatches, TaggedStream, open_stream_shards

# Examples whose only tag is not trained on.
UNTRAINED = (0, 7, 22)
META = {"a": Value("int64"), "b": Value("null")}
NESTED = Features({"id": Value("string"), "tags": List(Value("string")), "meta": META, "title": Value("string")})


def write(folder, files, rows=23, ids=True):
    """Write examples with one tag each to Parquet files of several row groups."""
    columns = {"title": [f"title {n}" for n in range(rows)], "tags": [[f"t{n}"] for n in range(rows)]}
    if ids:
        columns["id"] = [f"v{n}" for n in range(rows)]
    whole = Dataset.from_dict(columns)
    for number in range(files):
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        whole.shard(files, number, contiguous=True).to_parquet(path, batch_size=5)


def load(folder, max_shards=16, **settings):
    arguments = {"split": "train", "streaming": True, "cache_dir": folder / "cache"}
    rows, texts = (load_tagging_dataset(folder, texts_only=only, **arguments) for only in (False, True))
    shards, known = open_stream_shards(rows, texts, max_shards, "my examples")
    tags = {tag for own in known["tags"] for tag in own} - {f"t{number}" for number in UNTRAINED}
    trained = [shard for shard, own in zip(known["stream_shard"], known["tags"]) if tags & set(own)]
    return TaggedStream(shards, tags, np.bincount(trained, minlength=len(shards)).tolist(), **settings)


def ids_of(batches, workers=0):
    loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=list)
    return [[row["id"] for row in batch] for batch in loader]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Without it, `datasets` sleeps for five seconds whenever a stream is not read to its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 examples in two files; 20 of them are trained on."""
    folder = tmp_path_factory.mktemp("stream")
    write(folder, 2)
    return folder


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory):
    """64 examples in four files; 61 of them are trained on."""
    folder = tmp_path_factory.mktemp("even")
    write(folder, 4, rows=64)
    return folder


@pytest.mark.parametrize("shards", [2, 16])
def test_each_epoch_has_all_streamed_examples_with_known_tags(folder, shards):
    stream = load(folder, shards, buffer_size=24)
    # Two files have six row groups.
    assert len(stream.stream_shards) == min(shards, 6) and sum(rows.num_shards for rows in stream.stream_shards) == 6
    rows = [row for batch in StreamBatches(stream, 6, 10, seed=0) for row in batch]
    epochs = [[row["id"] for row in rows[start : start + 20]] for start in (0, 20, 40)]
    assert all(len(set(epoch)) == 20 and not set(epoch) & {"v0", "v7", "v22"} for epoch in epochs)
    assert epochs[0] != epochs[1] and all(row["tags"] == [f"t{row['id'][1:]}"] for row in rows)
    assert len({row["example_seed"] for row in rows}) == 60 and len({row["example_index"] for row in rows}) == 20


@pytest.mark.parametrize("processes, micro_batches, workers", [(2, 1, 1), (3, 2, 0), (5, 1, 2)])
def test_a_streamed_step_does_not_depend_on_processes(folder, processes, micro_batches, workers):
    def ids(workers=0, **partition):
        return ids_of(StreamBatches(load(folder, buffer_size=8), 6, 10, seed=0, **partition), workers)

    whole = ids()
    divided = [
        ids(workers, process=process, num_processes=processes, micro_batches=micro_batches)
        for process in range(processes)
    ]
    for step, expected in enumerate(whole):
        batches = [own[step * micro_batches + index] for own in divided for index in range(micro_batches)]
        assert [row for batch in batches for row in batch] == expected
    assert ids(workers, start=7) == whole[7:]


@pytest.mark.parametrize("processes, max_examples, workers", [(2, None, 0), (2, 3, 2), (4, None, 1)])
def test_processes_divide_the_stream_and_see_the_same_steps(even_folder, processes, max_examples, workers):
    stream = load(even_folder, 4, buffer_size=16)
    whole = ids_of(StreamBatches(stream, 12, 12, seed=0))
    shards, micro_batches, micro_batch_size = stream.assign_shards(12, processes, max_examples)
    assert sorted(shard for own in shards for shard in own) == [0, 1, 2, 3] and len(shards) == processes
    divided = []
    for process in range(processes):
        stream, read = load(even_folder, 4, buffer_size=16), set()
        if not workers:
            record_shards(stream, read)
        partition = {"process": process, "num_processes": processes, "micro_batches": micro_batches}
        partition["stream_shards"] = shards[process]
        divided.append(ids_of(StreamBatches(stream, 12, 12, seed=0, **partition), workers))
        assert workers or read == set(shards[process])
        rest = ids_of(StreamBatches(stream, 12, 12, seed=0, start=7, **partition), workers)
        assert rest == divided[-1][7 * micro_batches :]
    sizes = {len(batch) for own in divided for batch in own}
    assert min(sizes) > 0 and max(sizes) <= micro_batch_size <= (max_examples or 12)
    for step, expected in enumerate(whole):
        batches = [own[step * micro_batches + index] for own in divided for index in range(micro_batches)]
        assert sorted(row for batch in batches for row in batch) == sorted(expected)


def record_shards(stream, read):
    """Record which stream shards of a stream are read."""
    epoch = stream.epoch

    def recorded(shard, *args):
        for row in epoch(shard, *args):
            read.add(shard)
            yield row

    stream.epoch = recorded


def test_too_few_or_uneven_shards_are_read_by_every_process(folder, even_folder):
    few = load(even_folder, 4)
    # Fewer stream shards than processes, and micro-batches that would be empty.
    assert few.assign_shards(16, 8, None) == (None, 1, 2)
    assert few.assign_shards(8, 4, 1)[0] is None
    uneven = load(folder, 6)
    assert uneven.num_examples == [4, 4, 2, 5, 5, 0] and uneven.assign_shards(10, 4, None)[0] is None
    assert uneven.assign_shards(10, 2, None)[0] is not None
    with pytest.raises(ValueError, match="too small for 8 processes"):
        few.assign_shards(4, 8, None)


def test_stream_shards_of_different_sizes_end_together(folder):
    stream = load(folder, 2)
    uneven = TaggedStream(stream.stream_shards, stream.tags, [15, 5])
    assert (uneven.shard_of_position.reshape(5, 4) == 1).sum(axis=1).tolist() == [1] * 5


def test_a_stream_that_has_changed_is_refused(folder):
    stream = load(folder, 2)
    first, second = stream.num_examples
    for expected, now in ((first + 1, str(first)), (first - 1, "more")):
        changed = TaggedStream(stream.stream_shards, stream.tags, [expected, second])
        with pytest.raises(ValueError, match=rf"had {expected} examples .* first read, now {now}\."):
            list(changed.epoch(0, 0, 0))


def test_a_broken_file_of_a_stream_is_located():
    def rows(broken):
        yield {"id": "v0", "title": "", "tags": ["a"]}
        yield {"id": "v1", "title": "", "tags": ["a"]}
        if broken:
            raise OSError("page header")

    whole, broken = (IterableDataset.from_generator(rows, gen_kwargs={"broken": own}) for own in (False, True))
    for buffer_size, where in ((1, "after example v[01]"), (100, "before the first example")):
        stream = TaggedStream([whole, broken], ["a"], [2, 3], buffer_size=2 * buffer_size)
        with pytest.raises(OSError, match=rf"in stream shard 2 of 2, {where}: page header"):
            ids_of(StreamBatches(stream, 5, 1, seed=0))


def test_row_numbers_are_ids_only_in_a_single_file(tmp_path_factory):
    # Not `tmp_path`: `datasets` takes "test" in a path for the name of a split.
    folder = tmp_path_factory.mktemp("numbers")
    for name, files in (("one", 1), ("three", 3)):
        (folder / name).mkdir()
        write(folder / name, files, ids=False)
    stream = load(folder / "one")
    assert len(stream.stream_shards) == 1 and not stream.is_hardly_shuffled
    assert load(folder / "one", buffer_size=3).is_hardly_shuffled
    rows = [row for batch in StreamBatches(stream, 5, 8, seed=0) for row in batch]
    assert len({row["id"] for row in rows}) == 20 and all(row["tags"] == [f"t{row['id']}"] for row in rows)
    with pytest.raises(ValueError, match="my examples: examples of a stream of several files need an `id`.*23 of 23"):
        load(folder / "three")


def write_some_ids(folder, files):
    """Write examples of which every fourth has no id."""
    for number in range(files):
        rows = [
            {"id": f"v{row}" if row % 4 else None, "tags": [f"t{row}"], "meta": {"a": row, "b": None}, "title": ""}
            for row in range(9)
        ]
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        Dataset.from_list(rows, features=NESTED).to_parquet(path, batch_size=2)


def test_missing_ids_are_row_numbers_in_a_single_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    write_some_ids(folder, files=1)
    rows = [row for batch in StreamBatches(load(folder, buffer_size=9), 3, 5, seed=0) for row in batch]
    assert {row["id"] for row in rows} >= {"v1", "4", "8"}
    assert all(row["id"][-1] == row["tags"][0][-1] for row in rows)


def test_missing_or_repeated_ids_in_several_files_are_refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    write_some_ids(folder, files=3)
    with pytest.raises(ValueError, match="9 of 27 have none"):
        load(folder)
    for path in folder.glob("*.parquet"):
        rows = [{"id": f"v{row}", "tags": [f"t{row}"], "title": ""} for row in range(9)]
        Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(ValueError, match="27 of them have only 9 different ones"):
        load(folder)


def test_a_stream_without_rows_is_refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    Dataset.from_dict({"id": [], "title": [], "tags": []}, features=TEXT_COLUMNS).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="my examples: there are no rows to train on"):
        load(folder)


def test_only_text_columns_of_parquet_files_are_read(folder, monkeypatch):
    read = []
    tables = parquet.Parquet._generate_tables

    def recorded(self, **files):
        read.append(self.config.columns)
        return tables(self, **files)

    monkeypatch.setattr(parquet.Parquet, "_generate_tables", recorded)
    rows = load_tagging_dataset(folder, split="train", streaming=True, texts_only=True)
    assert rows.column_names == ["id", "title", "tags"] and len(list(rows)) == 23
    assert {tuple(columns) for columns in read} == {("id", "title", "tags")}
    with pytest.raises(ValueError, match="texts_only"):
        load_tagging_dataset(folder, texts_only=True)
