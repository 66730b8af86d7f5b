"""A tiny model and its processor, made without a network: random weights, tokenizers trained on the spot."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from behaviour_matrix import matrix_lines
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessor

from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor, train_tag_tokenizer
from modeling_optsg.configuration_optsg import EfficientNetLiteConfig
from optsg import main

torch.set_num_threads(1)

EXAMPLES = Path(__file__).parents[1] / "examples"

LABEL_VOCABULARY = {"red": 9, "blue": 7, "colour": 6, "square": 3, "e-mail": 1, "创意美食": 2, "家常菜": 1}
TITLE_WORDS = ["a", "red", "blue", "green", "square", "dog", "e", "-", "mail", *"红色方块创意美食家常菜"]
TEXT_SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def pytest_terminal_summary(terminalreporter):
    """Prints the matrix of test_common_behaviour.py, also with pytest-xdist."""
    if lines := matrix_lines(terminalreporter.stats):
        terminalreporter.section("classes and behaviours")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def load_program():
    """Returns a function that loads a program of `examples/` by its name, as a new module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def text_tokenizer():
    """A BERT-like tokenizer that knows a few words."""
    vocabulary = [*TEXT_SPECIAL_TOKENS.values(), *TITLE_WORDS]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **TEXT_SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def tag_tokenizer():
    return train_tag_tokenizer(LABEL_VOCABULARY, vocab_size=300)


@pytest.fixture(scope="session")
def tower_configs(text_tokenizer):
    """Configurations of tiny towers, by name; images are 32 pixels wide."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return {
        "vit": ViTConfig(**shape, image_size=32, patch_size=16),
        "efficientnet_lite": EfficientNetLiteConfig(
            stem_size=8, stages=[[1, 3, 1, 1, 8], [2, 3, 2, 2, 12], [1, 5, 2, 2, 16]], hidden_size=24
        ),
        "bert": BertConfig(**shape, vocab_size=len(text_tokenizer), max_position_embeddings=16),
    }


@pytest.fixture(scope="session")
def make_model(tower_configs, tag_tokenizer):
    """Makes a tiny model in evaluation mode.

    Weights are drawn wider than usual, so that the logits of an untrained model differ: its tags have many lengths and
    some slots stay empty.
    """

    def make(vision="vit", seed=0, **config):
        torch.manual_seed(seed)
        defaults = {
            "text_config": tower_configs["bert"],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_encoder_layers": 1,
            "num_prompt_layers": 1,
            "num_prompts": 4,
            "max_frames": 4,
            "max_tag_tokens": 8,
            "alignment_size": 8,
            "tag_vocab_size": len(tag_tokenizer),
            "initializer_range": 0.3,
        }
        vision_config = tower_configs[vision] if vision is not None else None
        # Models write into their configurations.
        config = copy.deepcopy({"vision_config": vision_config} | defaults | config)
        return OPTSGForTagGeneration(OPTSGConfig(**config)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_processor(text_tokenizer, tag_tokenizer):
    return OPTSGProcessor(
        ViTImageProcessor(size={"height": 32, "width": 32}),
        text_tokenizer,
        tag_tokenizer,
        num_frames=4,
        num_prompts=4,
        max_tag_tokens=8,
        label_vocabulary=LABEL_VOCABULARY,
    )


@pytest.fixture
def tiny_model(make_model):
    """A model for [`tiny_processor`]; every test has one of its own."""
    return make_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, make_model, tiny_processor):
    """The folder of a saved model that always writes tags, and its processor."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    model = make_model()
    model.generation_config.pad_bias = -5.0
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def towers(tiny_checkpoint, tmp_path_factory):
    """The two towers of the tiny checkpoint, saved apart as pretrained towers are."""
    root = tmp_path_factory.mktemp("towers")
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    model.model.vision_tower.save_pretrained(root / "vision")
    processor.image_processor.save_pretrained(root / "vision")
    model.model.text_tower.save_pretrained(root / "text")
    processor.tokenizer.save_pretrained(root / "text")
    return root


@pytest.fixture(scope="session")
def exported_checkpoint(tmp_path_factory):
    """The shipped checkpoint as ONNX."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"Not installed: {', '.join(missing)}.")
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = Path(__file__).parents[1] / "checkpoints/optsg-icon-small"
    assert main(["export-onnx", str(checkpoint), "--output", str(folder)]) == 0
    return folder
