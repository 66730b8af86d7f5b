"""Saving and loading: auto classes, incomplete checkpoints, pretrained towers, and remote code."""

import ast
import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ViTModel,
)

import modeling_optsg
from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGModel, OPTSGProcessor
from modeling_optsg.efficientnet_lite import EfficientNetLiteForImageClassification, EfficientNetLiteModel
from modeling_optsg.training import add_image_words

PACKAGE = Path(modeling_optsg.__file__).parent
# Packages that code saved with a model may import.
REQUIREMENTS = {"numpy", "PIL", "scipy", "tokenizers", "torch", "transformers"}


@pytest.fixture(scope="module")
def inputs(tiny_processor):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return tiny_processor(images=[pixels[0], None, pixels[1]], titles=["a red square", "创意美食", None])


def copy_with_weights(folder, target, change):
    """Copies a saved model and applies `change` to its dictionary of tensors."""
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), target / "model.safetensors", metadata={"format": "pt"})
    return target


def settings(config):
    """Returns the fields of a configuration without those that loading changes."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, dict):
        return {k: settings(v) for k, v in config.items() if k not in ("_name_or_path", "architectures", "dtype")}
    return config


# Loading with the package


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite", None])
def test_a_saved_model_loads_unchanged(make_model, tmp_path, vision):
    model = make_model(vision, frame_feature_size=None if vision else 6)
    model.save_pretrained(tmp_path)
    loaded, report = OPTSGForTagGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert settings(loaded.config) == settings(model.config)


def test_auto_classes_find_model_configuration_and_processor(tiny_checkpoint, inputs):
    config, model = AutoConfig.from_pretrained(tiny_checkpoint), AutoModel.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert (type(config), type(model), type(processor)) == (OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor)
    tags = processor.batch_decode(model.generate(**inputs))
    assert all(len(example) > 0 for example in tags)


def test_the_output_layer_shares_weights_with_token_embeddings(tiny_checkpoint):
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    assert model.lm_head.weight is model.tag_decoder.token_embeddings.weight
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tiny_checkpoint / "model.safetensors")


def test_resizing_the_tag_vocabulary_keeps_the_text_vocabulary(make_model, inputs, tmp_path):
    model = make_model()
    text_vocabulary = model.config.text_config.vocab_size
    before = model.generate(**inputs, pad_bias=-5.0)
    model.resize_token_embeddings(310, mean_resizing=False)
    assert model.config.tag_vocab_size == 310 and model.config.text_config.vocab_size == text_vocabulary
    assert model.lm_head.weight is model.tag_decoder.token_embeddings.weight
    assert model.lm_head.bias.shape == (310,)
    model.save_pretrained(tmp_path)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path)
    vocabulary = [sequence[sequence != 0].tolist() for sequence in before.sequences.flatten(0, 1) if sequence.any()]
    resized = loaded.generate(**inputs, pad_bias=-5.0, tag_vocabulary=vocabulary)
    assert resized.slots.ge(0).any() and torch.equal(resized.pad_margins, model.generate(**inputs).pad_margins)


def test_half_precision_weights_load_in_the_configured_precision(tiny_checkpoint, tmp_path, inputs):
    half = copy_with_weights(
        tiny_checkpoint, tmp_path / "half", lambda weights: {name: tensor.half() for name, tensor in weights.items()}
    )
    assert json.loads((half / "config.json").read_text())["dtype"] == "float32"
    model, expected = (
        OPTSGForTagGeneration.from_pretrained(half),
        OPTSGForTagGeneration.from_pretrained(tiny_checkpoint),
    )
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(model(**inputs).order_prompts, expected(**inputs).order_prompts, rtol=1e-2, atol=1e-2)


def test_tensors_of_another_shape_are_reported(tiny_checkpoint):
    for auto in (OPTSGForTagGeneration, AutoModel):
        with pytest.raises(ValueError, match=r"prompt_encoder.queries is \[4, 16\], not \[7, 16\]"):
            auto.from_pretrained(tiny_checkpoint, num_prompts=7)
    with pytest.raises(ValueError, match="and [0-9]+ more"):
        OPTSGForTagGeneration.from_pretrained(tiny_checkpoint, hidden_size=32)
    model, report = OPTSGForTagGeneration.from_pretrained(
        tiny_checkpoint, num_prompts=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(model.model.prompt_encoder.queries) == 7 and len(report["mismatched_keys"]) == 1


def test_missing_tensors_are_initialised_and_reported(tiny_checkpoint, tmp_path, caplog):
    missing = {
        "model.prompt_encoder.queries",
        "tag_alignment.logit_scale",
        "tag_alignment.pad_embedding",
        "lm_head.bias",
        "model.multimodal_encoder.frame_positions.weight",
        "model.multimodal_encoder.norm.weight",
    }
    partial = copy_with_weights(
        tiny_checkpoint, tmp_path / "partial", lambda weights: {k: v for k, v in weights.items() if k not in missing}
    )
    # Tests of the command line, which run in the same process, turn the library's warnings off.
    caplog.set_level(logging.WARNING, logger="transformers")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        model, report = OPTSGForTagGeneration.from_pretrained(partial, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert set(report["missing_keys"]) == missing
    for name in missing:
        assert name in caplog.text
    state = model.state_dict()
    assert state["model.prompt_encoder.queries"].std().item() == pytest.approx(1.0, abs=0.3)
    assert state["tag_alignment.logit_scale"].exp().item() == pytest.approx(1 / 0.07)
    assert state["tag_alignment.pad_embedding"].std().item() == pytest.approx(0.3, rel=0.8)
    assert state["lm_head.bias"].eq(0).all() and state["model.multimodal_encoder.norm.weight"].eq(1).all()
    assert state["model.multimodal_encoder.frame_positions.weight"].std().item() == pytest.approx(0.3, rel=0.4)


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_every_missing_tensor_is_initialised(make_model, tmp_path, vision):
    """`from_pretrained` builds the model on the meta device, so a tensor that nothing sets is uninitialised memory."""
    model = make_model(vision)
    model.save_pretrained(tmp_path)
    save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first, second = (load_with_seed(tmp_path) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} is not set by _init_weights"
        if tensor.is_floating_point():
            assert tensor.isfinite().all() and tensor.abs().max() < 100, name


def load_with_seed(folder):
    # Freed memory full of NaN: uninitialised tensors would otherwise often be zero.
    filler = [torch.full((size,), float("nan")) for size in (8, 16, 64, 256, 1024, 4096) for _ in range(50)]
    del filler
    torch.manual_seed(0)
    return OPTSGForTagGeneration.from_pretrained(folder).state_dict()


# Pretrained towers


@pytest.fixture(scope="module")
def tower_folders(tower_configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    towers = {
        "vit": ViTModel(tower_configs["vit"]),
        "bert": BertModel(tower_configs["bert"]),
        "efficientnet_lite": EfficientNetLiteModel(tower_configs["efficientnet_lite"]),
        "CLIP": CLIPModel(
            CLIPConfig(
                vision_config={**tower_configs["vit"].to_dict(), "model_type": "clip_vision_model"},
                text_config={**tower_configs["bert"].to_dict(), "model_type": "clip_text_model", "eos_token_id": 3},
                projection_dim=8,
            )
        ),
    }
    for name, tower in towers.items():
        tower.eval().save_pretrained(folder / name)
    return folder, towers


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite", "CLIP"])
@pytest.mark.parametrize("text", ["bert", "CLIP"])
def test_pretrained_towers_keep_their_weights(tower_folders, tmp_path, inputs, vision, text):
    folder, towers = tower_folders
    model = OPTSGForTagGeneration.from_vision_text_pretrained(
        folder / vision, folder / text, hidden_size=16, num_attention_heads=2, num_prompts=3, tag_vocab_size=50
    ).eval()
    assert model.config.num_prompts == 3 and model.config.frame_feature_size == model.config.vision_config.hidden_size
    vision_tower = towers[vision].vision_model if vision == "CLIP" else towers[vision]
    text_tower = towers[text].text_model if text == "CLIP" else towers[text]
    model.save_pretrained(tmp_path)
    for built in (model, OPTSGForTagGeneration.from_pretrained(tmp_path)):
        with torch.no_grad():
            tokens = vision_tower(pixel_values=inputs["pixel_values"][0]).last_hidden_state
            tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
            features = built.model.encode_frames(inputs["pixel_values"]).frame_features
            torch.testing.assert_close(features[0], tokens)
            title, mask = inputs["input_ids"][:1], inputs["attention_mask"][:1]
            expected = text_tower(input_ids=title, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(built.model.encode_text(title, mask), expected)
        assert built.generate(**inputs, pad_bias=-5.0).slots.ge(0).any()


def test_half_precision_towers_join_a_single_precision_model(tower_folders, tmp_path):
    folder, towers = tower_folders
    copy.deepcopy(towers["bert"]).half().save_pretrained(tmp_path / "half")
    model = OPTSGForTagGeneration.from_vision_text_pretrained(folder / "vit", tmp_path / "half", tag_vocab_size=50)
    model.save_pretrained(tmp_path / "model")
    for built in (model, OPTSGForTagGeneration.from_pretrained(tmp_path / "model")):
        assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}


def test_a_model_for_precomputed_features_needs_no_vision_tower(tower_folders, tmp_path):
    folder, _ = tower_folders
    model = OPTSGForTagGeneration.from_vision_text_pretrained(
        None, folder / "bert", frame_feature_size=6, tag_vocab_size=50
    )
    assert model.config.vision_config is None and model.model.vision_tower is None
    model.save_pretrained(tmp_path)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path).eval()
    features = torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = model.eval()(frame_features=features).order_prompts
        torch.testing.assert_close(loaded(frame_features=features).order_prompts, expected)


def test_the_base_model_loads_from_the_whole_model(tiny_checkpoint, inputs):
    encoder = OPTSGModel.from_pretrained(tiny_checkpoint)
    expected = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint).model(**inputs)
    torch.testing.assert_close(encoder(**inputs).order_prompts, expected.order_prompts)


# Remote code, without the package


def imports(path):
    """Returns the packages that a file imports outside `try`, and the files that it imports relatively."""
    absolute, siblings = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    in_try = {id(n) for block in ast.walk(tree) if isinstance(block, ast.Try) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name} imports from outside its folder"
            siblings.add(f"{node.module}.py")
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in in_try:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            absolute |= {name.partition(".")[0] for name in names}
    return absolute - set(sys.stdlib_module_names), siblings


def test_saved_code_is_complete_and_equals_the_package(tiny_checkpoint):
    copies = {path.name: path for path in tiny_checkpoint.glob("*.py")}
    assert {"configuration_optsg.py", "modeling_optsg.py", "processing_optsg.py"} <= copies.keys()
    for name, path in copies.items():
        assert path.read_bytes() == (PACKAGE / name).read_bytes(), f"{name} differs from the package's"
        absolute, siblings = imports(path)
        assert siblings <= copies.keys(), f"{name} imports files that were not saved"
        assert absolute <= REQUIREMENTS, f"{name} requires {absolute - REQUIREMENTS}"


REMOTE_PROGRAM = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_optsg", "dataset_scripts"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

torch.set_num_threads(1)
folder, saved, pixels, *titles = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert model.lm_head.weight is model.tag_decoder.token_embeddings.weight
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[*torch.load(pixels).numpy(), None], titles=titles)
tags = {d: processor.batch_decode(model.generate(**inputs, decoding=d)) for d in ("parallel", "sequential")}
model.save_pretrained(saved)
processor.save_pretrained(saved)
tagger = pipeline("tag-generation", model=saved, trust_remote_code=True)
assert type(tagger).__module__.startswith("transformers_modules"), type(tagger)
restricted = tagger({"title": titles[-1]}, tag_vocabulary=["red", "blue"])
assert {tag["label"] for tag in restricted} <= {"red", "blue"}, restricted
assert not any(name.startswith("modeling_optsg") for name in sys.modules)
print(json.dumps(tags))
"""


