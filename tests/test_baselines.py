"""The other systems of the paper: each learns a few examples by heart, saves and loads, and answers like OP-TSG."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel

from modeling_optsg import OPTSGDataCollator, TagTable
from modeling_optsg.baselines.asymmetric_classifier import ASYForTagClassification, asymmetric_loss
from modeling_optsg.baselines.configuration import ASYConfig, KNNConfig, ModelFConfig, ModelGConfig, OpenBookConfig
from modeling_optsg.baselines.knn import KNNForTagVote
from modeling_optsg.baselines.open_book import OpenBookForTagGeneration
from modeling_optsg.baselines.prompt_variants import ModelFForTagGeneration, ModelGForTagClassification
from modeling_optsg.tag_classifier import LabelVocabulary

TAG_SETS = [["red", "square"], ["blue"], ["red", "colour", "e-mail"], ["创意美食"]]
ALL_TAGS = sorted({tag for tags in TAG_SETS for tag in tags})
MODEL_TYPES = {
    "model-f": (ModelFForTagGeneration, ModelFConfig),
    "model-g": (ModelGForTagClassification, ModelGConfig),
    "asy": (ASYForTagClassification, ASYConfig),
    "sequence": (OpenBookForTagGeneration, OpenBookConfig),
    "open-book": (OpenBookForTagGeneration, OpenBookConfig),
}


@pytest.fixture(scope="module")
def table(tag_tokenizer):
    ids = tag_tokenizer(ALL_TAGS, add_special_tokens=False)["input_ids"]
    return TagTable(ALL_TAGS, ids, torch.randn(len(ALL_TAGS), 16, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    return [{"frame_features": generator.normal(size=(1, 3, 6)).astype(np.float32), "tags": tags} for tags in TAG_SETS]


@pytest.fixture(scope="module")
def batch(tiny_processor, table, examples):
    return OPTSGDataCollator(tiny_processor, table)(examples)


def inputs_of(batch):
    return {name: batch[name] for name in ("frame_features", "frame_mask")}


@pytest.fixture(scope="module")
def make_system(tower_configs, tag_tokenizer, table):
    def make(name, **changes):
        model_class, config_class = MODEL_TYPES[name]
        settings = {
            "text_config": tower_configs["bert"],
            "frame_feature_size": 6,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_encoder_layers": 1,
            "num_prompt_layers": 1,
            "max_tag_tokens": 8,
            "alignment_size": 16,
            "tag_vocab_size": len(tag_tokenizer),
            "dropout": 0.0,
        }
        if name in ("model-f", "model-g"):
            settings["num_prompts"] = 4
        if name in ("model-g", "asy"):
            settings["num_tag_classes"] = len(table.tags)
        if name == "sequence":
            settings["num_book_examples"] = 0
        torch.manual_seed(0)
        model = model_class(config_class(**copy.deepcopy(settings | changes)))
        if hasattr(model, "set_label_vocabulary"):
            model.set_label_vocabulary(table.input_ids)
        return model

    return make


def learn(model, batch, steps=150, rate=3e-3):
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), rate)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return loss.item()


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_system_learns_its_examples_by_heart_and_is_the_same_after_saving(
    name, make_system, batch, tiny_processor, tmp_path
):
    model = make_system(name)
    before = model(**batch).loss.item()
    after = learn(model, batch)
    assert after < before / 3
    outputs = model.generate(**inputs_of(batch), threshold=0.5)
    written = [{row["tag"] for row in rows} for rows in tiny_processor.batch_decode(outputs)]
    assert written == [set(tags) for tags in TAG_SETS]
    assert ((outputs.tag_scores >= 0) & (outputs.tag_scores <= 1)).all()
    model.generation_config.threshold = 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    again = loaded.generate(**inputs_of(batch))
    assert torch.equal(again.sequences, outputs.sequences)
    torch.testing.assert_close(again.tag_scores, outputs.tag_scores)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_batch_equals_its_examples_one_by_one(name, make_system, batch):
    model = make_system(name).eval()
    together = model.generate(**inputs_of(batch))
    for index in range(len(TAG_SETS)):
        alone = model.generate(**{n: v[index : index + 1] for n, v in inputs_of(batch).items()})
        kept = together.tag_scores[index] > 0
        alone_kept = alone.tag_scores[0] > 0
        torch.testing.assert_close(together.tag_scores[index][kept], alone.tag_scores[0][alone_kept])


@pytest.mark.parametrize("name", ["model-f", "model-g"])
def test_one_pass_shows_what_every_pad_bias_would_give(name, make_system, batch):
    model = make_system(name).eval()
    width = {"num_return_sequences": 2} if name == "model-g" else {"num_beams": 2, "num_return_sequences": 2}
    widest = model.generate(**inputs_of(batch), pad_bias=-9.0, output_slots=True, **width)
    middle = widest.pad_margins.median().item()
    for pad_bias in (-9.0, middle, 9.0):
        expected = model.generate(**inputs_of(batch), pad_bias=pad_bias, threshold=0.0, **width)
        found = widest.at_pad_bias(pad_bias, model.config.tag_pad_token_id)
        kept = expected.tag_scores.shape[1]
        torch.testing.assert_close(found.tag_scores[:, :kept], expected.tag_scores)
        assert torch.equal(found.slots[:, :kept], expected.slots) and (found.tag_scores[:, kept:] == 0).all()


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_model_f_decodes_only_prompts_its_head_calls_meaningful(make_system, batch, decoding):
    model = make_system("model-f").eval()
    inputs = inputs_of(batch)
    prompts = model.model(**inputs).order_prompts
    logits = model.meaningful_head(prompts)[..., 0]
    bar = logits.median().item()
    outputs = model.generate(**inputs, decoding=decoding, pad_bias=bar)
    torch.testing.assert_close(outputs.pad_margins, logits)
    for example in range(len(TAG_SETS)):
        chosen = set((logits[example] > bar).nonzero().flatten().tolist())
        assert set(outputs.slots[example][outputs.slots[example] >= 0].tolist()) <= chosen
    nothing = model.generate(**inputs, decoding=decoding, pad_bias=1e6)
    assert (nothing.slots == -1).all()


def test_model_f_has_no_pad_in_its_losses(make_system, batch):
    model = make_system("model-f").eval()
    outputs = model(**batch)
    assert (outputs.targets != model.config.tag_pad_token_id).all()
    matched = outputs.assignment >= 0
    assert matched.sum() == sum(map(len, TAG_SETS))


def test_asymmetric_loss_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, generator=generator)
    targets = (torch.rand(3, 5, generator=generator) < 0.4).float()
    total = 0.0
    for row, truth in zip(logits.tolist(), targets.tolist()):
        for logit, present in zip(row, truth):
            p = 1 / (1 + math.exp(-logit))
            shifted = max(p - 0.05, 0)
            total -= (1 - p) * math.log(p) if present else shifted**4 * math.log(1 - shifted)
    torch.testing.assert_close(asymmetric_loss(logits, targets, 4.0, 1.0, 0.05), torch.tensor(total / 3))
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 3
    torch.testing.assert_close(asymmetric_loss(logits, targets, 0.0, 0.0, 0.0), plain)


def test_open_book_copies_what_it_has_never_written(make_system, batch, tag_tokenizer, tiny_processor):
    """Trained on books that hold the answer, it writes another book's tag where the vocabulary cannot help."""
    model = make_system("open-book")
    ids = [sum((tag_tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in tags), []) for tags in TAG_SETS]
    longest = max(map(len, ids))
    book = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    learn(model, batch | {"book_input_ids": book, "book_mask": mask})
    outputs = model.generate(**inputs_of(batch), book_input_ids=book, book_mask=mask)
    assert outputs.copy_gate.shape == (4,) and (outputs.copy_gate > 0).all() and (outputs.copy_gate < 1).all()
    loss = model(**batch, book_input_ids=book, book_mask=mask)
    # The training loss takes the target's share alone; it is that of the whole mixture, which sums to 1.
    mixtures = []
    hook = model.copier.register_forward_hook(lambda module, args, output: mixtures.append(output[0]))
    model.generate(**inputs_of(batch), book_input_ids=book, book_mask=mask)
    hook.remove()
    torch.testing.assert_close(mixtures[0].exp().sum(-1), torch.ones(mixtures[0].shape[:2]))
    first = mixtures[0][:, 0].gather(1, loss.targets[:, :1])[:, 0]
    torch.testing.assert_close(loss.target_log_probs[:, 0], first, atol=1e-5, rtol=1e-5)
    # Examples without a book are written by the vocabulary alone.
    nobody = model.generate(**inputs_of(batch), book_input_ids=book, book_mask=torch.zeros_like(mask))
    assert (nobody.copy_gate == 0).all()


