"""OP-TSG as a whole: batches, precomputed features, losses, gradients, and invalid input."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from modeling_optsg import OPTSGConfig
from modeling_optsg.layers import TransformerLayer

DECODINGS = ("parallel", "sequential")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def batch(tiny_processor, images):
    """An image with a title, a title, an image, and two videos of different length."""
    return dict(
        tiny_processor(
            images=[images[0], None, images[1], None, None],
            videos=[None, None, None, list(images[2:5]), list(images[4:6])],
            titles=["a red square", "创意美食 dog", None, "blue", " "],
            tags=[["red", "square"], ["创意美食"], ["blue", "colour", "red", "e-mail"], ["red"], ["家常菜", "blue"]],
        )
    )


@pytest.fixture(scope="module")
def inputs(batch):
    """The batch without its tags."""
    return {name: batch[name] for name in ("pixel_values", "frame_mask", "input_ids", "attention_mask")}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def losses(outputs):
    return torch.stack([outputs.loss, outputs.generation_loss, outputs.alignment_loss])


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    model.train()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# Batches


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_a_batch_equals_its_examples_one_by_one(make_model, tiny_processor, images, inputs, vision):
    model = make_model(vision)
    singles = [
        tiny_processor(images=images[0], titles="a red square"),
        tiny_processor(titles="创意美食 dog"),
        tiny_processor(images=images[1]),
        tiny_processor(videos=[list(images[2:5])], titles="blue"),
        tiny_processor(videos=[list(images[4:6])]),
    ]
    with torch.no_grad():
        together = model(**inputs).order_prompts
        alone = torch.cat([model(**single).order_prompts for single in singles])
        for decoding in DECODINGS:
            outputs = model.generate(**inputs, decoding=decoding)
            for index, single in enumerate(singles):
                expected = model.generate(**single, decoding=decoding)
                kept = outputs.slots[index] >= 0
                assert torch.equal(outputs.slots[index][kept], expected.slots[0])
                torch.testing.assert_close(outputs.tag_scores[index][kept], expected.tag_scores[0], rtol=1e-3, atol=0)
    assert_close(together, alone)


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens(model, tiny_processor, images):
    tags = [["red", "square"], ["blue"]]
    titles = ["a red square", "dog"]
    with torch.no_grad():
        both = model(**tiny_processor(images=list(images[:2]), titles=titles, tags=tags))
        singles = [
            model(**tiny_processor(images=images[i], titles=titles[i], tags=[own])) for i, own in enumerate(tags)
        ]
    counts = torch.tensor([float(len(single.targets)) for single in singles])
    expected = (torch.stack([single.generation_loss for single in singles]) * counts).sum() / counts.sum()
    assert_close(both.generation_loss, expected)
    assert_close(both.logits, torch.cat([single.logits for single in singles]))
    assert torch.equal(both.assignment, torch.cat([single.assignment for single in singles]))


def test_the_loss_with_seeds_equals_that_of_single_examples(make_model, batch):
    """With example seeds and given step tokens, the random choices of an example do not depend on its batch."""
    settings = {"num_prompts": 16, "pad_slot_ratio": 0.3, "parallel_ratio": 0.5, "modality_dropout": 0.5}
    settings |= {"num_sampled_tokens": 20, "memory_token_dropout": 0.3, "dropout": 0.0, "attention_dropout": 0.0}
    model = make_model(**settings).train()
    for tower in (model.model.vision_tower, model.model.text_tower):
        tower.eval()
    special_tokens = torch.tensor([model.config.tag_pad_token_id, model.config.tag_sep_token_id])
    step_tokens = torch.cat([batch["labels"][batch["labels"] >= 0], special_tokens]).unique()
    others = torch.arange(0, 200, 2)
    step = {"step_tokens": step_tokens, "sampled_tokens": others[~torch.isin(others, step_tokens)]}
    seeds = torch.arange(len(batch["labels"])) + 11
    whole = model(**batch, **step, example_seeds=seeds)
    total, count = 0.0, 0.0
    for index in range(len(seeds)):
        alone = {name: value[index : index + 1] for name, value in batch.items()}
        outputs = model(**alone, **step, example_seeds=seeds[index : index + 1])
        # The tokens of tags, and all [PAD]-aligned slots.
        positions = (outputs.targets != model.config.tag_pad_token_id).sum() + (outputs.assignment < 0).sum()
        total, count = total + outputs.generation_loss * positions, count + positions
    assert_close(whole.generation_loss, total / count)
    assert not torch.isclose(whole.generation_loss, model(**batch, **step, example_seeds=seeds + 5).generation_loss)


def test_the_content_of_padding_has_no_effect(model, batch):
    padded = {name: value.clone() for name, value in batch.items()}
    padded["pixel_values"] = nn.functional.pad(batch["pixel_values"], (0, 0) * 3 + (0, 1), value=9.0)
    padded["frame_mask"] = nn.functional.pad(batch["frame_mask"], (0, 1))
    padded["pixel_values"][padded["frame_mask"] == 0] = 9.0
    padded["input_ids"] = nn.functional.pad(batch["input_ids"], (0, 3), value=7)
    padded["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 3))
    padded["input_ids"][padded["attention_mask"] == 0] = 7
    padded["tag_text_input_ids"][padded["tag_text_attention_mask"] == 0] = 7
    padded["labels"] = nn.functional.pad(batch["labels"], (0, 2, 1, 1), value=-100)
    for name in ("tag_text_input_ids", "tag_text_attention_mask"):
        padded[name] = nn.functional.pad(padded[name], (0, 0, 1, 1))
    for decoding in DECODINGS:
        with torch.no_grad():
            assert_close(losses(model(**padded, decoding=decoding)), losses(model(**batch, decoding=decoding)))


# Inputs


def test_precomputed_frame_features_equal_their_pixels(model, batch):
    pixels, mask = batch["pixel_values"], batch["frame_mask"]
    features = model.model.encode_frames(pixels, mask).frame_features
    assert features.shape == (5, 3, 5, 16), "a ViT of four patches and [CLS]"
    assert_close(features[mask.bool()], model.model.encode_frames(pixels).frame_features[mask.bool()])
    precomputed = {name: value for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        assert_close(losses(model(**precomputed, frame_features=features)), losses(model(**batch)))


def test_precomputed_title_features_equal_their_titles(model, batch):
    features = model.model.encode_text(batch["input_ids"], batch["attention_mask"])
    precomputed = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        assert_close(losses(model(**precomputed, title_features=features)), losses(model(**batch)))


def test_one_vector_per_frame_is_a_frame_of_one_token(model, batch):
    features = torch.randn(5, 3, 16)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        expected = model(**rest, frame_features=features[:, :, None])
        assert_close(losses(model(**rest, frame_features=features)), losses(expected))


def test_without_masks_all_tokens_are_real(model, batch):
    pixels, titles = batch["pixel_values"][3:4], batch["input_ids"][:1]
    with torch.no_grad():
        expected = model(pixels, frame_mask=torch.ones(1, 3), input_ids=titles, attention_mask=torch.ones_like(titles))
        assert_close(model(pixels, input_ids=titles).order_prompts, expected.order_prompts)


def test_the_order_of_frames_matters(model, batch):
    video = batch["pixel_values"][3:4]
    with torch.no_grad():
        assert not torch.allclose(model(video).order_prompts, model(video.flip(1)).order_prompts)


def test_a_video_of_masked_frames_equals_no_video(model, batch):
    titles = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    with torch.no_grad():
        masked = model(batch["pixel_values"][3:4], frame_mask=torch.zeros(1, 3), **titles)
        assert_close(masked.order_prompts, model(**titles).order_prompts)


def test_a_tag_is_embedded_by_the_mean_of_its_tokens(model, tiny_processor):
    encoded = tiny_processor.encode_tags(["red", "创意美食"])
    features = model.model.embed_tags(encoded["tag_text_input_ids"], encoded["tag_text_attention_mask"])
    for index, tag in enumerate(["red", "创意美食"]):
        alone = tiny_processor.encode_tags([tag])["tag_text_input_ids"]
        assert_close(features[index], model.model.text_tower(alone).last_hidden_state[0].mean(0))


# Training


@pytest.mark.parametrize(("ratio", "decoding"), [(0.0, "sequential"), (1.0, "parallel")])
def test_parallel_ratio_chooses_the_mask_in_training(make_model, batch, ratio, decoding):
    model = make_model(parallel_ratio=ratio, dropout=0.0, classifier_dropout=0.0, modality_dropout=0.0)
    expected = model(**batch, decoding=decoding).loss
    assert_close(model(**batch).loss, model(**batch, decoding="parallel").loss)
    model.train()
    # The towers have their own dropout.
    model.model.text_tower.eval()
    model.model.vision_tower.eval()
    assert_close(model(**batch).loss, expected)


def test_sampled_pad_slots_count_for_all_pad_slots(make_model, batch):
    model = make_model(pad_slot_ratio=0.3, num_prompts=16).train()
    pad = model.config.tag_pad_token_id
    num_tag_tokens = int((make_model(num_prompts=16)(**batch).targets != pad).sum())
    num_sampled, num_pad_slots = 0, 0
    for seed in range(40):
        torch.manual_seed(seed)
        outputs = model(**batch)
        is_pad = outputs.targets == pad
        token_losses = nn.functional.cross_entropy(outputs.logits.float(), outputs.targets, reduction="none")
        pad_slots = (outputs.assignment < 0).sum(dim=1)
        sampled = (pad_slots * 0.3).round().clamp(min=1)
        assert int(is_pad.sum()) == int(sampled.sum()) and int((~is_pad).sum()) == num_tag_tokens
        # Slots are laid out example by example; each sampled slot stands for several of its own example.
        weights = (pad_slots / sampled).repeat_interleave(sampled.long())
        expected = token_losses[~is_pad].sum() + (token_losses[is_pad] * weights).sum()
        assert_close(outputs.generation_loss, expected / (num_tag_tokens + pad_slots.sum()))
        num_sampled, num_pad_slots = num_sampled + int(is_pad.sum()), num_pad_slots + int(pad_slots.sum())
    assert num_sampled / num_pad_slots == pytest.approx(0.3, abs=0.03)
    assert int((model.eval()(**batch).targets == pad).sum()) == int(pad_slots.sum()), "all of them in evaluation"


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_every_parameter_has_a_gradient(make_model, batch, vision):
    model = make_model(vision)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    assert all("tower.pooler." in name for name in frozen), "the model reads only the towers' tokens"
    for missing in ((), ("pixel_values", "frame_mask"), ("input_ids", "attention_mask")):
        kept = slice(3, 4) if missing else slice(None)
        own = {name: value[kept] for name, value in batch.items() if name not in missing}
        found = gradients(model, own)
        # A tower cannot run without an input.
        absent = {name for name in trained if "vision_tower" in name and "pixel_values" in missing}
        assert found.keys() == trained - absent
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_gradient_checkpointing_changes_no_gradient(make_model, batch):
    model = make_model()
    expected = gradients(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    checkpointed = [m for m in model.modules() if isinstance(m, TransformerLayer) and m.gradient_checkpointing]
    assert len(checkpointed) == 4, "every layer of the three modules"
    actual = gradients(model, batch)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, expected[name])


def test_frozen_towers_have_no_gradient(make_model, batch):
    model = make_model()
    model.model.vision_tower.requires_grad_(False)
    model.model.text_tower.requires_grad_(False)
    found = gradients(model, batch)
    assert not any("tower" in name for name in found)
    assert "tag_alignment.tag_projection.weight" in found


# Attention


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(make_model, batch, inputs):
    model = make_model()
    assert model.config._attn_implementation == "sdpa"
    expected = {d: (losses(model(**batch, decoding=d)), model.generate(**inputs, decoding=d)) for d in DECODINGS}
    assert model.model(**inputs).prompt_attentions is None
    model.set_attn_implementation("eager")
    for decoding, (expected_losses, expected_tags) in expected.items():
        assert_close(losses(model(**batch, decoding=decoding)), expected_losses)
        tags = model.generate(**inputs, decoding=decoding)
        assert torch.equal(tags.sequences, expected_tags.sequences)
        torch.testing.assert_close(tags.tag_scores, expected_tags.tag_scores, rtol=1e-3, atol=0)
    outputs = model.model(**inputs)
    [attention] = outputs.prompt_attentions
    assert attention.shape == (5, 2, 4, 3 * 5 + inputs["input_ids"].shape[1])
    assert_close(attention.sum(-1), torch.ones(5, 2, 4))
    assert not attention.masked_select(~outputs.memory_mask[:, None, None]).any()


# Invalid input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_features": torch.zeros(5, 3, 16)}, "pixel_values or frame_features, not both"),
        ({"title_features": torch.zeros(5, 4, 16)}, "input_ids or title_features, not both"),
        (
            {"pixel_values": torch.zeros(5, 3, 32, 32)},
            r"\(5, 3, 32, 32\); expected \[batch, frames, 3, height, width\]",
        ),
        ({"pixel_values": None, "frame_features": torch.zeros(5, 16)}, r"frame_features.*\(5, 16\)"),
        ({"pixel_values": None, "frame_features": torch.zeros(5, 3, 7)}, "width 7.*frame_feature_size=16"),
        ({"pixel_values": torch.zeros(5, 5, 3, 32, 32), "frame_mask": None}, "5 frames.*max_frames=4"),
        ({"frame_mask": torch.zeros(5, 3)}, r"Examples \[2, 4\] .* neither a frame nor a title"),
        ({"pixel_values": None, "input_ids": None}, "Nothing to encode"),
        ({"decoding": "serial"}, "decoding='serial'"),
        ({"labels": torch.full((5, 4, 9), 2)}, "9 tokens.*max_tag_tokens=8"),
        ({"labels": torch.zeros(5, 4)}, r"labels has shape \(5, 4\); expected \[batch, max tags"),
        ({"labels": torch.full((5, 4, 8), -100)}, "No example of the batch has a tag"),
        ({"labels": None}, "tag_text_input_ids come without labels.*label_smoothing_factor"),
        ({"negative_input_ids": torch.full((5, 1, 8), 9)}, "negative_input_ids need negative_features"),
        ({"tag_text_input_ids": None}, "labels.*tag_text_input_ids"),
        ({"labels": torch.arange(2, 7).view(1, 5, 1).expand(5, -1, -1)}, "5 tags.*num_prompts=4"),
    ],
)
def test_invalid_input_is_reported(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model(**(batch | change))


def test_a_model_without_vision_tower_asks_for_frame_features(make_model):
    model = make_model(None, frame_feature_size=6)
    with pytest.raises(ValueError, match="no vision tower; pass frame_features"):
        model(torch.zeros(1, 1, 3, 32, 32))
    assert model(frame_features=torch.zeros(1, 2, 6)).order_prompts.shape == (1, 4, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 18, "num_attention_heads": 4}, "hidden_size=18.*num_attention_heads=4"),
        ({"frame_feature_size": 5}, "frame_feature_size=5 must equal vision_config.hidden_size=16"),
        ({"vision_config": None}, "Set frame_feature_size"),
        ({"tag_pad_token_id": 1}, "must differ"),
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"max_tag_tokens": 0}, "max_tag_tokens=0"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"parallel_ratio": -1.0}, "parallel_ratio=-1.0"),
        ({"num_sampled_tokens": -1}, "num_sampled_tokens=-1"),
        ({"asl_margin": 1.0}, r"asl_margin=1.0 must lie in \[0, 1\)"),
    ],
)
def test_an_invalid_configuration_is_reported(tower_configs, settings, message):
    with pytest.raises(ValueError, match=message):
        OPTSGConfig(**({"vision_config": tower_configs["vit"], "text_config": tower_configs["bert"]} | settings))