def run_without_package(folder, saved, pixels, titles, tmp_path):
    """Loads `folder` as remote code in a new process, saves it to `saved`, and returns its tags per decoding."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    (tmp_path / "working_directory").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", REMOTE_PROGRAM, str(folder), str(saved), str(pixels), *titles],
        cwd=tmp_path / "working_directory",
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def let_words_replace_images(model, processor, folder):
    """Gives a model a tag classifier and image words, and makes every image unfamiliar."""
    config = copy.deepcopy(model.config.vision_config)
    config.id2label, config.label2id = {0: "red", 1: "blue dog"}, {"red": 0, "blue dog": 1}
    classifier = EfficientNetLiteForImageClassification(config)
    classifier.efficientnet_lite.load_state_dict(model.model.vision_tower.state_dict())
    classifier.save_pretrained(folder)
    model.set_label_vocabulary(processor.tag_tokenizer(["red", "blue"], add_special_tokens=False)["input_ids"])
    add_image_words(model, folder, processor.tokenizer)
    model.model.multimodal_encoder.evidence_pooler.standardizer.half_familiar_distance.fill_(1e-20)
    model.generation_config.num_candidates = 2
    model.generation_config.fusion_weights = [0.7, 0.6, -0.2, 0.9, -0.1]


@pytest.mark.parametrize("with_words", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_saved_model_works_where_the_package_is_not_installed(make_model, tiny_processor, tmp_path, with_words):
    """The tower is the package's own class. Saved again there, the folder is complete."""
    model = make_model("efficientnet_lite")
    if with_words:
        let_words_replace_images(model, tiny_processor, tmp_path / "classifier")
    model.generation_config.pad_bias = {"parallel": -5.0, "sequential": -4.0}
    model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    titles = ["a red square", "", "创意美食"]
    torch.save(torch.from_numpy(pixels), tmp_path / "pixels.pt")

    inputs = tiny_processor(images=[*pixels, None], titles=titles)
    remote_tags = run_without_package(
        tmp_path / "saved", tmp_path / "saved_again", tmp_path / "pixels.pt", titles, tmp_path
    )
    for decoding in ("parallel", "sequential"):
        expected = tiny_processor.batch_decode(model.generate(**inputs, decoding=decoding))
        assert sum(map(len, expected)) > 3
        for actual_tags, tags in zip(remote_tags[decoding], expected, strict=True):
            assert [t["tag"] for t in actual_tags] == [t["tag"] for t in tags]
            assert [t["novel"] for t in actual_tags] == [t["novel"] for t in tags]
            assert [t["score"] for t in actual_tags] == pytest.approx([t["score"] for t in tags], rel=1e-3)
    saved_again, saved = ({path.name for path in (tmp_path / name).iterdir()} for name in ("saved_again", "saved"))
    assert saved_again >= saved
    for path in (tmp_path / "saved_again").glob("*.py"):
        assert path.read_bytes() == (PACKAGE / path.name).read_bytes()
