"""Measures how the tags of a checkpoint change in half precision, with 8-bit weights and as ONNX.

    pip install torchao bitsandbytes onnx onnxscript onnxruntime
    python -m benchmarks.precision --output results/precision.json

300 random test examples of icon-tagging are tagged in batches of 8 with the settings of the checkpoint, from pixels
and titles. Nothing is fitted again. A variant agrees on an example if it gives the same set of tags as single
precision. Sizes are those of the saved weights. Times are CPU time with one thread, measured on a shared machine.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import BitsAndBytesConfig

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator, predict_tags
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.onnx import export_onnx
from optsg.onnx import OnnxTagger

NUM_EXAMPLES, BATCH_SIZE = 300, 8
REFERENCE = "fp32"
METRICS = ("full_f1", "micro_f1", "tags_per_example")


def load_in(dtype: torch.dtype) -> Callable[[str, Path], OPTSGForTagGeneration]:
    """Return a function that loads a checkpoint in a floating-point type."""
    return lambda checkpoint, folder: OPTSGForTagGeneration.from_pretrained(checkpoint, dtype=dtype)


def load_dynamic(checkpoint: str, folder: Path) -> OPTSGForTagGeneration:
    """Quantise the linear layers with torch, weights and activations to 8 bits."""
    model = OPTSGForTagGeneration.from_pretrained(checkpoint).eval()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def load_torchao(checkpoint: str, folder: Path) -> OPTSGForTagGeneration:
    """Quantise the weights of the linear layers with torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = OPTSGForTagGeneration.from_pretrained(checkpoint).eval()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def load_bitsandbytes(checkpoint: str, folder: Path) -> OPTSGForTagGeneration:
    """Quantise the linear layers with bitsandbytes, all but the output layer."""
    return OPTSGForTagGeneration.from_pretrained(
        checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )


def load_exported(checkpoint: str, folder: Path) -> OnnxTagger:
    """Export to ONNX, and run it with onnxruntime."""
    return _export(checkpoint, folder, int8=False)


def load_exported_int8(checkpoint: str, folder: Path) -> OnnxTagger:
    """Export to ONNX with weights in 8 bits, and run it with onnxruntime."""
    return _export(checkpoint, folder, int8=True)


def _export(checkpoint: str, folder: Path, int8: bool) -> OnnxTagger:
    model = OPTSGForTagGeneration.from_pretrained(checkpoint)
    export_onnx(model, OPTSGProcessor.from_pretrained(checkpoint), folder, int8)
    return OnnxTagger.from_pretrained(folder, threads=1)


VARIANTS = {
    REFERENCE: load_in(torch.float32),
    "fp16": load_in(torch.float16),
    "bf16": load_in(torch.bfloat16),
    "torch dynamic int8": load_dynamic,
    "torchao int8": load_torchao,
    "bitsandbytes int8": load_bitsandbytes,
    "onnx fp32": load_exported,
    "onnx int8": load_exported_int8,
}


def tag(model: nn.Module | OnnxTagger, processor: OPTSGProcessor, examples: Dataset) -> list[list[dict]]:
    """Tag examples in batches of `BATCH_SIZE`."""
    if isinstance(model, OnnxTagger):
        found = model(list(examples.select_columns(["image", "title"])), batch_size=BATCH_SIZE)
        return [[{"tag": tag["label"]} | tag for tag in tags] for tags in found]
    return predict_tags(model.eval(), processor, examples, batch_size=BATCH_SIZE, progress=False)


def bytes_on_disk(model: nn.Module | OnnxTagger, folder: Path) -> int:
    """Return the size of the weights: of the exported programs in the folder, or else of the model's state."""
    if exported := list(folder.glob("*.onnx")):
        return sum(path.stat().st_size for path in exported)
    path = folder / "state.pt"
    # Tied weights are saved once.
    torch.save(model.state_dict(), path)
    return path.stat().st_size


def measure(checkpoint: str, variant: str, examples: Dataset) -> dict:
    """Tag the examples with a variant of the checkpoint; return tags, metrics, time and size."""
    processor = OPTSGProcessor.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        model = VARIANTS[variant](checkpoint, folder)
        tag(model, processor, examples.select(range(BATCH_SIZE)))
        start = time.process_time()
        predictions = tag(model, processor, examples)
        seconds = time.process_time() - start
        size = bytes_on_disk(model, folder)
    metrics = TagEvaluator(examples["tags"], processor.label_vocabulary).score(predictions)
    row = {name: metrics[name] for name in METRICS}
    row |= {"megabytes": round(size / 1e6, 1), "ms_per_example": round(1000 * seconds / len(examples), 1)}
    return row | {"tags": [sorted(tag["tag"] for tag in tags) for tags in predictions]}


def compare(rows: dict[str, dict]) -> dict[str, dict]:
    """Add the agreement with single precision: equal tag sets in percent, and the mean Jaccard index."""
    compared = copy.deepcopy(rows)
    expected = [set(tags) for tags in rows[REFERENCE]["tags"]]
    for row in compared.values():
        pairs = [(set(tags), own) for tags, own in zip(row["tags"], expected, strict=True)]
        row["equal_tag_sets"] = round(100 * sum(found == own for found, own in pairs) / len(pairs), 1)
        jaccard = [len(found & own) / len(found | own) if found | own else 1.0 for found, own in pairs]
        row["jaccard"] = round(sum(jaccard) / len(jaccard), 4)
        del row["tags"]
    return compared


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the variants and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--num_examples", type=int, default=NUM_EXAMPLES)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    examples = load_tagging_dataset("icon_tagging")["test"].shuffle(0).select(range(arguments.num_examples))
    output, rows = arguments.output, {}
    # Variants that are not measured again are kept.
    kept = json.loads(output.read_text(encoding="utf-8"))["variants"] if output.exists() else {}
    for variant in dict.fromkeys([REFERENCE, *arguments.variants]):
        rows[variant] = measure(arguments.checkpoint, variant, examples)
        compared = compare(rows)
        print(variant, json.dumps(compared[variant], allow_nan=False), flush=True)
        variants = {name: (kept | compared)[name] for name in VARIANTS if name in kept | compared}
        result = {"checkpoint": arguments.checkpoint, "examples": len(examples), "variants": variants}
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result | environment(), indent=1, allow_nan=False)
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
