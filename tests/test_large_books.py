"""Books that are searched with FAISS, and their tables."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from modeling_optsg.book import BookQueries, TagBook, load_book, nearest, save_book
from modeling_optsg.book.nearest import Clusters, ClusterSearch, ExactSearch
from modeling_optsg.book.tables import GroupTable, TagTable
from modeling_optsg.book.title_words import TitleWordIndex, title_words
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
    table = GroupTable(Dataset.from_dict({"group": list(map(str, groups.tolist()))}))
    excluded = [table.number_of(str(group)) for group in excluded.tolist()]
    numbers = table.numbers
    exact, search = ExactSearch(vectors), ClusterSearch(vectors, Clusters.from_vectors(vectors))
    for left_out in (torch.full((NUM_QUERIES,), -1), torch.tensor(excluded)):
        wanted, found = exact(queries, 20, left_out, table), search(queries, 20, left_out, table)
        hits = sum(len(set(own) & set(other)) for own, other in zip(wanted, found, strict=True))
        assert hits >= 0.95 * sum(map(len, wanted))
        assert found[7] == wanted[7] == []
        for query, rows in enumerate(found):
            assert int(left_out[query]) not in numbers[rows].tolist()
            similarities = (vectors[rows].float() @ queries[query]).tolist()
            assert similarities == sorted(similarities, reverse=True) and (len(rows) == 20 or query == 7)


@pytest.mark.parametrize("number, width", [(20, WIDTH), (400, 30), (400, 1)])
def test_few_vectors_and_odd_widths_are_searched(faiss, number, width):
    random = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(number, width, generator=random), dim=-1).half()
    table = GroupTable(Dataset.from_dict({"group": ["one"] * number}))
    search, none = ClusterSearch(vectors, Clusters.from_vectors(vectors)), torch.full((number,), -1)
    # Each vector is most similar to itself.
    found = search(vectors.float(), 5, none, table)
    similarities = [vectors[rows[0]].float() @ query for rows, query in zip(found, vectors.float(), strict=True)]
    assert np.mean(np.array(similarities) > 0.99) > 0.9


def test_a_source_with_few_vectors_is_searched_exactly(faiss, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_EXACT", 100)
    examples, queries = make_book()
    queries.vectors["image"][10:] = 0
    queries.vectors["title"][:] = 0
    book = TagBook(examples, queries, "model")
    found = book.look_up(queries.select([3, 30]))
    assert set(book.clusters) == {"joint"} and all(own.tags for own in found)
    # The titles that are added are found, too.
    added = make_book(50, 1, "new")
    book.add_examples(*added)
    only_title = added[1].select([7])
    only_title.vectors["image"][:] = only_title.vectors["joint"][:] = 0
    assert book.look_up(only_title)[0].neighbours[0][0]["id"] == "new7"


def test_clusters_are_computed_again_when_a_book_has_grown(faiss, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_EXACT", 100)
    book = TagBook(*make_book(150), "model")
    book.prepare()
    before = len(book.clusters["joint"].centroids)
    book.add_examples(*make_book(30, 1, "a"))
    book.prepare()
    assert len(book.clusters["joint"].centroids) == before
    book.add_examples(*make_book(600, 2, "b"))
    book.prepare()
    assert len(book.clusters["joint"].centroids) > 2 * before


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
    monkeypatch.setattr(Clusters, "from_vectors", None)
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


def test_the_search_of_titles_finds_what_scoring_all_titles_finds():
    random = np.random.default_rng(0)
    # Some words are in most titles, others in one.
    words = (2 ** (9 * random.random((2000, 4)))).astype(int)
    titles = [" ".join(f"w{word}" for word in own) for own in words]
    index, hidden = TitleWordIndex(titles), random.random(2000) < 0.5
    for title in [*titles[:50], "w1", "w1 w1 w500", "w1 w2", "unknown"]:
        ids = index.index.get_tokens_ids(title_words(title))
        scores = index.index.get_scores_from_ids(ids) if ids else np.zeros(2000)
        for left_out in (None, hidden):
            expected = np.sort(scores if left_out is None else scores[~left_out])[::-1][:20]
            found = index.search(title, 20, left_out)
            assert list(found.values()) == pytest.approx(
                (expected[expected > 0] / index.largest[ids].sum()).tolist() if ids else [], abs=1e-5
            )
            assert left_out is None or not left_out[list(found)].any()
