"""Runs the towers on a dummy example when a model is built, so that a tower that cannot work fails before training."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_optsg.base_models import OPTSGTowers
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.processing_optsg import OPTSGProcessor

from .image_preprocessing import PHOTOGRAPH, check_image_processor

logger = get_logger(__name__)

# More words than most titles have.
LONG_TITLE = "a " * 600


def load_text_tokenizer(name_or_path: str, tower: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text tower, and complete its settings.

    Texts are padded on the right, because the position embeddings of some decoders ignore the attention mask. A
    tokenizer without a padding token, as that of GPT-2, uses its end-of-text token. Texts are truncated to the number
    of positions of the tower.

    Args:
        name_or_path: Folder or Hub name of the text tower.
        tower: The text tower.

    Raises:
        ValueError: There is no token that can be used for padding.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if token is None:
            raise ValueError(
                f"The tokenizer of the text tower {name_or_path} has no padding token and no other special token. Set "
                "pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = token
    tokenizer.padding_side = "right"
    positions = getattr(tower.config, "max_position_embeddings", None)
    if positions is not None:
        embeddings = getattr(getattr(tower, "embeddings", None), "position_embeddings", None)
        if getattr(embeddings, "padding_idx", None) is not None:
            # RoBERTa counts positions from the one after that of padding.
            positions -= embeddings.padding_idx + 1
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def check_towers(
    towers: OPTSGTowers, processor: OPTSGProcessor, vision_name: str, text_name: str, image_size: int | None = None
) -> None:
    """Run both towers on dummy images and titles, as training will do.

    Args:
        towers: The towers of a model.
        processor: Its processor.
        vision_name: Name of the vision tower, for messages.
        text_name: Name of the text tower, for messages.
        image_size: `--image_size`, if it was given.

    Raises:
        ValueError: A tower cannot work with this processor. The message names the tower and the reason.
    """
    with torch.no_grad(), evaluation_mode(towers):
        _check_text(towers, processor, text_name)
        if towers.vision_tower is not None:
            if processor.num_frames > towers.config.max_frames:
                raise ValueError(
                    f"--num_frames {processor.num_frames} is more than max_frames={towers.config.max_frames}; set "
                    "max_frames in --config_overrides."
                )
            check_image_processor(processor.image_processor, vision_name, image_size)
            _check_vision(towers, processor, vision_name, image_size)


def _check_text(towers: OPTSGTowers, processor: OPTSGProcessor, name: str) -> None:
    try:
        batch = processor(titles=["a", LONG_TITLE])
        towers.encode_text(batch["input_ids"].to(towers.device), batch["attention_mask"].to(towers.device))
    except Exception as error:  # A tower of another kind fails in its own way.
        raise ValueError(
            f"The text tower {name} cannot be used: it cannot encode a long title with its tokenizer "
            f"({type(error).__name__}: {error}). Check model_max_length and pad_token in its tokenizer_config.json."
        ) from error


def _check_vision(towers: OPTSGTowers, processor: OPTSGProcessor, name: str, image_size: int | None) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*PHOTOGRAPH, 3), dtype=np.uint8)
    tall, wide = Image.fromarray(noise), Image.fromarray(noise.swapaxes(0, 1))
    batch = processor(images=[wide, None], videos=[None, [tall, wide]])
    pixels, mask = batch["pixel_values"].to(towers.device), batch["frame_mask"].to(towers.device)
    height, width = pixels.shape[-2:]
    patch_size = getattr(towers.vision_tower.config, "patch_size", None)
    advice = "" if not isinstance(patch_size, int) else f" Use a multiple of its patch size {patch_size}."
    try:
        features = towers.encode_frames(pixels, mask)
    except Exception as error:  # A tower of another kind fails in its own way.
        raise ValueError(
            f"The vision tower {name} cannot read images of {height} × {width} pixels ({type(error).__name__}: "
            f"{error}).{advice} Without --image_size, its own size is used."
        ) from error
    expected = towers.config.frame_feature_size
    if features.frame_features.shape[-1] != expected:
        raise ValueError(
            f"The vision tower {name} returns features of width {features.frame_features.shape[-1]}; expected "
            f"frame_feature_size={expected}."
        )
    for side in _ignored_edges(towers, pixels[:1, :1]):
        message = f"The vision tower {name} ignores the {side} edge of images of {height} × {width} pixels.{advice}"
        if image_size is not None:
            raise ValueError(message)
        logger.warning(message)


@torch.enable_grad()
def _ignored_edges(towers: OPTSGTowers, pixels: torch.Tensor) -> list[str]:
    """Return the edges that the features do not depend on: patches leave out the pixels after the last whole patch."""
    pixels = pixels.clone().requires_grad_()
    features = towers.encode_frames(pixels).frame_features
    # Random factors, because the sum of normalised features is constant.
    factors = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    (gradient,) = torch.autograd.grad((features * factors).sum(), pixels)
    if gradient.eq(0).all():
        # An untrained tower may have no measurable gradient.
        return []
    edges = {"lower": gradient[..., -1, :], "right": gradient[..., -1]}
    return [side for side, values in edges.items() if values.eq(0).all()]
