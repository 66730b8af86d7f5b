"""`optsg export-onnx`: write a checkpoint as ONNX, for onnxruntime and for browsers."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .model_argument import chosen_model
from .terminal import error_line

if TYPE_CHECKING:
    from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

# Differences of pixels that no tag depends on; pixels have a standard deviation of about 1.
MAX_PIXEL_DIFFERENCE = 1e-3


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `export-onnx` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "export-onnx",
        help="write a checkpoint as ONNX, which needs no PyTorch",
        description="Writes a checkpoint as ONNX programs, tokenizers and settings. `optsg.onnx.OnnxTagger` tags\n"
        "with the folder without PyTorch, and the page in space/browser without a server. Decoding\n"
        'is parallel. Needs: pip install "optsg[onnx]"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="CHECKPOINT", help="checkpoint folder (default: the shipped checkpoint)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder to write to: a new or empty one, or an earlier export",
    )
    parser.add_argument(
        "--int8", action="store_true", help="store weights in 8 bits, which is faster and changes some tags"
    )
    parser.set_defaults(run=lambda args: _run(parser, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    checkpoint = chosen_model(parser, args)
    try:
        _export(checkpoint, args.output, args.int8)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        print(f"optsg export-onnx: {error_line(error)}", file=sys.stderr)
        return 2
    for path in sorted(args.output.iterdir()):
        print(f"{path.name:<24}{path.stat().st_size:>12,}")
    return 0


def _export(checkpoint: str, output: Path, int8: bool) -> None:
    if not Path(checkpoint, "config.json").is_file():
        raise ValueError(f"{checkpoint} is not the folder of a checkpoint: it has no config.json")
    _check_packages()
    import transformers
    from transformers import AutoModel

    from modeling_optsg import OPTSGProcessor
    from modeling_optsg.onnx import check_output_folder, export_onnx

    from .model_check import check_model

    check_output_folder(output)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, processor = AutoModel.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    check_model(checkpoint, model, processor)
    _check_images(model, processor)
    export_onnx(model.float(), processor, output, int8, checkpoint)


def _check_packages() -> None:
    import importlib.util

    needed = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{", ".join(missing)} is not installed; install it with: pip install "optsg[onnx]"')


def _check_images(model: "OPTSGForTagGeneration", processor: "OPTSGProcessor") -> None:
    """Check that the runner prepares an image like the image processor, of which there are many kinds."""
    import numpy as np

    from modeling_optsg.onnx.settings import export_settings

    from .onnx.inputs import ImageReader

    settings = export_settings(model, processor)
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    expected, found = processor.read_pixels(image)[0].numpy(), ImageReader(settings["image"])(image, "the image")
    if expected.shape != found.shape or np.abs(expected - found).max() > MAX_PIXEL_DIFFERENCE:
        raise ValueError(
            f"the image processor {type(processor.image_processor).__name__} does more than resize, crop and "
            "normalise, so its model cannot be exported"
        )
