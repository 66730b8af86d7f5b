"""A book is published with its checkpoint, on a local Hub."""

import json
import shutil

from colour_folder import COLOURS, LONG_TAG, write_colour_folder
from hub_client import Client, copy_with_card
from hub_server import Account, HubServer

BOOK_TAGS = """
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.book import encoder_fingerprint, load_pretrained_book
model = OPTSGForTagGeneration.from_pretrained({0!r})
processor = OPTSGProcessor.from_pretrained({0!r})
book = load_pretrained_book({0!r}, encoder_fingerprint(model, processor))
print("BOOK", sorted(book.tags))
"""


PUSH = """
from modeling_optsg.book import BookTagger
BookTagger.from_pretrained({0!r}).push_to_hub({1!r})
print("BOOK", sorted(BookTagger.from_pretrained({1!r}, revision="main").book.tags))
"""


def test_a_book_travels_with_its_checkpoint(make_model, tiny_processor, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_colour_folder(images)
    with HubServer(tmp_path / "hub", {"hf_writes": Account("ann", ("org",))}).running() as hub:
        optsg = Client(hub.endpoint, tmp_path / "client", "hf_writes")
        tags = sorted([*COLOURS, "left", "right", LONG_TAG])
        model = make_model(use_tag_classifier=True)
        model.set_label_vocabulary(tiny_processor.tag_tokenizer(list(tiny_processor.label_vocabulary))["input_ids"])
        model.save_pretrained(tmp_path / "saved")
        tiny_processor.save_pretrained(tmp_path / "saved")
        folder = copy_with_card(tmp_path / "saved", tmp_path / "with-book")
        done = optsg("index", images / "train", "--model", folder, "--output", folder / "index")
        assert done[0] == 0, done
        done = optsg("push", folder, "org/with-book")
        assert done[0] == 0, done
        status, output, error = optsg.python(BOOK_TAGS.format("org/with-book"))
        assert status == 0 and f"BOOK {tags}" in output, error
        # The book is found in the folder and in the repository of the checkpoint.
        found = {}
        for name in (folder, "org/with-book"):
            status, output, error = optsg("tag", images / "test", "--model", name, "--book", name, "--json")
            assert status == 0, error
            found[name] = [json.loads(line)["tags"] for line in output.splitlines()]
            assert {tag["tag"] for own in found[name] for tag in own} <= set(tags) and any(found[name])
        assert found[folder] == found["org/with-book"]
        # A second run knows the files of the first by the book on the Hub.
        words = ("tag", images / "test", "--model", folder, "--book", "org/with-book", "--write", "json")
        assert "written" in optsg(*words, "--output", tmp_path / "sidecars")[2]
        assert "already tagged" in optsg(*words, "--output", tmp_path / "sidecars")[2]
        # A tagger pushes model, processor and book together, as a model does.
        status, output, error = optsg.python(PUSH.format(str(folder), "org/pushed"))
        assert status == 0 and f"BOOK {tags}" in output, error
        pushed, published = hub.contents("org/pushed"), hub.contents("org/with-book")
        for name in ("model.safetensors", "label_vocabulary.json", "index/book-vectors.safetensors"):
            assert pushed[name] == published[name], name
        # A damaged book is not published, and a checkpoint without a book replaces one with a book.
        (folder / "index" / "book-examples.parquet").write_bytes(b"x")
        status, _, error = optsg("push", folder, "org/with-book")
        assert status != 0 and "book-examples.parquet: ValueError: the file changed after the book was saved" in error
        shutil.rmtree(folder / "index")
        assert optsg("push", folder, "org/with-book")[0] == 0
        assert not any(name.startswith("index/") for name in hub.contents("org/with-book"))
        missing = "org/none is neither a folder nor the name of a repository on the Hub"
        for name, message in (
            ("org/with-book", "The repository org/with-book does not contain"),
            ("org/none", missing),
        ):
            for more in ((), ("--write", "json")):
                status, _, error = optsg("tag", images / "test", "--model", folder, "--book", name, *more)
                assert status == 2 and error.startswith(f"optsg tag: {message}") and error.count("\n") == 1, error
        optsg.close()
