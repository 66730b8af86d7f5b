"""The baselines: they overfit a few examples, load as they were saved, and predict as their definitions say."""

import copy
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from modeling_optsg import OPTSGDataCollator
from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.knn import KNNForTagVote
from modeling_optsg.baselines.pooling import pool_examples
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.baselines.retrieval import ExampleRetriever, ExamplesWithBook, encode_book
from modeling_optsg.data.collator import TagTable
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.training import OPTSGTrainingArguments, load_classifier
from modeling_optsg.training.model_building import freeze_text_layers

TAG_SETS = [["red", "square"], ["blue"], ["red", "colour", "e-mail"], ["创意美食"]]
ALL_TAGS = sorted({tag for tags in TAG_SETS for tag in tags})
TRAINED = ["model-f", "model-g", "asy", "sequence", "open-book"]


@pytest.fixture(scope="module")
def table(tag_tokenizer):
    ids = tag_tokenizer(ALL_TAGS, add_special_tokens=False)["input_ids"]
    return TagTable(ALL_TAGS, ids, torch.randn(len(ALL_TAGS), 16, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def batch(tiny_processor, table):
    generator = np.random.default_rng(0)
    examples = [
        {"frame_features": generator.normal(size=(1, 3, 6)).astype(np.float32), "tags": tags} for tags in TAG_SETS
    ]
    return OPTSGDataCollator(tiny_processor, table)(examples)


@pytest.fixture(scope="module")
def inputs(batch):
    """The batch without its tags."""
    return {name: batch[name] for name in ("frame_features", "frame_mask")}


@pytest.fixture(scope="module")
def make_baseline(tower_configs, tag_tokenizer, table):
    def make(name, seed=0, **config):
        spec = MODEL_TYPES[name]
        settings = {
            "text_config": tower_configs["bert"],
            "frame_feature_size": 6,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_encoder_layers": 1,
            "num_prompt_layers": 1,
            "num_prompts": 4,
            "max_tag_tokens": 8,
            "alignment_size": 16,
            "tag_vocab_size": len(tag_tokenizer),
            "num_tag_classes": len(table.tags) if spec.needs_classes else 0,
            "dropout": 0.0,
            "classifier_dropout": 0.0,
        }
        torch.manual_seed(seed)
        model = spec.model(spec.model.config_class(**copy.deepcopy(settings | dict(spec.config) | config)))
        if spec.needs_classes:
            model.set_label_vocabulary(table.input_ids)
        return model

    return make


def overfit(model, batch, num_steps=250, learning_rate=3e-3):
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), learning_rate)
    model.train()
    for _ in range(num_steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return loss.item()


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_overfits_and_is_the_same_after_loading(make_baseline, batch, inputs, tiny_processor, tmp_path, name):
    model = make_baseline(name)
    before = model(**batch).loss.item()
    assert overfit(model, batch) < before / 3
    outputs = model.generate(**inputs, threshold=0.5)
    predicted = [{tag["tag"] for tag in tags} for tags in tiny_processor.batch_decode(outputs)]
    assert predicted == [set(tags) for tags in TAG_SETS]
    assert ((outputs.tag_scores >= 0) & (outputs.tag_scores <= 1)).all()
    model.generation_config.threshold = 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    again = loaded.generate(**inputs)
    assert torch.equal(again.sequences, outputs.sequences)
    torch.testing.assert_close(again.tag_scores, outputs.tag_scores)


@pytest.mark.parametrize("name", TRAINED)
def test_a_batch_equals_its_examples_one_by_one(make_baseline, inputs, name):
    model = make_baseline(name).eval()
    together = model.generate(**inputs)
    for index in range(len(TAG_SETS)):
        alone = model.generate(**{key: value[index : index + 1] for key, value in inputs.items()})
        expected = alone.tag_scores[0][alone.tag_scores[0] > 0]
        scores = together.tag_scores[index]
        torch.testing.assert_close(scores[scores > 0], expected)


@pytest.mark.parametrize("name", ["model-f", "model-g"])
def test_at_pad_bias_equals_generate_with_that_pad_bias(make_baseline, inputs, name):
    model = make_baseline(name).eval()
    settings = {"num_return_sequences": 2} if name == "model-g" else {"num_beams": 2, "num_return_sequences": 2}
    lowest = model.generate(**inputs, pad_bias=-9.0, output_slots=True, **settings)
    for pad_bias in (-9.0, lowest.pad_margins.median().item(), 9.0):
        expected = model.generate(**inputs, pad_bias=pad_bias, threshold=0.0, **settings)
        actual = lowest.at_pad_bias(pad_bias, model.config.tag_pad_token_id)
        num_tags = expected.tag_scores.shape[1]
        torch.testing.assert_close(actual.tag_scores[:, :num_tags], expected.tag_scores)
        assert torch.equal(actual.slots[:, :num_tags], expected.slots)
        assert (actual.tag_scores[:, num_tags:] == 0).all()


# Model F


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
def test_model_f_decodes_only_the_prompts_that_its_head_chooses(make_baseline, inputs, decoding):
    model = make_baseline("model-f").eval()
    logits = model.has_tag_head(model.model(**inputs).order_prompts)[..., 0]
    pad_bias = logits.median().item()
    outputs = model.generate(**inputs, decoding=decoding, pad_bias=pad_bias)
    torch.testing.assert_close(outputs.pad_margins, logits)
    for example in range(len(TAG_SETS)):
        chosen = set((logits[example] > pad_bias).nonzero().flatten().tolist())
        assert set(outputs.slots[example][outputs.slots[example] >= 0].tolist()) <= chosen
    assert (model.generate(**inputs, decoding=decoding, pad_bias=1e6).slots == -1).all()


def test_model_f_has_no_pad_in_its_targets(make_baseline, batch):
    model = make_baseline("model-f").eval()
    outputs = model(**batch)
    assert (outputs.targets != model.config.tag_pad_token_id).all()
    assert (outputs.assignment >= 0).sum() == sum(map(len, TAG_SETS))


# ASY


def test_asy_needs_the_classes_of_the_tags(make_baseline, batch, inputs, table):
    model = make_baseline("asy")
    with pytest.raises(ValueError, match=r"tokens \[5, 7\] is not one of the 6 classes; set the classes"):
        model(**inputs, labels=torch.tensor([[[5, 7]]] * 4))
    with pytest.raises(ValueError, match="num_tag_classes=3"):
        model.set_label_vocabulary(table.input_ids[:3])


def test_logit_adjustment_subtracts_the_logarithm_of_counts(make_baseline, inputs, table):
    model = make_baseline("asy").eval()
    counts = [1 + 10 * index for index in range(len(table.tags))]
    model.set_label_vocabulary(table.input_ids, counts)
    logits = model(**inputs).logits
    expected = logits - 0.3 * torch.tensor(counts).log()
    torch.testing.assert_close(model.label_vocabulary.adjust_logits(logits, 0.3), expected)
    outputs = model.generate(**inputs, logit_adjustment=0.3)
    torch.testing.assert_close(outputs.tag_scores[:, 0], expected.sigmoid().max(dim=1).values)
    with pytest.raises(ValueError, match="logit_adjustment"):
        model.generate(**inputs, logit_adjustment=float("nan"))


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_unknown_settings_are_refused(make_baseline, inputs, batch, name):
    model = make_baseline(name)
    for arguments in ({"treshold": 0.5}, {"labels": batch["labels"]}, {"num_beamz": 2}):
        with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
            model.generate(**inputs, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name != "knn"])
