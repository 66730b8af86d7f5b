"""Compares an exported checkpoint, which runs without PyTorch, with the model in PyTorch.

    pip install "optsg[onnx]"
    python -m benchmarks.onnx_runner --output results/speed/onnx.json

All test examples of icon-tagging, and then all validation examples, are tagged from files and titles, in batches of 8
with one thread, in single precision and with 8-bit weights. The variants take turns at every batch, because the load
of the machine changes. Times are CPU time, with reading of images. The cold start is the CPU time of one new process
that tags one image: the median of several.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.onnx import export_onnx
from optsg.onnx import OnnxTagger

BATCH_SIZE, STARTS = 8, 5
REFERENCE, FP32, INT8 = "pytorch", "onnx fp32", "onnx int8"
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1", "tags_per_example")
IMAGE, TITLE = "examples/images/tent-tree.png", "tent tree"
ONE_IMAGE = """
import sys
from optsg.onnx import OnnxTagger
print(OnnxTagger.from_pretrained(sys.argv[1])({"image": sys.argv[2], "title": sys.argv[3]}))
"""


def tag_with_pytorch(checkpoint: str) -> Callable[[list, list], list[list[dict]]]:
    """Return a function that tags images and titles with the model in PyTorch, prepared for a CPU."""
    processor = OPTSGProcessor.from_pretrained(checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(checkpoint).prepare_for_inference()
    return lambda images, titles: processor.batch_decode(model.generate(**processor(images=images, titles=titles)))


def tag_with_onnx(folder: Path) -> Callable[[list, list], list[list[dict]]]:
    """Return a function that tags images and titles with an exported checkpoint."""
    tagger = OnnxTagger.from_pretrained(folder, threads=1)
    return lambda images, titles: [
        [{"tag": tag.pop("label")} | tag for tag in tags]
        for tags in tagger(
            [{"image": image, "title": title} for image, title in zip(images, titles, strict=True)],
            batch_size=BATCH_SIZE,
        )
    ]


def cold_start(command: list[str]) -> float:
    """Return the CPU seconds of a command, the median of several runs."""
    seconds = []
    for _ in range(STARTS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(statistics.median(seconds), 2)


def compare(found: list[list[dict]], expected: list[list[dict]]) -> dict[str, float]:
    """Return how many examples have the same set of tags, and the largest difference of a common tag's score."""
    equal, largest = 0, 0.0
    for own, other in zip(found, expected, strict=True):
        scores, others = ({tag["tag"]: tag["score"] for tag in tags} for tags in (own, other))
        equal += scores.keys() == others.keys()
        largest = max([largest, *(abs(scores[tag] - others[tag]) for tag in scores.keys() & others.keys())])
    return {"equal_tag_sets": equal, "largest_score_difference": float(f"{largest:.2g}")}


def measure(checkpoint: str, folders: dict[str, Path], num_examples: int | None, split: str) -> dict[str, dict]:
    """Tag the examples of a split with every variant; return metrics, agreement and times."""
    examples = load_tagging_dataset("icon_tagging")[split].cast_column("image", datasets.Image(decode=False))
    examples = examples.select(range(num_examples or len(examples)))
    taggers = {REFERENCE: tag_with_pytorch(checkpoint)}
    taggers |= {name: tag_with_onnx(folder) for name, folder in folders.items()}
    seconds, predictions = dict.fromkeys(taggers, 0.0), {name: [] for name in taggers}
    first = examples[:BATCH_SIZE]
    for tag in taggers.values():
        tag(first["image"], first["title"])
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        for name, tag in taggers.items():
            begin = time.process_time()
            predictions[name] += tag(batch["image"], batch["title"])
            seconds[name] += time.process_time() - begin
    evaluator = TagEvaluator(examples["tags"], OPTSGProcessor.from_pretrained(checkpoint).label_vocabulary)
    rows = {}
    for name, found in predictions.items():
        metrics = evaluator.score(found)
        rows[name] = {metric: metrics[metric] for metric in METRICS} | compare(found, predictions[REFERENCE])
        rows[name]["ms_per_example"] = round(1000 * seconds[name] / len(examples), 1)
    return {"examples": len(examples), "variants": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Export, measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument("--exported", type=Path, help="folder with earlier exports, in fp32 and int8")
    parser.add_argument("--num_examples", type=int, help="by default, all examples of both splits")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = arguments.exported or Path(name)
        folders = {FP32: root / "fp32", INT8: root / "int8"}
        for variant, folder in folders.items():
            if not folder.exists():
                model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
                processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
                export_onnx(model, processor, folder, int8=variant == INT8, checkpoint=arguments.checkpoint)
        with torch.no_grad():
            result = measure(arguments.checkpoint, folders, arguments.num_examples, "test")
            result["validation"] = measure(arguments.checkpoint, folders, arguments.num_examples, "validation")
        variants = result["variants"]
        for variant, folder in folders.items():
            size = sum(path.stat().st_size for path in folder.glob("*.onnx"))
            variants[variant]["megabytes"] = round(size / 1e6, 1)
            command = [sys.executable, "-c", ONE_IMAGE, str(folder), IMAGE, TITLE]
            variants[variant]["cold_start_seconds"] = cold_start(command)
        command = [sys.executable, "-m", "optsg", "tag", "--model", arguments.checkpoint, "--title", TITLE, IMAGE]
        variants[REFERENCE]["cold_start_seconds"] = cold_start(command)
        # What no program that uses a model of transformers can do without.
        imports = cold_start([sys.executable, "-c", "from transformers import PreTrainedModel"])
        variants[REFERENCE]["import_seconds"] = imports
    result = {"checkpoint": arguments.checkpoint, "batch_size": BATCH_SIZE, "threads": 1} | result
    result["load_average"] = round(os.getloadavg()[0], 1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | environment(), indent=1, allow_nan=False)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
