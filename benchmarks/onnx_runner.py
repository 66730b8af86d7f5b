"""Compares an exported checkpoint, which runs without PyTorch, with the model in PyTorch.

    pip install "optsg[onnx]"
    python -m benchmarks.onnx_runner --output results/speed/onnx.json

All test examples of icon-tagging, and then all validation examples, are tagged from files and titles, in batches of 8
with one thread, in single precision and with 8-bit weights. The variants take turns at every batch, because the load
of the machine changes. Times are CPU time, with reading of images. The cold start is the CPU time of `optsg tag` with
one image in a new process. The commands take turns. The result is the median.

With `--before`, PyTorch with an earlier version of the code takes turns too, in a process of its own.
"""

import argparse
import contextlib
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import torch

from benchmarks.folder_reading import in_tree, revision
from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.onnx import export_onnx
from optsg.onnx import OnnxTagger

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE, STARTS = 8, 5
REFERENCE, FP32, INT8, BEFORE, IMPORTS = "pytorch", "onnx fp32", "onnx int8", "before", "imports"
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1", "tags_per_example")
IMAGE, TITLE = "examples/images/tent-tree.png", "tent tree"
# Run with the code of an earlier version: tags the batches that it is sent, and answers with tags and CPU seconds.
BEFORE_PROGRAM = """
import os, pickle, sys, time
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import torch
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
torch.set_num_threads(1)
processor = OPTSGProcessor.from_pretrained(sys.argv[1])
model = OPTSGForTagGeneration.from_pretrained(sys.argv[1]).eval()
# Versions before this method had nothing to prepare.
getattr(model, "prepare_for_inference", lambda: None)()
while True:
    try:
        images, titles = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    begin = time.process_time()
    tags = processor.batch_decode(model.generate(**processor(images=images, titles=titles)))
    pickle.dump((tags, time.process_time() - begin), answers)
    answers.flush()
"""
Tags = list[list[dict]]
Tagger = Callable[[list, list], tuple[Tags, float]]


def timed(tag: Callable[[list, list], Tags]) -> Tagger:
    """Return a function that also returns the CPU seconds of this process."""

    def call(images: list, titles: list) -> tuple[Tags, float]:
        begin = time.process_time()
        return tag(images, titles), time.process_time() - begin

    return call


@contextlib.contextmanager
def tag_with_tree(tree: Path, checkpoint: str) -> Iterator[Tagger]:
    """Give a function that tags images and titles with the model in PyTorch and the code in another working tree."""
    command = [sys.executable, "-c", BEFORE_PROGRAM, str(Path(checkpoint).resolve())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **in_tree(tree))

    def call(images: list, titles: list) -> tuple[Tags, float]:
        pickle.dump((images, titles), process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)

    with process:
        yield call


def tag_with_pytorch(checkpoint: str) -> Callable[[list, list], Tags]:
    """Return a function that tags images and titles with the model in PyTorch, prepared for a CPU."""
    processor = OPTSGProcessor.from_pretrained(checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(checkpoint).prepare_for_inference()
    return lambda images, titles: processor.batch_decode(model.generate(**processor(images=images, titles=titles)))


def tag_with_onnx(folder: Path) -> Callable[[list, list], Tags]:
    """Return a function that tags images and titles with an exported checkpoint."""
    tagger = OnnxTagger.from_pretrained(folder, threads=1)
    return lambda images, titles: [
        [{"tag": tag.pop("label")} | tag for tag in tags]
        for tags in tagger(
            [{"image": image, "title": title} for image, title in zip(images, titles, strict=True)],
            batch_size=BATCH_SIZE,
        )
    ]


def cold_starts(commands: dict[str, tuple[list[str], Path]]) -> dict[str, float]:
    """Return the CPU seconds of commands with the code of a working tree, the median of several runs in turn."""
    seconds = {name: [] for name in commands}
    for _ in range(STARTS):
        for name, (command, tree) in commands.items():
            where = in_tree(tree)
            where["env"]["OMP_NUM_THREADS"] = "1"
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **where)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: round(statistics.median(own), 2) for name, own in seconds.items()}


def tag_command(model: str | Path) -> list[str]:
    """Return the command that tags one image."""
    words = ["tag", "--model", str(Path(model).resolve()), "--title", TITLE, str(ROOT / IMAGE)]
    return [sys.executable, "-m", "optsg", *words]


def compare(found: list[list[dict]], expected: list[list[dict]]) -> dict[str, float]:
    """Return how many examples have the same set of tags, and the largest difference of a common tag's score."""
    equal, largest = 0, 0.0
    for own, other in zip(found, expected, strict=True):
        scores, others = ({tag["tag"]: tag["score"] for tag in tags} for tags in (own, other))
        equal += scores.keys() == others.keys()
        largest = max([largest, *(abs(scores[tag] - others[tag]) for tag in scores.keys() & others.keys())])
    return {"equal_tag_sets": equal, "largest_score_difference": float(f"{largest:.2g}")}


def measure(checkpoint: str, taggers: dict[str, Tagger], num_examples: int | None, split: str) -> dict[str, dict]:
    """Tag the examples of a split with every variant; return metrics, agreement and times."""
    examples = load_tagging_dataset("icon_tagging")[split].cast_column("image", datasets.Image(decode=False))
    examples = examples.select(range(num_examples or len(examples)))
    seconds, predictions = dict.fromkeys(taggers, 0.0), {name: [] for name in taggers}
    first = examples[:BATCH_SIZE]
    for tag in taggers.values():
        tag(first["image"], first["title"])
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        for name, tag in taggers.items():
            found, used = tag(batch["image"], batch["title"])
            predictions[name] += found
            seconds[name] += used
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
    parser.add_argument("--before", type=Path, help="working tree of an earlier version")
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
        taggers = {REFERENCE: timed(tag_with_pytorch(arguments.checkpoint))}
        taggers |= {variant: timed(tag_with_onnx(folder)) for variant, folder in folders.items()}
        commands = {REFERENCE: (tag_command(arguments.checkpoint), ROOT)}
        commands |= {variant: (tag_command(folder), ROOT) for variant, folder in folders.items()}
        # The imports that every program with a transformers model needs.
        commands[IMPORTS] = [sys.executable, "-c", "from transformers import PreTrainedModel"], ROOT
        with contextlib.ExitStack() as stack:
            if arguments.before:
                tree = arguments.before.resolve()
                taggers[BEFORE] = stack.enter_context(tag_with_tree(tree, arguments.checkpoint))
                commands[BEFORE] = tag_command(arguments.checkpoint), tree
            stack.enter_context(torch.no_grad())
            result = measure(arguments.checkpoint, taggers, arguments.num_examples, "test")
            result["validation"] = measure(arguments.checkpoint, taggers, arguments.num_examples, "validation")
        variants, starts = result["variants"], cold_starts(commands)
        variants[REFERENCE]["import_seconds"] = starts.pop(IMPORTS)
        for variant, seconds in starts.items():
            variants[variant]["cold_start_seconds"] = seconds
        for variant, folder in folders.items():
            size = sum(path.stat().st_size for path in folder.glob("*.onnx"))
            variants[variant]["megabytes"] = round(size / 1e6, 1)
    if arguments.before:
        result["before"] = revision(arguments.before)
    result = {"checkpoint": arguments.checkpoint, "batch_size": BATCH_SIZE, "threads": 1} | result
    result["load_average"] = round(os.getloadavg()[0], 1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | environment(), indent=1, allow_nan=False)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
