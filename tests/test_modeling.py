"""The rooms of the model and how they are wired: shapes, masks, independence of examples, gradients, bad input."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from modeling_optsg import OPTSGConfig
from modeling_optsg.layers import TransformerLayer
from modeling_optsg.seeded_random import PURPOSES, seeded_uniform
from modeling_optsg.tag_decoder import lay_out_slots

PAD, SEP = 0, 1


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
def examples(batch):
    """The batch without its tags."""
    return {k: v for k, v in batch.items() if k in ("pixel_values", "frame_mask", "input_ids", "attention_mask")}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def losses(outputs):
    return torch.stack([outputs.loss, outputs.generation_loss, outputs.alignment_loss])


# Layers


def copy_into_torch(layer, reference):
    """Our weights, in the layout of torch's own transformer layers."""
    attentions = {"self_attn": layer.self_attention}
    norms = [layer.self_norm, layer.feed_forward_norm]
    if hasattr(layer, "cross_attention"):
        attentions["multihead_attn"] = layer.cross_attention
        norms.insert(1, layer.cross_norm)
    for name, ours in attentions.items():
        theirs = getattr(reference, name)
        for kind in ("weight", "bias"):
            joined = torch.cat([getattr(part, kind) for part in (ours.query, ours.key, ours.value)])
            getattr(theirs, f"in_proj_{kind}").data.copy_(joined)
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    for number, norm in enumerate(norms, start=1):
        getattr(reference, f"norm{number}").load_state_dict(norm.state_dict())
    reference.linear1.load_state_dict(layer.feed_forward[0].state_dict())
    reference.linear2.load_state_dict(layer.feed_forward[2].state_dict())
    return reference.eval()


@pytest.mark.parametrize("cross_attention", [False, True])
def test_a_layer_equals_torchs_pre_norm_layer(model, cross_attention):
    torch.manual_seed(0)
    layer = TransformerLayer(model.config, cross_attention).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    kind = nn.TransformerDecoderLayer if cross_attention else nn.TransformerEncoderLayer
    reference = copy_into_torch(layer, kind(16, 2, 32, activation="gelu", batch_first=True, norm_first=True))
    states, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    seen, memory_seen = torch.ones(5, 5).tril().bool(), torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool()
    with torch.no_grad():
        if cross_attention:
            actual, _ = layer(states, seen, memory, memory_seen[:, None, None])
            expected = reference(states, memory, ~seen, memory_key_padding_mask=~memory_seen)
        else:
            actual, _ = layer(states, seen)
            expected = reference(states, ~seen)
    assert_close(actual, expected)


def test_slots_are_laid_end_to_end_in_prompt_order():
    torch.manual_seed(0)
    lengths = torch.tensor([2, 1, 4, 3])
    tokens = torch.randint(2, 9, (4, 5))
    assignment = torch.tensor([[2, -1, 0], [-1, -1, -1], [1, 3, -1], [3, 2, 0]])
    sequence = lay_out_slots(assignment, tokens, lengths, PAD, SEP)
    rows = []
    for example in assignment.tolist():
        row = []
        for slot, tag in enumerate(example):
            written = [] if tag < 0 else tokens[tag, : lengths[tag]].tolist()
            targets = [*written, SEP] if written else [PAD]
            for position, target in enumerate(targets):
                row.append((slot, position, target, written[position - 1] if position else None))
        rows.append(row)
    assert sequence.slot.shape == (4, max(map(len, rows)))
    for index, row in enumerate(rows):
        count = len(row)
        assert sequence.valid[index].tolist() == [True] * count + [False] * (sequence.slot.shape[1] - count)
        slots, positions, targets, read = zip(*row)
        assert sequence.slot[index, :count].tolist() == [*slots]
        assert sequence.position[index, :count].tolist() == [*positions]
        assert sequence.targets[index, :count].tolist() == [*targets]
        assert sequence.targets[index, count:].eq(-100).all()
        inside = [(token, expected) for token, expected in zip(sequence.input_ids[index].tolist(), read) if expected]
        assert all(token == expected for token, expected in inside)


