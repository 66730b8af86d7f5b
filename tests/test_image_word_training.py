"""Image words of a model that is trained."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import ViTForImageClassification

from modeling_optsg import OPTSGTrainer, OPTSGTrainingArguments
from modeling_optsg.training import embed_image_words, loop

WORDS = ["red", "a dog", "blue square"]


@pytest.fixture(scope="module")
def classifier(tower_configs, tiny_processor, tmp_path_factory):
    """The folder of a vision tower that names images."""
    folder = tmp_path_factory.mktemp("classifier")
    config = copy.deepcopy(tower_configs["vit"])
    config.id2label, config.label2id = dict(enumerate(WORDS)), {word: index for index, word in enumerate(WORDS)}
    ViTForImageClassification(config).save_pretrained(folder)
    tiny_processor.image_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def train(classifier, towers, tmp_path):
    """Trains a model on the towers, and returns its trainer and the number of validations."""

    def train(name, **arguments):
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}
        settings = {"tag_vocab_size": 270, "max_tag_tokens": 16, "config_overrides": json.dumps(sizes)}
        settings |= {"num_train_epochs": 2, "train_batch_size": 4, "eval_steps": 1, "image_warmup_epochs": 0}
        settings |= {"vision_tower": str(classifier), "text_tower": str(towers / "text")} | arguments
        args = OPTSGTrainingArguments(str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **settings)
        titles = ["red", "blue square"] * 6
        rows = {"title": titles, "tags": [[title] for title in titles], "image": [Image.new("RGB", (32, 32))] * 12}
        trainer = OPTSGTrainer(args=args, train_dataset=Dataset.from_dict(rows))
        return trainer, len(trainer.train()["history"])

    return train


def check_words(trainer):
    towers = trainer.model.model
    found = towers.image_words.text_features.clone()
    assert len(found) == len(WORDS) and found.any()
    embed_image_words(towers, trainer.processing_class.tokenizer)
    torch.testing.assert_close(found, towers.image_words.text_features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text_layers", [0, 1])
def test_words_are_embedded_again_only_if_the_text_tower_is_trained(train, monkeypatch, text_layers):
    embedded = []
    monkeypatch.setattr(loop, "embed_image_words", lambda *args: embedded.append(embed_image_words(*args)))
    trainer, validations = train("run", train_text_layers=text_layers, tower_learning_rate=1e-2)
    assert validations > 1 and len(embedded) == (validations if text_layers else 0)
    check_words(trainer)


def test_words_are_embedded_with_the_text_tower_of_a_classifier_checkpoint(train, tmp_path):
    asy = train("asy", model_type="asy", train_text_layers=0)[0].model
    with torch.no_grad():
        asy.model.text_tower.embeddings.word_embeddings.weight.normal_()
    asy.save_pretrained(tmp_path / "asy")
    trainer, _ = train("run", train_text_layers=0, classifier_checkpoint=str(tmp_path / "asy"))
    check_words(trainer)
