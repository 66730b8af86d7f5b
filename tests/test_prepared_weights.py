"""`prepare_for_inference`: the same results, and undone by training."""

import pytest
import torch
from torch import nn

from modeling_optsg import OPTSGForTagGeneration
from optsg.tagger import load_model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(3, 2, 3, 32, 32, generator=generator),
        "frame_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
    }


def test_a_prepared_model_generates_the_same_and_saves_the_same(make_model, inputs, tmp_path):
    model = make_model("efficientnet_lite", vision_feature_layers=[1, 2])
    expected, state = model.generate(**inputs), {name: v.clone() for name, v in model.state_dict().items()}
    assert model.prepare_for_inference() is model
    assert not model.lm_head.weight.is_contiguous() and model.get_input_embeddings().weight.is_contiguous()
    outputs = model.generate(**inputs)
    assert torch.equal(outputs.sequences, expected.sequences)
    torch.testing.assert_close(outputs.tag_scores, expected.tag_scores)
    model.save_pretrained(tmp_path)
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_optsg_tag_loads_a_prepared_model(tiny_checkpoint):
    model, _ = load_model(str(tiny_checkpoint))
    assert not model.lm_head.weight.is_contiguous()


def test_training_undoes_the_preparation(make_model):
    model = make_model().prepare_for_inference()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.train()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_training_goes_on_with_the_same_parameters(make_model):
    model = make_model("efficientnet_lite").train()
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    # A cast in between does not matter, and neither does a second call.
    model.prepare_for_inference().prepare_for_inference().to(torch.bfloat16).train()
    after = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert after == before and all(parameter.is_contiguous() for parameter in model.parameters())


def test_folded_batch_norms_follow_their_weights_when_training_starts(make_model, inputs):
    model = make_model("efficientnet_lite").prepare_for_inference()
    tower, frames = model.model.vision_tower, inputs["pixel_values"].flatten(0, 1)
    with torch.no_grad():
        before = tower(frames).last_hidden_state
        tower.head.norm.bias.data += 1.0
        assert torch.equal(tower(frames).last_hidden_state, before)
        model.train().eval()
        changed = tower(frames).last_hidden_state
        assert not torch.equal(changed, before)
        tower.head.norm.bias.data += 1.0
        assert not torch.equal(tower(frames).last_hidden_state, changed)


def test_a_prepared_model_can_be_cast(make_model, inputs):
    model = make_model("efficientnet_lite").prepare_for_inference().to(torch.bfloat16)
    assert model.generate(**inputs).tag_scores.isfinite().all()


def test_quantised_layers_are_left_as_they_are(make_model, inputs):
    model = torch.ao.quantization.quantize_dynamic(make_model(use_tag_classifier=True).eval(), {nn.Linear})
    expected = model.generate(**inputs).tag_scores
    assert torch.equal(model.prepare_for_inference().generate(**inputs).tag_scores, expected)


def test_adapters_can_be_added_to_a_prepared_model(make_model):
    peft = pytest.importorskip("peft")
    for settings in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        adapted = peft.get_peft_model(make_model().prepare_for_inference(), peft.LoraConfig(r=2, **settings))
        assert all(parameter.is_contiguous() for parameter in adapted.train().parameters())


def test_many_frames_are_encoded_in_parts(make_model, monkeypatch):
    model = make_model("efficientnet_lite", vision_feature_layers=[1, 2])
    frames = torch.randn(5, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes = []
    model.model.vision_tower.register_forward_hook(lambda _, args, output: sizes.append(len(output.last_hidden_state)))
    with torch.no_grad():
        monkeypatch.setattr("modeling_optsg.towers.FRAMES_AT_ONCE", 4)
        expected = model.model.encode_frames(frames)
        monkeypatch.setattr("modeling_optsg.towers.FRAMES_AT_ONCE", 1000)
        together = model.model.encode_frames(frames)
    assert sizes == [4, 4, 2, 10]
    torch.testing.assert_close(expected.frame_features, together.frame_features)
    torch.testing.assert_close(expected.image_features, together.image_features)
