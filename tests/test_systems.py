"""The other systems of the paper: each learns a few items by heart, saves and loads, and answers like OP-TSG."""

import copy
import math

import numpy as np
import pytest
import torch

from modeling_optsg import OPTSGDataCollator, TagTable
from modeling_optsg.configuration_optsg import ASYConfig, KNNConfig, ModelFConfig, ModelGConfig, OpenBookConfig
from modeling_optsg.modeling_asy import ASYForTagClassification, asymmetric_loss
from modeling_optsg.modeling_knn import KNNForTagVote
from modeling_optsg.modeling_open_book import OpenBookForTagGeneration
from modeling_optsg.modeling_variants import ModelFForTagGeneration, ModelGForTagClassification
from modeling_optsg.tag_classes import TagClasses

TAG_SETS = [["red", "square"], ["blue"], ["red", "colour", "e-mail"], ["创意美食"]]
ALL_TAGS = sorted({tag for tags in TAG_SETS for tag in tags})
SYSTEMS = {
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
def items():
    generator = np.random.default_rng(0)
    return [{"frame_features": generator.normal(size=(1, 3, 6)).astype(np.float32), "tags": tags} for tags in TAG_SETS]


@pytest.fixture(scope="module")
def batch(tiny_processor, table, items):
    return OPTSGDataCollator(tiny_processor, table)(items)


def inputs_of(batch):
    return {name: batch[name] for name in ("frame_features", "frame_mask")}


@pytest.fixture(scope="module")
def make_system(tower_configs, tag_tokenizer, table):
    def make(name, **changes):
        model_class, config_class = SYSTEMS[name]
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
            settings["num_book_items"] = 0
        torch.manual_seed(0)
        model = model_class(config_class(**copy.deepcopy(settings | changes)))
        if hasattr(model, "set_tag_classes"):
            model.set_tag_classes(table.input_ids)
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


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_learns_its_items_by_heart_and_is_the_same_after_saving(
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
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    again = loaded.generate(**inputs_of(batch), threshold=0.5)
    assert torch.equal(again.sequences, outputs.sequences)
    torch.testing.assert_close(again.tag_scores, outputs.tag_scores)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_batch_equals_its_items_one_by_one(name, make_system, batch):
    model = make_system(name).eval()
    together = model.generate(**inputs_of(batch))
    for index in range(len(TAG_SETS)):
        alone = model.generate(**{n: v[index : index + 1] for n, v in inputs_of(batch).items()})
        kept = together.tag_scores[index] > 0
        alone_kept = alone.tag_scores[0] > 0
        torch.testing.assert_close(together.tag_scores[index][kept], alone.tag_scores[0][alone_kept])


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_model_f_decodes_only_prompts_its_head_calls_meaningful(make_system, batch, decoding):
    model = make_system("model-f").eval()
    inputs = inputs_of(batch)
    prompts = model.model(**inputs).order_prompts
    logits = model.meaningful_head(prompts)[..., 0]
    bar = logits.median().item()
    outputs = model.generate(**inputs, decoding=decoding, pad_bias=bar)
    torch.testing.assert_close(outputs.pad_margins, logits)
    for item in range(len(TAG_SETS)):
        chosen = set((logits[item] > bar).nonzero().flatten().tolist())
        assert set(outputs.slots[item][outputs.slots[item] >= 0].tolist()) <= chosen
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
    torch.testing.assert_close(loss.log_probs.exp().sum(-1), torch.ones(loss.log_probs.shape[:2]))
    # Items without a book are written by the vocabulary alone.
    nobody = model.generate(**inputs_of(batch), book_input_ids=book, book_mask=torch.zeros_like(mask))
    assert (nobody.copy_gate == 0).all()


def test_sequence_takes_no_book(make_system, batch):
    model = make_system("sequence")
    with pytest.raises(ValueError, match="num_book_items=0"):
        model(**batch, book_input_ids=torch.zeros(4, 2, dtype=torch.long))


def test_class_systems_name_what_is_wrong_with_their_classes(make_system, batch, table):
    model = make_system("asy")
    with pytest.raises(ValueError, match="tag_ids"):
        model(**inputs_of(batch), labels=batch["labels"])
    with pytest.raises(ValueError, match="num_tag_classes=3"):
        model.set_tag_classes(table.input_ids[:3])
    classes = TagClasses(ASYConfig(text_config=model.config.text_config, frame_feature_size=6, num_tag_classes=2))
    with pytest.raises(ValueError, match="same tag"):
        classes.set_tags([[5], [5]])
    with pytest.raises(ValueError, match="1 to max_tag_tokens"):
        classes.set_tags([[5], []])


def test_knn_against_a_vote_counted_by_hand(tower_configs, tag_tokenizer, table, tiny_processor, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures, titles = torch.randn(4, 6, generator=generator), torch.randn(4, 16, generator=generator)
    config = KNNConfig(
        text_config=copy.deepcopy(tower_configs["bert"]),
        frame_feature_size=6,
        max_tag_tokens=8,
        tag_vocab_size=len(tag_tokenizer),
        num_items=4,
        num_tag_classes=len(table.tags),
        max_item_tags=3,
    )
    model = KNNForTagVote(config).eval()
    model.set_tag_classes(table.input_ids)
    model.remember(pictures, titles, [[table.index[tag] for tag in tags] for tags in TAG_SETS])
    query_picture, query_title = (
        torch.randn(1, 1, 1, 6, generator=generator),
        torch.randn(1, 1, 16, generator=generator),
    )
    outputs = model.generate(
        frame_features=query_picture, title_features=query_title, neighbours=2, picture_weight=0.5
    )
    found = {row["tag"]: row["score"] for row in tiny_processor.batch_decode(outputs)[0]}

    def unit(vector):
        return vector / np.linalg.norm(vector)

    mean = pictures.numpy().mean(0)
    similarity = [
        unit(query_title[0, 0].numpy()) @ unit(titles[n].numpy())
        + 0.5 * unit(query_picture[0, 0, 0].numpy() - mean) @ unit(pictures[n].numpy() - mean)
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
        frame_features=query_picture, title_features=query_title, neighbours=2, picture_weight=0.5
    )
    torch.testing.assert_close(again.tag_scores, outputs.tag_scores)
    with pytest.raises(ValueError, match="neighbours=9"):
        model.generate(frame_features=query_picture, neighbours=9)
    with pytest.raises(ValueError, match="Nothing to look at"):
        model.generate()


def test_a_book_finds_neighbours_and_never_the_item_itself(tmp_path):
    pytest.importorskip("faiss")
    from modeling_optsg.tag_book import TagBook

    embeddings = np.eye(4, dtype=np.float32) + 0.1
    titles = ["arrow left", "Left-Arrow", "house", "tree"]
    book = TagBook(titles, [["a"], ["b"], ["c"], ["d"]], embeddings)
    assert book.retrieve(embeddings[:1], 1) == [[["a"]]]
    others = book.retrieve(embeddings[:1], 4, own_titles=titles[:1])[0]
    assert sorted(map(tuple, others)) == [("c",), ("d",)]
    book.save(tmp_path / "book")
    assert TagBook.load(tmp_path / "book").retrieve(embeddings[2:3], 1) == [[["c"]]]
