"""`build_book` with unusual examples: the same id twice, changed images under the same ids."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from colour_folder import COLOURS, write_colour_folder
from datasets import Dataset
from datasets import Image as ImageFeature

from dataset_scripts.tagging_columns import FRAMES
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


def test_titles_without_images_are_read_once(build, read):
    titles = [f"word {number}" for number in range(8)]
    rows = Dataset.from_dict({"id": list("abcdefgh"), "title": titles, "tags": [["a", "b"]] * 8})
    build(rows)
    fitted = len(read) - 8
    read.clear()
    build(rows)
    assert len(read) == fitted


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


def test_a_book_with_too_few_examples_keeps_nothing_of_an_older_fit(build, images, tmp_path):
    book = build(make_examples(images))
    book.threshold, book.temperatures["image"] = 0.9, 1.0
    book.score.known.is_fitted = True
    save_book(book, tmp_path / "book")
    again = build(make_examples(images, range(1, 8)))
    assert again.threshold == 0.1 and not again.score.is_fitted and set(again.temperatures.values()) == {0.05}


def with_images(images, kind, changed=()):
    """Examples with the same ids and titles; some have another image."""
    examples, contents = make_examples(images), [images / f"{number}.png" for number in range(8)]
    for number in changed:
        contents[number] = images / f"{number + 9}.png"
    if kind == "frames":
        videos = [[{"path": None, "bytes": path.read_bytes()}] * 2 for path in contents]
        return examples.remove_columns("image").add_column("video", videos, feature=FRAMES)
    # All have the same path, which names no file.
    cells = [{"path": "image.png", "bytes": path.read_bytes()} for path in contents]
    image = ImageFeature(decode=kind == "decoded")
    return examples.remove_columns("image").add_column("image", cells, feature=image)


def assert_same_vectors(book, other):
    assert book.examples["state"][:] == other.examples["state"][:] and all(book.examples["state"])
    for name, vectors in book.vectors.items():
        torch.testing.assert_close(vectors, other.vectors[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["bytes", "decoded", "frames"])
def test_changed_images_are_read_again_after_an_interruption(build, read, images, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(building, "CHUNK_SIZE", 4)
    monkeypatch.setattr(building, "save_book", stop := Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(with_images(images, kind))
    assert stop.called and (tmp_path / "book" / building.PARTIAL_FOLDER).exists()
    monkeypatch.setattr(building, "save_book", save_book)
    monkeypatch.setattr(building, "MAX_FIT_EXAMPLES", 0)
    read.clear()
    book = build(with_images(images, kind, changed=[6]))
    # The chunk with the changed image.
    assert read == [f"number {number}" for number in range(4, 8)]
    assert_same_vectors(book, build(with_images(images, kind, changed=[6]), tmp_path / "fresh"))


def test_a_resumed_chunk_reads_only_its_unreadable_images_again(build, read, images, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"damaged")
    examples = make_examples(images).map(lambda row: {"image": str(damaged)} if row["id"] == "3" else {})
    monkeypatch.setattr(building, "MAX_FIT_EXAMPLES", 0)
    monkeypatch.setattr(building, "save_book", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(examples)
    monkeypatch.setattr(building, "save_book", save_book)
    read.clear()
    assert build(examples).examples["id"][:] == list("0124567") and read == ["number 3"]


def test_a_damaged_image_of_a_decoded_dataset_does_not_stop_the_others(model, tiny_processor, images, tmp_path):
    contents = [(images / f"{number}.png").read_bytes() for number in range(3)] + [b"damaged"]
    cells = [{"path": None, "bytes": content} for content in contents]
    examples = make_examples(images, range(4)).remove_columns("image")
    examples = examples.add_column("image", cells, feature=ImageFeature())
    book, unreadable = build_book(model, tiny_processor, examples, tmp_path / "book", progress=False)
    assert book.examples["id"][:] == list("012") and list(unreadable) == ["3"]


@pytest.mark.parametrize("kind", ["bytes", "decoded", "frames"])
def test_only_changed_images_of_a_dataset_are_read_again(build, read, images, monkeypatch, kind):
    monkeypatch.setattr(building, "MAX_FIT_EXAMPLES", 0)
    first = build(with_images(images, kind))
    read.clear()
    book = build(with_images(images, kind, changed=[3, 5]))
    assert read == ["number 3", "number 5"]
    states = [dict(zip(own.examples["id"], own.examples["state"], strict=True)) for own in (first, book)]
    assert {name for name in states[0] if states[0][name] != states[1][name]} == {"3", "5"}


def test_the_state_of_an_input_changes_with_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12")
    of_file = building._state(str(path))
    assert of_file == building._state({"path": str(path), "bytes": None}) and of_file.startswith("2 ")
    assert building._state(None) == building._state({"path": None, "bytes": None}) == building._state("no file") == ""
    features = [[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0], [3.0, 5.0]]]
    values = [b"a", b"b", {"path": str(path), "bytes": b"c"}, np.zeros((2, 2, 3), np.uint8), [b"a"], [b"a", b"b"]]
    states = [building._state(value) for value in [*features, *values, [str(path)], [str(path), None]]]
    assert len(set(states)) == len(states) and all(states)
    assert building._state([str(path)]) == building._state([{"path": str(path), "bytes": None}])


def test_a_tag_that_is_missing_is_named_before_anything_is_read(build, read, images):
    examples = make_examples(images).map(lambda row: {"tags": [None] if row["id"] == "3" else row["tags"]})
    with pytest.raises(ValueError, match="The example '3' has the tag None"):
        build(examples)
    assert read == []


def test_a_full_disk_is_an_error_that_names_the_file(build, images):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError, match=r"\.safetensors cannot be written"):
            build(make_examples(images))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