def test_sequential_positions_see_all_before_them_and_parallel_ones_their_own_slot():
    assignment = torch.tensor([[0, -1, 1], [1, 0, 1]])
    sequence = lay_out_slots(assignment, torch.full((2, 2), 5), torch.tensor([1, 2]), PAD, SEP)
    for parallel in (torch.tensor([True, False]), torch.tensor([False, True])):
        mask = sequence.attention_mask(parallel)[:, 0]
        for example in range(2):
            slots = sequence.slot[example].tolist()
            for row, row_slot in enumerate(slots):
                for column, column_slot in enumerate(slots):
                    visible = column <= row and (row_slot == column_slot or not parallel[example])
                    assert mask[example, row, column] == visible


def test_prompt_and_token_at_the_first_position_are_not_mixed(model):
    """[PAD]'s embedding, or anything else in a prompt's place, is never read."""
    prompts, places = torch.randn(3, 16), torch.zeros(3, dtype=torch.long)
    tokens = torch.tensor([PAD, SEP, 9])
    first_place = model.config.hidden_size**0.5 * model.tag_decoder.positions.weight[0]
    assert_close(model.tag_decoder.embed(prompts, places, tokens), prompts + first_place.expand(3, -1))


# Examples


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_a_batch_equals_its_examples_one_by_one(make_model, tiny_processor, images, examples, vision):
    model = make_model(vision)
    singles = [
        tiny_processor(images=images[0], titles="a red square"),
        tiny_processor(titles="创意美食 dog"),
        tiny_processor(images=images[1]),
        tiny_processor(videos=[list(images[2:5])], titles="blue"),
        tiny_processor(videos=[list(images[4:6])]),
    ]
    with torch.no_grad():
        together = model(**examples).order_prompts
        alone = torch.cat([model(**single).order_prompts for single in singles])
        for decoding in ("parallel", "sequential"):
            outputs = model.generate(**examples, decoding=decoding)
            for index, single in enumerate(singles):
                expected = model.generate(**single, decoding=decoding)
                kept = outputs.slots[index] >= 0
                assert torch.equal(outputs.slots[index][kept], expected.slots[0])
                torch.testing.assert_close(outputs.tag_scores[index][kept], expected.tag_scores[0], rtol=1e-3, atol=0)
    assert_close(together, alone)


def test_the_loss_of_a_batch_is_the_mean_over_all_written_tokens(model, tiny_processor, images):
    tags = [["red", "square"], ["blue"]]
    titles = ["a red square", "dog"]
    with torch.no_grad():
        both = model(**tiny_processor(images=list(images[:2]), titles=titles, tags=tags))
        # The same candidates in the same order, so that the alignment's softmax is the same.
        encoded = tiny_processor.encode_tags(["red", "square", "blue"])
        singles = [
            model(**tiny_processor(images=images[i], titles=titles[i]), **encoded, labels=labels)
            for i, labels in enumerate([torch.tensor([[0, 1]]), torch.tensor([[2]])])
        ]
    counts = torch.tensor([float(len(single.targets)) for single in singles])
    expected = (torch.stack([single.generation_loss for single in singles]) * counts).sum() / counts.sum()
    assert_close(both.generation_loss, expected)
    assert_close(both.logits, torch.cat([single.logits for single in singles]))
    assert torch.equal(both.assignment, torch.cat([single.assignment for single in singles]))


