"""Measures a model that is fine-tuned on few images, next to a vote of the nearest neighbours on the same towers.

    python -m benchmarks.own_data --output results/own_data.json

The training images are drawn scenes without titles, or a slice of the training split of icon-tagging with titles. They
are divided and trained on with the default arguments of `optsg train --checkpoint`. Both methods are fitted on the
validation examples that the training sets aside, and scored on 300 other images: new drawings, or test examples of
icon-tagging. The checkpoint was trained on icon-tagging: it has seen the images of the slices and their tags, but not
the test examples. The drawn scenes are new to it.

Runs that are in the output file already are skipped.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from datasets import Dataset, Features, Image, List, Value
from transformers.utils import logging

from benchmarks.own_library import draw_example
from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGTrainer, OPTSGTrainingArguments, TagEvaluator, predict_tags
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.data.splits import split_examples
from modeling_optsg.evaluation.knn_comparison import score_knn
from modeling_optsg.evaluation.reporting import environment

SIZES, SEEDS, NUM_TEST = (10, 50, 200, 1000), (0, 1, 2), 300
KINDS = ("scenes", "icons")
# Ten random icons have no tag in common, so there is nothing to validate. They are chosen among the icons with one of
# the most frequent tags.
MIN_RANDOM_ICONS, NUM_FREQUENT = 50, 5
METRICS = ("full_f1", "micro_f1", "tags_per_example")
FEATURES = Features({"image": Image(), "title": Value("string"), "tags": List(Value("string"))})


def draw_scenes(number: int, seed: str) -> Dataset:
    """Draw images with their keywords."""
    rng = random.Random(seed)
    images, tags = zip(*(draw_example(rng) for _ in range(number)))
    return Dataset.from_dict({"image": images, "title": [""] * number, "tags": tags}, features=FEATURES)


def load_rows(kind: str, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Return training images and test images."""
    if kind == "scenes":
        return draw_scenes(size, f"train {seed}"), draw_scenes(NUM_TEST, "test")
    dataset = load_tagging_dataset("icon_tagging")
    train = dataset["train"].shuffle(seed=seed)
    if size < MIN_RANDOM_ICONS:
        counts = Counter(tag for tags in train["tags"] for tag in set(tags))
        frequent = {tag for tag, _ in counts.most_common(NUM_FREQUENT)}
        train = train.filter(lambda tags: not frequent.isdisjoint(tags), input_columns="tags")
    return train.select(range(size)), dataset["test"].shuffle(0).select(range(NUM_TEST))


def measure(checkpoint: str, kind: str, size: int, seed: int) -> dict:
    """Fine-tune a checkpoint, and return the test metrics of the model and of kNN."""
    rows, test = load_rows(kind, size, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = OPTSGTrainingArguments(f"{folder}/run", checkpoint=checkpoint, cache_dir=f"{folder}/cache", seed=seed)
        start = time.perf_counter()
        trainer = OPTSGTrainer(args=args, train_dataset=rows)
        summary = trainer.train()
        seconds = time.perf_counter() - start
        train, validation = split_examples({"train": rows}, validation_ratio=args.validation_ratio, seed=seed)
        model, processor = trainer.model, trainer.processing_class
        examples = [
            CachedFeatures(cache_tower_features(own, model.model, processor, Path(folder, "cache/features")))
            for own in (train, validation, test)
        ]
        counts = Counter(tag for own in train["tags"] for tag in set(own))
        evaluators = [TagEvaluator(own["tags"], counts) for own in (validation, test)]
        own = evaluators[1].score(predict_tags(model, processor, examples[2]))
        knn = score_knn(model, processor, *examples[:2], evaluators[0], examples[2], evaluators[1])
    row = {"seconds": round(seconds, 1), "training_seconds": summary["training_seconds"]}
    row |= {name: summary["arguments"][name] for name in ("train_batch_size", "num_train_epochs")}
    return row | {"model": _select(own), "nearest neighbours": _select(knn)}


def _select(metrics: dict) -> dict:
    return {name: metrics[name] for name in METRICS}


def summarize(runs: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Return the means over the seeds by kind of images and number of images."""
    means = {}
    for prefix in dict.fromkeys(name.rsplit("/", 1)[0] for name in runs):
        own = [run for name, run in runs.items() if name.rsplit("/", 1)[0] == prefix]
        row = {"seeds": len(own), "seconds": round(mean(run["seconds"] for run in own), 1)}
        for method in ("model", "nearest neighbours"):
            row[method] = {key: round(mean(run[method][key] for run in own), 2) for key in METRICS}
        kind, size = prefix.split("/")
        means.setdefault(kind, {})[size] = row
    return means


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing in the output file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    output = arguments.output
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {}
    for kind in arguments.kinds:
        for size in arguments.sizes:
            for seed in arguments.seeds:
                if (name := f"{kind}/{size}/{seed}") in runs:
                    continue
                runs[name] = measure(arguments.checkpoint, kind, size, seed)
                print(name, json.dumps(runs[name], allow_nan=False), flush=True)
                _write(arguments.checkpoint, runs, output)
    _write(arguments.checkpoint, runs, output)


def _write(checkpoint: str, runs: dict[str, dict], output: Path) -> None:
    result = {"checkpoint": checkpoint, "means": summarize(runs), "runs": runs, **environment()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