def test_outputs_can_be_tuples(make_baseline, batch, inputs, name):
    model = make_baseline(name).eval()
    calls = [batch, inputs] if name in ("op-tsg", "model-f", "model-g", "asy") else [batch]
    for arguments in calls:
        expected = model(**arguments).to_tuple()
        found = model(**arguments, return_dict=False)
        assert type(found) is tuple and len(found) == len(expected)
        torch.testing.assert_close(found[0], expected[0])
    model.config.return_dict = False
    assert type(model(**batch)) is tuple and type(model.model(**inputs)) is tuple
    assert model.generate(**inputs).tag_scores.isfinite().all()


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_configuration_has_a_default(name):
    model_class = MODEL_TYPES[name].model
    config = AutoConfig.for_model(model_class.config_class.model_type)
    assert type(config) is model_class.config_class
    assert (config.vision_config.model_type, config.text_config.model_type) == ("efficientnet_lite", "bert")
    with torch.device("meta"):
        model = model_class(config)
    assert 2e7 < model.num_parameters() < 5e7, "small towers"


# The classifier of an ASY checkpoint


@pytest.fixture(scope="module")
def asy_checkpoint(make_baseline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asy")
    model = make_baseline("asy", seed=7)
    torch.nn.init.ones_(model.model.multimodal_encoder.evidence_pooler.standardizer.mean)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def load(asy_checkpoint, table):
    """Makes a model with the parts of the ASY checkpoint."""

    def run(model, model_type="op-tsg", train_text_layers=0, **more):
        settings = {"classifier_checkpoint": str(asy_checkpoint), "train_text_layers": train_text_layers}
        freeze_text_layers(model.model.text_tower, train_text_layers)
        load_classifier(model, OPTSGTrainingArguments("run", model_type=model_type, **settings | more))
        return model

    return run


def copied_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("train_text_layers", [0, -1])
def test_parts_of_an_asy_checkpoint_are_loaded(make_baseline, asy_checkpoint, table, load, train_text_layers):
    model = make_baseline("op-tsg", num_tag_classes=len(table.tags))
    model.set_label_vocabulary(table.input_ids)
    before = copied_state(model)
    load(model, train_text_layers=train_text_layers)
    expected = MODEL_TYPES["asy"].model.from_pretrained(asy_checkpoint).state_dict()
    parts = ("model.text_tower.", "model.multimodal_encoder.evidence_pooler.", "tag_classifier.")
    loaded = {name for name in expected if name.startswith(parts)}
    for part in parts:
        assert any(not torch.equal(before[name], expected[name]) for name in loaded if name.startswith(part))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name] if name in loaded else before[name]), name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters()}
    frozen = {name for name in parameters if ".pooler." in name}
    assert parameters - trained == frozen | (parameters & loaded if train_text_layers == 0 else set())


