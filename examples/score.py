r"""Scores a checkpoint on the test split of a tagging dataset and writes one JSON.

    python examples/score.py --checkpoint checkpoints/optsg-icon-small \
        --output results/icon_tagging/optsg-icon-small.json

`pad_bias` and `threshold` are those of the checkpoint, fitted on validation examples when it was trained; those of the
kNN vote are fitted on the same validation examples here. Nothing is fitted on the test split.
"""

import argparse
import json
import platform
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from dataset_scripts import load_tagging_dataset
from modeling_optsg import KNNForTagVote, OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.pooling import pool_examples
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.prediction import predict_tags

FITTED = ("pad_bias", "fusion_weights", "logit_adjustment", "threshold")
MODALITIES = {"both": ("image", "title"), "image": ("image",), "title": ("title",)}
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy", "scipy")


def reliability(predictions: list[list[dict]], references: list[list[str]], bins: int = 10) -> dict:
    """How often tags of a given probability are right: for each tenth of the probabilities the number of tags, their
    mean probability and the share that is in the ground truth, in percent; and the expected calibration error, the
    mean distance of the two weighted by the number of tags."""
    pairs = np.array([(p["score"], p["tag"] in set(tags)) for row, tags in zip(predictions, references) for p in row])
    which = np.minimum((pairs[:, 0] * bins).astype(int), bins - 1)
    rows = []
    for index in range(bins):
        inside = pairs[which == index]
        if len(inside):
            probability, correct = inside.mean(axis=0) * 100
            rows.append(
                {
                    "from": index / bins,
                    "to": (index + 1) / bins,
                    "tags": len(inside),
                    "mean_probability": round(probability, 1),
                    "correct": round(correct, 1),
                }
            )
    error = sum(row["tags"] * abs(row["mean_probability"] - row["correct"]) for row in rows) / len(pairs)
    return {"table": rows, "expected_calibration_error": round(error, 2)}


def novel_hits(predictions: list[list[dict]], references: list[list[str]]) -> dict:
    """Novel tags written, and how many of those are in the example's ground truth."""
    novel = [p["tag"] in set(tags) for row, tags in zip(predictions, references) for p in row if p["novel"]]
    return {"written": len(novel), "exact_hits": sum(novel)}


def neighbours_vote(model, processor, examples, tags: list[list[str]]) -> KNNForTagVote:
    """The kNN vote of training examples under a checkpoint's towers."""
    known = {tag: place for place, tag in enumerate(sorted({tag for row in tags for tag in row}))}
    ids = processor.tag_tokenizer(list(known), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    config = KNNConfig(
        text_config=model.config.text_config,
        frame_feature_size=model.config.frame_feature_size,
        tag_vocab_size=model.config.tag_vocab_size,
        # A vote needs no decoder: tags too long for it can be named all the same.
        max_tag_tokens=max(map(len, ids)),
        num_tag_classes=len(known),
    )
    knn = KNNForTagVote(config).eval()
    knn.set_label_vocabulary(ids)
    knn.fit(*pool_examples(examples, config), [[known[tag] for tag in dict.fromkeys(row)] for row in tags])
    return knn


def score_knn(model, processor, examples, dataset, train_counts, evaluator) -> dict:
    """The vote's metrics on the test examples, fitted on the validation examples."""
    knn = neighbours_vote(model, processor, examples["train"], dataset["train"]["tags"])
    validation = TagEvaluator(dataset["validation"]["tags"], train_counts)
    grid = MODEL_TYPES["knn"].grid()
    # There may be fewer training examples than the most neighbours that are tried.
    grid["neighbours"] = sorted({min(count, len(examples["train"])) for count in grid["neighbours"]})
    fit = fit_generation_config(knn, processor, examples["validation"], validation, grid=grid)
    fit.pop("tried")
    return evaluator.score(predict_tags(knn, processor, examples["test"])) | fit


def environment() -> dict:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": commit or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dataset", default="icon_tagging")
    parser.add_argument("--dataset_dir", default=None)
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    started = time.perf_counter()

    dataset = load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir)
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    examples = {
        name: CachedFeatures(
            cache_tower_features(dataset[name], model.model, processor, arguments.cache_dir / "features")
        )
        for name in ("train", "validation", "test")
    }
    train_counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    references = dataset["test"]["tags"]
    evaluator = TagEvaluator(references, train_counts)
    result = {"checkpoint": arguments.checkpoint, "dataset": arguments.dataset, "examples": len(references)}
    result |= {"evaluated_tags": len(evaluator.evaluated_tags), "test": {}}

    for decoding in ("parallel", "sequential"):
        fitted = {name: getattr(model.generation_config, name, None) for name in FITTED}
        settings = {name: value[decoding] for name, value in fitted.items() if value is not None}
        before = time.perf_counter()
        predictions = predict_tags(
            model, processor, examples["test"], decoding=decoding, batch_size=arguments.batch_size
        )
        seconds = time.perf_counter() - before
        result["test"][decoding] = evaluator.score(predictions) | settings
        result["test"][decoding] |= {
            "seconds_per_example_without_towers": round(seconds / len(references), 5),
            "novel": novel_hits(predictions, references),
        }
        unfiltered = predict_tags(
            model, processor, examples["test"], decoding=decoding, batch_size=arguments.batch_size, threshold=0.0
        )
        result["test"][decoding]["reliability"] = reliability(unfiltered, references)
        print(decoding, json.dumps(evaluator.score(predictions)), flush=True)

    result["modalities"] = {
        name: evaluator.score(
            predict_tags(model, processor, examples["test"], modalities=modalities, batch_size=arguments.batch_size)
        )
        for name, modalities in MODALITIES.items()
    }

    result["knn"] = score_knn(model, processor, examples, dataset, train_counts, evaluator)
    print("knn", json.dumps(result["knn"]))

    summary_path = Path(arguments.checkpoint) / "training_summary.json"
    if summary_path.exists():
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        result["seed"] = summary["arguments"]["seed"]
        result["training_seconds"] = summary["training_seconds"]
    result |= {"seconds": round(time.perf_counter() - started, 1)} | environment()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
