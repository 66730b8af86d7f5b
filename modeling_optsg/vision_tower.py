"""Runs any vision tower on frames: image towers, NaFlex towers (patches as input) and VideoMAE (whole videos)."""

import functools
import inspect
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

VIDEO_TOWER = "videomae"


def run_vision_tower(
    tower: PreTrainedModel, frames: torch.Tensor, counts: Sequence[int], output_hidden_states: bool = False
) -> ModelOutput:
    """Run a vision tower on the frames of a batch.

    - Position embeddings are interpolated, if the tower can do this, so that frames can have other sizes than in its
      pretraining.
    - A NaFlex tower (SigLIP 2) gets the patches of each frame, all of them real.
    - VideoMAE gets the frames of an example as one video, sampled evenly or repeated to the number of frames that it
      takes. Each frame gets the tokens of its time.

    Args:
        tower: The vision tower.
        frames: `[frames, 3, height, width]`, the frames of all examples, example after example, of any floating-point
            type.
        counts: Number of frames of each example, at least 1. Their sum is the number of frames. Only VideoMAE needs
            them.
        output_hidden_states: Whether to return `hidden_states`.

    Returns:
        The tower's output, in which `last_hidden_state` and `hidden_states` are feature maps
        `[frames, width, rows, columns]` or tokens `[frames, tokens, width]`.
    """
    more = {"output_hidden_states": True} if output_hidden_states else {}
    frames = frames.to(tower.dtype)
    if tower.config.model_type == VIDEO_TOWER:
        return _run_on_videos(tower, frames, counts, more)
    return tower(**image_inputs(tower, frames), **more)


def image_inputs(tower: PreTrainedModel, frames: torch.Tensor) -> dict[str, torch.Tensor | bool]:
    """Return the arguments of an image tower for frames `[frames, 3, height, width]`."""
    arguments = _forward_arguments(type(tower))
    if "spatial_shapes" in arguments:
        return _to_patches(frames, tower.config.patch_size)
    interpolation = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in arguments else {}
    return {"pixel_values": frames} | interpolation


@functools.cache
def _forward_arguments(tower_class: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(tower_class.forward).parameters)


def _to_patches(frames: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor]:
    """Divide frames into patches, row by row, with the channels last, as `Siglip2ImageProcessor` does."""
    rows, columns = (length // patch_size for length in frames.shape[-2:])
    frames = frames[..., : rows * patch_size, : columns * patch_size]
    patches = frames.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size)).permute(0, 2, 4, 3, 5, 1)
    patches = patches.flatten(3).flatten(1, 2)
    shapes = torch.tensor([[rows, columns]], device=frames.device).expand(frames.shape[0], 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=frames.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _run_on_videos(tower: PreTrainedModel, frames: torch.Tensor, counts: Sequence[int], more: dict) -> ModelOutput:
    num_frames, tubelet = tower.config.num_frames, tower.config.tubelet_size
    sampled, times, start = [], [], 0
    for example, count in enumerate(counts):
        sampled.append([start + index * count // num_frames for index in range(num_frames)])
        # The first time at which a frame is shown, in tubelets of consecutive frames.
        shown = [min(-(-frame * num_frames // count), num_frames - 1) for frame in range(count)]
        times += [(example, time // tubelet) for time in shown]
        start += count
    outputs = tower(pixel_values=frames[torch.tensor(sampled, device=frames.device)], **more)
    examples, tubelets = torch.tensor(times, device=frames.device).T

    def per_frame(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(1, (num_frames // tubelet, -1))[examples, tubelets]

    outputs.last_hidden_state = per_frame(outputs.last_hidden_state)
    if more:
        outputs.hidden_states = tuple(per_frame(states) for states in outputs.hidden_states)
    return outputs


def as_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return a feature map `[images, width, rows, columns]` as tokens `[images, tokens, width]`."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


def pool_layers(hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Describe images by several layers of a vision tower, because fine details are lost in its last layer.

    Args:
        hidden_states: Feature maps `[images, width, rows, columns]` or tokens `[images, tokens, width]`.

    Returns:
        `[images, twice the sum of the widths]`: the mean and the maximum of each layer over its positions.
    """
    pooled = []
    for layer in map(as_tokens, hidden_states):
        pooled += [layer.mean(dim=1), layer.amax(dim=1)]
    return torch.cat(pooled, dim=-1)


def pretraining_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Return height and width in pixels of the images that a vision tower was trained on, or else a usual size."""
    size, patch_size = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return tuple(size)
    if isinstance(patch_size, int) and getattr(config, "num_patches", None):
        return (patch_size * math.isqrt(config.num_patches),) * 2
    return 224, 224


@torch.no_grad()
def measure_vision_tower(tower: PreTrainedModel, layers: Sequence[int] | None = None) -> tuple[int, int]:
    """Run a vision tower on one image, and return the widths of its features.

    Args:
        tower: The vision tower, in evaluation mode.
        layers: Hidden states to pool into image features, see [`pool_layers`]. By default, image features are the
            mean of the last hidden state.

    Returns:
        The widths of frame features and of image features.

    Raises:
        ValueError: The tower cannot read the image, its features differ from run to run, or it does not have these
            hidden states. The message says why.
    """
    height, width = pretraining_size(tower.config)
    frames = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        first, second = (run_vision_tower(tower, frames, [1], output_hidden_states=bool(layers)) for _ in range(2))
        tokens = as_tokens(first.last_hidden_state)
    except Exception as error:  # A tower of another kind fails in its own way.
        raise ValueError(
            f"it cannot read an image of {height} × {width} pixels ({type(error).__name__}: {error}). Use an image "
            "tower such as ViT, CLIP, SigLIP, DINOv2 or ConvNeXt, or VideoMAE for videos"
        ) from error
    if tokens.ndim != 3:
        raise ValueError(f"its features have shape {list(tokens.shape)}; expected [images, tokens, width]")
    if not torch.allclose(tokens, as_tokens(second.last_hidden_state), rtol=1e-3, atol=1e-4):
        raise ValueError(
            "its features of the same image differ from run to run, as those of ViTMAE, which hides random patches"
        )
    if not layers:
        return tokens.shape[2], tokens.shape[2]
    count = len(first.hidden_states)
    if any(not -count <= layer < count for layer in layers):
        raise ValueError(f"vision_feature_layers={list(layers)}: the vision tower has {count} hidden states")
    return tokens.shape[2], pool_layers([first.hidden_states[layer] for layer in layers]).shape[1]
