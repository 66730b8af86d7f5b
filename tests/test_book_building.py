"""`build_book` with unusual examples: the same id twice, changed images under the same ids."""

import pytest
from colour_folder import COLOURS, write_colour_folder
from datasets import Dataset

from modeling_optsg.book import TagBook, build_book, building, load_book, save_book


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_colour_folder(folder)
    return folder / "train"


@pytest.fixture(scope="module")
def model(make_model, tiny_processor):
    model = make_model(use_tag_classifier=True)
    model.set_label_vocabulary(tiny_processor.tag_tokenizer(list(tiny_processor.label_vocabulary))["input_ids"])
    return model


@pytest.fixture
def build(model, tiny_processor, tmp_path):
    def build(examples, folder=tmp_path / "book"):
        return build_book(model, tiny_processor, examples, folder, batch_size=4, progress=False)[0]

    return build


@pytest.fixture
def read(monkeypatch):
    """The titles of the examples that the processor reads."""
    titles, original = [], building.OPTSGDataCollator.__call__

    def collate(self, rows):
        titles.extend(row["title"] for row in rows)
        return original(self, rows)

    monkeypatch.setattr(building.OPTSGDataCollator, "__call__", collate)
    return titles


def make_examples(images, ids=range(8)):
    ids = list(ids)
    columns = {
        "id": list(map(str, ids)),
        "title": [f"number {number}" for number in ids],
        "tags": [[list(COLOURS)[number % 4]] for number in ids],
        "image": [str(images / f"{number}.png") for number in ids],
    }
    return Dataset.from_dict(columns)


def test_an_id_that_occurs_twice_is_named_before_anything_is_read(build, read, images, tmp_path):
    build(make_examples(images))
    read.clear()
    # With and without an older book.
    for folder in (tmp_path / "book", tmp_path / "new"):
        with pytest.raises(ValueError, match="The id '3' occurs 2 times; ids must be unique"):
            build(make_examples(images, [*range(8), 3]), folder)
    assert read == []


def test_a_reused_book_with_an_id_twice_gives_each_example_once(build, images, tmp_path):
    book, folder = build(make_examples(images)), tmp_path / "book"
    # As another program may have saved it.
    rows = [*range(8), 3]
    book.examples = book.examples.select(rows)
    book.vectors = {name: vectors[rows] for name, vectors in book.vectors.items()}
    save_book(book, folder)
    assert len(load_book(folder)) == 9
    again = build(make_examples(images))
    assert isinstance(again, TagBook) and again.examples["id"][:] == list(map(str, range(8)))
    assert {len(vectors) for vectors in again.vectors.values()} == {8}
