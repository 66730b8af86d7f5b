"""Tags of a model with a book: `BookTagger`, the pipeline and the Space."""

import base64
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from colour_folder import COLOURS, write_colour_folder
from datasets import Dataset
from transformers import pipeline

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.book import BookTagger, build_book, load_book, save_book
from modeling_optsg.hub import handler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "space"))

import loading  # noqa: E402
import markup  # noqa: E402
from limits import Limits  # noqa: E402
from tagging import Tagger  # noqa: E402


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_colour_folder(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, tiny_processor, images):
    """The folder of a model with a book of red and green images, which both have a personal keyword."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(use_tag_classifier=True)
    model.set_label_vocabulary(tiny_processor.tag_tokenizer(list(tiny_processor.label_vocabulary))["input_ids"])
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    rows = [row for row in range(16) if row % 4 < 2]
    columns = {
        "id": [f"{row}.png" for row in rows],
        "title": [f"number {row}" for row in rows],
        "tags": [[list(COLOURS)[row % 4], "our garden"] for row in rows],
        "image": [str(images / "train" / f"{row}.png") for row in rows],
    }
    model, processor = OPTSGForTagGeneration.from_pretrained(folder), OPTSGProcessor.from_pretrained(folder)
    build_book(model, processor, Dataset.from_dict(columns), folder / "index", progress=False)
    return folder


@pytest.fixture(scope="module")
def tagger(checkpoint):
    return pipeline("tag-generation", model=str(checkpoint), trust_remote_code=True)


def expected(checkpoint, image, title=None, **settings):
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    tagger = BookTagger(model, processor, checkpoint)
    outputs = model.generate(**processor(images=[image], titles=[title]), **tagger.generate_options)
    return tagger(outputs, [title], **settings)[0]


def test_a_tag_names_its_source_and_the_examples_that_have_it(checkpoint, images):
    tags = expected(checkpoint, images / "test" / "0.png", "number 4", threshold=0.0)
    assert {tag["tag"] for tag in tags} == {"red", "green", "our garden"}
    garden = next(tag for tag in tags if tag["tag"] == "our garden")
    assert garden["novel"] and garden["source"] == "book"
    # The title is that of an example in the book.
    assert (garden["neighbours"][0]["id"], garden["neighbours"][0]["title"]) == ("4.png", "number 4")
    votes = [example["score"] for example in garden["neighbours"]]
    assert len(votes) == 8 and sum(votes) == pytest.approx(1) and votes == sorted(votes, reverse=True)
    scores = [tag["score"] for tag in tags]
    assert scores == sorted(scores, reverse=True)


def test_a_book_of_all_tags_keeps_those_of_the_model(checkpoint, images, tmp_path):
    book = load_book(checkpoint / "index")
    assert book.own_tags_only
    book.own_tags_only = False
    save_book(book, tmp_path)
    image = images / "test" / "0.png"
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    tagger = BookTagger(model, processor, tmp_path)
    outputs = model.generate(**processor(images=[image]), **tagger.generate_options)
    of_model = {tag["tag"] for tag in processor.batch_decode(outputs)[0]}
    tags = tagger(outputs, [None], threshold=0.0)[0]
    assert {tag["tag"] for tag in tags} == of_model | {"red", "green", "our garden"}
    assert {tag["source"] for tag in tags if tag["tag"] in of_model} <= {"generated", "classified"}


def test_a_tagger_is_saved_and_loaded_with_model_processor_and_book(checkpoint, images, tmp_path):
    tagger = BookTagger.from_pretrained(checkpoint)
    assert isinstance(tagger.model, OPTSGForTagGeneration) and not tagger.model.training
    # What was added to the book is saved too.
    added = tagger.book.examples.select([0]).map(lambda row: {"id": "new", "tags": ["new tag"]})
    inputs = tagger.processor(images=[images / "test" / "0.png"], titles=["number 4"])
    outputs = tagger.model.generate(**inputs, **tagger.generate_options)
    queries, _ = tagger._read_outputs(outputs, ["number 4"])
    tagger.book.add_examples(added, queries)
    tags = tagger(outputs, ["number 4"], threshold=0.0)
    assert "new tag" in {tag["tag"] for tag in tags[0]}
    # A second save replaces the first.
    for _ in range(2):
        tagger.save_pretrained(tmp_path)
    loaded = BookTagger.from_pretrained(tmp_path)
    outputs = loaded.model.generate(**inputs, **loaded.generate_options)
    assert loaded(outputs, ["number 4"], threshold=0.0) == tags
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="does not contain a book"):
        BookTagger.from_pretrained(tmp_path)


def test_the_handler_uses_the_book_of_the_checkpoint(checkpoint, images, monkeypatch, caplog):
    path = images / "test" / "0.png"
    request = {"inputs": {"image": base64.b64encode(path.read_bytes()).decode(), "title": "number 4"}}
    endpoint = handler.EndpointHandler(str(checkpoint))
    wanted = expected(checkpoint, path, "number 4")
    for tag, own in zip(endpoint(request), wanted, strict=True):
        assert (tag["label"], tag["source"]) == (own["tag"], own["source"])
        assert [example["id"] for example in tag["neighbours"]] == [example["id"] for example in own["neighbours"]]
    known = list(endpoint.pipeline.processor.label_vocabulary)
    limited = endpoint(request | {"parameters": {"tag_vocabulary": known, "threshold": 0.0}})
    assert limited and all(set(tag) == {"label", "score", "novel"} for tag in limited)
    monkeypatch.setattr(handler.importlib.util, "find_spec", lambda name: None)
    assert handler.EndpointHandler(str(checkpoint)).options == {} and "needs the package optsg" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_uses_a_book(tagger, checkpoint, images, batch_size):
    examples = [{"image": str(images / "test" / f"{row}.png"), "title": f"number {row}"} for row in range(4)]
    results = tagger(examples, book=str(checkpoint), batch_size=batch_size)
    for example, tags in zip(examples, results, strict=True):
        wanted = expected(checkpoint, example["image"], example["title"])
        assert [tag["label"] for tag in tags] == [tag["tag"] for tag in wanted] and tags
        for tag, own in zip(tags, wanted, strict=True):
            assert tag["score"] == pytest.approx(own["score"], abs=1e-4)
            assert (tag["source"], tag["neighbours"][0]["id"]) == (own["source"], own["neighbours"][0]["id"])
    [tag] = tagger(examples[0], book=str(checkpoint), top_k=1)
    assert tag["label"] == results[0][0]["label"]
    assert len(tagger(examples[0], book=str(checkpoint), threshold=0.0)) == 3
    assert tagger(examples[0], book=str(checkpoint), threshold=1.0) == []
    # Without a book, the tags are those of the model.
    assert "source" not in tagger(examples[0], threshold=0.0)[0]


def test_the_pipeline_refuses_what_a_book_cannot_do(tagger, checkpoint, images):
    image = str(images / "test" / "0.png")
    with pytest.raises(ValueError, match="exclude each other"):
        tagger(image, book=str(checkpoint), tag_vocabulary=["red"])
    with pytest.raises(FileNotFoundError, match="does not contain a book"):
        tagger(image, book=str(images))
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        tagger(image, book="/no such folder")
    with pytest.raises(FileNotFoundError, match="is not a folder, and no repository|neither a folder nor"):
        tagger(image, book="org/none")
    for settings, message in (
        ({"threshold": 1.5}, "threshold"),
        ({"top_k": 0}, "top_k"),
        ({"max_tags": -1}, "max_tags"),
    ):
        with pytest.raises(ValueError, match=message):
            tagger(image, book=str(checkpoint), **settings)
    with_book = pipeline("tag-generation", model=tagger.model, processor=tagger.processor, book=str(checkpoint))
    assert "source" in with_book(image, threshold=0.0)[0]
    with pytest.raises(ValueError, match="exclude each other"):
        with_book(image, tag_vocabulary=["red"])


def test_a_book_of_another_model_is_refused(checkpoint):
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    book = load_book(checkpoint / "index")
    book.fingerprint = "another model"
    with pytest.raises(ValueError, match="another model"):
        BookTagger(model, processor, book)


def test_a_tag_in_another_letter_case_is_not_novel(checkpoint, images):
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    book = load_book(checkpoint / "index")
    known = next(iter(processor.label_vocabulary))
    rows = [known.upper() if tag == "red" else tag for tag in ("red", "green", "our garden")]
    names = dict(zip(("red", "green", "our garden"), rows, strict=True))
    examples = book.examples.map(lambda row: {"tags": [names[tag] for tag in row["tags"]]})
    book.replace_examples(examples, book.vectors)
    tagger = BookTagger(model, processor, book)
    outputs = model.generate(**processor(images=[images / "test" / "0.png"]), **tagger.generate_options)
    novel = {tag["tag"]: tag["novel"] for tag in tagger(outputs, [None], threshold=0.0)[0]}
    assert novel == {known.upper(): False, "green": "green" not in processor.label_vocabulary, "our garden": True}


def test_the_space_starts_without_a_book_that_it_cannot_use(checkpoint, tmp_path, caplog, monkeypatch):
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    assert loading.load_book(str(tmp_path), model, processor, None) is None
    assert loading.load_book(str(tmp_path), model, processor, str(checkpoint)).book.own_tags_only
    shutil.copytree(checkpoint / "index", tmp_path / "index")
    (tmp_path / "index" / "book.json").write_text("{}")
    assert loading.load_book(str(tmp_path), model, processor, None) is None
    assert "is not used" in caplog.text and "damaged" in caplog.text
    with pytest.raises(ValueError, match="damaged"):
        loading.load_book(str(checkpoint), model, processor, str(tmp_path / "index"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package optsg"):
        loading.load_book(str(checkpoint), model, processor, str(checkpoint))


def test_the_space_shows_the_examples_that_have_a_tag(checkpoint, images):
    space = Tagger(str(checkpoint), Limits())
    try:
        path = str(images / "test" / "0.png")
        tagged = space.tag(path, "0.png", "number 4")
        wanted = expected(checkpoint, path, "number 4", threshold=0.0)
        assert [tag["tag"] for tag in tagged.tags] == [tag["tag"] for tag in wanted]
        assert tagged.default_threshold == space.fitted_threshold("parallel") == space.book.book.threshold
        page = markup.tag_list(tagged, 0.0)
        garden = next(tag for tag in tagged.tags if tag["tag"] == "our garden")
        first = garden["neighbours"][0]
        assert f"like 4.png “number 4” ({first['score']:.2f}), " in page and "and 5 more" in page
        shown = markup.tag_list(replace(tagged, tags=[garden | {"source": "pointed", "slot": 3}]), 0.0)
        assert '<span class="source">book reader</span>' in shown
        hostile = {"id": "<i>", "title": "<b>", "score": 0.5}
        shown = markup.tag_list(replace(tagged, tags=[garden | {"neighbours": [hostile]}]), 0.0)
        assert "like &lt;i&gt; “&lt;b&gt;” (0.50)" in shown
        assert [tag["source"] for tag in tagged.tags] == [tag["source"] for tag in wanted]
    finally:
        space.reader.stop()
