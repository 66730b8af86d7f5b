"""The book reader: pointers, training, and what stays the same without a book."""

import json

import numpy as np
import pytest
import torch
from colour_folder import COLOURS, LONG_TAG, write_colour_folder
from datasets import Dataset
from PIL import Image

from dataset_scripts.icon_tagging.splits import split_key
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.baselines.asymmetric_classifier import ASYForTagClassification
from modeling_optsg.baselines.configuration import ASYConfig
from modeling_optsg.book import (
    GENERATE_OPTIONS,
    BookCandidates,
    BookTagger,
    ModelTagReader,
    TagBook,
    embed_examples,
    encoder_fingerprint,
    load_book,
)
from modeling_optsg.book.predictions import candidate_tensors
from modeling_optsg.book.votes import NO_EVIDENCE
from modeling_optsg.book_reader import _hide_half, log_missed_by_all
from modeling_optsg.data.collator import OPTSGDataCollator
from modeling_optsg.training import book_reader_training
from modeling_optsg.training.book_reader_training import (
    MAX_HIDDEN_RATIO,
    _hidden,
    _ReaderBatches,
    train_book_reader,
    training_candidates,
)
from optsg import main

SIZE = len(NO_EVIDENCE)
BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
ASY = {"text_config": BERT, "frame_feature_size": 8, "hidden_size": 8, "num_tag_classes": 3}
WORDS = ["red", "green", "blue", "circle", "square", "star"]


@pytest.fixture
def model(make_model, tiny_processor):
    torch.manual_seed(0)
    model = make_model(use_tag_classifier=True)
    model.set_label_vocabulary(tiny_processor.tag_tokenizer(list(tiny_processor.label_vocabulary))["input_ids"])
    return model.eval()


@pytest.fixture
def inputs(model):
    random = torch.Generator().manual_seed(0)
    width, prompts = model.config.hidden_size, model.config.num_prompts
    return {
        "order_prompts": torch.randn(2, prompts, width, generator=random),
        "memory": torch.randn(2, 5, width, generator=random),
        "memory_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "candidate_input_ids": torch.tensor([[[5, 0], [6, 7], [8, 0]], [[6, 7], [0, 0], [0, 0]]]),
        "evidence": torch.randn(2, 3, SIZE, generator=random),
    }


def make_rows(number=48):
    """Titles of two words, whose tags are the words and their first letters."""
    random = np.random.default_rng(0)
    pairs = [random.choice(WORDS, 2, replace=False).tolist() for _ in range(number)]
    return [{"title": " ".join(pair), "tags": [*pair, *(word[0] for word in pair)]} for pair in pairs]


@pytest.fixture
def library(model, tiny_processor):
    rows = make_rows()
    columns = {"id": list(map(str, range(len(rows))))} | {
        name: [row[name] for row in rows] for name in ("title", "tags")
    }
    examples = Dataset.from_dict(columns | {"group": columns["title"]})
    queries = embed_examples(model, tiny_processor, rows)
    return TagBook(examples, queries, encoder_fingerprint(model, tiny_processor)), queries, rows


def test_each_slot_has_one_distribution_and_padding_none_of_it(model, inputs):
    model.add_book_reader(SIZE)
    pointers = model.eval().read_book(**inputs).exp()
    assert pointers.shape == (2, model.config.num_prompts, 4)
    torch.testing.assert_close(pointers.sum(dim=-1), torch.ones(2, model.config.num_prompts))
    assert (pointers[1, :, 1:3] == 0).all() and (pointers[0] > 0).all()


def test_neither_the_order_of_candidates_nor_padding_matters(model, inputs):
    model.add_book_reader(SIZE)
    model.eval()
    pointers, order = model.read_book(**inputs), [2, 0, 1]
    shuffled = {name: inputs[name][:, order] for name in ("candidate_input_ids", "evidence")}
    torch.testing.assert_close(model.read_book(**inputs | shuffled), pointers[..., [*order, 3]])
    changed = inputs["memory"].clone()
    changed[1, 3:] = 100.0
    torch.testing.assert_close(model.read_book(**inputs | {"memory": changed}), pointers)
    alone = {name: tensor[1:] for name, tensor in inputs.items()}
    alone |= {name: alone[name][:, :1] for name in ("candidate_input_ids", "evidence")}
    torch.testing.assert_close(model.read_book(**alone), pointers[1:, :, [0, 3]])


