"""The multimodal encoder: modality dropout, token dropout, and the pooler."""

import pytest
import torch
from torch import nn

from modeling_optsg.layers import pool_tokens
from modeling_optsg.multimodal_encoder import EncoderInputs


@pytest.fixture
def encoder_inputs():
    """Features of three frames of five tokens, and of seven title tokens; some are masked."""
    torch.manual_seed(0)
    return {
        "frame_features": torch.randn(4, 3, 5, 16),
        "frame_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool(),
        "title_features": torch.randn(4, 7, 16),
        "attention_mask": torch.arange(7) < torch.tensor([[7], [3], [2], [0]]),
    }


def test_modality_dropout_never_drops_an_only_modality(make_model):
    encoder = make_model(modality_dropout=1.0, memory_token_dropout=0.9).model.multimodal_encoder
    frames = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool().repeat(200, 1)
    title = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]).bool().repeat(200, 1)
    torch.manual_seed(0)
    kept_frames, kept_title = encoder._hide_at_random([frames, title], None)
    assert (kept_frames.any(1) | kept_title.any(1)).all(), "every example keeps a token"
    assert not (kept_frames & ~frames).any() and not (kept_title & ~title).any()
    has_both = frames.any(1) & title.any(1)
    assert not (kept_frames.any(1) & kept_title.any(1))[has_both].any()
    dropped_titles = (~kept_title.any(1))[has_both].float().mean()
    assert 0.3 < dropped_titles < 0.7, "both modalities are dropped equally often"


def test_token_dropout_does_not_depend_on_the_other_modality(make_model):
    encoder = make_model(memory_token_dropout=0.5).model.multimodal_encoder
    frames, title, seeds = torch.ones(1, 4).bool(), torch.ones(1, 12).bool(), torch.tensor([7])
    _, expected = encoder._hide_at_random([frames, title], seeds)
    missing, kept = encoder._hide_at_random([None, title], seeds)
    assert missing is None and torch.equal(kept, expected) and not kept.all()


def test_nothing_is_dropped_in_evaluation(make_model, encoder_inputs):
    settings = {"modality_dropout": 1.0, "memory_token_dropout": 0.5}
    with torch.no_grad():
        found = make_model(**settings).model.multimodal_encoder(EncoderInputs(**encoder_inputs))
        expected = make_model(modality_dropout=0.0).model.multimodal_encoder(EncoderInputs(**encoder_inputs))
    assert torch.equal(found.memory_mask, expected.memory_mask)
    torch.testing.assert_close((found.memory, found.prompt_pooled), (expected.memory, expected.prompt_pooled))


def test_the_pooler_averages_the_visible_tokens(make_model, encoder_inputs):
    """Tokens that modality dropout hides from the memory are hidden from the pooler too."""
    settings = {"modality_dropout": 1.0, "dropout": 0.0, "pooled_title_ratio": 0.0}
    encoder = make_model(**settings).model.multimodal_encoder.train()
    outputs = encoder(EncoderInputs(**encoder_inputs))
    output, masks = outputs.prompt_pooled, outputs.memory_mask.split([15, 7], dim=1)
    has_both = encoder_inputs["frame_mask"].any(1) & encoder_inputs["attention_mask"].any(1)
    assert has_both.any() and not (masks[0].any(1) & masks[1].any(1)).any()
    pooler = encoder.prompt_pooler
    modalities = (encoder_inputs["frame_features"].flatten(1, 2), encoder_inputs["title_features"])
    for example in range(4):
        pooled = []
        for tokens, mask, norm in zip(modalities, masks, pooler.norms):
            visible = tokens[example][mask[example]]
            pooled.append(norm(visible.mean(0)) if len(visible) else torch.zeros(16))
        expected = pooler.outer(nn.functional.gelu(pooler.inner(torch.cat(pooled))))
        expected = expected + pooler.title_projection(pooled[1])
        torch.testing.assert_close(output[example], expected, rtol=1e-4, atol=1e-5)


def test_without_a_pooler_prompts_depend_on_the_memory_alone(make_model, encoder_inputs):
    model = make_model(use_prompt_pooler=False, use_tag_classifier=False).model
    with torch.no_grad():
        outputs = model(**encoder_inputs)
    assert model.multimodal_encoder.prompt_pooler is None
    assert outputs.prompt_pooler_output is None and outputs.evidence is None
    prompts = outputs.order_prompts
    assert prompts.isfinite().all() and not torch.equal(prompts[0], prompts[1])


@torch.no_grad()
def test_some_training_titles_are_pooled(make_model, encoder_inputs):
    """A pooled title is one token, the mean of the title's tokens."""
    encoder = make_model(pooled_title_ratio=0.5).model.multimodal_encoder
    titles, mask = encoder_inputs["title_features"].repeat(50, 1, 1), encoder_inputs["attention_mask"].repeat(50, 1)
    seeds = torch.arange(200)
    pooled, pooled_mask = encoder._pool_titles_at_random(titles, mask, seeds)
    means = pool_tokens(titles, mask)
    chosen = (pooled[:, 0] != titles[:, 0]).any(dim=1)
    assert 0.35 < chosen[mask.any(dim=1)].float().mean() < 0.65 and not chosen[~mask.any(dim=1)].any()
    assert pooled_mask[chosen].sum(dim=1).eq(1).all() and pooled_mask[chosen, 0].all()
    torch.testing.assert_close(pooled[chosen, 0], means[chosen])
    assert torch.equal(pooled[~chosen], titles[~chosen]) and torch.equal(pooled_mask[~chosen], mask[~chosen])
    again, _ = encoder._pool_titles_at_random(titles[:7], mask[:7], seeds[:7])
    assert torch.equal(again, pooled[:7]), "it follows from the seeds"


@torch.no_grad()
def test_the_memory_hides_frames_that_contradict_the_title(make_model, encoder_inputs):
    encoder = make_model(num_tag_classes=2).model.multimodal_encoder
    gate = encoder.evidence_pooler.gate_outer
    inputs = EncoderInputs(**encoder_inputs, image_features=torch.randn(4, 16))
    frames = encoder_inputs["frame_mask"].repeat_interleave(5, dim=1)
    for bias, is_hidden in ((1e3, [False] * 4), (-1e3, [True, True, False, False])):
        gate.weight.zero_()
        gate.bias.fill_(bias)
        found = encoder(inputs).memory_mask.split([15, 7], dim=1)
        # The last example has no title, the third has no frame.
        assert torch.equal(found[0], frames & ~torch.tensor(is_hidden)[:, None])
        assert torch.equal(found[1], encoder_inputs["attention_mask"])