def test_sequence_takes_no_book(make_system, batch):
    model = make_system("sequence")
    with pytest.raises(ValueError, match="num_book_examples=0"):
        model(**batch, book_input_ids=torch.zeros(4, 2, dtype=torch.long))


def test_class_systems_name_what_is_wrong_with_their_classes(make_system, batch, table):
    model = make_system("asy")
    with pytest.raises(ValueError, match="tag_ids"):
        model(**inputs_of(batch), labels=batch["labels"])
    with pytest.raises(ValueError, match="num_tag_classes=3"):
        model.set_label_vocabulary(table.input_ids[:3])
    classes = LabelVocabulary(ASYConfig(text_config=model.config.text_config, frame_feature_size=6, num_tag_classes=2))
    with pytest.raises(ValueError, match="same tag"):
        classes.set_tags([[5], [5]])
    with pytest.raises(ValueError, match="1 to max_tag_tokens"):
        classes.set_tags([[5], []])


def test_knn_against_a_vote_counted_by_hand(tower_configs, tag_tokenizer, table, tiny_processor, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, titles = torch.randn(4, 6, generator=generator), torch.randn(4, 16, generator=generator)
    config = KNNConfig(
        text_config=copy.deepcopy(tower_configs["bert"]),
        frame_feature_size=6,
        max_tag_tokens=8,
        tag_vocab_size=len(tag_tokenizer),
        num_examples=4,
        num_tag_classes=len(table.tags),
        max_tags_per_example=3,
    )
    model = KNNForTagVote(config).eval()
    model.set_label_vocabulary(table.input_ids)
    model.fit(images, titles, [[table.index[tag] for tag in tags] for tags in TAG_SETS])
    query_image, query_title = (
        torch.randn(1, 1, 1, 6, generator=generator),
        torch.randn(1, 1, 16, generator=generator),
    )
    outputs = model.generate(frame_features=query_image, title_features=query_title, neighbours=2, image_weight=0.5)
    found = {row["tag"]: row["score"] for row in tiny_processor.batch_decode(outputs)[0]}

    def unit(vector):
        return vector / np.linalg.norm(vector)

    mean = images.numpy().mean(0)
    similarity = [
        unit(query_title[0, 0].numpy()) @ unit(titles[n].numpy())
        + 0.5 * unit(query_image[0, 0, 0].numpy() - mean) @ unit(images[n].numpy() - mean)
        for n in range(4)
    ]
    near = sorted(range(4), key=lambda n: -similarity[n])[:2]
    weights = [max(similarity[n], 1e-6) for n in near]
    expected = {}
    for n, weight in zip(near, weights):
        for tag in TAG_SETS[n]:
            expected[tag] = expected.get(tag, 0) + weight / sum(weights)
    assert found == pytest.approx(expected, abs=1e-5)
    model.save_pretrained(tmp_path)
    again = KNNForTagVote.from_pretrained(tmp_path).generate(
        frame_features=query_image, title_features=query_title, neighbours=2, image_weight=0.5
    )
    torch.testing.assert_close(again.tag_scores, outputs.tag_scores)
    with pytest.raises(ValueError, match="neighbours=9"):
        model.generate(frame_features=query_image, neighbours=9)
    with pytest.raises(ValueError, match="Nothing to look at"):
        model.generate()


def test_a_book_finds_neighbours_and_never_the_example_itself(tmp_path):
    pytest.importorskip("faiss")
    from modeling_optsg.baselines.retrieval import TagBook

    features, images = torch.eye(4), torch.zeros(4, 2)
    titles = ["arrow left", "Left-Arrow", "house", "tree"]
    book = TagBook(titles, [["a"], ["b"], ["c"], ["d"]], images, features)
    assert book.retrieve(images[:1], features[:1], 1) == [[["a"]]]
    others = book.retrieve(images[:1], features[:1], 4, own_titles=titles[:1])[0]
    assert sorted(map(tuple, others)) == [("c",), ("d",)]
    book.save(tmp_path / "book")
    loaded = TagBook.load(tmp_path / "book")
    assert loaded.retrieve(images[2:3], features[2:3], 1) == [[["c"]]]
    with pytest.raises(ValueError, match="as many of each"):
        TagBook(titles[:3], [["a"]] * 4, images, features)


def test_the_similarity_of_a_book_is_that_of_the_vote(tower_configs):
    """Its inner products rank training examples as `KNNForTagVote.similarity` does, missing images included."""
    pytest.importorskip("faiss")
    from modeling_optsg.baselines.retrieval import TagBook

    model = KNNForTagVote(
        KNNConfig(text_config=copy.deepcopy(tower_configs["bert"]), frame_feature_size=6, num_tag_classes=1)
    )
    images, titles = torch.rand(9, 6), torch.randn(9, 16)
    images[4] = 0
    model.fit(images, titles, [[0]] * 9)
    book = TagBook([f"t{n}" for n in range(9)], [[str(n)] for n in range(9)], images, titles, image_weight=0.7)
    query_images, query_titles = torch.rand(3, 6), torch.randn(3, 16)
    query_images[1] = 0
    ranked = model.similarity(query_images, query_titles, 0.7).argsort(dim=1, descending=True)
    found = book.retrieve(query_images, query_titles, 9)
    assert [[int(tags[0]) for tags in row] for row in found] == ranked.tolist()


def test_book_tokens_keep_votes_and_drop_the_farthest(tag_tokenizer):
    from modeling_optsg.baselines.retrieval import encode_book

    ids = tag_tokenizer(["cat", "left"], add_special_tokens=False)["input_ids"]
    cat, left = (tokens + [tag_tokenizer.sep_token_id] for tokens in ids)
    book = encode_book([[["cat", "left"], ["cat"]], []], tag_tokenizer, 100)
    assert book == [cat + left + cat, []]
    short = encode_book([[["cat", "left"], ["cat"]]], tag_tokenizer, len(cat + left))
    assert short == [cat + left]


def test_a_checkpoint_with_a_book_reads_a_image(make_system, batch, tag_tokenizer, tiny_processor):
    """`TagBook.open` gives `generate` what the collator gives it in training."""
    pytest.importorskip("faiss")
    from modeling_optsg.baselines.pooling import pool_examples
    from modeling_optsg.baselines.retrieval import ExamplesWithBook, TagBook, encode_book
    from modeling_optsg.data.collator import OPTSGDataCollator

    model = make_system("open-book", num_book_examples=2)
    examples = [
        {"frame_features": np.random.rand(1, 3, 6).astype(np.float32), "title_features": None, "tags": tags}
        for tags in (["cat"], ["left"], ["cat", "left"])
    ]
    titles = ["one", "two", "three"]
    book = TagBook(titles, [example["tags"] for example in examples], *pool_examples(examples, model.config))
    retrieved = book.retrieve(*pool_examples(examples, model.config), 2, own_titles=titles)
    assert all(len(retrieved[n]) == 2 and examples[n]["tags"] not in retrieved[n] for n in range(3))
    with_book = ExamplesWithBook(examples, book, model.config, tag_tokenizer, own_titles=titles)
    assert with_book[0]["book_input_ids"] == encode_book(retrieved, tag_tokenizer, model.config.max_book_tokens)[0]
    collate = OPTSGDataCollator(tiny_processor)
    queries = [{"frame_features": example["frame_features"]} for example in examples]
    collated = collate([dict(example) for example in ExamplesWithBook(queries, book, model.config, tag_tokenizer)])
    opened = book.open(
        model, tiny_processor, frame_features=collated["frame_features"], frame_mask=collated["frame_mask"]
    )
    assert torch.equal(opened["book_input_ids"], collated["book_input_ids"])
    one, other = model.generate(**opened), model.generate(**collated)
    assert torch.equal(one.sequences, other.sequences) and torch.equal(one.copy_gate, other.copy_gate)
    with pytest.raises(ValueError, match="Nothing to look at"):
        book.look_up(model, tiny_processor)


def test_rare_classes_gain_by_what_is_taken_off_the_common_ones(make_system, batch, table):
    model = make_system("asy").eval()
    counts = [1 + 10 * place for place in range(len(table.tags))]
    with pytest.raises(ValueError, match="counts"):
        model.set_label_vocabulary(table.input_ids, counts[:-1])
    with pytest.raises(ValueError, match="at least 1"):
        model.set_label_vocabulary(table.input_ids, [0, *counts[1:]])
    model.set_label_vocabulary(table.input_ids, counts)
    logits = model(**inputs_of(batch)).logits
    expected = logits - 0.3 * torch.tensor(counts).log()
    torch.testing.assert_close(model.label_vocabulary.adjust_logits(logits, 0.3), expected)
    found = model.generate(**inputs_of(batch), logit_adjustment=0.3)
    best = expected.sigmoid().max(dim=1).values
    torch.testing.assert_close(found.tag_scores[:, 0], best)
    with pytest.raises(ValueError, match="logit_adjustment"):
        model.generate(**inputs_of(batch), logit_adjustment=float("nan"))