def test_what_padding_holds_changes_nothing(model, batch):
    padded = {name: value.clone() for name, value in batch.items()}
    padded["pixel_values"] = nn.functional.pad(batch["pixel_values"], (0, 0) * 3 + (0, 1), value=9.0)
    padded["frame_mask"] = nn.functional.pad(batch["frame_mask"], (0, 1))
    padded["pixel_values"][padded["frame_mask"] == 0] = 9.0
    padded["input_ids"] = nn.functional.pad(batch["input_ids"], (0, 3), value=7)
    padded["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 3))
    padded["input_ids"][padded["attention_mask"] == 0] = 7
    padded["tag_text_input_ids"][padded["tag_text_attention_mask"] == 0] = 7
    longest = batch["tag_input_ids"].shape[1]
    padded["tag_input_ids"][torch.arange(longest) >= batch["tag_lengths"][:, None]] = 7
    padded["labels"] = nn.functional.pad(batch["labels"], (1, 1), value=-100)
    for decoding in ("parallel", "sequential"):
        with torch.no_grad():
            assert_close(losses(model(**padded, decoding=decoding)), losses(model(**batch, decoding=decoding)))


def test_frame_features_equal_the_pixels_they_were_made_of(model, batch):
    pixels, mask = batch["pixel_values"], batch["frame_mask"]
    features = model.model.encode_frames(pixels, mask)
    assert features.shape == (5, 3, 5, 16), "a ViT of four patches and [CLS]"
    assert_close(features[mask.bool()], model.model.encode_frames(pixels)[mask.bool()])
    precomputed = {name: value for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        assert_close(losses(model(**precomputed, frame_features=features)), losses(model(**batch)))


def test_one_vector_a_frame_is_a_frame_of_one_token(model, batch):
    features = torch.randn(5, 3, 16)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        expected = model(**rest, frame_features=features[:, :, None])
        assert_close(losses(model(**rest, frame_features=features)), losses(expected))


def test_title_features_equal_the_titles_they_were_made_of(model, batch):
    features = model.model.encode_text(batch["input_ids"], batch["attention_mask"])
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        assert_close(losses(model(**rest, title_features=features)), losses(model(**batch)))


def test_without_masks_everything_is_real(model, batch):
    pixels, titles = batch["pixel_values"][3:4], batch["input_ids"][:1]
    with torch.no_grad():
        expected = model(pixels, frame_mask=torch.ones(1, 3), input_ids=titles, attention_mask=torch.ones_like(titles))
        assert_close(model(pixels, input_ids=titles).order_prompts, expected.order_prompts)


def test_the_order_of_frames_matters_and_a_masked_batch_of_frames_is_no_frame(model, batch):
    video = batch["pixel_values"][3:4]
    titles = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    with torch.no_grad():
        assert not torch.allclose(model(video).order_prompts, model(video.flip(1)).order_prompts)
        hidden = model(video, frame_mask=torch.zeros(1, 3), **titles)
        assert_close(hidden.order_prompts, model(**titles).order_prompts)


def test_tags_are_embedded_by_the_mean_of_their_own_tokens(model, tiny_processor):
    encoded = tiny_processor.encode_tags(["red", "创意美食"])
    features = model.model.embed_tags(encoded["tag_text_input_ids"], encoded["tag_text_attention_mask"])
    for index, tag in enumerate(["red", "创意美食"]):
        alone = tiny_processor.encode_tags([tag])["tag_text_input_ids"]
        assert_close(features[index], model.model.text_tower(alone).last_hidden_state[0].mean(0))


# Masking in training


def test_modality_dropout_never_takes_an_examples_only_modality(make_model):
    encoder = make_model(modality_dropout=1.0, memory_token_dropout=0.9).model.multimodal_encoder
    frames = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool().repeat(200, 1)
    titles = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]).bool().repeat(200, 1)
    torch.manual_seed(0)
    kept_frames, kept_titles = encoder._hide_at_random([frames, titles], [0, 1])
    assert (kept_frames | kept_titles.any(1, keepdim=True)).any(1).all(), "something is left of every example"
    assert not (kept_frames & ~frames).any() and not (kept_titles & ~titles).any()
    both = frames.any(1) & titles.any(1)
    assert not (kept_frames.any(1) & kept_titles.any(1))[both].any()
    lost_titles = (~kept_titles.any(1))[both].float().mean()
    assert 0.3 < lost_titles < 0.7, "either modality is taken as often"


def test_tokens_are_hidden_whatever_other_modality_the_batch_has(make_model):
    encoder = make_model(memory_token_dropout=0.5).model.multimodal_encoder
    frames, titles, seeds = torch.ones(1, 4).bool(), torch.ones(1, 12).bool(), torch.tensor([7])
    beside = encoder._hide_at_random([frames, titles], [0, 1], seeds)[1]
    assert torch.equal(encoder._hide_at_random([titles], [1], seeds)[0], beside) and not beside.all()