def test_without_candidates_every_slot_generates(model, inputs):
    model.add_book_reader(SIZE)
    inputs["candidate_input_ids"][:] = 0
    pointers = model.eval().read_book(**inputs)
    assert (pointers[..., -1] == 0).all()
    torch.testing.assert_close(log_missed_by_all(pointers), torch.zeros(2, 3), atol=1e-5, rtol=0)


def test_a_model_without_a_reader_says_so(model, inputs):
    with pytest.raises(ValueError, match="no book reader"):
        model.read_book(**inputs)


def test_the_loss_is_the_cross_entropy_of_the_chance_that_any_slot_points(model, inputs):
    model.add_book_reader(SIZE)
    pointers = model.eval().read_book(**inputs)
    chance = 1 - torch.prod(1 - pointers.exp()[..., :-1], dim=1)
    mask = torch.tensor([[True] * 3, [True, False, False]])
    is_correct = torch.tensor([[True, False, False], [False, False, True]])
    expected = torch.nn.functional.binary_cross_entropy(chance[mask], is_correct[mask].float())
    torch.testing.assert_close(model.book_reader.loss(pointers, mask, is_correct), expected, rtol=1e-4, atol=1e-5)


def test_training_changes_the_reader_alone_and_it_learns(model, tiny_processor, library, tmp_path):
    book, queries, rows = library
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"batch_size": 16, "learning_rate": 1e-2, "progress": False}
    result = train_book_reader(model, tiny_processor, book, queries, rows, num_epochs=20, **options)
    assert result["losses"][-1] < 0.7 * result["losses"][0]
    assert 0 < result["correct_candidates"] < 4 < result["candidates"]
    assert not model.training and not model.book_reader.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    reader_parameters = set(model.book_reader.parameters())
    assert all(value.grad is None for value in model.parameters() if value not in reader_parameters)
    # The words of the title are among the tags, so pointers must be larger for correct candidates.
    reader, model_tags = ModelTagReader(model, tiny_processor), read(model, tiny_processor, rows)
    candidates = training_candidates(book, queries, progress=False)
    reader.point(model_tags, candidates)
    pairs = [
        (pointer, tag in row["tags"])
        for own, row in zip(candidates, rows)
        for pointer, tag in zip(own.pointers, own.tags)
    ]
    right, wrong = ([pointer for pointer, correct in pairs if correct is kind] for kind in (True, False))
    assert np.mean(right) > 2 * np.mean(wrong)
    # The checkpoint contains the reader.
    model.save_pretrained(tmp_path)
    loaded = ModelTagReader(OPTSGForTagGeneration.from_pretrained(tmp_path), tiny_processor)
    again = training_candidates(book, queries, progress=False)
    loaded.point(model_tags, again)
    for one, other in zip(candidates, again, strict=True):
        np.testing.assert_allclose(one.pointers, other.pointers, atol=1e-5)


def read(model, processor, rows):
    batch = OPTSGDataCollator(processor)([{"title": row["title"]} for row in rows])
    return ModelTagReader(model, processor)(
        model.generate(**batch, **GENERATE_OPTIONS), [row["title"] for row in rows]
    )[1]


