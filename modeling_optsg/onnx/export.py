"""Writes the programs of a model as ONNX files."""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from modeling_optsg.modeling_optsg import OPTSGForTagGeneration

from .programs import DecodingStep, EncoderProgram

ENCODER, STEP = "encoder.onnx", "decoding_step.onnx"
MEMORY_OUTPUTS = ("order_prompts", "memory_keys", "memory_values", "memory_mask")
CLASSIFIER_OUTPUTS = ("classifier_logits", "has_title", "uses_image", "uses_words", "reads_words")
STEP_OUTPUTS = ("logits", "next_keys", "next_values")


def example_inputs(model: OPTSGForTagGeneration, size: int = 224) -> tuple[dict, dict]:
    """Return inputs of the two programs and their dynamic shapes, each as `{name: (tensor, dimensions)}`.

    Args:
        model: The model.
        size: Height and width of frames in pixels.
    """
    config, device = model.config, model.device
    batch, is_video = Dim("batch"), config.max_frames > 1
    length = Dim("title_length", max=getattr(config.text_config, "max_position_embeddings", None))
    of_frames = {0: batch} | ({1: Dim("frames", max=config.max_frames)} if is_video else {})
    pixels = torch.rand(2, 2, 3, size, size, device=device)
    frame_mask = torch.tensor([[1, 1], [1, 0]], device=device)
    encoder = {
        "pixel_values": (pixels if is_video else pixels[:, :1], of_frames),
        "frame_mask": (frame_mask if is_video else frame_mask[:, :1], of_frames),
        "input_ids": (torch.full((2, 5), 3, device=device), {0: batch, 1: length}),
        "attention_mask": (torch.ones(2, 5, dtype=torch.long, device=device), {0: batch, 1: length}),
    }
    layers, heads = config.num_decoder_layers, config.num_attention_heads
    head_size = config.hidden_size // heads
    slots, position, memory = Dim("slots"), Dim("position"), Dim("memory_length")
    cached, remembered = (layers, 2, 3, heads, 2, head_size), (layers, 2, heads, 7, head_size)
    step = {
        "prompts": (torch.rand(2, 3, config.hidden_size, device=device), {0: batch, 1: slots}),
        "position": (torch.tensor([2], device=device), {}),
        "input_ids": (torch.full((2, 3), 5, device=device), {0: batch, 1: slots}),
        # Each a tensor of its own: a tensor that is given twice would be traced as one input.
        "keys": (torch.rand(cached, device=device), {1: batch, 2: slots, 4: position}),
        "values": (torch.rand(cached, device=device), {1: batch, 2: slots, 4: position}),
        "memory_keys": (torch.rand(remembered, device=device), {1: batch, 3: memory}),
        "memory_values": (torch.rand(remembered, device=device), {1: batch, 3: memory}),
        "memory_mask": (torch.ones(2, 7, dtype=torch.bool, device=device), {0: batch, 1: memory}),
    }
    return encoder, step


@torch.no_grad()
def export_onnx(model: OPTSGForTagGeneration, folder: Path, size: int = 224) -> None:
    """Export the two programs of a model to `encoder.onnx` and `decoding_step.onnx`.

    Batch, frames, title length and slots are dynamic.

    Args:
        model: The model, in single precision.
        folder: Folder to write to.
        size: Height and width of frames in pixels.

    Raises:
        ImportError: `onnx` or `onnxscript` is not installed.
    """
    model = model.eval()
    encoder, step = example_inputs(model, size)
    outputs = MEMORY_OUTPUTS + (CLASSIFIER_OUTPUTS if model.tag_classifier is not None else ())
    _export(EncoderProgram(model), encoder, outputs, Path(folder, ENCODER))
    _export(DecodingStep(model), step, STEP_OUTPUTS, Path(folder, STEP))


def _export(program: nn.Module, inputs: dict, outputs: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = tuple(tensor for tensor, _ in inputs.values())
    torch.onnx.export(
        program,
        tensors,
        path,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes=tuple(dimensions for _, dimensions in inputs.values()),
        dynamo=True,
        external_data=False,
    )
