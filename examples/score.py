r"""Evaluate a checkpoint on the test split of a tagging dataset and write the metrics to a JSON file.

    python examples/score.py --checkpoint checkpoints/optsg-icon-small \
        --output results/icon_tagging/optsg-icon-small.json

The decoding settings are those of the checkpoint, which `examples/train.py` fitted on the validation split. The kNN
baseline is fitted on the training and validation splits. Nothing is fitted on the test split.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from datasets import DatasetDict

from dataset_scripts import load_tagging_dataset
from dataset_scripts.column_names import add_column_arguments, column_arguments
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.knn import KNNForTagVote
from modeling_optsg.baselines.pooling import pool_examples
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import fit_generation_config, reliability
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import environment, novel_hits, score_modalities

FITTED_SETTINGS = ("pad_bias", "fusion_weights", "logit_adjustment", "threshold")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the model")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dataset", default="icon_tagging", help="benchmark, folder or Hub name of the dataset")
    add_column_arguments(parser)
    parser.add_argument("--dataset_dir", help="cache folder of the datasets library")
    parser.add_argument(
        "--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser(), help="cache folder for tower features"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="number of examples per batch")
    return parser.parse_args()


def score_decoding(
    model: OPTSGForTagGeneration,
    processor: OPTSGProcessor,
    examples: CachedFeatures,
    references: list[list[str]],
    evaluator: TagEvaluator,
    decoding: str,
    batch_size: int,
) -> dict:
    """Score one decoding: metrics, its settings, its speed, novel tags and the reliability of its probabilities."""
    settings = {}
    for name in FITTED_SETTINGS:
        value = getattr(model.generation_config, name, None)
        if value is not None:
            settings[name] = value[decoding] if isinstance(value, dict) else value
    start = time.perf_counter()
    predictions = predict_tags(model, processor, examples, decoding=decoding, batch_size=batch_size)
    seconds = time.perf_counter() - start
    unfiltered = predict_tags(model, processor, examples, decoding=decoding, batch_size=batch_size, threshold=0.0)
    return (
        evaluator.score(predictions)
        | settings
        | {
            "seconds_per_example_without_towers": round(seconds / len(references), 5),
            "novel": novel_hits(predictions, references),
            "reliability": reliability(unfiltered, references),
        }
    )


def fit_knn(model: OPTSGForTagGeneration, processor: OPTSGProcessor, examples: CachedFeatures) -> KNNForTagVote:
    """Fit the kNN baseline to training examples, with the towers of a model."""
    tags = [list(dict.fromkeys(example_tags)) for example_tags in examples.dataset["tags"]]
    index = {tag: position for position, tag in enumerate(sorted({tag for row in tags for tag in row}))}
    ids = processor.tag_tokenizer(list(index), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    config = KNNConfig(
        text_config=model.config.text_config,
        image_feature_size=model.config.image_feature_size,
        frame_feature_size=model.config.frame_feature_size,
        tag_vocab_size=model.config.tag_vocab_size,
        # Tags that are too long for the decoder of the model can also get votes.
        max_tag_tokens=max(map(len, ids)),
        num_tag_classes=len(index),
    )
    knn = KNNForTagVote(config).eval()
    knn.set_label_vocabulary(ids)
    knn.fit(*pool_examples(examples, config), [[index[tag] for tag in row] for row in tags])
    return knn


def score_knn(
    model: OPTSGForTagGeneration,
    processor: OPTSGProcessor,
    examples: Mapping[str, CachedFeatures],
    validation_evaluator: TagEvaluator,
    evaluator: TagEvaluator,
) -> dict:
    """Fit the kNN baseline on training and validation examples, and score it on the test examples."""
    knn = fit_knn(model, processor, examples["train"])
    grid = MODEL_TYPES["knn"].grid()
    grid["neighbours"] = sorted({min(count, len(examples["train"])) for count in grid["neighbours"]})
    fit = fit_generation_config(knn, processor, examples["validation"], validation_evaluator, grid=grid)
    del fit["tried"]
    return evaluator.score(predict_tags(knn, processor, examples["test"])) | fit


def load_splits(arguments: argparse.Namespace) -> DatasetDict:
    """Load the dataset and check that it has all splits."""
    options = {"cache_dir": arguments.dataset_dir, **column_arguments(arguments)}
    splits = load_tagging_dataset(arguments.dataset, **options)
    if missing := {"train", "validation", "test"} - set(splits):
        raise SystemExit(
            f"{arguments.dataset} has no split {' and no split '.join(sorted(missing))}. The program needs the splits "
            "train, validation and test (docs/evaluation.md)."
        )
    return splits


def main() -> None:
    """Run the program."""
    arguments = parse_arguments()
    start = time.perf_counter()
    splits = load_splits(arguments)
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    features_dir = arguments.cache_dir / "features"
    examples = {
        name: CachedFeatures(cache_tower_features(splits[name], model.model, processor, features_dir))
        for name in ("train", "validation", "test")
    }
    train_counts = Counter(tag for tags in splits["train"]["tags"] for tag in set(tags))
    references = splits["test"]["tags"]
    evaluator = TagEvaluator(references, train_counts)
    validation_evaluator = TagEvaluator(splits["validation"]["tags"], train_counts)

    result = {
        "checkpoint": arguments.checkpoint,
        "dataset": arguments.dataset,
        "examples": len(references),
        "evaluated_tags": len(evaluator.evaluated_tags),
        "test": {},
    }
    for decoding in ("parallel", "sequential"):
        result["test"][decoding] = score_decoding(
            model, processor, examples["test"], references, evaluator, decoding, arguments.batch_size
        )
        print(f"{decoding}: Full F1 {result['test'][decoding]['full_f1']}", flush=True)
    result["modalities"] = score_modalities(
        model, processor, examples["test"], evaluator, batch_size=arguments.batch_size
    )
    result["knn"] = score_knn(model, processor, examples, validation_evaluator, evaluator)
    print(f"kNN: Full F1 {result['knn']['full_f1']}")

    summary_path = Path(arguments.checkpoint) / "training_summary.json"
    if summary_path.exists():
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        result |= {"seed": summary["arguments"]["seed"], "training_seconds": summary["training_seconds"]}
    result |= {"seconds": round(time.perf_counter() - start, 1)} | environment()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
