"""The benchmarks of books run, with few examples."""

import json

import pytest

from benchmarks import book_scale, own_library
from modeling_optsg.book import TagBook


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, tiny_processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(use_tag_classifier=True)
    model.set_label_vocabulary(tiny_processor.tag_tokenizer(list(tiny_processor.label_vocabulary))["input_ids"])
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def test_keywords_of_drawn_images_are_suggested(checkpoint, tmp_path):
    result = own_library.measure(str(checkpoint), tmp_path, 24, 4)
    assert (result["images"], result["held_out_images"]) == (20, 4)
    keywords = {*own_library.PLACES, *own_library.SUBJECTS, *own_library.OCCASIONS}
    assert 0 < result["keywords"] <= len(keywords) and len(list((tmp_path / "library").glob("*.xmp"))) == 20
    hits, total = result["among_first_five"], result["held_out_keywords"]
    assert 0 < hits <= total and result["among_first_five_percent"] == round(100 * hits / total, 1)
    assert 0 < result["five_most_frequent_percent"] < 100


def test_the_synthetic_book_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book_scale, "NUM_QUERIES", 60)
    monkeypatch.setattr(book_scale, "NUM_WORDS", 500)
    monkeypatch.setattr(book_scale, "NUM_TAGS", 500)
    monkeypatch.setattr("sys.argv", ["book_scale.py", "--examples", "600", "--output", str(tmp_path / "scale.json")])
    book_scale.main()
    result = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert result == json.loads(capsys.readouterr().out)
    # A small book is searched exactly.
    assert result["recall_at_20_percent"] == {"image": 100, "title": 100, "joint": 100} and not result["clusters"]
    assert result["examples"] == 600 and result["same_tags_after_loading"] and result["milliseconds"] > 0


def test_recall_counts_the_nearest_examples_that_are_missed():
    examples, vectors = book_scale.SyntheticExamples(5).draw(200, "book")
    book = TagBook(examples, vectors, "synthetic")
    queries = vectors.select(range(10))
    exact = book._searches["title"]

    def half(*arguments):
        return [rows[: book_scale.NUM_NEIGHBOURS // 2] for rows in exact(*arguments)]

    book._searches["title"] = half
    assert book_scale.measure_recall(book, queries) == {"image": 100, "title": 50, "joint": 100}
