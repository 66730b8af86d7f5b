"""Attention of the order prompts: against torch's own, and mapped to patches, frames and title tokens."""

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

from modeling_optsg.multimodal_encoder import MemoryLayout, patch_grid


@pytest.fixture(scope="module")
def inputs(tiny_processor):
    """An image with a short title, a video of three frames without one, a long title alone."""
    red, blue = (Image.new("RGB", (40, 32), colour) for colour in ("red", "blue"))
    return tiny_processor(
        images=[red, None, None],
        videos=[None, [red, blue, red], None],
        titles=["a red square", None, "a blue square e - mail"],
    )


def torch_attentions(model, inputs):
    """Computes the prompts' cross-attention with the multi-head attention of torch."""
    attentions = []

    def attend(module, args):
        hidden_states, memory, mask, *_ = args
        reference = torch.nn.MultiheadAttention(
            hidden_states.shape[-1], module.num_heads, batch_first=True, dtype=memory.dtype
        )
        projections = (module.q_proj, module.k_proj, module.v_proj)
        reference.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        reference.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        padding = ~mask[:, 0, 0]
        attentions.append(reference(hidden_states, memory, memory, padding, average_attn_weights=False)[1])

    layers = model.model.prompt_encoder.layers
    hooks = [layer.cross_attention.register_forward_pre_hook(attend) for layer in layers]
    try:
        model.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return attentions


@torch.no_grad()
@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_attentions_equal_those_of_torch(make_model, inputs, vision):
    model = make_model(vision, num_prompt_layers=2)
    assert model.config._attn_implementation == "sdpa"
    outputs = model.model(**inputs, output_attentions=True)
    expected = torch_attentions(model, inputs)
    assert len(outputs.prompt_attentions) == len(expected) == 2
    for attention, reference in zip(outputs.prompt_attentions, expected):
        assert attention.shape == (3, 2, 4, outputs.memory.shape[1])
        torch.testing.assert_close(attention, reference)
        assert not attention.masked_select(~outputs.memory_mask[:, None, None]).any(), "padding has no weight"


@torch.no_grad()
def test_output_attentions_changes_nothing_else(make_model, inputs):
    model = make_model(num_prompt_layers=2)
    assert model.model(**inputs).prompt_attentions is None
    for decoding in ("parallel", "sequential"):
        plain = model.generate(**inputs, decoding=decoding, pad_bias=-5.0)
        with_attentions = model.generate(**inputs, decoding=decoding, pad_bias=-5.0, output_attentions=True)
        assert plain.prompt_attentions is None and plain.memory_layout is None
        assert torch.equal(plain.sequences, with_attentions.sequences)
        assert torch.equal(plain.tag_scores, with_attentions.tag_scores)
    model.set_attn_implementation("eager")
    eager_attentions = model.model(**inputs).prompt_attentions
    for attention, eager in zip(with_attentions.prompt_attentions, eager_attentions, strict=True):
        torch.testing.assert_close(attention, eager)


@torch.no_grad()
def test_attentions_do_not_depend_on_the_batch(make_model, tiny_processor, inputs):
    model = make_model()
    alone = tiny_processor(images=[Image.new("RGB", (40, 32), "red")], titles=["a red square"])
    one = model.model(**alone, output_attentions=True)
    many = model.model(**inputs, output_attentions=True)
    patches, others, title = one.memory_layout.split(one.prompt_attentions[0][0])
    batch_patches, batch_others, batch_title = many.memory_layout.split(many.prompt_attentions[0][0])
    torch.testing.assert_close(batch_patches[..., :1, :, :], patches)
    torch.testing.assert_close(batch_others[..., :1, :], others)
    torch.testing.assert_close(batch_title[..., : title.shape[-1]], title)
    assert not batch_patches[..., 1:, :, :].any() and not batch_title[..., title.shape[-1] :].any()


@torch.no_grad()
@pytest.mark.parametrize("vision, others", [("vit", 1), ("efficientnet_lite", 0), ("CLIP", 1)])
def test_a_patch_depends_most_on_its_own_pixels(make_model, tower_configs, inputs, vision, others):
    """The gradient of a patch's token is largest at the pixels that the layout assigns to the patch."""
    if vision == "CLIP":
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = make_model("vit", vision_config=CLIPVisionConfig(**shape, image_size=32, patch_size=16))
    else:
        model = make_model(vision)
    with torch.enable_grad():
        pixels = torch.randn(1, 2, 3, 32, 32, requires_grad=True)
        features = model.model.encode_frames(pixels).frame_features
        patch_size = getattr(model.config.vision_config, "patch_size", None)
        layout = MemoryLayout.from_features(features, 0, (32, 32), patch_size)
        rows, columns = layout.grid
        assert layout.others == others and layout.frames == 2 and rows == columns
        patches, _, _ = layout.split(torch.arange(features.shape[1] * features.shape[2]))
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
            token = features.flatten(1, 2)[0, patches[1, row, column]]
            [gradient] = torch.autograd.grad(token.pow(2).sum(), pixels, retain_graph=True)
            per_patch = gradient[0, 1].abs().sum(0).unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).sum((1, 3))
            assert not gradient[0, 0].any(), "the other frame has no effect"
            assert per_patch.argmax() == row * columns + column


def test_patch_grid_follows_from_tokens_and_patch_size():
    assert patch_grid(197, (224, 224), 16) == (14, 14)  # [CLS]
    assert patch_grid(16, (64, 64), (16, 16)) == (4, 4)
    assert patch_grid(261, (224, 224), 14) == (16, 16)  # [CLS] and four registers
    assert patch_grid(49, (224, 224), 4) == (7, 7)  # patches merged by later layers
    assert patch_grid(16, (128, 128)) == (4, 4)
    assert patch_grid(8, (64, 128)) == (2, 4)
    assert patch_grid(7, (128, 128)) is None


@torch.no_grad()
def test_features_and_titles_have_no_patch_grid(make_model, inputs):
    model = make_model(None, frame_feature_size=16)
    features = torch.randn(1, 3, 16)
    outputs = model.model(frame_features=features, input_ids=inputs["input_ids"][:1], output_attentions=True)
    patches, others, title = outputs.memory_layout.split(outputs.prompt_attentions[0])
    assert patches is None and others.shape[-2:] == (3, 1) and title.shape[-1] == inputs["input_ids"].shape[1]
    torch.testing.assert_close(others.sum((-1, -2)) + title.sum(-1), torch.ones(1, 2, 4))
    outputs = model.model(input_ids=inputs["input_ids"][:1], output_attentions=True)
    patches, others, title = outputs.memory_layout.split(outputs.prompt_attentions[0])
    assert patches is None and others.numel() == 0
    torch.testing.assert_close(title.sum(-1), torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="values has 3 positions; this memory has"):
        outputs.memory_layout.split(torch.ones(3))