def test_the_summary_is_the_mean_of_what_may_be_looked_at(make_model, batch):
    """What modality dropout hides from the memory is hidden from the summary too: the way is short, not secret."""
    model = make_model(modality_dropout=1.0, dropout=0.0).model
    frames, titles = model.read(
        batch["pixel_values"], None, batch["frame_mask"], batch["input_ids"], None, batch["attention_mask"]
    )
    encoder = model.multimodal_encoder.train()
    both = batch["frame_mask"].any(1) & batch["attention_mask"].any(1)
    seen = {}
    hook = encoder.prompt_pooler.register_forward_hook(
        lambda module, args, output: seen.update(masks=args[1], out=output)
    )
    encoder(frames, batch["frame_mask"], titles, batch["attention_mask"])
    hook.remove()
    frame_mask, title_mask = seen["masks"]
    assert both.any() and not (frame_mask.any(1) & title_mask.any(1)).any()
    summary = encoder.prompt_pooler
    for example in range(len(frames)):
        pooled = []
        for tokens, mask, norm in zip((frames.flatten(1, 2), titles), (frame_mask, title_mask), summary.norms):
            real = tokens[example][mask[example]]
            pooled.append(norm(real.mean(0)) if len(real) else torch.zeros(tokens.shape[-1]))
        expected = summary.outer(nn.functional.gelu(summary.inner(torch.cat(pooled))))
        expected = expected + summary.title_projection(pooled[1])
        assert_close(seen["out"][example], expected)


def test_without_a_summary_prompts_know_examples_from_the_memory_alone(make_model, batch):
    model = make_model(use_prompt_pooler=False, use_tag_classifier=False)
    assert model.model.multimodal_encoder.prompt_pooler is None
    assert torch.isfinite(model(**batch).loss)


def test_nothing_is_hidden_in_evaluation(make_model, batch):
    hiding = make_model(modality_dropout=1.0, memory_token_dropout=0.5)
    plain = make_model(modality_dropout=0.0)
    with torch.no_grad():
        assert_close(hiding(**batch).loss, plain(**batch).loss)


def test_parallel_share_divides_the_examples_in_training(make_model, batch):
    still = {"dropout": 0.0, "classifier_dropout": 0.0, "modality_dropout": 0.0}
    for share, decoding in ((0.0, "sequential"), (1.0, "parallel")):
        model = make_model(parallel_ratio=share, **still)
        expected = model(**batch, decoding=decoding).loss
        assert_close(model(**batch).loss, model(**batch, decoding="parallel").loss)
        model.train()
        # The towers keep dropout of their own.
        model.model.text_tower.eval()
        model.model.vision_tower.eval()
        assert_close(model(**batch).loss, expected)


# Gradients and attention


def test_eager_and_sdpa_attention_agree_and_eager_shows_where_prompts_look(make_model, batch, examples):
    model = make_model()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        sdpa = [losses(model(**batch, decoding=decoding)) for decoding in ("parallel", "sequential")]
        tags = [model.generate(**examples, decoding=decoding) for decoding in ("parallel", "sequential")]
        assert model.model(**examples).prompt_attentions is None
        model.set_attn_implementation("eager")
        for decoding, expected, written in zip(("parallel", "sequential"), sdpa, tags):
            assert_close(losses(model(**batch, decoding=decoding)), expected)
            outputs = model.generate(**examples, decoding=decoding)
            assert torch.equal(outputs.sequences, written.sequences)
            torch.testing.assert_close(outputs.tag_scores, written.tag_scores, rtol=1e-3, atol=0)
        outputs = model.model(**examples)
    [attention] = outputs.prompt_attentions
    memory_length = 3 * 5 + examples["input_ids"].shape[1]
    assert attention.shape == (5, 2, 4, memory_length)
    assert_close(attention.sum(-1), torch.ones(5, 2, 4))
    assert not attention.masked_select(~outputs.memory_mask[:, None, None]).any()


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    model.train()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_every_parameter_gets_a_gradient(make_model, batch, vision):
    model = make_model(vision)
    found = gradients(model, batch)
    without = {name for name, _ in model.named_parameters()} - found.keys()
    assert all("tower.pooler." in name for name in without), "only what towers compute beside their tokens"
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_gradient_checkpointing_changes_no_gradient(make_model, batch):
    model = make_model()
    expected = gradients(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    checkpointed = [m for m in model.modules() if isinstance(m, TransformerLayer) and m.gradient_checkpointing]
    assert len(checkpointed) == 4, "every layer of the three rooms"
    actual = gradients(model, batch)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, expected[name])


