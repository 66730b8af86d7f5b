"""Streamed training examples: the same steps whichever processes and workers read them."""

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.packaged_modules.parquet import parquet
from torch.utils.data import DataLoader

from dataset_scripts import load_tagging_dataset
from dataset_scripts.tagging_columns import TEXT_COLUMNS
from modeling_optsg.training import StreamBatches, TaggedStream, open_shards

SPARE = (0, 7, 22)
META = {"a": Value("int64"), "b": Value("null")}
NESTED = Features({"id": Value("string"), "tags": List(Value("string")), "meta": META, "title": Value("string")})


def write(folder, files, rows=23, ids=True):
    """Examples of one tag each, in Parquet files of several row groups."""
    columns = {"title": [f"title {n}" for n in range(rows)], "tags": [[f"t{n}"] for n in range(rows)]}
    if ids:
        columns["id"] = [f"v{n}" for n in range(rows)]
    whole = Dataset.from_dict(columns)
    for number in range(files):
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        whole.shard(files, number, contiguous=True).to_parquet(path, batch_size=5)


def load(folder, most=16, **settings):
    arguments = {"split": "train", "streaming": True, "cache_dir": folder / "cache"}
    rows, texts = (load_tagging_dataset(folder, texts_only=only, **arguments) for only in (False, True))
    shards, known = open_shards(rows, texts, most, "my examples")
    tags = {tag for own in known["tags"] for tag in own} - {f"t{place}" for place in SPARE}
    trained = [shard for shard, own in zip(known["shard"], known["tags"]) if tags & set(own)]
    return TaggedStream(shards, tags, np.bincount(trained, minlength=len(shards)).tolist(), **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 examples, of which 20 are trained on, in two files."""
    folder = tmp_path_factory.mktemp("stream")
    write(folder, 2)
    return folder


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory):
    """64 examples, of which 61 are trained on, in four files."""
    folder = tmp_path_factory.mktemp("even")
    write(folder, 4, rows=64)
    return folder


@pytest.mark.parametrize("shards", [2, 16])
def test_streamed_examples_are_seen_once_an_epoch_with_the_tags_that_are_known(folder, shards):
    stream = load(folder, shards, buffer_size=24)
    # The six row groups of two files.
    assert len(stream.shards) == min(shards, 6) and sum(rows.num_shards for rows in stream.shards) == 6
    rows = [row for batch in StreamBatches(stream, 6, 10, seed=0) for row in batch]
    epochs = [[row["id"] for row in rows[start : start + 20]] for start in (0, 20, 40)]
    assert all(len(set(epoch)) == 20 and not set(epoch) & {"v0", "v7", "v22"} for epoch in epochs)
    assert epochs[0] != epochs[1] and all(row["tags"] == [f"t{row['id'][1:]}"] for row in rows)
    assert len({row["example_seed"] for row in rows}) == 60 and len({row["example_index"] for row in rows}) == 20


@pytest.mark.parametrize("processes, parts, workers", [(2, 1, 1), (3, 2, 0), (5, 1, 2)])
def test_a_stream_s_step_does_not_depend_on_processes_parts_and_workers(folder, processes, parts, workers):
    def ids(workers=0, **share):
        batches = StreamBatches(load(folder, buffer_size=8), 6, 10, seed=0, **share)
        loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=list)
        return [[row["id"] for row in batch] for batch in loader]

    whole = ids()
    shares = [ids(workers, process=process, num_processes=processes, parts=parts) for process in range(processes)]
    for step, expected in enumerate(whole):
        assert [row for own in shares for part in range(parts) for row in own[step * parts + part]] == expected
    assert ids(workers, start=7) == whole[7:]


@pytest.mark.parametrize("processes, max_examples, workers", [(2, None, 0), (2, 3, 2), (4, None, 1)])
def test_processes_divide_the_reading_and_see_the_steps_of_one(even_folder, processes, max_examples, workers):
    stream = load(even_folder, 4, buffer_size=16)
    whole = [[row["id"] for row in batch] for batch in StreamBatches(stream, 12, 12, seed=0)]
    shards, parts, at_once = stream.divide(12, processes, max_examples)
    assert sorted(shard for own in shards for shard in own) == [0, 1, 2, 3] and len(shards) == processes
    found = []
    for process in range(processes):
        read = set()

        def seen(number, shard, rows, read=read):
            for row in rows:
                read.add(number)
                yield row

        own = load(even_folder, 4, buffer_size=16)
        if not workers:
            epoch = own.epoch
            own.epoch = lambda shard, *rest, epoch=epoch, seen=seen: seen(shard, shard, epoch(shard, *rest))
        share = {"process": process, "num_processes": processes, "parts": parts, "shards": shards[process]}
        batches = StreamBatches(own, 12, 12, seed=0, **share)
        loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=list)
        found.append([[row["id"] for row in batch] for batch in loader])
        assert workers or read == set(shards[process])
        rest = DataLoader(
            StreamBatches(own, 12, 12, seed=0, start=7, **share), None, num_workers=workers, collate_fn=list
        )
        assert [[row["id"] for row in batch] for batch in rest] == found[-1][7 * parts :]
    sizes = {len(batch) for own in found for batch in own}
    assert min(sizes) > 0 and max(sizes) <= at_once <= (max_examples or 12)
    for step, expected in enumerate(whole):
        together = [example for own in found for part in range(parts) for example in own[step * parts + part]]
        assert sorted(together) == sorted(expected)


def test_too_few_or_uneven_shards_are_read_by_every_process(folder, even_folder):
    few = load(even_folder, 4)
    # Fewer shards than processes; and parts that would be empty.
    assert few.divide(16, 8, None) == (None, 1, 2)
    assert few.divide(8, 4, 1)[0] is None
    uneven = load(folder, 6)
    assert uneven.examples == [4, 4, 2, 5, 5, 0] and uneven.divide(10, 4, None)[0] is None
    assert uneven.divide(10, 2, None)[0] is not None
    with pytest.raises(ValueError, match="cannot be shared by 8 processes"):
        few.divide(4, 8, None)


def test_shards_end_together_however_long_they_are(folder):
    stream = load(folder, 2)
    stream.examples = [15, 5]
    assert (TaggedStream(stream.shards, stream.tags, [15, 5]).shard_of.reshape(5, 4) == 1).sum(axis=1).tolist() == [
        1
    ] * 5


def test_a_stream_that_has_changed_is_refused(folder):
    stream = load(folder, 2)
    for examples, now in ((stream.examples[0] + 1, str(stream.examples[0])), (stream.examples[0] - 1, "more")):
        changed = TaggedStream(stream.shards, stream.tags, [examples, stream.examples[1]])
        with pytest.raises(
            ValueError, match=rf"had {examples} examples to train on when it was first read, now {now}\."
        ):
            list(changed.epoch(0, 0, 0))


def test_a_broken_file_of_a_stream_is_found_by_its_part_and_last_example():
    def rows(broken):
        yield {"id": "v0", "title": "", "tags": ["a"]}
        yield {"id": "v1", "title": "", "tags": ["a"]}
        if broken:
            raise OSError("page header")

    whole, broken = (IterableDataset.from_generator(rows, gen_kwargs={"broken": own}) for own in (False, True))
    for buffer_size, where in ((1, "after example v[01]"), (100, "before the first example")):
        stream = TaggedStream([whole, broken], ["a"], [2, 3], buffer_size=2 * buffer_size)
        loader = DataLoader(StreamBatches(stream, 5, 1, seed=0), batch_size=None, num_workers=1, collate_fn=list)
        with pytest.raises(OSError, match=rf"in part 2 of 2 of its files, {where}: page header"):
            list(loader)


def test_ids_that_are_numbers_of_the_place_hold_for_one_file_alone(tmp_path_factory):
    # `datasets` takes a "test" in the path for a split.
    tmp_path = tmp_path_factory.mktemp("numbers")
    for name, files in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, files, ids=False)
    stream = load(tmp_path / "one")
    assert len(stream.shards) == 1 and not stream.is_hardly_shuffled
    assert load(tmp_path / "one", buffer_size=3).is_hardly_shuffled
    rows = [row for batch in StreamBatches(stream, 5, 8, seed=0) for row in batch]
    assert len({row["id"] for row in rows}) == 20 and all(row["tags"] == [f"t{row['id']}"] for row in rows)
    with pytest.raises(ValueError, match="my examples: examples of a stream of several files need an `id`.*23 of 23"):
        load(tmp_path / "three")


@pytest.mark.parametrize("files", [1, 3])
def test_ids_that_are_missing_or_the_same_are_refused(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("ids")
    for number in range(files):
        rows = [
            {"id": f"v{row}" if row % 4 else None, "tags": [f"t{row}"], "meta": {"a": row, "b": None}, "title": ""}
            for row in range(9)
        ]
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        Dataset.from_list(rows, features=NESTED).to_parquet(path, batch_size=2)
    if files == 1:
        # Numbered as they stand, whatever their order is.
        rows = [row for batch in StreamBatches(load(folder, buffer_size=9), 3, 5, seed=0) for row in batch]
        assert {row["id"] for row in rows} >= {"v1", "4", "8"} and all(
            row["id"][-1] == row["tags"][0][-1] for row in rows
        )
    else:
        with pytest.raises(ValueError, match="9 of 27 have none"):
            load(folder)
        for path in folder.glob("*.parquet"):
            Dataset.from_list([{"id": f"v{row}", "tags": [f"t{row}"], "title": ""} for row in range(9)]).to_parquet(
                path
            )
        with pytest.raises(ValueError, match="27 of them have only 9 different ones"):
            load(folder)


def test_a_stream_without_rows_says_so(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    Dataset.from_dict({"id": [], "title": [], "tags": []}, features=TEXT_COLUMNS).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="my examples: there are no rows to train on"):
        load(folder)


def test_texts_alone_are_read_of_parquet(folder, monkeypatch):
    read = []
    tables = parquet.Parquet._generate_tables

    def noted(self, **files):
        read.append(self.config.columns)
        return tables(self, **files)

    monkeypatch.setattr(parquet.Parquet, "_generate_tables", noted)
    rows = load_tagging_dataset(folder, split="train", streaming=True, texts_only=True)
    assert rows.column_names == ["id", "title", "tags"] and len(list(rows)) == 23
    assert {tuple(columns) for columns in read} == {("id", "title", "tags")}
    with pytest.raises(ValueError, match="texts_only goes with streaming"):
        load_tagging_dataset(folder, texts_only=True)