def test_a_frozen_classifier_predicts_as_in_its_checkpoint(make_baseline, asy_checkpoint, table, load, batch):
    model = make_baseline("op-tsg", num_tag_classes=len(table.tags))
    model.set_label_vocabulary(table.input_ids)
    load(model).eval()
    source = MODEL_TYPES["asy"].model.from_pretrained(asy_checkpoint)
    titles = {"title_features": torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1))}
    inputs = {"frame_features": batch["frame_features"], **titles}
    expected = source(**inputs).logits
    torch.testing.assert_close(model.tag_classifier.logits(model.model(**inputs).evidence), expected)
    assert expected.std() > 0.1
    assert model(**batch).classifier_loss is not None, "it is measured in validation"
    assert model.train()(**batch).classifier_loss is None


def test_without_a_checkpoint_the_classifier_is_new(make_baseline, table, load):
    model = make_baseline("op-tsg", num_tag_classes=len(table.tags))
    before = copied_state(model)
    load(model, classifier_checkpoint=None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.tag_classifier.parameters())


def test_a_classifier_of_other_tags_is_refused(make_baseline, asy_checkpoint, table, load):
    for ids in (table.input_ids[:-1], table.input_ids[::-1], [*table.input_ids[:-1], [9, 9, 9]]):
        model = make_baseline("op-tsg", num_tag_classes=len(ids))
        model.set_label_vocabulary(ids)
        before = copied_state(model)
        with pytest.raises(ValueError, match=f"{asy_checkpoint.name} has a different label vocabulary"):
            load(model)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("sequence", {}), ("open-book", {}), ("model-g", {}), ("op-tsg", {"use_tag_classifier": False})],
)
def test_a_model_without_tag_classifier_loads_the_text_tower(make_baseline, asy_checkpoint, load, model_type, config):
    model = make_baseline(model_type, **config)
    before = copied_state(model)
    load(model, model_type)
    expected = MODEL_TYPES["asy"].model.from_pretrained(asy_checkpoint).state_dict()
    tower = {name for name in before if name.startswith("model.text_tower.")}
    assert any(not torch.equal(before[name], expected[name]) for name in tower)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name] if name in tower else before[name]), name


# kNN


def test_knn_equals_a_vote_computed_with_numpy(tower_configs, tag_tokenizer, table, tiny_processor, tmp_path):
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
    image, title = torch.randn(1, 1, 1, 6, generator=generator), torch.randn(1, 1, 16, generator=generator)
    query = {"frame_features": image, "title_features": title, "neighbours": 2, "image_weight": 0.5}
    outputs = model.generate(**query)
    scores = {tag["tag"]: tag["score"] for tag in tiny_processor.batch_decode(outputs)[0]}

    def unit(vector):
        return vector / np.linalg.norm(vector)

    mean, scale = images.numpy().mean(0), images.numpy().std(0) + 1e-3
    similarity = [
        unit(title[0, 0].numpy()) @ unit(titles[n].numpy())
        + 0.5 * unit((image[0, 0, 0].numpy() - mean) / scale) @ unit((images[n].numpy() - mean) / scale)
        for n in range(4)
    ]
    nearest = sorted(range(4), key=lambda n: -similarity[n])[:2]
    weights = [max(similarity[n], 1e-6) for n in nearest]
    expected = {}
    for n, weight in zip(nearest, weights):
        for tag in TAG_SETS[n]:
            expected[tag] = expected.get(tag, 0) + weight / sum(weights)
    assert scores == pytest.approx(expected, abs=1e-5)
    model.save_pretrained(tmp_path)
    loaded = KNNForTagVote.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.generate(**query).tag_scores, outputs.tag_scores)
    with pytest.raises(ValueError, match="neighbours=9"):
        model.generate(frame_features=image, neighbours=9)
    with pytest.raises(ValueError, match="Nothing to encode"):
        model.generate()


