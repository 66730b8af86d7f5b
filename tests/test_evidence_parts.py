"""The experiment that switches off parts of the evidence, with a tiny checkpoint."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import BertModel, ViTForImageClassification

from experiments.icon_tagging import evidence_parts
from experiments.icon_tagging.evidence_parts import (
    ALL_PARTS,
    BOTH,
    FAMILIAR,
    IMAGE,
    INPUTS,
    MATCHING,
    NO_STYLE,
    NO_WORDS,
    PARTS,
    TITLE,
    WRONG_IMAGE,
    WrongImages,
    without,
)
from modeling_optsg import OPTSGForTagGeneration, OPTSGModel, OPTSGProcessor, TagEvaluator
from modeling_optsg.evaluation.reporting import score_modalities
from modeling_optsg.training import add_image_words

TITLES = ["a red square", "blue dog", "green mail", "red", "dog"]
TAGS = [["red", "square"], ["blue", "colour"], ["e-mail"], ["red"], ["colour"]]


@pytest.fixture(scope="module")
def checkpoint(tower_configs, text_tokenizer, tag_tokenizer, tiny_processor, tmp_path_factory):
    """A checkpoint with style and image words, for which images are neither familiar nor unfamiliar."""
    root = tmp_path_factory.mktemp("checkpoint")
    config = copy.deepcopy(tower_configs["vit"])
    words = ["red", "blue", "a dog", "mail", "square"]
    config.id2label, config.label2id = dict(enumerate(words)), {word: index for index, word in enumerate(words)}
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(root / "vit")
    BertModel(copy.deepcopy(tower_configs["bert"])).save_pretrained(root / "bert")
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_prompts": 4}
    settings |= {"tag_vocab_size": len(tag_tokenizer), "initializer_range": 0.5, "num_image_words": 3}
    model = OPTSGForTagGeneration.from_vision_text_pretrained(root / "vit", root / "bert", **settings).eval()
    tags = list(tiny_processor.label_vocabulary)
    ids = tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    model.set_label_vocabulary(ids, list(tiny_processor.label_vocabulary.values()))
    add_image_words(model, root / "vit", text_tokenizer)
    standardizer = model.model.multimodal_encoder.evidence_pooler.standardizer
    with torch.no_grad():
        features = model.model.encode_frames(torch.randn(8, 1, 3, 32, 32)).image_features
        standardizer.half_familiar_distance.fill_(standardizer.distances(standardizer.standardize(features)).mean())
    model.generation_config.update(pad_bias=-5.0, num_candidates=5, fusion_weights=[0.5, 0.5, 0.0, 1.0, 0.0])
    model.save_pretrained(root)
    tiny_processor.save_pretrained(root)
    return root


@torch.no_grad()
def test_each_part_is_switched_off_and_on_again(checkpoint):
    model = OPTSGForTagGeneration.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 1, 3, 32, 32, generator=generator)
    titles = {"title_features": torch.randn(2, 3, 16, generator=generator)}

    def evidence(part, **inputs):
        with without(model, part):
            return model.model(pixels, **inputs).evidence

    both = evidence(ALL_PARTS, **titles)
    assert (both.match_logits.sigmoid() < 1).all() and (both.familiarity < 0.9).all() and both.style.any()
    found = evidence(MATCHING, **titles)
    torch.testing.assert_close(found.image_gate, both.familiarity)
    found = evidence(FAMILIAR, **titles)
    assert found.familiarity.eq(1).all()
    torch.testing.assert_close(found.image_gate, both.match_logits.sigmoid())
    found = evidence(NO_STYLE, **titles)
    assert not found.style.any() and not torch.equal(found.vectors, both.vectors)
    torch.testing.assert_close(found.image_gate, both.image_gate)
    alone = evidence(ALL_PARTS)
    assert alone.word_vectors.any() and evidence(NO_WORDS).word_vectors is None
    # The inputs that a part is not measured for are not changed by it.
    logits = model.tag_classifier.logits
    torch.testing.assert_close(logits(evidence(NO_WORDS, **titles)), logits(both))
    torch.testing.assert_close(logits(evidence(MATCHING)), logits(alone))
    for part in PARTS:
        with without(model, part):
            title = model.model(**titles).evidence
        torch.testing.assert_close(logits(title), logits(model.model(**titles).evidence))
    # Everything is on again.
    torch.testing.assert_close(evidence(ALL_PARTS, **titles).vectors, both.vectors)
    torch.testing.assert_close(logits(evidence(ALL_PARTS)), logits(alone))
    model.model.image_words = None
    with pytest.raises(ValueError, match="no image words: the checkpoint does not have this part"):
        evidence(NO_WORDS)


def test_every_example_gets_a_wrong_image():
    examples = [{"image": index, "title": f"t{index}", "tags": [str(index)]} for index in range(9)]
    wrong = [WrongImages(examples)[index] for index in range(9)]
    assert sorted(row["image"] for row in wrong) == list(range(9))
    assert all(row["image"] != index for index, row in enumerate(wrong))
    assert [{**row, "image": index} for index, row in enumerate(wrong)] == examples


def test_the_program_scores_every_part(checkpoint, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    rows = Dataset.from_dict({"image": list(map(Image.fromarray, pixels)), "title": TITLES, "tags": TAGS})
    encode, loaded, encoded = OPTSGModel.encode_frames, [], []

    def load(name, **options):
        loaded.append((name, options))
        return rows

    def count(towers, pixel_values, frame_mask=None):
        encoded.extend(pixel_values)
        return encode(towers, pixel_values, frame_mask)

    monkeypatch.setattr(evidence_parts, "load_tagging_dataset", load)
    monkeypatch.setattr(OPTSGModel, "encode_frames", count)
    output = tmp_path / "results/parts.json"
    evidence_parts.main(["--checkpoint", str(checkpoint), "--output", str(output), "--num_examples", "4"])
    result = json.loads(output.read_text())
    assert loaded == [("icon_tagging", options) for options in evidence_parts.SPLITS.values()]
    assert len(encoded) == 4, "each image is encoded once"
    model = OPTSGForTagGeneration.from_pretrained(checkpoint)
    processor = OPTSGProcessor.from_pretrained(checkpoint)
    examples = rows.select([0, 1, 2, 4])
    evaluator = TagEvaluator(examples["tags"], processor.label_vocabulary)
    expected = score_modalities(model, processor, examples, evaluator, progress=False)
    for split in evidence_parts.SPLITS:
        scores = result[split]
        assert (scores.pop("examples"), scores.pop("evaluated_tags")) == (4, len(evaluator.evaluated_tags))
        assert set(scores) == set(PARTS) and all(set(own) == set(INPUTS) for own in scores.values())
        for name, modality in ((BOTH, "image+title"), (IMAGE, "image"), (TITLE, "title")):
            metrics = {metric: expected[modality][metric] for metric in evidence_parts.METRICS}
            assert scores[ALL_PARTS][name] == pytest.approx(metrics, abs=0.01)
        for part, inputs in PARTS.items():
            assert all(scores[part][name] == scores[ALL_PARTS][name] for name in set(INPUTS) - set(inputs))
    assert result["validation"][FAMILIAR][WRONG_IMAGE]["tags_per_example"] > 0