def test_the_same_seed_trains_the_same_reader(model, tiny_processor, library):
    book, queries, rows = library
    weights = []
    for _ in range(2):
        torch.rand(3)
        train_book_reader(model, tiny_processor, book, queries, rows, num_epochs=1, batch_size=16, progress=False)
        weights.append(model.book_reader.q_proj.weight.clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_the_reader_is_trained_in_bfloat16_where_it_is_fast(
    model, tiny_processor, library, monkeypatch, capability, expected
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    book, queries, rows = library
    dtypes, read_book = set(), model.read_book

    def record(order_prompts, *inputs):
        dtypes.add((order_prompts @ order_prompts.mT).dtype)
        return read_book(order_prompts, *inputs)

    monkeypatch.setattr(model, "read_book", record)
    train_book_reader(model, tiny_processor, book, queries, rows, num_epochs=1, batch_size=16, progress=False)
    assert dtypes == {expected}


@pytest.mark.parametrize("num_epochs", [0.1, 2 / 3, 10 / 3])
def test_few_steps_are_enough(model, tiny_processor, library, num_epochs):
    book, queries, rows = library
    result = train_book_reader(
        model, tiny_processor, book, queries, rows, num_epochs=num_epochs, batch_size=16, progress=False
    )
    assert np.isfinite(result["losses"]).all()


def test_a_reader_does_not_change_what_the_model_generates(model, tiny_processor, library):
    _, _, rows = library
    before = read(model, tiny_processor, rows)
    model.add_book_reader(SIZE)
    model.eval()
    after = read(model, tiny_processor, rows)
    assert [own.tags for own in before] == [own.tags for own in after] and any(own.tags for own in before)


def test_pointers_are_the_same_in_any_batch(model, tiny_processor, library, monkeypatch):
    book, queries, rows = library
    model.add_book_reader(SIZE)
    reader, model_tags = ModelTagReader(model.eval(), tiny_processor), read(model, tiny_processor, rows)
    found = []
    for size in (64, 5):
        monkeypatch.setattr("modeling_optsg.book.predictions.POINTER_BATCH", size)
        found.append(book.look_up(queries))
        reader.point(model_tags, found[-1])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.pointers, other.pointers, atol=1e-5)


def test_the_fit_uses_the_pointers(model, tiny_processor, library):
    book, queries, rows = library
    references = [row["tags"] for row in rows]

    class Oracle(ModelTagReader):
        def point(self, model_tags, candidates):
            for own, tags in zip(candidates, references, strict=True):
                own.pointers = np.array([0.9 if tag in tags else 0.1 for tag in own.tags])

    reader, model_tags = Oracle(model, tiny_processor), read(model, tiny_processor, rows)
    options = {"excluded_groups": book.examples["group"][:]}
    without = book.fit(queries, references, model_tags, **options)
    assert book.fit(queries, references, model_tags, reader=reader, **options)["micro_f1"] > without["micro_f1"] + 5


def test_a_book_tagger_uses_the_pointers_of_the_reader(model, tiny_processor, library):
    book, queries, rows = library
    options = {"batch_size": 16, "learning_rate": 1e-2, "progress": False}
    train_book_reader(model, tiny_processor, book, queries, rows, num_epochs=5, **options)
    reader, model_tags = ModelTagReader(model, tiny_processor), read(model, tiny_processor, rows)
    references, groups = [row["tags"] for row in rows], book.examples["group"][:]
    assert book.fit(queries, references, model_tags, reader=reader, excluded_groups=groups) is not None
    book.fingerprint = encoder_fingerprint(model, tiny_processor)
    tagger = BookTagger(model, tiny_processor, book)
    titles, ids = [row["title"] for row in rows[:6]], book.examples["id"][:6]
    outputs = model.generate(**tiny_processor(titles=titles), **tagger.generate_options)
    tagged = tagger(outputs, titles, ids, threshold=0.0)
    own_queries, own_tags = reader(outputs, titles)
    found = book.look_up(own_queries, ids)

    def scores():
        return [
            {tag["tag"]: tag["score"] for tag in book.predict(tags, own)}
            for tags, own in zip(own_tags, found, strict=True)
        ]

    without = scores()
    reader.point(own_tags, found)
    for tags, pointed, others in zip(tagged, scores(), without, strict=True):
        assert {tag["tag"]: tag["score"] for tag in tags} == pytest.approx(pointed, abs=1e-6)
        assert max(abs(pointed[tag] - others[tag]) for tag in others) > 0.05


def test_up_to_half_of_the_candidates_are_hidden_in_training():
    torch.manual_seed(0)
    hidden = _hidden(torch.ones(400, 1001, 2, dtype=torch.long))
    assert hidden.shape == (400, 1001) and not hidden[:, 0].any()
    ratios = hidden[:, 1:].float().mean(dim=1)
    # Each example has its own ratio, up to the maximum.
    assert ratios.mean() == pytest.approx(MAX_HIDDEN_RATIO / 2, abs=0.02)
    assert ratios.min() < 0.02 and MAX_HIDDEN_RATIO - 0.02 < ratios.max() < MAX_HIDDEN_RATIO + 0.05


def test_a_hidden_candidate_is_not_trained_on(model, tiny_processor, library, monkeypatch):
    book, queries, rows = library
    model.add_book_reader(SIZE)
    batches = _ReaderBatches(tiny_processor, rows, book, training_candidates(book, queries, progress=False))
    inputs, reader_inputs, is_correct = batches(range(4))
    hidden = torch.zeros(is_correct.shape, dtype=torch.bool)
    hidden[:, 1::2] = True
    losses = []
    for wanted in (is_correct, is_correct ^ hidden, is_correct ^ ~hidden):
        monkeypatch.setattr(book_reader_training, "_hidden", lambda input_ids: hidden)
        losses.append(book_reader_training._loss(model.eval(), inputs, reader_inputs, wanted).item())
    # Whether a hidden candidate is correct does not matter.
    assert losses[0] == losses[1] != losses[2]


def test_half_of_the_examples_have_no_prompts_or_memory_in_training(model, inputs):
    torch.manual_seed(0)
    tokens = torch.randn(400, 3, 4)
    kept = _hide_half(tokens)
    is_hidden = (kept == 0).flatten(1).all(dim=1)
    assert torch.equal(kept[~is_hidden], tokens[~is_hidden]) and 160 < is_hidden.sum() < 240
    model.add_book_reader(SIZE)
    reader = model.book_reader.train()
    for layer in reader.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    # Prompts and memory are hidden independently of each other.
    in_training = {tuple(model.read_book(**inputs)[0].flatten().tolist()) for _ in range(60)}
    reader.eval()
    in_evaluation = {tuple(model.read_book(**inputs)[0].flatten().tolist()) for _ in range(5)}
    assert len(in_training) == 4 and len(in_evaluation) == 1


def test_examples_without_candidates_and_long_tags_are_read(model, tiny_processor):
    model.add_book_reader(SIZE)
    long_tag = "a tag of many more tokens than a slot has, which stays a candidate"
    model_tags = read(model.eval(), tiny_processor, make_rows(2))
    candidates = [BookCandidates([], np.zeros((0, SIZE)), []), BookCandidates([long_tag], NO_EVIDENCE[None], [[]])]
    assert candidate_tensors(candidates, tiny_processor)["candidate_input_ids"].shape == (2, 1, 8)
    ModelTagReader(model, tiny_processor).point(model_tags, candidates)
    assert len(candidates[0].pointers) == 0 and 0 < candidates[1].pointers[0] < 1
    nothing = [BookCandidates([], np.zeros((0, SIZE)), [])]
    ModelTagReader(model, tiny_processor).point(model_tags[:1], nothing)
    assert nothing[0].pointers is None


def test_examples_without_candidates_are_not_trained_on(model, tiny_processor):
    rows = [*make_rows(15), {"title": "dog", "tags": ["dog"]}]
    titles = [row["title"] for row in rows]
    columns = {"id": titles, "title": titles, "tags": [row["tags"] for row in rows], "group": ["same"] * 15 + ["dog"]}
    columns["id"] = list(map(str, range(16)))
    queries = embed_examples(model, tiny_processor, rows)
    book = TagBook(Dataset.from_dict(columns), queries, "model")
    result = train_book_reader(model, tiny_processor, book, queries, rows, num_epochs=10, batch_size=1, progress=False)
    assert np.isfinite(result["losses"]).all() and 0 < result["candidates"] < 20


def test_a_reader_of_a_half_precision_model_is_trained_in_full_precision(model, tiny_processor, library):
    book, queries, rows = library
    model.to(torch.bfloat16)
    train_book_reader(model, tiny_processor, book, queries, rows, num_epochs=1, batch_size=16, progress=False)
    assert {value.dtype for value in model.book_reader.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_book_is_bound_to_its_reader_and_needs_a_classifier(model, tiny_processor, make_model, tmp_path):
    before = encoder_fingerprint(model, tiny_processor)
    model.add_book_reader(SIZE)
    fingerprint = encoder_fingerprint(model, tiny_processor)
    assert not model.book_reader.training and fingerprint != before
    # A shipped processor has no auto map, and a saved one has.
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    saved = (OPTSGForTagGeneration.from_pretrained(tmp_path), OPTSGProcessor.from_pretrained(tmp_path))
    assert "auto_map" in saved[1].image_processor.to_dict()
    assert encoder_fingerprint(*saved) == fingerprint
    without, asy = make_model(use_tag_classifier=True), ASYForTagClassification(ASYConfig(**ASY))
    for make in (encoder_fingerprint, ModelTagReader):
        for other in (without, asy):
            with pytest.raises(ValueError, match="needs a model with a tag classifier and slots"):
                make(other, tiny_processor)


def test_an_example_without_inputs_is_an_error(model, tiny_processor):
    with pytest.raises(ValueError, match="1 examples have neither"):
        ModelTagReader(model, tiny_processor).read_examples(
            [{"title": "red"}, {"title": " "}], ["red", " "], progress=False
        )


def test_hidden_titles_are_not_searched_for(model, tiny_processor):
    reader = ModelTagReader(model, tiny_processor)
    rows = [{"title": "red", "image": Image.new("RGB", (20, 20), "red")}]
    for modalities, titles in ((["image"], [""]), (["title"], ["red"]), (["image", "title"], ["red"])):
        queries, _ = reader.read_examples(rows, ["red"], modalities=modalities, progress=False)
        assert queries.titles == titles
    assert reader.read_examples(rows, ["red"], progress=False)[0].titles == ["red"]


def test_wrong_training_examples_are_named(model, tiny_processor, library):
    book, queries, rows = library
    with pytest.raises(ValueError, match="48 examples, but there are 48 and 47"):
        train_book_reader(model, tiny_processor, book, queries, rows[:-1], progress=False)
    single = TagBook(book.examples.select([0]), queries.select([0]), "model")
    with pytest.raises(ValueError, match="another group has"):
        train_book_reader(model, tiny_processor, single, queries.select([0]), rows[:1], progress=False)
    assert model.book_reader is None


def test_variants_of_a_concept_are_not_candidates_of_each_other(
    model, tiny_processor, load_program, tmp_path, monkeypatch
):
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    titles = ["red square", "red square outline", "Blue dog", "blue dog filled", "red dog", "green square"]
    rows = Dataset.from_dict({"id": titles, "title": titles, "tags": [[title, title[0]] for title in titles]})
    program, output = load_program("train_book_reader"), tmp_path / "open-book"
    monkeypatch.setattr(
        program, "load_tagging_dataset", lambda name, **columns: {"train": rows, "validation": rows.select([4, 5])}
    )
    words = ["--checkpoint", tmp_path / "checkpoint", "--output_dir", output, "--dataset", "icon-tagging"]
    words += ["--cache_dir", tmp_path / "cache", "--num_train_epochs", "1"]
    monkeypatch.setattr("sys.argv", ["train_book_reader.py", *map(str, words)])
    program.main(program.parse_arguments())
    book = load_book(output / "index")
    assert book.examples["group"][:] == [split_key(title) for title in titles]
    found = training_candidates(book, embed_examples(model, tiny_processor, rows), progress=False)
    for own, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert titles[other] not in found[own].tags and {*titles[4:]} <= set(found[own].tags)


def test_the_program_names_an_id_that_occurs_twice_first(model, tiny_processor, load_program, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    rows = Dataset.from_dict({"id": ["a", "b", "a"], "title": ["x", "y", "z"], "tags": [["red"]] * 3})
    program, words = load_program("train_book_reader"), ["--output_dir", tmp_path / "out", "--dataset", "any"]
    monkeypatch.setattr(program, "load_tagging_dataset", lambda name, **columns: {"train": rows, "validation": rows})
    monkeypatch.setattr(program, "cache_tower_features", None)
    words += ["--checkpoint", tmp_path / "checkpoint"]
    monkeypatch.setattr("sys.argv", ["train_book_reader.py", *map(str, words)])
    with pytest.raises(ValueError, match="The id 'a' occurs 2 times"):
        program.main(program.parse_arguments())


def test_the_program_saves_a_checkpoint_with_a_book_that_the_command_uses(
    model, tiny_processor, load_program, tmp_path, monkeypatch, capsys
):
    (tmp_path / "images").mkdir()
    write_colour_folder(tmp_path / "images")
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    program, output = load_program("train_book_reader"), tmp_path / "open-book"
    words = ["--checkpoint", tmp_path / "checkpoint", "--output_dir", output, "--dataset", tmp_path / "images"]
    words += ["--cache_dir", tmp_path / "cache", "--metric", "micro_f1"]
    monkeypatch.setattr("sys.argv", ["train_book_reader.py", *map(str, words)])
    program.main(program.parse_arguments())
    summary = json.loads((output / "book_summary.json").read_text())
    assert summary["training"]["candidates"] > 1 and len(summary["training"]["losses"]) > 1
    capsys.readouterr()
    image = tmp_path / "images" / "test" / "0.png"
    assert main(["tag", "--model", str(output), "--book", str(output), "--json", "--threshold", "0", str(image)]) == 0
    found = {tag["tag"] for tag in json.loads(capsys.readouterr().out)["tags"]}
    # This book was fitted to all tags of the model.
    assert {"red", "left"} <= found and found - {*COLOURS, "left", "right", LONG_TAG}