# Open-Book


def test_open_book_mixes_generating_and_copying(make_baseline, batch, inputs, tag_tokenizer):
    model = make_baseline("open-book")
    ids = [sum((tag_tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in tags), []) for tags in TAG_SETS]
    max_length = max(map(len, ids))
    book_input_ids = torch.tensor([row + [0] * (max_length - len(row)) for row in ids])
    book_mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in ids])
    book = {"book_input_ids": book_input_ids, "book_mask": book_mask}
    overfit(model, batch | book)
    outputs = model.generate(**inputs, **book)
    assert outputs.copy_gate.shape == (4,) and (outputs.copy_gate > 0).all() and (outputs.copy_gate < 1).all()
    mixtures = []
    hook = model.copier.register_forward_hook(lambda module, args, output: mixtures.append(output[0]))
    model.generate(**inputs, **book)
    hook.remove()
    torch.testing.assert_close(mixtures[0].exp().sum(-1), torch.ones(mixtures[0].shape[:2]))
    # The training loss computes only the targets' probabilities, which must be those of the whole mixture.
    training = model(**batch, **book)
    expected = mixtures[0][:, 0].gather(1, training.targets[:, :1])[:, 0]
    torch.testing.assert_close(training.target_log_probs[:, 0], expected, atol=1e-5, rtol=1e-5)
    without_book = model.generate(**inputs, book_input_ids=book_input_ids, book_mask=torch.zeros_like(book_mask))
    assert (without_book.copy_gate == 0).all()


def test_sequence_rejects_a_book(make_baseline, batch):
    with pytest.raises(ValueError, match="num_book_examples=0"):
        make_baseline("sequence")(**batch, book_input_ids=torch.zeros(4, 2, dtype=torch.long))


def test_a_book_leaves_out_examples_of_the_same_group(tmp_path):
    pytest.importorskip("faiss")
    features, images = torch.eye(4), torch.zeros(4, 2)
    groups = ["arrow left", "arrow left", "house", "tree"]
    book = ExampleRetriever(groups, [["a"], ["b"], ["c"], ["d"]], images, features)
    assert book.retrieve(images[:1], features[:1], 1) == [[["a"]]]
    others = book.retrieve(images[:1], features[:1], 2, own_groups=groups[:1])[0]
    assert sorted(map(tuple, others)) == [("c",), ("d",)]
    book.save(tmp_path / "book")
    loaded = ExampleRetriever.load(tmp_path / "book")
    assert loaded.retrieve(images[2:3], features[2:3], 1) == [[["c"]]]
    loaded.table.drop_index(loaded.column)
    loaded.table.remove_columns("group").save_to_disk(tmp_path / "earlier")
    shutil.copy(tmp_path / "book/similarity.json", tmp_path / "earlier")
    with pytest.raises(ValueError, match="earlier was made by an earlier version and has no groups"):
        ExampleRetriever.load(tmp_path / "earlier")
    with pytest.raises(ValueError, match="3 groups, 4 tag sets, 4 images .* the same number"):
        ExampleRetriever(groups[:3], [["a"]] * 4, images, features)


def test_a_book_ranks_examples_as_knn_does(tower_configs):
    pytest.importorskip("faiss")
    config = KNNConfig(text_config=copy.deepcopy(tower_configs["bert"]), frame_feature_size=6, num_tag_classes=1)
    model = KNNForTagVote(config)
    images, titles = torch.rand(9, 6), torch.randn(9, 16)
    images[4] = 0
    model.fit(images, titles, [[0]] * 9)
    book = ExampleRetriever(
        [f"t{n}" for n in range(9)], [[str(n)] for n in range(9)], images, titles, image_weight=0.7
    )
    query_images, query_titles = torch.rand(3, 6), torch.randn(3, 16)
    query_images[1] = 0
    expected = model.similarity(query_images, query_titles, 0.7).argsort(dim=1, descending=True)
    retrieved = book.retrieve(query_images, query_titles, 9)
    assert [[int(tags[0]) for tags in row] for row in retrieved] == expected.tolist()