def test_frozen_towers_need_no_gradient(make_model, batch):
    model = make_model()
    model.model.vision_tower.requires_grad_(False)
    model.model.text_tower.requires_grad_(False)
    found = gradients(model, batch)
    assert not any("tower" in name for name in found)
    assert "tag_alignment.tag_projection.weight" in found


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_features": torch.zeros(5, 3, 16)}, "pixel_values or frame_features, not both"),
        ({"title_features": torch.zeros(5, 4, 16)}, "input_ids or title_features, not both"),
        (
            {"pixel_values": torch.zeros(5, 3, 32, 32)},
            r"must be \[batch, frames, 3, height, width\].*\(5, 3, 32, 32\)",
        ),
        ({"pixel_values": None, "frame_features": torch.zeros(5, 16)}, r"frame_features.*\(5, 16\)"),
        ({"pixel_values": None, "frame_features": torch.zeros(5, 3, 7)}, "7 wide.*frame_feature_size=16"),
        ({"pixel_values": torch.zeros(5, 5, 3, 32, 32), "frame_mask": None}, "5 frames.*max_frames=4"),
        ({"frame_mask": torch.zeros(5, 3)}, r"Examples \[2, 4\] .* neither a frame nor a title"),
        ({"pixel_values": None, "input_ids": None}, "Nothing to look at"),
        ({"decoding": "serial"}, "decoding='serial'"),
        ({"tag_input_ids": torch.full((6, 9), 2)}, "9 tokens.*max_tag_tokens=8"),
        ({"tag_text_input_ids": None}, "labels.*tag_text_input_ids"),
        ({"tag_input_ids": None}, "labels.*tag_input_ids"),
        ({"tag_lengths": None}, "labels.*tag_lengths"),
        ({"labels": torch.tensor([[0, 1, 2, 3, 4]] * 5)}, "5 tags.*num_prompts=4"),
    ],
)
def test_what_the_model_cannot_read_is_named(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model(**(batch | change))


def test_a_model_without_a_vision_tower_says_what_it_reads(make_model):
    model = make_model(None, frame_feature_size=6)
    with pytest.raises(ValueError, match="no vision tower: give frame_features"):
        model(torch.zeros(1, 1, 3, 32, 32))
    assert model(frame_features=torch.zeros(1, 2, 6)).order_prompts.shape == (1, 4, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 18, "num_attention_heads": 4}, "hidden_size=18.*num_attention_heads=4"),
        ({"frame_feature_size": 5}, "frame_feature_size=5 must equal vision_config.hidden_size=16"),
        ({"vision_config": None}, "frame_feature_size is needed"),
        ({"tag_pad_token_id": 1}, "must differ"),
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"max_tag_tokens": 0}, "max_tag_tokens=0"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"parallel_ratio": -1.0}, "parallel_ratio=-1.0"),
    ],
)
def test_a_configuration_that_makes_no_model_is_named(tower_configs, settings, message):
    with pytest.raises(ValueError, match=message):
        OPTSGConfig(**({"vision_config": tower_configs["vit"], "text_config": tower_configs["bert"]} | settings))


# Cheap training


def test_few_empty_slots_are_written_and_count_for_all(make_model, batch):
    model = make_model(pad_slot_ratio=0.3, num_prompts=16).train()
    full = make_model(num_prompts=16)(**batch)
    written, empty = 0, 0
    for seed in range(40):
        torch.manual_seed(seed)
        outputs = model(**batch)
        pads = outputs.targets == model.config.tag_pad_token_id
        losses = torch.nn.functional.cross_entropy(outputs.logits.float(), outputs.targets, reduction="none")
        empties = (outputs.assignment < 0).sum(dim=1)
        chosen = (empties * 0.3).round().clamp(min=1)
        assert int(pads.sum()) == int(chosen.sum())
        # Slots are laid out example by example, and each example's empty ones stand for all of its own.
        stands_for = (empties / chosen).repeat_interleave(chosen.long())
        expected = losses[~pads].sum() + (losses[pads] * stands_for).sum()
        assert_close(outputs.generation_loss, expected / ((~pads).sum() + empties.sum()))
        # Every tag is written all the same.
        assert (~pads).sum() == (full.targets != model.config.tag_pad_token_id).sum()
        written, empty = written + int(pads.sum()), empty + int((outputs.assignment < 0).sum())
    assert written / empty == pytest.approx(0.3, abs=0.03)
    # In evaluation all of them.
    assert int((model.eval()(**batch).targets == 0).sum()) == int((outputs.assignment < 0).sum())


