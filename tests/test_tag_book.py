"""Tag books: search, votes, probabilities, changes, files."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from dataset_scripts.file_hash import file_sha256
from modeling_optsg.book import BookCandidates, BookQueries, ModelTags, TagBook, book_files, load_book, save_book
from modeling_optsg.book.book_files import EXAMPLES_NAME, SETTINGS_NAME, VECTORS_NAME
from modeling_optsg.book.fusion import IN_BOOK, BookScore, FusedScore
from modeling_optsg.book.title_words import TitleWordIndex, title_words
from modeling_optsg.book.votes import MIN_VOTE, SOURCES, VECTOR_SOURCES

WIDTH = 6
TITLES = ["red bus", "blue bus", "red square", "", "dog", "家常菜"]
TAGS = [["bus", "red"], ["bus", "blue"], ["red", "shape"], ["shape"], ["pet", "animal"], ["food"]]


def make_queries(titles, seed=0, without_image=(), without_title=()):
    random = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(len(titles), WIDTH, generator=random) for name in VECTOR_SOURCES}
    vectors["image"][list(without_image)] = 0
    vectors["title"][list(without_title)] = 0
    return BookQueries(vectors, list(titles))


def make_examples(titles=TITLES, tags=TAGS, prefix="example"):
    ids = [f"{prefix}-{index}" for index in range(len(titles))]
    return Dataset.from_dict({"id": ids, "title": list(titles), "tags": list(tags), "group": list(titles)})


def make_model_tags(tags, classes=()):
    """The tags of a model whose slots have the given scores, and whose classifier knows nothing."""
    index = {tag: number for number, tag in enumerate(classes)}
    logits = np.zeros(len(index)) if index else None
    return ModelTags([{"slot_score": tag["score"]} | tag for tag in tags], logits, index)


def widened(source=None):
    """A query that may have a vector of another model."""
    queries = make_queries(["one"])
    return BookQueries(queries.vectors | ({source: torch.ones(1, 9)} if source else {}), queries.titles)


def add_one(book, source=None, **columns):
    row = {"id": ["new"], "title": ["one"], "tags": [["a"]], "group": ["one"]}
    book.add_examples(Dataset.from_dict(row | columns), widened(source))


@pytest.fixture
def book():
    return TagBook(make_examples(), make_queries(TITLES, without_image=[5], without_title=[3]), "model-1")


def clusters(number, seed):
    """Examples of eight kinds; a kind decides the vectors, up to noise, and the tags."""
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 8, number)
    centres = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed))
    vectors = {"image": centres[kinds] + 0.6 * noise, "title": torch.zeros(number, WIDTH), "joint": noise}
    # One in five examples lacks the tag of its kind, and has a random one instead.
    wrong = random.random(number) < 0.2
    tags = [[f"kind {random.integers(0, 8) if other else kind}"] for kind, other in zip(kinds, wrong)]
    return make_examples([""] * number, tags, f"seed{seed}"), BookQueries(vectors, [""] * number), tags


def test_neighbours_are_those_of_a_brute_force_search(book):
    queries = make_queries(["red bus", "cat", ""], seed=1, without_title=[2])
    neighbours = book.search(queries, num_neighbours=2)
    for query in range(len(queries)):
        expected = set()
        for source in ("title", "joint"):
            vector = torch.nn.functional.normalize(queries.vectors[source][query], dim=0).numpy()
            vectors = book.vectors[source].float().numpy()
            if vector.any():
                expected |= set(np.argsort(-np.where(vectors.any(axis=1), vectors @ vector, -2))[:2].tolist())
        rows = {row for row in neighbours.rows[query].tolist() if row >= 0}
        assert expected <= rows
    rows = torch.tensor([row for row in neighbours.rows[0].tolist() if row >= 0])
    similarities = neighbours.similarities[0, : len(rows), SOURCES.index("title")]
    expected = torch.cosine_similarity(book.vectors["title"].float()[rows], queries.vectors["title"][:1], dim=1)
    assert similarities == pytest.approx(expected.numpy(), abs=2e-3)


def test_what_is_missing_has_no_vote(book):
    neighbours = book.search(make_queries(["", "bus"], seed=2, without_image=[0], without_title=[0]), 6)
    votes = neighbours.votes(book.temperatures)
    sums = dict(zip(SOURCES, votes[0].sum(axis=0)))
    assert sums == pytest.approx({"image": 0, "title": 0, "joint": 1, "words": 0})
    assert votes[1].sum(axis=0) == pytest.approx([1, 1, 1, 1])
    # Neither an example without an image nor one without a title takes part in what it lacks.
    rows = neighbours.rows[1].tolist()
    assert votes[1, rows.index(5), SOURCES.index("image")] == votes[1, rows.index(3), SOURCES.index("title")] == 0


def test_evidence_adds_up_the_votes_of_a_tag(book):
    queries = make_queries(["red bus"], seed=3)
    neighbours = book.search(queries, 6)
    votes, (found,) = neighbours.votes(book.temperatures), book.candidates(neighbours)
    assert set(found.tags) == {tag for tags in TAGS for tag in tags}
    row = found.tags.index("bus")
    columns = [neighbours.rows[0].tolist().index(example) for example in (0, 1)]
    for source in range(len(SOURCES)):
        share = votes[0, columns, source].sum()
        assert found.evidence[row, source] == pytest.approx(math.log(share + MIN_VOTE), abs=1e-5)
        largest = float(neighbours.similarities[0, columns, source].max())
        assert found.evidence[row, len(SOURCES) + source] == pytest.approx(largest, abs=1e-5)
    assert found.evidence[row, 2 * len(SOURCES)] == pytest.approx(math.log(3))
    shares = votes[0].mean(axis=-1)
    assert [example["id"] for example in found.neighbours[row]] == [
        f"example-{neighbours.rows[0, column]}" for column in sorted(columns, key=lambda column: -shares[column])
    ]
    assert found.mean_votes[row] == pytest.approx(shares[columns].sum(), abs=1e-5)
    assert found.mean_votes.tolist() == sorted(found.mean_votes, reverse=True)


def test_the_own_group_is_not_seen(book):
    queries = make_queries(TITLES)
    own = book.search(queries, 1)
    others = book.search(queries, 1, excluded_groups=TITLES)
    for query in range(len(TITLES)):
        assert query in own.rows[query].tolist() and query not in others.rows[query].tolist()


def predict(book, queries, predictions=None):
    found = book.look_up(queries)
    predictions = predictions or [ModelTags()] * len(found)
    return [book.predict(tags, candidates) for tags, candidates in zip(predictions, found, strict=True)]


@pytest.mark.parametrize(
    ("pointer", "slot_score", "class_logit", "source"),
    [
        (0.6, 0.5, 0.0, "pointed"),
        (0.6, 0.7, 0.0, "generated"),
        (0.6, 0.5, 2.0, "generated"),
        (0.6, 0.0, 2.0, "classified"),
        (0.6, None, None, "pointed"),
        # Too small to be read by the score.
        (0.0005, None, None, None),
        (None, 0.5, 0.0, "generated"),
    ],
)
def test_a_tag_is_pointed_at_if_no_other_way_is_as_probable(book, pointer, slot_score, class_logit, source):
    book.score.known.is_fitted = True
    (found,) = book.look_up(make_queries(TITLES[:1]))
    if pointer is not None:
        found.pointers = np.full(len(found.tags), pointer)
    model_tags = ModelTags()
    if slot_score is not None:
        row = {"tag": found.tags[0], "score": 0.5, "source": "generated" if slot_score else "classified"}
        logits = np.array([class_logit], dtype=np.float32)
        model_tags = ModelTags([row | {"slot_score": slot_score}], logits, {found.tags[0]: 0})
    tag = next(tag for tag in book.predict(model_tags, found) if tag["tag"] == found.tags[0])
    assert tag.get("source") == source
    book.score.known.is_fitted = False
    assert all(tag.get("source") != "pointed" for tag in book.predict(model_tags, found))


def errors(predicted, references):
    """The Brier score, and how far the mean probability is from the ratio of correct tags."""
    scores = np.array([tag["score"] for tags in predicted for tag in tags])
    correct = np.array([tag["tag"] in own for tags, own in zip(predicted, references) for tag in tags])
    return float(np.mean((scores - correct) ** 2)), abs(scores.mean() - correct.mean())


def test_a_large_group_does_not_leave_a_query_without_neighbours():
    titles = ["holiday"] * 50 + [f"other {index}" for index in range(10)]
    book = TagBook(make_examples(titles, [["a"]] * 60), make_queries(titles), "model")
    found = book.search(make_queries(titles[:1]), 5, excluded_groups=["holiday"])
    rows = [row for row in found.rows[0].tolist() if row >= 0]
    assert len(rows) >= 5 and min(rows) >= 50
    assert min(book.search(make_queries(titles[:1]), 60, ["holiday"]).rows[0].tolist()) in (-1, 50)


def test_an_example_of_the_book_does_not_find_itself(book):
    queries = make_queries(TITLES)
    own = [f"example-{index}" for index in range(5)] + [None]
    for query, candidates in enumerate(book.look_up(queries, own)):
        found = {example["id"] for examples in candidates.neighbours for example in examples}
        assert (f"example-{query}" in found) == (query == 5)


def test_an_example_without_an_image_takes_no_place_among_similar_images():
    titles = [f"title {index}" for index in range(40)]
    book = TagBook(make_examples(titles, [["a"]] * 40), make_queries(titles, without_image=range(30)), "model")
    queries = make_queries(["x"], seed=5, without_title=[0])
    queries.vectors["joint"][:] = 0
    queries.titles = [""]
    assert set(book.search(queries, 10).rows[0].tolist()) == set(range(30, 40))


@pytest.mark.parametrize("tag", ["always", None])
def test_tags_that_say_nothing_are_not_fitted(tag):
    examples, queries, tags = clusters(60, seed=4)
    tags = [[tag or f"tag {index}"] for index in range(60)]
    book = TagBook(make_examples([""] * 60, tags), queries, "model")
    _, validation, _ = clusters(40, seed=5)
    references = [[tag or "never"]] * 40
    assert book.fit(validation, references) is None and not book.score.is_fitted


def test_a_fit_gives_calibrated_probabilities():
    examples, queries, _ = clusters(400, seed=1)
    book = TagBook(examples, queries, "model")
    _, validation, references = clusters(300, seed=2)
    _, test, wanted = clusters(300, seed=3)
    before = errors(predict(book, test), wanted)
    assert book.fit(validation, references)["micro_f1"] > 65
    after = errors(predict(book, test), wanted)
    assert after[0] < 0.9 * before[0] and after[1] < 0.02 < before[1]
    best = [tags[0]["tag"] for tags in predict(book, test)]
    assert np.mean([tag in tags for tag, tags in zip(best, wanted)]) > 0.7
    assert 0.1 < book.threshold < 0.9


def test_the_fit_weighs_the_model_by_how_good_it_is():
    examples, queries, _ = clusters(400, seed=1)
    _, validation, references = clusters(300, seed=2)
    _, test, wanted = clusters(300, seed=3)
    random = np.random.default_rng(0)

    def model(references, hit_ratio):
        """Predicts the right tag of a ratio of the examples with 0.9, and a random tag of the others."""
        kinds = [own[0] if random.random() < hit_ratio else f"kind {random.integers(0, 8)}" for own in references]
        classes = [f"kind {index}" for index in range(8)]
        return [make_model_tags([{"tag": kind, "score": 0.9, "novel": False}], classes) for kind in kinds]

    found = {}
    for hit_ratio in (0.0, 0.95):
        book = TagBook(examples, queries, "model")
        book.fit(validation, references, model(references, hit_ratio))
        predicted = predict(book, test, model(wanted, hit_ratio))
        found[hit_ratio] = np.mean([tags[0]["tag"] in own for tags, own in zip(predicted, wanted)])
        assert errors(predicted, wanted)[1] < 0.03  # the fit is a compromise with a smaller book
    # A model that guesses does no harm, and a good one decides.
    assert 0.7 < found[0.0] < 0.85 and found[0.95] > 0.93


def test_a_book_that_lost_most_of_its_examples_trusts_the_model():
    """Each tag is on one example of the book only. The book finds nine in ten, and so does the model."""
    random, number = np.random.default_rng(0), 400
    centres = torch.randn(number, 16, generator=torch.Generator().manual_seed(0))

    def rows(seed):
        generator = torch.Generator().manual_seed(seed)
        vectors = centres + 0.05 * torch.randn(number, 16, generator=generator)
        vectors[::10] = torch.randn(number // 10, 16, generator=generator)
        return BookQueries(dict.fromkeys(VECTOR_SOURCES, vectors), [""] * number)

    def model(references):
        tags = [own[0] if random.random() < 0.9 else f"tag {random.integers(number)}" for own in references]
        names = [f"tag {index}" for index in range(number)]
        return [make_model_tags([{"tag": tag, "score": 0.6, "novel": False}], names) for tag in tags]

    ids, references = list(map(str, range(number))), [[f"tag {index}"] for index in range(number)]
    columns = {"id": ids, "title": [""] * number, "tags": references, "group": ids}
    book = TagBook(Dataset.from_dict(columns), rows(1), "model", num_neighbours=5)
    book.fit(rows(2), references, model(references))
    book.remove_examples(ids[number // 10 :])
    tags = [tag for own in predict(book, rows(3), model(references)) for tag in own if not tag["neighbours"]]
    # Nine in ten are right. To the whole book, tags without neighbours were right in only half of the cases.

    assert len(tags) > 300 and np.mean([tag["score"] for tag in tags]) > 0.6


def test_the_logit_adjustment_favours_rare_tags_and_stays_calibrated():
    random = np.random.default_rng(0)
    features = random.normal(size=(4000, 3))
    is_correct = random.random(4000) < 1 / (1 + np.exp(-features.sum(axis=1)))
    score = FusedScore(3)
    score.fit(features, is_correct)
    adjusted = score.adjusted(features, is_correct, 0.5)
    assert score.adjusted(features, is_correct, 0.0)(features) == pytest.approx(score(features), abs=1e-3)
    assert adjusted(features).mean() == pytest.approx(is_correct.mean(), abs=1e-3)
    frequent = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert np.subtract(*adjusted(frequent)) > np.subtract(*score(frequent))
    again = FusedScore.from_dict(json.loads(json.dumps(adjusted.to_dict())))
    assert again(features).tolist() == adjusted(features).tolist()


def test_a_book_of_few_examples_is_not_fitted(book):
    before = book.score.to_dict()
    assert book.fit_to_itself(make_queries(TITLES), range(6)) is None
    assert book.score.to_dict() == before


def test_new_examples_count_at_once_and_removed_ones_no_longer(book):
    queries = make_queries(["new thing"], seed=7)
    assert "brand new" not in book.look_up(queries)[0].tags
    book.add_examples(make_examples(["new thing"], [["brand new"]], "added"), queries)
    found = book.look_up(queries)[0]
    assert found.tags[0] == "brand new" and found.neighbours[0][0]["id"] == "added-0" and len(book) == 7
    book.remove_examples(["added-0"])
    assert "brand new" not in book.look_up(queries)[0].tags and len(book) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda book: book.add_examples(make_examples(), make_queries(TITLES)), "'example-0' occurs 2 times"),
        (lambda book: book.add_examples(make_examples(), make_queries(["one"])), "6 examples but vectors for 1"),
        (lambda book: book.remove_examples(["nobody"]), "The id 'nobody' is not in the book"),
        (lambda book: book.remove_examples([f"example-{i}" for i in range(6)]), "at least one"),
        (lambda book: TagBook(make_examples([], []), make_queries([]), "x"), "no examples"),
        # Not the examples "1" and "2".
        (lambda book: book.remove_examples("12"), "must be a list; got the text '12'"),
        (lambda book: add_one(book, id=[None]), "no id"),
        (lambda book: add_one(book, tags=[["a", None]]), "The example 'new' has the tag None"),
        (lambda book: add_one(book, tags=["a"]), "a list of strings, got string"),
        (lambda book: add_one(book, "image"), f"image vectors have 9 dimensions, but those of the book have {WIDTH}"),
        (lambda book: add_one(book, "title"), "title vectors have 9 .* the model that the book was made with"),
        (lambda book: book.search(widened("title")), "title vectors have 9 dimensions"),
        (
            lambda book: TagBook(Dataset.from_dict({"id": ["a"]}), make_queries(["a"]), "x"),
            "missing: group, tags, title",
        ),
    ],
)
def test_wrong_examples_are_refused_and_change_nothing(book, change, message):
    with pytest.raises(ValueError, match=message):
        change(book)
    assert len(book) == 6 and book.tags[0] in {"bus", "red", "shape"}


def test_a_saved_book_gives_the_same_tags(tmp_path):
    examples, queries, _ = clusters(60, seed=4)
    book = TagBook(examples, queries, "model")
    book.fit_to_itself(queries, range(60))
    save_book(book, tmp_path / "book")
    loaded = load_book(tmp_path / "book", "model")
    for one, other in zip(book.look_up(queries), loaded.look_up(queries), strict=True):
        assert book.predict(ModelTags(), one) == loaded.predict(ModelTags(), other)
    assert loaded.threshold == book.threshold
    save_book(loaded, tmp_path / "again")
    assert (tmp_path / "again" / VECTORS_NAME).read_bytes() == (tmp_path / "book" / VECTORS_NAME).read_bytes()


@pytest.mark.parametrize("name", [SETTINGS_NAME, EXAMPLES_NAME, VECTORS_NAME])
def test_damaged_files_are_named(book, tmp_path, name):
    save_book(book, tmp_path)
    data = (tmp_path / name).read_bytes()
    message = rf"{tmp_path} is damaged \({name}: .* optsg index"
    for length in (0, 9, len(data) // 2, len(data) - 2):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(ValueError, match=message):
            load_book(tmp_path)
        if name != SETTINGS_NAME:
            # As if the file was already truncated when its digest was computed.
            settings = (tmp_path / SETTINGS_NAME).read_text()
            digest = json.loads(settings)["sha256"][name]
            (tmp_path / SETTINGS_NAME).write_text(settings.replace(digest, file_sha256(tmp_path / name)))
            with pytest.raises(ValueError, match=message):
                load_book(tmp_path)
            (tmp_path / SETTINGS_NAME).write_text(settings)
    (tmp_path / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{tmp_path} .*{name}"):
        load_book(tmp_path)


@pytest.mark.parametrize("settings", ["[]", "{}", json.dumps({"version": book_files.VERSION})])
def test_settings_without_what_a_book_needs_are_named(book, tmp_path, settings):
    save_book(book, tmp_path)
    (tmp_path / SETTINGS_NAME).write_text(settings)
    with pytest.raises(ValueError, match=SETTINGS_NAME):
        load_book(tmp_path)


def test_a_vector_file_that_lacks_vectors_is_named(book, tmp_path):
    del book.vectors["joint"]
    save_book(book, tmp_path)
    with pytest.raises(ValueError, match=f"{VECTORS_NAME}: KeyError: 'joint'"):
        load_book(tmp_path)


def test_books_of_other_models_and_versions_and_mixed_files_are_refused(book, tmp_path):
    save_book(book, tmp_path)
    with pytest.raises(ValueError, match="made with another model"):
        load_book(tmp_path, "model-2")
    settings = json.loads((tmp_path / SETTINGS_NAME).read_text())
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings | {"examples": 5}))
    with pytest.raises(ValueError, match=r"disagree on the number of examples: \[5, 6\]"):
        load_book(tmp_path)
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings | {"version": 99}))
    with pytest.raises(ValueError, match="another version of optsg"):
        load_book(tmp_path)
    other = TagBook(make_examples(), make_queries(TITLES, seed=1), "model-1")
    save_book(other, tmp_path / "other")
    (tmp_path / "other" / VECTORS_NAME).replace(tmp_path / VECTORS_NAME)
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{VECTORS_NAME}: .* changed after the book was saved"):
        load_book(tmp_path)


def test_a_failed_save_leaves_the_old_book(book, tmp_path, monkeypatch):
    save_book(book, tmp_path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(book_files, "save_file", fail)
    book.remove_examples(["example-0"])
    with pytest.raises(OSError, match="no space"):
        save_book(book, tmp_path)
    assert len(load_book(tmp_path)) == 6


def test_a_fitted_book_with_a_model_is_saved(tmp_path):
    examples, queries, tags = clusters(300, 1)
    book = TagBook(examples, queries, "model")
    _, wanted, references = clusters(100, 2)
    known = [f"kind {kind}" for kind in range(4)]
    model_tags = [make_model_tags([{"tag": own[0], "score": 0.6, "novel": False}], known) for own in references]
    assert book.fit(wanted, references, model_tags)["full_f1"] > 50
    save_book(book, tmp_path)
    loaded = load_book(tmp_path)
    for own, found in zip(model_tags, book.look_up(wanted), strict=True):
        assert loaded.predict(own, found) == book.predict(own, found)


def test_an_example_without_any_neighbour_has_no_candidates(book):
    titles = ["red bus"] * 3
    alone = TagBook(make_examples(titles, [["bus"]] * 3), make_queries(titles), "model")
    found = alone.look_up(make_queries(titles[:2]), ["example-0", "example-1"])
    assert [own.tags for own in found] == [[], []]


def test_a_tag_that_the_model_does_not_know_is_scored_by_its_neighbours():
    random = np.random.default_rng(0)
    # A vote decides whether a tag is correct, and the classifier knows it, too.
    features = np.zeros((2000, 7))
    features[:, IN_BOOK] = 1
    features[:, 6] = random.normal(size=2000)
    is_correct = random.random(2000) < 1 / (1 + np.exp(-3 * features[:, 6]))
    features[:, 3] = np.where(is_correct, 2.0, -2.0) + random.normal(size=2000)
    score = BookScore(7)
    score.fit(features, is_correct)
    new = np.zeros((3, 7))
    new[:, 0] = new[:, IN_BOOK] = 1
    new[:, 3], new[:, 6] = -8, 1
    # The second tag is also generated by a slot, with a small and with a large probability.
    new[1, 1], new[1, 2], new[2, 1], new[2, 2] = 1, -6, 1, 3
    scores = score(new)
    assert scores[0] == pytest.approx(1 / (1 + np.exp(-3)), abs=0.03)
    assert scores[0] <= scores[1] <= scores[2]
    # A known tag with such a classifier logit is unlikely.
    new[:, 0] = 0
    assert score(new)[0] < 0.1
    again = BookScore.from_dict(json.loads(json.dumps(score.to_dict())))
    assert np.array_equal(again(features), score(features))


def test_files_of_others_are_not_replaced(book, tmp_path):
    (tmp_path / SETTINGS_NAME).write_text('{"title": "my novel"}')
    with pytest.raises(ValueError, match="does not belong to a book"):
        save_book(book, tmp_path)
    assert "my novel" in (tmp_path / SETTINGS_NAME).read_text()


def test_a_book_with_damaged_settings_is_replaced(book, tmp_path):
    for settings in ("", '{"version": 3, "finger'):
        save_book(book, tmp_path)
        (tmp_path / SETTINGS_NAME).write_text(settings)
        save_book(book, tmp_path)
        assert len(load_book(tmp_path, "model-1")) == len(book)


def test_without_a_fit_either_the_model_or_the_neighbours_are_enough(book):
    (found,) = book.look_up(make_queries(["red bus"], seed=3))
    votes = dict(zip(found.tags, found.mean_votes))
    tags = [
        {"tag": "BUS", "score": 0.4, "novel": False},
        {"tag": "not in the book", "score": 0.9, "novel": True},
    ]
    predictions = make_model_tags(tags, ["bus"])
    expected = {tag: vote / (1 + vote) for tag, vote in votes.items()}
    every = {tag["tag"]: tag for tag in book.predict(predictions, found)}
    assert {tag: every[tag]["score"] for tag in expected} == pytest.approx(expected)
    assert every["BUS"]["score"] == pytest.approx(0.4) and every["not in the book"]["novel"]
    book.own_tags_only = True
    own = {tag["tag"]: tag for tag in book.predict(predictions, found)}
    assert own.keys() == expected.keys()
    assert own["bus"]["score"] == pytest.approx(1 - 0.6 * (1 - expected["bus"])) and not own["bus"]["novel"]
    assert own["red"]["score"] == pytest.approx(expected["red"]) and own["red"]["novel"]
    assert own["bus"]["neighbours"] == found.neighbours[found.tags.index("bus")]
    assert book.predict(ModelTags(), BookCandidates([], np.zeros((0, found.evidence.shape[1])), [])) == []


def test_titles_are_searched_by_words():
    assert title_words("Red-Bus 家常菜!") == ["red", "bus", "家", "常", "菜"]
    index = TitleWordIndex(["red bus", "red square", "家常菜", "", "a very long title about a red bus stop"])
    found = index.search("Red bus", 5)
    assert list(found)[0] == 0 and 2 not in found and 0 < found[1] < found[0] <= 1
    assert list(index.search("家", 5)) == [2]
    assert index.search("unknown words", 5) == index.search("", 5) == {}