def test_encode_book_keeps_repeated_tags_and_drops_the_farthest(tag_tokenizer):
    ids = tag_tokenizer(["cat", "left"], add_special_tokens=False)["input_ids"]
    cat, left = (tokens + [tag_tokenizer.sep_token_id] for tokens in ids)
    assert encode_book([[["cat", "left"], ["cat"]], []], tag_tokenizer, 100) == [cat + left + cat, []]
    assert encode_book([[["cat", "left"], ["cat"]]], tag_tokenizer, len(cat + left)) == [cat + left]


def test_look_up_retrieves_the_same_book_as_in_training(make_baseline, tag_tokenizer, tiny_processor):
    pytest.importorskip("faiss")
    model = make_baseline("open-book", num_book_examples=2).eval()
    generator = np.random.default_rng(0)
    examples = [
        {"frame_features": generator.random((1, 3, 6), dtype=np.float32), "title_features": None, "tags": tags}
        for tags in (["cat"], ["left"], ["cat", "left"])
    ]
    groups = ["one", "two", "three"]
    book = ExampleRetriever.from_examples(groups, [example["tags"] for example in examples], examples, model.config)
    retrieved = book.retrieve(*pool_examples(examples, model.config), 2, own_groups=groups)
    assert all(len(retrieved[n]) == 2 and examples[n]["tags"] not in retrieved[n] for n in range(3))
    with_book = ExamplesWithBook(examples, book, model.config, tag_tokenizer, own_groups=groups)
    assert with_book[0]["book_input_ids"] == encode_book(retrieved, tag_tokenizer, model.config.max_book_tokens)[0]

    queries = [{"frame_features": example["frame_features"]} for example in examples]
    with_book = ExamplesWithBook(queries, book, model.config, tag_tokenizer)
    collated = OPTSGDataCollator(tiny_processor)([dict(example) for example in with_book])
    inputs = {name: collated[name] for name in ("frame_features", "frame_mask")}
    arguments = book.look_up(model, tiny_processor, **inputs)
    assert torch.equal(arguments["book_input_ids"], collated["book_input_ids"])
    outputs, expected = model.generate(**arguments), model.generate(**collated)
    assert torch.equal(outputs.sequences, expected.sequences) and torch.equal(outputs.copy_gate, expected.copy_gate)
    with pytest.raises(ValueError, match="Nothing to encode"):
        book.look_up(model, tiny_processor)
    with pytest.raises(ValueError, match="'pixels'.* are not inputs of the towers"):
        book.look_up(model, tiny_processor, pixels=torch.zeros(1))


def test_a_hidden_input_does_not_choose_the_book(make_baseline, tag_tokenizer, tiny_processor):
    pytest.importorskip("faiss")
    model = make_baseline("open-book", num_book_examples=1).eval()
    generator = np.random.default_rng(0)
    images = generator.normal(size=(4, 1, 3, 6)).astype(np.float32)
    titles = generator.normal(size=(4, 2, 16)).astype(np.float32)

    def rows(image_order, title_order):
        pairs = zip(image_order, title_order, strict=True)
        return [{"frame_features": images[image], "title_features": titles[title]} for image, title in pairs]

    order, other = [0, 1, 2, 3], [2, 3, 0, 1]
    retrieved = encode_book([[tags] for tags in TAG_SETS], tag_tokenizer, model.config.max_book_tokens)

    def with_book(*orders, image_weight=0.4):
        book = ExampleRetriever.from_examples(list("abcd"), TAG_SETS, rows(order, order), model.config, image_weight)
        return ExamplesWithBook(rows(*orders), book, model.config, tag_tokenizer)

    def predict(examples, *modalities):
        return predict_tags(
            model, tiny_processor, examples, modalities=modalities, threshold=0.0, pad_bias=-50.0, progress=False
        )

    both, other_titles = with_book(order, order), with_book(order, other)
    other_images = with_book(other, order, image_weight=3.0)
    for examples, modalities in ((other_titles, ["image"]), (other_images, ["title"])):
        assert any(predict(both, *modalities)) and predict(examples, *modalities) == predict(both, *modalities)
        assert both.with_modalities(modalities).book_input_ids == retrieved
        assert examples.with_modalities(modalities).book_input_ids == retrieved != examples.book_input_ids
    assert (
        predict(both, "title", "image") == predict(both, "image", "title") != predict(other_titles, "image", "title")
    )
    plain = [dict(both[index]) for index in range(4)]
    with pytest.raises(ValueError, match=r"\['image'\] hides the title, by which book_input_ids may"):
        predict(plain, "image")
    assert predict(plain, "image", "title") == predict(both, "image", "title")
    # Nothing is hidden where an example has only what is visible.
    image_alone = [{**row, "title_features": None, "title": " "} for row in plain]
    assert any(predict(image_alone, "image"))
