"""Any vision tower works, or is refused with its name and the reason when the model is built."""

import numpy as np
import pytest
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, BertModel, Siglip2ImageProcessor

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.training import OPTSGTrainingArguments, build_model
from modeling_optsg.training.image_preprocessing import load_image_processor, shown_part
from modeling_optsg.vision_tower import measure_vision_tower, run_vision_tower

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DENSE = SHAPE | {"intermediate_size": 32}
STAGES = {"depths": [1, 1, 1, 1]}
SQUARE = {"height": 32, "width": 32}
TEXT_HALF = DENSE | {"vocab_size": 40}
VISION_HALF = {"vision_config": DENSE | {"image_size": 32, "patch_size": 8}, "text_config": TEXT_HALF}
# Name: configuration, its arguments, image processor, its arguments, width of the features.
TOWERS = {
    "convnext": ("ConvNextConfig", STAGES | {"hidden_sizes": [8, 8, 12, 24]}, "ConvNextImageProcessor", {}, 24),
    "convnextv2": ("ConvNextV2Config", STAGES | {"hidden_sizes": [8, 8, 12, 24]}, "ConvNextImageProcessor", {}, 24),
    "resnet": (
        "ResNetConfig",
        STAGES | {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24]},
        "ConvNextImageProcessor",
        {},
        24,
    ),
    "regnet": (
        "RegNetConfig",
        STAGES | {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "groups_width": 8},
        "ConvNextImageProcessor",
        {},
        24,
    ),
    "efficientnet": (
        "EfficientNetConfig",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
        "EfficientNetImageProcessor",
        {"size": {"height": 64, "width": 64}},
        320,
    ),
    "mobilenet_v1": ("MobileNetV1Config", {"depth_multiplier": 0.25}, "MobileNetV1ImageProcessor", {}, 256),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.35}, "MobileNetV2ImageProcessor", {}, 1280),
    "mobilevit": (
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 40]},
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        40,
    ),
    "swin": (
        "SwinConfig",
        {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "ViTImageProcessor",
        {"size": {"height": 64, "width": 64}},
        16,
    ),
    "vit": ("ViTConfig", DENSE | {"image_size": 32, "patch_size": 8}, "ViTImageProcessor", {"size": SQUARE}, 16),
    "CLIP": (
        "CLIPConfig",
        VISION_HALF,
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
        16,
    ),
    "dinov2": (
        "Dinov2Config",
        SHAPE | {"image_size": 28, "patch_size": 14},
        "BitImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}},
        16,
    ),
    "siglip": ("SiglipConfig", VISION_HALF, "SiglipImageProcessor", {"size": SQUARE}, 16),
    "siglip2": (
        "Siglip2Config",
        {"vision_config": DENSE | {"num_patches": 16, "patch_size": 8}, "text_config": TEXT_HALF},
        "Siglip2ImageProcessor",
        {"patch_size": 8, "max_num_patches": 16},
        16,
    ),
    "beit": (
        "BeitConfig",
        DENSE | {"image_size": 32, "patch_size": 8, "use_relative_position_bias": True},
        "BeitImageProcessor",
        {"size": SQUARE, "do_center_crop": False},
        16,
    ),
    "videomae": (
        "VideoMAEConfig",
        DENSE | {"image_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2},
        "VideoMAEImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
        16,
    ),
    # Refused.
    "vit_mae": ("ViTMAEConfig", DENSE | {"image_size": 32, "patch_size": 8}, "ViTImageProcessor", {"size": SQUARE}, 0),
    "timesformer": ("TimesformerConfig", DENSE | {"image_size": 32, "patch_size": 8}, "VideoMAEImageProcessor", {}, 0),
    "pvt": (
        "PvtConfig",
        STAGES | {"image_size": 64, "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1] * 4},
        "PvtImageProcessor",
        {"size": {"height": 64, "width": 64}},
        0,
    ),
    "segformer": (
        "SegformerConfig",
        STAGES | {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1] * 4},
        "DPTImageProcessor",
        {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": True},
        0,
    ),
}
WORKING = [name for name, tower in TOWERS.items() if tower[4]]
# Towers with patches of 8 pixels.
PATCHES_OF_8 = ("vit", "CLIP", "siglip", "siglip2", "beit")
SMALL = '{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_prompts": 4}'


@pytest.fixture(scope="module")
def vision_tower(tmp_path_factory):
    """Returns a function that saves a tiny tower and its image processor once, and returns the folder."""
    root = tmp_path_factory.mktemp("vision_towers")

    def save(name):
        folder = root / name
        if not folder.exists():
            config, values, image_processor, settings, _ = TOWERS[name]
            torch.manual_seed(0)
            AutoModel.from_config(getattr(transformers, config)(**values)).save_pretrained(folder)
            getattr(transformers, image_processor)(**settings).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory, tower_configs, text_tokenizer):
    folder = tmp_path_factory.mktemp("text_tower")
    BertModel(tower_configs["bert"]).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def build(vision_tower, text_tower, tmp_path):
    PartialState()  # for the loggers
    rows = Dataset.from_list(
        [{"title": "a red square", "tags": ["red", "square"]}, {"title": "a dog", "tags": ["dog"]}]
    )

    def run(name, **more):
        more = {"image_words": "none", "embedding_init_std": 0.0, "config_overrides": SMALL} | more
        towers = {"vision_tower": str(vision_tower(name)), "text_tower": str(text_tower)}
        arguments = OPTSGTrainingArguments(
            str(tmp_path), cache_dir=str(tmp_path), tag_vocab_size=260, **towers, **more
        )
        return build_model(arguments, rows, rows)

    return run


def photograph(width=90, height=60, border=9, seed=0):
    """An image of noise with a red border."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[:border] = pixels[-border:] = pixels[:, :border] = pixels[:, -border:] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", WORKING)
def test_any_vision_tower_works(build, name, tmp_path):
    model, processor = build(name)
    assert model.config.frame_feature_size == TOWERS[name][4]
    frames = [photograph(seed=seed) for seed in range(3)]
    batch = processor(images=[photograph(), None], videos=[None, frames], tags=[["red"], ["dog"]])
    assert model(**batch).loss.isfinite()
    # A saved model computes the same.
    model.eval().save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path / "saved").eval()
    again = OPTSGProcessor.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        features = [m.model.encode_frames(batch["pixel_values"], batch["frame_mask"]) for m in (model, loaded)]
        torch.testing.assert_close(features[0].frame_features, features[1].frame_features)
        # Frames do not depend on the other examples and on the padding.
        alone = model.model.encode_frames(again(images=[photograph()])["pixel_values"])
    torch.testing.assert_close(alone.frame_features[0, 0], features[0].frame_features[0, 0], atol=1e-4, rtol=1e-4)
    assert features[0].frame_features[0, 1:].eq(0).all() and features[0].frame_features[1].ne(0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("name", [name for name in WORKING if name not in ("dinov2", "videomae")])
@pytest.mark.parametrize("size", [64, 96])
def test_the_border_reaches_the_tower_at_any_size(build, name, size):
    _, processor = build(name, image_size=size)
    pixels = processor(images=[photograph()])["pixel_values"][0, 0]
    red = processor(images=[Image.new("RGB", (90, 60), "red")])["pixel_values"][0, 0]
    assert pixels.shape == (3, size, size)
    for row in (pixels[:, 1], pixels[:, -2], pixels[:, :, 1], pixels[:, :, -2]):
        torch.testing.assert_close(row, red[:, 1], atol=0.05, rtol=0)
    assert (pixels - red).abs().mean() > 0.2


@pytest.mark.parametrize("name", ["CLIP", "dinov2", "convnext", "mobilenet_v1"])
def test_a_cropping_image_processor_is_reported(build, name, caplog):
    with caplog.at_level("WARNING"):
        _, processor = build(name)
    # DINOv2: 28 of 48 and of 32 pixels; MobileNet: 224 of 384 and of 256 pixels.
    kept = {"CLIP": (67, 100), "dinov2": (58, 87), "convnext": (100, 100), "mobilenet_v1": (59, 88)}[name]
    size = processor(images=[photograph()])["pixel_values"].shape[-1]
    message = (
        f"it keeps {kept[0]}% of the width and {kept[1]}% of the height. --image_size {size} shows the whole image"
    )
    assert ("crops images" in caplog.text) == (message in caplog.text) == (name != "convnext")
    caplog.clear()
    build(name, image_size=size)
    assert "crops images" not in caplog.text


def test_the_shown_part_is_measured(tmp_path):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 100}, crop_size={"height": 50, "width": 90})
    processor.save_pretrained(tmp_path)
    # 150 x 100 pixels after resizing.
    assert shown_part(processor) == pytest.approx((0.6, 0.5), abs=0.01)
    assert shown_part(load_image_processor(tmp_path, 40)) == pytest.approx((1, 1), abs=0.01)


@pytest.mark.parametrize("name", PATCHES_OF_8)
def test_a_size_that_is_not_a_multiple_of_the_patch_size_is_refused(build, name):
    message = f"{name} ignores the lower edge of images of 50 × 50 pixels. Use a multiple of its patch size 8"
    with pytest.raises(ValueError, match=message):
        build(name, image_size=50)


def test_an_own_size_that_is_not_a_multiple_of_the_patch_size_is_reported(build, vision_tower, tmp_path, caplog):
    processor = transformers.ViTImageProcessor(size={"height": 36, "width": 36})
    tower = AutoModel.from_pretrained(vision_tower("vit"))
    tower.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    with caplog.at_level("WARNING"):
        build("vit", image_words="none")
        assert "ignores" not in caplog.text
        TOWERS["own"] = TOWERS["vit"][:3] + ({"size": {"height": 36, "width": 36}}, 16)
        build("own")
    assert "ignores the lower edge of images of 36 × 36 pixels" in caplog.text


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("vit_mae", None, "vit_mae cannot be used: its features of the same image differ from run to run"),
        ("timesformer", None, "timesformer cannot be used: it cannot read an image of 32 × 32 pixels .* or VideoMAE"),
        ("pvt", 96, "pvt cannot read images of 96 × 96 pixels"),
        ("videomae", 64, "videomae cannot read images of 64 × 64 pixels .*Without --image_size, its own size is used"),
        (
            "segformer",
            None,
            "segformer gives the shapes .* to a wide and a tall image.* Give a fixed size with --image_size",
        ),
    ],
)
def test_a_tower_that_cannot_work_is_refused(build, name, size, message):
    with pytest.raises(ValueError, match=message):
        build(name, image_size=size)


def test_a_tower_without_an_image_processor_is_refused(build, vision_tower):
    path = vision_tower("beit") / "preprocessor_config.json"
    content = path.read_text()
    path.unlink()
    try:
        with pytest.raises(ValueError, match="beit has no image processor"):
            build("beit")
    finally:
        path.write_text(content)


def test_a_text_model_is_not_a_vision_tower(text_tower):
    with pytest.raises(ValueError, match="The vision tower .* cannot be used: it cannot read an image"):
        OPTSGForTagGeneration.from_vision_text_pretrained(str(text_tower), str(text_tower))


def test_a_checkpoint_without_the_weights_of_the_tower_is_refused(vision_tower, tower_configs, tmp_path):
    tower = AutoModel.from_pretrained(vision_tower("vit"))
    weights = {name: tensor for name, tensor in tower.state_dict().items() if "encoder.layer.1" not in name}
    weights = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    assert len(weights) < len(tower.state_dict())
    tower.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"cannot be used: the checkpoint lacks \d+ of its weights, such as \w+"):
        OPTSGForTagGeneration.from_vision_text_pretrained(str(tmp_path), str(tmp_path))


def test_more_frames_than_the_model_has_positions_for_are_refused(build):
    with pytest.raises(ValueError, match="--num_frames 64 is more than max_frames=32; set max_frames"):
        build("vit", num_frames=64)


# What the towers read


@torch.no_grad()
def test_a_naflex_tower_gets_the_patches_of_its_own_image_processor(vision_tower):
    tower = AutoModel.from_pretrained(vision_tower("siglip2")).vision_model.eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    inputs = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)(images=[image], return_tensors="pt")
    own = load_image_processor(vision_tower("siglip2"))
    frames = torch.as_tensor(np.stack(own(images=[image])["pixel_values"]))
    found = run_vision_tower(tower, frames, [1]).last_hidden_state
    torch.testing.assert_close(found, tower(**inputs).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_videomae_reads_the_frames_of_an_example_as_one_video(vision_tower):
    tower = AutoModel.from_pretrained(vision_tower("videomae")).eval()
    frames = torch.rand(8, 3, 32, 32)
    # An image, a video of two frames, one of four and a single frame again.
    found = run_vision_tower(tower, frames, [1, 2, 4, 1]).last_hidden_state
    assert found.shape == (8, 16, 16)

    def read(*indices):
        return tower(pixel_values=frames[list(indices)][None]).last_hidden_state[0].unflatten(0, (2, 16))

    torch.testing.assert_close(found[0], read(0, 0, 0, 0)[0])
    torch.testing.assert_close(found[1:3], read(1, 1, 2, 2))
    torch.testing.assert_close(found[3:7], read(3, 4, 5, 6)[[0, 0, 1, 1]])
    torch.testing.assert_close(found[7], read(7, 7, 7, 7)[0])
    # A longer video is sampled evenly, and its frames get the tokens of their time.
    longer = run_vision_tower(tower, frames, [8], output_hidden_states=True)
    torch.testing.assert_close(longer.last_hidden_state, read(0, 2, 4, 6)[[0, 0, 0, 1, 1, 1, 1, 1]])
    assert [tuple(states.shape) for states in longer.hidden_states] == [(8, 16, 16)] * 3


@torch.no_grad()
def test_position_embeddings_are_interpolated(vision_tower):
    tower = AutoModel.from_pretrained(vision_tower("vit")).eval()
    frames = torch.rand(2, 3, 48, 64)
    found = run_vision_tower(tower, frames, [1, 1]).last_hidden_state
    assert found.shape == (2, 1 + 6 * 8, 16)
    torch.testing.assert_close(found, tower(frames, interpolate_pos_encoding=True).last_hidden_state)


def test_the_width_of_the_features_is_measured(vision_tower):
    # `hidden_sizes` of MobileViT ends with another width.
    tower = AutoModel.from_pretrained(vision_tower("mobilevit")).eval()
    assert measure_vision_tower(tower) == (40, 40) and tower.config.hidden_sizes[-1] == 16