def test_an_example_s_draws_follow_from_its_seed_whatever_the_batch():
    seeds = torch.tensor([3, 2**55 + 1, 4, 3])
    draws = {purpose: seeded_uniform(purpose, (4, 5000), seeds, seeds.device) for purpose in PURPOSES}
    for purpose, own in draws.items():
        assert torch.equal(own[0], own[3]) and not torch.equal(own[0], own[2])
        assert torch.equal(seeded_uniform(purpose, (2, 9), seeds[1:3], seeds.device), own[1:3, :9])
        assert 0 <= own.min() and own.max() < 1
        # Each tenth of [0, 1) as often.
        shares = torch.histc(own, bins=10, min=0, max=1) / own.numel()
        assert (shares - 0.1).abs().max() < 0.01
    rows = torch.stack([own[:3].flatten() for own in draws.values()])
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.05, "purposes are independent"
    # Seeds that follow one another too.
    near = seeded_uniform("parallel mask", (20_000,), torch.arange(20_000), torch.device("cpu"))
    assert (
        abs(float(near.mean()) - 0.5) < 0.01 and abs(torch.corrcoef(torch.stack([near[1:], near[:-1]]))[0, 1]) < 0.02
    )


def test_a_batch_s_losses_are_those_of_its_examples_alone(make_model, batch):
    """With seeds of their own and the step's tokens, examples do not see what company they are in."""
    settings = {"num_prompts": 16, "pad_slot_ratio": 0.3, "parallel_ratio": 0.5, "modality_dropout": 0.5}
    settings |= {"num_sampled_tokens": 20, "memory_token_dropout": 0.3, "dropout": 0.0, "attention_dropout": 0.0}
    model = make_model(**settings).train()
    for tower in (model.model.vision_tower, model.model.text_tower):
        tower.eval()
    own = torch.arange(0, 200, 2)
    step = {"step_tokens": batch["tag_input_ids"].unique(), "sampled_tokens": own}
    step["step_tokens"] = torch.cat([step["step_tokens"], torch.tensor([0, model.config.tag_sep_token_id])]).unique()
    step["sampled_tokens"] = own[~torch.isin(own, step["step_tokens"])]
    seeds = torch.arange(len(batch["labels"])) + 11
    whole = model(**batch, **step, example_seeds=seeds)
    examples = ("pixel_values", "frame_mask", "input_ids", "attention_mask", "labels")
    total, count = 0.0, 0.0
    for index in range(len(seeds)):
        alone = batch | {name: batch[name][index : index + 1] for name in examples if name in batch}
        outputs = model(**alone, **step, example_seeds=seeds[index : index + 1])
        # Written tokens, and every empty slot.
        positions = (outputs.targets != model.config.tag_pad_token_id).sum() + (outputs.assignment < 0).sum()
        total, count = total + outputs.generation_loss * positions, count + positions
    assert_close(whole.generation_loss, total / count)
    assert not torch.isclose(whole.generation_loss, model(**batch, **step, example_seeds=seeds + 5).generation_loss)


@torch.no_grad()
def test_sampled_tokens_stand_for_the_whole_vocabulary(make_model):
    model = make_model(num_sampled_tokens=60).train()
    vocabulary = model.config.tag_vocab_size
    hidden_states, targets = torch.randn(5, 16), torch.tensor([7, 3, 7, 200, 12])
    full = torch.nn.functional.linear(hidden_states, model.tag_decoder.token_embeddings.weight, model.lm_head.bias)
    sums = []
    for _ in range(600):
        logits, columns, tokens = model._token_logits(hidden_states, targets)
        assert logits.shape == (5, 4 + 60) and len(tokens.unique()) == 64
        assert torch.equal(tokens[columns], targets)
        # The targets' own logits are what they are.
        assert_close(logits[torch.arange(5), columns], full[torch.arange(5), targets])
        sums.append(logits.exp().sum(dim=1))
    ratio = torch.stack(sums).mean(dim=0) / full.exp().sum(dim=1)
    torch.testing.assert_close(ratio, torch.ones(5), atol=0.05, rtol=0)
    model.eval()
    logits, columns, tokens = model._token_logits(hidden_states, targets)
    assert logits.shape == (5, vocabulary) and tokens is None and torch.equal(columns, targets)
