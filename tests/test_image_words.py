"""Image words: the class names of a vision tower stand in for the title of an unfamiliar image."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from image_helpers import noise_image
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

from modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.efficientnet_lite import EfficientNetLiteForImageClassification
from modeling_optsg.generation_optsg import OPTSGGenerateOutput
from modeling_optsg.image_words import decode_image_words
from modeling_optsg.training import (
    OPTSGTrainingArguments,
    add_image_words,
    build_model,
    can_name_images,
    embed_image_words,
)
from optsg import main
from optsg.file_tagger import TagSettings
from optsg.media_files import find_media_files
from optsg.tagger import Tagger

WORDS = ["red", "a dog", "blue square", "mail", "创意"]
NAMING = ("vit", "efficientnet_lite", "CLIP", "siglip")
UNFAMILIAR, FAMILIAR = 1e-20, 1e20  # distances at which an image is half familiar


@pytest.fixture(scope="module")
def folders(tower_configs, text_tokenizer, tmp_path_factory):
    """Folders of vision towers that name images, and of a text tower."""
    root = tmp_path_factory.mktemp("towers")
    configs = copy.deepcopy(tower_configs)
    labels = dict(enumerate(WORDS))
    for name in ("vit", "efficientnet_lite"):
        configs[name].id2label, configs[name].label2id = labels, {word: index for index, word in labels.items()}
    two_tower = CLIPConfig(
        vision_config={**tower_configs["vit"].to_dict(), "model_type": "clip_vision_model"},
        text_config={**tower_configs["bert"].to_dict(), "model_type": "clip_text_model", "eos_token_id": 3},
        projection_dim=8,
    )
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipConfig(
        vision_config=width | {"image_size": 32, "patch_size": 8},
        text_config=width | {"vocab_size": len(text_tokenizer), "max_position_embeddings": 24},
    )
    torch.manual_seed(0)
    models = {
        "vit": ViTForImageClassification(configs["vit"]),
        "efficientnet_lite": EfficientNetLiteForImageClassification(configs["efficientnet_lite"]),
        "CLIP": CLIPModel(two_tower),
        "siglip": SiglipModel(siglip),
        "nameless": ViTModel(copy.deepcopy(tower_configs["vit"])),
        "bert": BertModel(configs["bert"]),
    }
    models["siglip"].logit_scale.data.fill_(2.0)
    models["siglip"].logit_bias.data.fill_(-10.0)
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
        model.eval().save_pretrained(root / name)
        text_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def make_with_words(folders, text_tokenizer, tag_tokenizer):
    """Makes a model with image words and a tag classifier over three tags."""

    def make(vision="vit", words=None, **config):
        torch.manual_seed(1)
        defaults = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_prompts": 4}
        defaults |= {"tag_vocab_size": len(tag_tokenizer), "initializer_range": 0.3, "num_image_words": 3}
        model = OPTSGForTagGeneration.from_vision_text_pretrained(
            folders / vision, folders / "bert", **defaults | config
        ).eval()
        model.set_label_vocabulary([[5], [6, 7], [8]])
        with torch.no_grad():
            model.tag_classifier.bias.normal_(-1)
        add_image_words(model, folders / vision, text_tokenizer, words)
        return model

    return make


@pytest.fixture
def pixels():
    return torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def set_familiarity(model, half_familiar_distance):
    model.model.multimodal_encoder.evidence_pooler.standardizer.half_familiar_distance.fill_(half_familiar_distance)


def class_logits(model, **inputs):
    return model.tag_classifier.logits(model.model(**inputs).evidence)


# Words of a tower


@torch.no_grad()
@pytest.mark.parametrize(("vision", "pooling"), [("vit", "first_token"), ("efficientnet_lite", "pooler_output")])
def test_word_probabilities_are_those_of_the_image_classifier(make_with_words, folders, pixels, vision, pooling):
    model = make_with_words(vision)
    assert model.config.image_word_labels == WORDS and model.config.image_word_pooling == pooling
    classifier = AutoModelForImageClassification.from_pretrained(folders / vision)
    expected = classifier(pixels.flatten(0, 1)).logits.softmax(-1).unflatten(0, (2, 2))
    assert expected.std(dim=0).max() > 0.01, "the images have different words"
    found = model.model.encode_frames(pixels).word_probabilities
    torch.testing.assert_close(found, expected.mean(dim=1), rtol=1e-4, atol=1e-5)
    masked = model.model.encode_frames(pixels, torch.tensor([[1, 0], [0, 0]])).word_probabilities
    torch.testing.assert_close(masked[0], expected[0, 0], rtol=1e-4, atol=1e-5)
    assert masked[1].eq(0).all(), "no frame, no words"


@torch.no_grad()
@pytest.mark.parametrize(
    ("vision", "padding"), [("CLIP", {"padding": True}), ("siglip", {"padding": "max_length", "max_length": 24})]
)
def test_word_probabilities_are_those_of_a_two_tower_model(
    make_with_words, folders, text_tokenizer, pixels, vision, padding
):
    model, two_tower = make_with_words(vision, WORDS), AutoModel.from_pretrained(folders / vision)
    expected = []
    for options in (padding, {"padding": True}):
        batch = text_tokenizer([f"a photo of a {word}." for word in WORDS], return_tensors="pt", **options)
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = two_tower(pixel_values=pixels.flatten(0, 1), **texts).logits_per_image
        expected.append(logits.softmax(-1).unflatten(0, (2, 2)).mean(dim=1))
    assert expected[0].std(dim=0).max() > 0.01, "the images have different words"
    found = model.model.encode_frames(pixels).word_probabilities
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    assert vision == "CLIP" or (found - expected[1]).abs().max() > 0.01, "the padding of the texts matters"


def test_towers_that_cannot_name_images_are_rejected(make_with_words, make_model, folders, text_tokenizer):
    named = {name: can_name_images(folders / name) for name in (*NAMING, "nameless")}
    assert named == dict.fromkeys(NAMING, True) | {"nameless": False}
    with pytest.raises(ValueError, match="nameless is neither an image classifier nor a two-tower model"):
        add_image_words(make_model(), folders / "nameless", text_tokenizer)
    for words in (None, []):
        with pytest.raises(ValueError, match="CLIP is a two-tower model; pass the words"):
            make_with_words("CLIP", words)


def test_a_classifier_of_another_tower_is_rejected(make_model, folders, text_tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="the input of the classifier is none of pooler_output, first_token, mean"):
        add_image_words(model, folders / "vit", text_tokenizer)
    assert model.model.image_words is None and model.config.image_word_labels is None


@torch.no_grad()
def test_words_have_the_features_of_their_texts(make_with_words, text_tokenizer):
    model = make_with_words()
    assert not any(parameter.requires_grad for parameter in model.model.image_words.parameters())
    for change in (False, True):
        if change:
            model.model.text_tower.encoder.layer[0].output.dense.weight.mul_(-1)
            embed_image_words(model.model.train(), text_tokenizer, batch_size=2)
            assert model.model.text_tower.training, "the mode is restored"
        for word, found in zip(WORDS, model.model.image_words.text_features, strict=True):
            expected = model.model.eval().embed_tags(text_tokenizer(word, return_tensors="pt")["input_ids"])
            torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


# What words say of tags


@torch.no_grad()
def expected_of_words(model, pixels):
    """Computes tag probabilities `[batch, tags]` as means over titles: the most probable words of each image."""
    probabilities, words = model.model.encode_frames(pixels).word_probabilities.topk(3)
    rows = []
    for weights, own in zip(probabilities.sqrt(), words):
        titles = model.model.image_words.text_features[own][:, None]
        of_titles = class_logits(model, title_features=titles).sigmoid()
        rows.append((weights / weights.sum()) @ of_titles)
    return torch.stack(rows)


@torch.no_grad()
def test_an_unfamiliar_image_has_the_probabilities_of_its_words(make_with_words, pixels):
    model = make_with_words()
    expected = expected_of_words(model, pixels)
    set_familiarity(model, UNFAMILIAR)
    torch.testing.assert_close(class_logits(model, pixel_values=pixels).sigmoid(), expected)


@torch.no_grad()
def test_a_familiar_image_has_its_own_probabilities(make_with_words, pixels):
    model = make_with_words()
    features = model.model.encode_frames(pixels)
    without_words = {"frame_features": features.frame_features, "image_features": features.image_features}
    own = class_logits(model, **without_words).sigmoid()
    for distance in (0, FAMILIAR):
        set_familiarity(model, distance)
        torch.testing.assert_close(class_logits(model, pixel_values=pixels).sigmoid(), own)
    assert (own - expected_of_words(model, pixels)).abs().max() > 0.05


@torch.no_grad()
def test_familiarity_mixes_the_image_and_its_words(make_with_words, pixels):
    model = make_with_words()
    own, words = class_logits(model, pixel_values=pixels).sigmoid(), expected_of_words(model, pixels)
    standardizer = model.model.multimodal_encoder.evidence_pooler.standardizer
    features = model.model.encode_frames(pixels).image_features
    set_familiarity(model, standardizer.distances(standardizer.standardize(features)).mean().item())
    familiarity = standardizer.familiarity(features)[:, None]
    assert ((familiarity > 0.1) & (familiarity < 0.9)).all()
    found = class_logits(model, pixel_values=pixels).sigmoid()
    torch.testing.assert_close(found, familiarity * own + (1 - familiarity) * words)


@torch.no_grad()
def test_image_words_do_not_favour_rare_tags(make_with_words, pixels):
    model = make_with_words()
    counts = torch.tensor([1.0, 30.0, 900.0])
    model.tag_classifier.label_vocabulary.log_counts.copy_(counts.log())
    mean = float((counts * counts.log()).sum() / counts.sum())
    set_familiarity(model, UNFAMILIAR)
    model.tag_classifier.bias -= 0.2 * mean
    expected = class_logits(model, pixel_values=pixels)
    model.tag_classifier.bias += 0.2 * mean
    evidence = model.model(pixels).evidence
    torch.testing.assert_close(model.tag_classifier.logits(evidence, logit_adjustment=0.2), expected)
    set_familiarity(model, FAMILIAR)
    evidence = model.model(pixels).evidence
    expected = model.tag_classifier.logits(evidence) - 0.2 * counts.log()
    torch.testing.assert_close(model.tag_classifier.logits(evidence, logit_adjustment=0.2), expected)


@torch.no_grad()
def test_the_tags_of_an_image_do_not_depend_on_its_batch(make_with_words, text_tokenizer, pixels):
    """The other example has a title, whose tags are those of the slots alone."""
    model = make_with_words()
    standardizer = model.model.multimodal_encoder.evidence_pooler.standardizer
    features = model.model.encode_frames(pixels).image_features
    set_familiarity(model, standardizer.distances(standardizer.standardize(features)).mean().item())
    weights = {"image+title": (0.5, 0.5, 0.0, 1.0, 0.0), "image": (0.1, 0.9, -1.0, 1.0, 0.0), "title": (1, 0, 0, 1, 0)}
    settings = {"fusion_weights": weights, "num_candidates": 3, "pad_bias": 50.0}
    alone = model.generate(pixels[:1], **settings)
    title = text_tokenizer(["dog"], return_tensors="pt")
    batch = {
        "frame_mask": torch.tensor([[1] * pixels.shape[1], [0] * pixels.shape[1]]),
        "input_ids": title["input_ids"].repeat(2, 1),
        "attention_mask": torch.stack([torch.zeros_like(title["attention_mask"][0]), title["attention_mask"][0]]),
    }
    together = model.generate(pixels[:1].repeat(2, *[1] * (pixels.ndim - 1)), **batch, **settings)
    scores = [outputs.tag_scores[0][outputs.tag_scores[0] > 0] for outputs in (alone, together)]
    torch.testing.assert_close(*scores)
    assert len(scores[0]) == 3


@torch.no_grad()
def test_words_change_nothing_beside_a_title(make_with_words, text_tokenizer, pixels):
    model = make_with_words()
    titles = dict(text_tokenizer(["a red square", "dog"], padding=True, return_tensors="pt"))
    titles = {name: titles[name] for name in ("input_ids", "attention_mask")}
    features = model.model.encode_frames(pixels)
    without_words = {"frame_features": features.frame_features, "image_features": features.image_features}
    for distance in (UNFAMILIAR, FAMILIAR):
        set_familiarity(model, distance)
        found, expected = model.model(pixels, **titles), model.model(**without_words, **titles)
        torch.testing.assert_close(found.order_prompts, expected.order_prompts)
        expected_logits = model.tag_classifier.logits(expected.evidence)
        torch.testing.assert_close(model.tag_classifier.logits(found.evidence), expected_logits)
    # Nor is there a word for a title without an image.
    torch.testing.assert_close(
        class_logits(model, pixel_values=pixels, frame_mask=torch.zeros(2, 2), **titles), class_logits(model, **titles)
    )


@torch.no_grad()
def test_the_memory_holds_words_instead_of_unfamiliar_frames(make_with_words, pixels):
    """The first example has an image alone, the second an image and a title of five tokens."""
    model = make_with_words(use_prompt_pooler=False)
    set_familiarity(model, UNFAMILIAR)
    titles = {"title_features": torch.randn(2, 5, 16), "attention_mask": torch.tensor([[0] * 5, [1] * 5])}
    outputs = model.model(pixels, **titles, output_attentions=True)
    words = model.model.encode_frames(pixels).word_probabilities.topk(3).indices
    assert outputs.memory_layout.title == 5
    expected = model.model(title_features=model.model.image_words.text_features[words[:1]])
    assert outputs.memory_mask[0].sum() == 3
    torch.testing.assert_close(outputs.memory[0, outputs.memory_mask[0]], expected.memory[0])
    torch.testing.assert_close(outputs.order_prompts[0], expected.order_prompts[0])
    alone = model.model(pixels[1:], title_features=titles["title_features"][1:])
    torch.testing.assert_close(outputs.order_prompts[1], alone.order_prompts[0])
    # Without any title there are more words than title tokens.
    outputs = model.model(pixels[:1], output_attentions=True)
    assert outputs.memory_layout.title == 3
    torch.testing.assert_close(outputs.order_prompts, expected.order_prompts)
    set_familiarity(model, FAMILIAR)
    familiar = model.model(pixels[:1])
    assert familiar.memory_mask[0].sum() == 2 * 5 and not familiar.memory_mask[0, -3:].any()


@torch.no_grad()
def test_an_image_read_as_words_has_no_fitted_threshold(make_with_words, pixels, monkeypatch):
    """The first example has an image alone, the second an image and a title."""
    model = make_with_words()
    monkeypatch.setattr(model, "num_word_tags", 2, raising=False)
    monkeypatch.setattr(model, "min_word_tag_probability", 0.0, raising=False)
    inputs = {"pixel_values": pixels, "title_features": torch.randn(2, 5, 16)}
    inputs |= {"attention_mask": torch.tensor([[0] * 5, [1] * 5]), "pad_bias": -5.0, "num_beams": 3}
    inputs |= {"num_return_sequences": 3}

    def scores(**settings):
        outputs = model.generate(**inputs, **settings)
        is_tag = outputs.sequences.ne(model.config.tag_pad_token_id).any(dim=-1)
        return [row[kept].tolist() for row, kept in zip(outputs.tag_scores, is_tag, strict=True)]

    set_familiarity(model, UNFAMILIAR)
    every = scores(threshold=0.0)
    assert min(map(len, every)) > 2, "one threshold is that of every example"
    assert scores(threshold=1.0) == [[], []]
    fitted = {"image+title": 1.0, "image": 1.0, "title": 1.0}
    assert scores(threshold=fitted) == [every[0][:2], []]
    assert scores(threshold=fitted, max_tags=1) == [every[0][:1], []]
    assert scores(threshold=fitted, max_tags=3) == [every[0][:3], []]
    monkeypatch.setattr(model, "min_word_tag_probability", every[0][1])
    assert scores(threshold=fitted, max_tags=3) == [every[0][:2], []]
    model.generation_config.threshold = {"parallel": fitted}
    assert scores() == [every[0][:2], []]
    set_familiarity(model, FAMILIAR)
    assert scores() == [[], []], "a familiar image has the threshold of images"


# Reading the words of an image


@pytest.fixture(scope="module")
def word_folder(make_with_words, tiny_processor, tmp_path_factory):
    """A checkpoint with image words that always generates tags."""
    folder = tmp_path_factory.mktemp("with_words")
    model = make_with_words()
    model.generation_config.pad_bias = -5.0
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tagger(word_folder):
    return pipeline("tag-generation", model=str(word_folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    noise_image(40, 32).save(folder / "noise.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "blue.png")
    return {name: str(folder / f"{name}.png") for name in ("noise", "blue")}


@torch.no_grad()
def expected_words(model, processor, image):
    """The three most probable words of the tower, with approximate scores."""
    probabilities = model.model.encode_frames(processor(images=image)["pixel_values"]).word_probabilities[0]
    ranked = sorted(zip(WORDS, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])[:3]
    return [{"word": word, "score": pytest.approx(score, abs=1e-5)} for word, score in ranked]


def test_words_are_decoded_without_those_of_probability_zero(make_with_words):
    config = make_with_words().config
    words = torch.tensor([[4, 0, 2], [0, 1, 2], [3, 1, 0]])
    scores = torch.tensor([[0.5, 0.25, 0.125], [0] * 3, [1, 0, 0]])
    outputs = OPTSGGenerateOutput(sequences=torch.zeros(3, 1, 1), image_words=words, image_word_scores=scores)
    assert decode_image_words(outputs, config) == [
        [{"word": "创意", "score": 0.5}, {"word": "red", "score": 0.25}, {"word": "blue square", "score": 0.125}],
        [],
        [{"word": "mail", "score": 1.0}],
    ]
    assert decode_image_words(OPTSGGenerateOutput(sequences=torch.zeros(2, 1, 1)), config) == [[], []]


def test_only_the_most_probable_words_are_decoded(make_with_words):
    config = copy.deepcopy(make_with_words().config)
    config.image_word_labels = [f"word {index}" for index in range(9)]
    words, scores = torch.arange(8, 0, -1)[None], torch.linspace(0.3, 0.1, 8)[None]
    outputs = OPTSGGenerateOutput(sequences=torch.zeros(1, 1, 1), image_words=words, image_word_scores=scores)
    (found,) = decode_image_words(outputs, config)
    assert [word["word"] for word in found] == [f"word {index}" for index in (8, 7, 6, 5, 4)]


def test_generate_returns_the_most_probable_words(tagger, images):
    model, processor = tagger.model, tagger.processor
    inputs = processor(images=[images["noise"], None, images["blue"]], titles=["a dog", "red", None])
    noise, nothing, blue = decode_image_words(model.generate(**inputs), model.config)
    assert noise == expected_words(model, processor, images["noise"]) and nothing == []
    expected = expected_words(model, processor, images["blue"])
    assert blue == expected and blue[0]["word"] != noise[0]["word"]
    outputs = model.model(**processor(images=[images["blue"]]))
    assert decode_image_words(outputs, model.config) == [expected], "outputs of the encoder have words as well"


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_pipeline_returns_image_words_on_request(tagger, images, batch_size):
    examples = [{"title": "blue"}, {"title": "a dog"}, images["blue"], {"image": images["noise"], "title": "red"}]
    tags = tagger(examples, batch_size=batch_size)
    found = tagger(examples, batch_size=batch_size, return_image_words=True)
    assert [example["tags"] for example in found] == tags and all(tags)
    expected = [expected_words(tagger.model, tagger.processor, images[name]) for name in ("blue", "noise")]
    assert [example["image_words"] for example in found] == [[], [], *expected]
    assert tagger(examples[2], return_image_words=False) == tagger(examples[2])
    assert tagger(examples[2], return_image_words=True).keys() == {"tags", "image_words"}


def test_the_pipeline_of_a_model_without_words_returns_none(tiny_checkpoint, images):
    tagger = pipeline("tag-generation", model=str(tiny_checkpoint), trust_remote_code=True, return_image_words=True)
    found = tagger(images["blue"])
    assert found["image_words"] == [] and found["tags"] == tagger(images["blue"], return_image_words=False)


def test_the_command_line_shows_image_words(tagger, word_folder, images, tiny_checkpoint, capsys):
    def run(*args, model=word_folder):
        assert main(["tag", "--model", str(model), *args, *images.values()]) == 0
        return capsys.readouterr().out.splitlines()

    expected = [expected_words(tagger.model, tagger.processor, path) for path in images.values()]
    lines = [json.loads(line) for line in run("--json", "--show-image-words")]
    for line, plain, words in zip(lines, run("--json"), expected, strict=True):
        assert line.pop("image_words") == words and line == json.loads(plain)
    table = run("--show-image-words")
    shown = [line.removeprefix("  image words: ") for line in table if line.startswith("  image words: ")]
    for line, words in zip(shown, expected, strict=True):
        assert [word.rpartition(" ")[0] for word in line.split(", ")] == [word["word"] for word in words]
        scores = [float(word.rpartition(" ")[2]) for word in line.split(", ")]
        assert scores == pytest.approx([word["score"].expected for word in words], abs=0.006)
    assert [line for line in table if not line.startswith("  image words: ")] == run()
    assert run("--show-image-words", model=tiny_checkpoint).count("  image words: (none)") == len(images)


def test_excluded_tags_do_not_count_among_the_tags_of_image_words(make_with_words, word_folder, images, monkeypatch):
    monkeypatch.setattr(OPTSGForTagGeneration, "num_word_tags", 1)
    monkeypatch.setattr(OPTSGForTagGeneration, "min_word_tag_probability", 0.0)
    files = find_media_files([images["blue"]], None, False).files

    def tags(**settings):
        tagger = Tagger(str(word_folder), TagSettings(**settings))
        set_familiarity(tagger.model, UNFAMILIAR)
        tagger.model.generation_config.threshold = {"parallel": {"image+title": 1.0}}
        [(_, result)] = tagger(files, batch_size=1)
        return [tag["tag"] for tag in result.tags]

    every = tags(threshold=0.0)
    assert len(every) > 2
    assert tags() == every[:1]
    assert tags(exclude=frozenset(every[:1])) == every[1:2]
    assert tags(exclude=frozenset(every[:1]), max_tags=2) == every[1:3]
    assert tags(exclude=frozenset(every[:1]), threshold=0.0) == every[1:]


# Saving


@torch.no_grad()
@pytest.mark.parametrize("vision", NAMING)
def test_a_saved_model_keeps_its_words(make_with_words, pixels, tmp_path, vision):
    model = make_with_words(vision, WORDS if vision in ("CLIP", "siglip") else None)
    set_familiarity(model, UNFAMILIAR)
    model.save_pretrained(tmp_path)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path)
    assert loaded.config.image_word_labels == WORDS
    for name, tensor in model.model.image_words.state_dict().items():
        assert torch.equal(loaded.model.image_words.state_dict()[name], tensor)
    torch.testing.assert_close(class_logits(loaded, pixel_values=pixels), class_logits(model, pixel_values=pixels))
    settings = {"pad_bias": -5.0, "num_candidates": 3, "fusion_weights": (0.7, 0.6, -0.2, 0.9, -0.1)}
    found, expected = loaded.generate(pixels, **settings), model.generate(pixels, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.tag_scores, expected.tag_scores)


def test_words_of_a_loaded_model_are_not_trained(make_with_words, tiny_processor, tmp_path):
    make_with_words().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    rows = Dataset.from_dict({"title": ["a dog"], "tags": [["red"]]})
    model, _ = build_model(OPTSGTrainingArguments("run", dataset="rows", checkpoint=str(tmp_path)), rows, rows)
    assert model.model.image_words is not None
    assert not any(parameter.requires_grad for parameter in model.model.image_words.parameters())
