"""`prepare_for_inference`: the same results, and undone by training."""

import pytest
import torch

from modeling_optsg import OPTSGForTagGeneration


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


def test_training_undoes_the_preparation(make_model):
    model = make_model().prepare_for_inference()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.train()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_folded_batch_norms_follow_their_weights(make_model, inputs):
    tower = make_model("efficientnet_lite").model.vision_tower
    frames = inputs["pixel_values"].flatten(0, 1)
    with torch.no_grad():
        before = tower(frames).last_hidden_state
        assert torch.equal(tower(frames).last_hidden_state, before)
        tower.head.norm.bias += 1.0
        changed = tower(frames).last_hidden_state
        assert not torch.equal(changed, before)
    torch.testing.assert_close(tower(frames).last_hidden_state, changed)


def test_many_frames_are_encoded_in_parts(make_model, monkeypatch):
    model = make_model("efficientnet_lite", vision_feature_layers=[1, 2])
    frames = torch.randn(5, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.encode_frames(frames)
        monkeypatch.setattr("modeling_optsg.towers.FRAMES_AT_ONCE", 1000)
        together = model.model.encode_frames(frames)
    torch.testing.assert_close(expected.frame_features, together.frame_features)
    torch.testing.assert_close(expected.image_features, together.image_features)
