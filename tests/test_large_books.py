"""Books that are searched with FAISS, and their tables."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from modeling_optsg.book import BookQueries, TagBook, load_book, nearest, save_book
from modeling_optsg.book.nearest import Clusters, ClusterSearch, ExactSearch
from modeling_optsg.book.tables import GroupTable, TagTable
from modeling_optsg.book.votes import VECTOR_SOURCES

WIDTH, NUM_EXAMPLES, NUM_QUERIES = 32, 3000, 100


def draw(number, seed):
    """Vectors in groups of about ten similar ones."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_EXAMPLES // 10, WIDTH, generator=torch.Generator().manual_seed(9))
    groups = torch.randint(0, len(centres), (number,), generator=random)
    vectors = centres[groups] + 0.7 * torch.randn(number, WIDTH, generator=random)
    return F.normalize(vectors, dim=-1).half(), groups


@pytest.fixture(scope="module")
def faiss():
    return pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def vectors(faiss):
    vectors, groups = draw(NUM_EXAMPLES, 0)
    vectors[::50] = 0
    return vectors, groups


def make_book(number=400, seed=0, prefix="example"):
    queries = BookQueries({name: draw(number, seed)[0].float() for name in VECTOR_SOURCES}, [""] * number)
    columns = {"id": [f"{prefix}{row}" for row in range(number)], "title": [""] * number}
    columns |= {"tags": [[f"tag{row % 7}"] for row in range(number)], "group": [str(row) for row in range(number)]}
    return Dataset.from_dict(columns), queries


def test_most_of_the_nearest_vectors_are_found(vectors):
    vectors, groups = vectors
    queries, excluded = draw(NUM_QUERIES, 1)
    queries = queries.float()
    queries[7] = 0
    exact, search = ExactSearch(vectors), ClusterSearch(vectors, Clusters.of(vectors))
    for left_out in (torch.full((NUM_QUERIES,), -1), excluded):
        wanted, found = exact(queries, 20, left_out, groups), search(queries, 20, left_out, groups)
        hits = sum(len(set(own) & set(other)) for own, other in zip(wanted, found, strict=True))
        assert hits >= 0.95 * sum(map(len, wanted))
        assert found[7] == wanted[7] == []
        for query, rows in enumerate(found):
            assert not set(groups[rows].tolist()) & {int(left_out[query])}
            similarities = (vectors[rows].float() @ queries[query]).tolist()
            assert similarities == sorted(similarities, reverse=True) and (len(rows) == 20 or query == 7)


def test_a_source_without_vectors_finds_nothing(faiss):
    vectors = torch.zeros(5, WIDTH).half()
    search = ClusterSearch(vectors, Clusters.of(vectors))
    assert search(torch.ones(2, WIDTH), 3, torch.full((2,), -1), torch.zeros(5, dtype=torch.long)) == [[], []]


def test_a_large_book_finds_what_a_small_one_finds(faiss, monkeypatch, tmp_path):
    examples, queries = make_book()
    small = TagBook(examples, queries, "model")
    expected = small.look_up(queries.select(range(20)))
    monkeypatch.setattr(nearest, "MAX_EXACT", 100)
    # All clusters are searched, and all vectors compared.
    monkeypatch.setattr(nearest, "OVERSAMPLING", 20)
    book = TagBook(examples, queries, "model")
    save_book(book, tmp_path)
    assert set(book.clusters) == set(VECTOR_SOURCES)
    loaded = load_book(tmp_path)
    monkeypatch.setattr(Clusters, "of", None)
    for large in (book, loaded):
        for own, other in zip(large.look_up(queries.select(range(20))), expected, strict=True):
            assert own.tags == other.tags
            assert np.allclose(own.evidence, other.evidence, atol=1e-5)


def test_the_clusters_follow_added_and_removed_examples(faiss, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_EXACT", 100)
    monkeypatch.setattr(nearest, "OVERSAMPLING", 20)
    examples, queries = make_book()
    book = TagBook(examples, queries, "model")
    book.look_up(queries.select([0]))
    book.add_examples(*make_book(50, 1, "new"))
    assert all(len(clusters.members) == 450 for clusters in book.clusters.values())
    new = make_book(50, 1)[1]
    [found] = book.look_up(new.select([3]))
    assert any(example["id"] == "new3" for own in found.neighbours for example in own)
    book.remove_examples([f"new{row}" for row in range(50)])
    [found] = book.look_up(new.select([3]))
    assert not any(example["id"].startswith("new") for own in found.neighbours for example in own)
    assert all(len(clusters.members) == 400 for clusters in book.clusters.values())


def test_without_faiss_a_large_book_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    monkeypatch.setattr(nearest, "MAX_EXACT", 100)
    examples, queries = make_book()
    with pytest.raises(ImportError, match=r'pip install "optsg\[book\]"'):
        TagBook(examples, queries, "model").look_up(queries.select([0]))


@pytest.mark.parametrize("tags", [[["b", "a", "b"], [], ["a"], None, ["c", "a", "b"]], [[], None]])
def test_tables_hold_each_tag_once(tags):
    table = TagTable(Dataset.from_dict({"tags": tags}))
    rows = [[table.tags[tag] for tag in table.numbers[a:b]] for a, b in zip(table.starts, table.starts[1:])]
    assert [set(row) for row in rows] == [set(own or []) for own in tags]
    assert [len(row) for row in rows] == [len(set(own or [])) for own in tags]
    assert dict(zip(table.tags, table.counts.tolist())) == ({"a": 3, "b": 2, "c": 1} if any(tags) else {})
    assert table.tags == sorted(table.tags)


def test_tables_follow_the_order_of_selected_rows():
    examples = Dataset.from_dict({"tags": [["a"], ["b"], ["c"]], "group": ["x", "y", "x"]}).select([2, 1])
    assert TagTable(examples).tags == ["c", "b"]
    groups = GroupTable(examples)
    assert groups.numbers.tolist() == [groups.number_of("x"), groups.number_of("y")] == [0, 1]
    assert groups.number_of("z") == groups.number_of(None) == -1
