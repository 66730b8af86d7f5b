"""Ways to load and to serve a model: other classes, missing weights, traced programs, 8 bits and offloading."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export import export
from transformers import BitsAndBytesConfig, pipeline

from modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.generation_optsg import check_placement
from modeling_optsg.onnx import DecodingStep, EncoderProgram
from modeling_optsg.onnx.export import example_inputs

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/optsg-icon-small"
IMAGES = Path(__file__).parents[1] / "examples/images"
TAGS = [[5], [6, 7], [8]]


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


@pytest.fixture
def model(make_model):
    model = make_model(num_tag_classes=3)
    model.set_label_vocabulary(TAGS, [3, 2, 1])
    return model


@pytest.fixture
def inputs(tiny_processor):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return dict(tiny_processor(images=list(pixels), titles=["a red square", "dog"]))


# Loading


def test_another_number_of_classes_is_an_error_or_a_new_head(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"class_embeddings.weight is \[3, 16\], not \[5, 16\].*set_label_vocabulary"):
        OPTSGForTagGeneration.from_pretrained(tmp_path, num_tag_classes=5)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path, num_tag_classes=5, ignore_mismatched_sizes=True)
    classifier, pad = loaded.tag_classifier, loaded.config.tag_pad_token_id
    assert classifier.label_vocabulary.tokens.eq(pad).all() and classifier.label_vocabulary.log_counts.eq(0).all()
    assert classifier.bias.eq(-5).all() and classifier.class_embeddings.weight.shape == (5, 16)
    settings = {"fusion_weights": [1.0, 1.0, 0.0, 1.0, 0.0], "num_candidates": 2}
    with pytest.raises(ValueError, match=r"Class \d of the tag classifier has no tag.*set_label_vocabulary"):
        loaded.generate(**inputs, **settings)
    loaded.set_label_vocabulary([[9], [10]])
    assert loaded.generate(**inputs, **settings).sequences.shape[0] == 2


def test_a_checkpoint_without_label_vocabulary_has_classes_without_tags(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if "label_vocabulary" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path).tag_classifier.label_vocabulary
    assert loaded.tokens.eq(model.config.tag_pad_token_id).all() and loaded.log_counts.eq(0).all()


def test_a_model_on_several_accelerators_is_refused(model, inputs):
    model.hf_device_map = {"model.vision_tower": 0, "model.text_tower": "cpu", "lm_head": 0}
    check_placement(model)
    model.hf_device_map["lm_head"] = 1
    with pytest.raises(ValueError, match=r"divided among the devices \['0', '1'\]"):
        model.generate(**inputs)


# Traced programs


def resized(inputs, sizes):
    """Other inputs of the same kind, with other sizes of the dynamic dimensions."""
    resized = {}
    for name, (tensor, dimensions) in inputs.items():
        shape = [sizes.get(getattr(dimensions.get(axis), "__name__", None), n) for axis, n in enumerate(tensor.shape)]
        others = torch.rand(shape) if tensor.is_floating_point() else torch.ones(shape, dtype=tensor.dtype)
        resized[name] = tensor if not dimensions else others
    return resized


SIZES = {"batch": 3, "frames": 4, "title_length": 7, "slots": 5, "position": 1, "memory_length": 9}


def programs(model):
    for program, inputs in zip(
        (EncoderProgram(model), DecodingStep(model)), example_inputs(model, (32, 32)), strict=True
    ):
        tensors = {name: tensor for name, (tensor, _) in inputs.items()}
        yield program, tensors, {name: dimensions for name, (_, dimensions) in inputs.items()}, resized(inputs, SIZES)


@pytest.mark.slow
@torch.no_grad()
def test_encoder_and_decoding_step_are_exported(model):
    for program, tensors, dimensions, others in programs(model):
        exported = export(program, (), tensors, dynamic_shapes=dimensions).module()
        for own in (tensors, others):
            torch.testing.assert_close(exported(**own), program(**own), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_encoder_and_decoding_step_are_compiled_as_one_graph(model):
    torch._dynamo.reset()
    for program, tensors, _, others in programs(model):
        compiled = torch.compile(program, fullgraph=True, dynamic=True)
        for own in (tensors, others):
            torch.testing.assert_close(compiled(**own), program(**own), rtol=1e-3, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    names = ("pixel_values", "frame_mask", "input_ids", "attention_mask")
    own = resized(example_inputs(model, (32, 32))[0], SIZES)
    found, expected = (program(**{name: own[name] for name in names}).order_prompts for program in (compiled, model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# The shipped checkpoint


@pytest.fixture(scope="module")
def example():
    return {"image": str(IMAGES / "tent-tree.png"), "title": "tent tree"}


@pytest.fixture(scope="module")
def expected(example):
    return pipeline("tag-generation", model=CHECKPOINT)(example)


def assert_similar(found, expected, tolerance):
    assert {tag["label"] for tag in found[:4]} == {tag["label"] for tag in expected[:4]}
    assert [tag["score"] for tag in found[:4]] == pytest.approx([tag["score"] for tag in expected[:4]], abs=tolerance)


@pytest.mark.slow
def test_an_offloaded_checkpoint_gives_the_same_tags(example, expected, tmp_path):
    settings = {"device_map": "auto", "max_memory": {"cpu": "30MB"}, "offload_folder": tmp_path}
    model = OPTSGForTagGeneration.from_pretrained(CHECKPOINT, **settings)
    assert "disk" in model.hf_device_map.values() and model.device.type == "cpu"
    found = pipeline("tag-generation", model=model, processor=str(CHECKPOINT))(example)
    assert [tag["label"] for tag in found] == [tag["label"] for tag in expected]
    assert_similar(found, expected, 1e-4)


@pytest.mark.slow
@needs("bitsandbytes")
def test_bitsandbytes_reads_the_checkpoint_in_8_bits(example, expected):
    quantisation = BitsAndBytesConfig(load_in_8bit=True)
    model = OPTSGForTagGeneration.from_pretrained(CHECKPOINT, quantization_config=quantisation, device_map={"": "cpu"})
    assert model.tag_classifier.class_embeddings.weight.dtype == torch.int8
    assert_similar(pipeline("tag-generation", model=model, processor=str(CHECKPOINT))(example), expected, 0.05)


@pytest.mark.slow
@needs("torchao")
def test_torchao_quantises_the_checkpoint_to_8_bits(example, expected):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = OPTSGForTagGeneration.from_pretrained(CHECKPOINT).eval()
    before = copy.deepcopy(model.tag_classifier.class_embeddings.weight)
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.tag_classifier.class_embeddings.weight) is not nn.Parameter and before.dtype == torch.float32
    assert_similar(pipeline("tag-generation", model=model, processor=str(CHECKPOINT))(example), expected, 0.05)
