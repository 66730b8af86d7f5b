"""Writes a model as a folder of ONNX programs, tokenizers and settings."""

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export import Dim

from modeling_optsg.data.atomic_files import write_text
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.processing_optsg import OPTSGProcessor

from .programs import ClassifierProgram, DecodingStep, EncoderProgram
from .settings import export_settings, tokenizer_json

if TYPE_CHECKING:
    from onnx import NodeProto

ENCODER, CLASSIFIER, STEP = "encoder.onnx", "classifier.onnx", "decoding_step.onnx"
SETTINGS, TEXT_TOKENIZER, TAG_TOKENIZER = "settings.json", "tokenizer.json", "tag_tokenizer.json"
# Files of a checkpoint that say what it is and what may be done with it.
NOTICES = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE")
MEMORY_OUTPUTS = ("order_prompts", "memory_keys", "memory_values", "memory_mask")
EVIDENCE_OUTPUTS = ("vectors", "has_title", "uses_image", "uses_words", "reads_words")
WORD_OUTPUTS = ("word_vectors", "word_probabilities", "familiarity")
STEP_OUTPUTS = ("log_probs", "tokens", "normalizer", "pad_logits", "sep_logits", "next_keys", "next_values")
# Matrix products and embeddings. Convolutions in 8 bits are slower and less exact.
QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]
TEXT_TOWER = "model.text_tower"


def example_inputs(model: OPTSGForTagGeneration, size: tuple[int, int]) -> tuple[dict, dict]:
    """Return inputs of encoder and decoding step and their dynamic shapes, each as `{name: (tensor, dimensions)}`.

    Args:
        model: The model.
        size: Height and width of frames in pixels.
    """
    config, device = model.config, model.device
    batch, is_video = Dim("batch"), config.max_frames > 1
    length = Dim("title_length", max=getattr(config.text_config, "max_position_embeddings", None))
    of_frames = {0: batch} | ({1: Dim("frames", max=config.max_frames)} if is_video else {})
    pixels = torch.rand(2, 2, 3, *size, device=device)
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


def export_onnx(
    model: OPTSGForTagGeneration,
    processor: OPTSGProcessor,
    folder: Path | str,
    int8: bool = False,
    checkpoint: Path | str | None = None,
) -> None:
    """Export a model to a folder that [`OnnxTagger`] and the page in `space/browser` read.

    The folder has `encoder.onnx` (towers, encoder and order prompts), `classifier.onnx` (the tag classifier, if there
    is one) and `decoding_step.onnx` (the next token of all slots), the two tokenizers, and `settings.json`. Numbers of
    examples, frames and slots and the length of titles are dynamic.

    The folder must be new, empty, or an earlier export, whose files are replaced. `settings.json` is written last, so
    an export that was interrupted has none and is not loaded.

    Args:
        model: The model, in single precision.
        processor: Its processor.
        folder: Folder to write to; it is created if necessary.
        int8: Store weights of matrix products and embeddings in 8 bits, with one scale for each output channel, except
            the matrix products of the text tower.
        checkpoint: Folder whose README, LICENSE and NOTICE are copied.

    Raises:
        ImportError: `onnx`, `onnxscript` or `onnxruntime` is not installed.
        ValueError: The model or a setting cannot be exported, or the folder has other files.
    """
    folder = Path(folder)
    check_output_folder(folder)
    settings = export_settings(model, processor)
    tokenizers = {
        TEXT_TOKENIZER: tokenizer_json(processor.tokenizer, pads=True),
        TAG_TOKENIZER: tokenizer_json(processor.tag_tokenizer, pads=False),
    }
    height, width = _frame_size(settings["image"])
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        exported = built / "exported" if int8 else built
        exported.mkdir(exist_ok=True)
        export_programs(model, exported, (height, width))
        if int8:
            _quantize(exported, built)
        programs = sorted(built.glob("*.onnx"))
        for program in programs:
            _optimize(program)
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in (SETTINGS, CLASSIFIER):
            (folder / earlier).unlink(missing_ok=True)
        for program in programs:
            shutil.move(program, folder / program.name)
    for name, text in tokenizers.items():
        write_text(folder / name, text)
    for name in NOTICES if checkpoint is not None else ():
        if (path := Path(checkpoint, name)).is_file():
            shutil.copyfile(path, folder / name)
    write_text(folder / SETTINGS, json.dumps(settings, ensure_ascii=False, allow_nan=False) + "\n")


def check_output_folder(folder: Path | str) -> None:
    """Check that an export to a folder replaces no other files.

    Raises:
        ValueError: The folder is a checkpoint, or it is neither new, nor empty, nor an earlier export.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} has a config.json, so it may be a checkpoint; choose another folder")
    if not folder.exists() or _is_export(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ValueError(
            f"{folder} is neither an empty folder nor an earlier export with {SETTINGS}; choose another folder, or "
            "delete this one first"
        )


def _is_export(folder: Path) -> bool:
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "format" in settings


def _frame_size(image: dict) -> tuple[int, int]:
    """Return height and width of frames after the image processor."""
    if image["crop"] is not None:
        return tuple(image["crop"])
    if image["size"].keys() != {"height", "width"}:
        raise ValueError(f"the image processor resizes to {image['size']}; expected height and width, or a crop")
    return image["size"]["height"], image["size"]["width"]


@torch.no_grad()
def export_programs(model: OPTSGForTagGeneration, folder: Path, size: tuple[int, int]) -> None:
    """Export the programs alone; see [`export_onnx`].

    Args:
        model: The model, in single precision.
        folder: Folder to write to.
        size: Height and width of frames in pixels.
    """
    model = model.eval()
    encoder, step = example_inputs(model, size)
    program = EncoderProgram(model)
    outputs = MEMORY_OUTPUTS
    if model.tag_classifier is not None:
        outputs += EVIDENCE_OUTPUTS
        vectors = torch.rand(2, model.config.hidden_size, device=model.device)
        _export(
            ClassifierProgram(model), {"vectors": (vectors, {0: Dim("rows")})}, ("logits",), Path(folder, CLASSIFIER)
        )
    if program.word_vectors is not None:
        outputs += WORD_OUTPUTS
    _export(program, encoder, outputs, Path(folder, ENCODER))
    _export(DecodingStep(model), step, STEP_OUTPUTS, Path(folder, STEP))


def _quantize(exported: Path, folder: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for path in sorted(exported.glob("*.onnx")):
        nodes = onnx.load(path, load_external_data=False).graph.node
        quantize_dynamic(
            path,
            folder / path.name,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in nodes if _is_in_text_tower(node)],
        )


def _is_in_text_tower(node: "NodeProto") -> bool:
    """Return whether a node is a matrix product of the text tower.

    Some activations of pretrained transformers are far larger than others, and in 8 bits the others lose their digits.
    This changes many tags.
    """
    scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
    return node.op_type in ("MatMul", "Gemm") and any(TEXT_TOWER in scope for scope in scopes)


def _optimize(path: Path) -> None:
    """Fuse operators once, because it takes a third of the time that onnxruntime needs to load the programs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # More would depend on the machine.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def _export(program: nn.Module, inputs: dict, outputs: tuple[str, ...], path: Path) -> None:
    with warnings.catch_warnings():
        # Of the exporter, about its own functions.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program,
            tuple(tensor for tensor, _ in inputs.values()),
            path,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(dimensions for _, dimensions in inputs.values()),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
