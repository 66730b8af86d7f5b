"""Trained runs and the splits that they are scored on; the programs of this folder share this module."""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGProcessor, TagEvaluator
from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES, ModelSpec
from modeling_optsg.baselines.retrieval import ExampleRetriever, ExamplesWithBook
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path("experiments/icon_tagging/results")
F1_METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")


def make_parser(description: str, has_dataset: bool = True) -> argparse.ArgumentParser:
    """Return an argument parser with the options that all programs have, `--dataset` only if `has_dataset`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if has_dataset:
        parser.add_argument("--dataset", default="icon_tagging", help="benchmark, or a folder of tagged images")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=Path("~/.cache/optsg").expanduser(),
        help="folder where the outputs of frozen towers are cached",
    )
    return parser


def train(arguments: Sequence[object], output_dir: Path, cache_dir: Path) -> None:
    """Run `examples/train.py`.

    Args:
        arguments: Words of the command line, without `--output_dir` and `--cache_dir`.
        output_dir: Folder of the run.
        cache_dir: Folder where the outputs of frozen towers are cached.

    Raises:
        subprocess.CalledProcessError: The training failed.
    """
    command = [sys.executable, REPOSITORY / "examples/train.py", *arguments]
    command += ["--output_dir", output_dir, "--cache_dir", cache_dir]
    subprocess.run([str(word) for word in command], check=True)


def read_summary(folder: Path) -> dict:
    """Return the training summary of a run.

    Raises:
        FileNotFoundError: The folder is not that of a finished training run.
    """
    return json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))


def mean_metric(scores: Sequence[dict], metric: str) -> float | None:
    """Return the mean of a metric, `None` if it is an average over no tags in one of the scores."""
    values = [score[metric] for score in scores]
    return None if None in values else fmean(values)


def write_result(result: dict, path: Path) -> None:
    """Write a result file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


class Benchmark:
    """The splits of a tagging dataset and what predictions on them are scored with.

    Args:
        dataset: Name of a benchmark, or a folder.
        cache_dir: Folder where the outputs of frozen towers are cached.

    Raises:
        ValueError: The dataset lacks a split.
    """

    def __init__(self, dataset: str, cache_dir: Path):
        self.splits = load_tagging_dataset(dataset)
        if missing := {"train", "validation", "test"} - set(self.splits):
            raise ValueError(f"{dataset} has no {' and no '.join(sorted(missing))} split.")
        self.name, self.cache_dir = dataset, cache_dir

    @cached_property
    def train_counts(self) -> Counter:
        """Number of training examples with each tag. Runs on a part of the training split are scored with it too."""
        return Counter(tag for tags in self.splits["train"]["tags"] for tag in set(tags))

    def evaluator(self, split: str) -> TagEvaluator:
        """Return the evaluator of a split."""
        return TagEvaluator(self.splits[split]["tags"], self.train_counts)

    def with_features(self, rows: Dataset, run: "Run") -> CachedFeatures | ExamplesWithBook:
        """Return rows with the tower features of a run, and with retrieved tags if its model reads them."""
        features = cache_tower_features(rows, run.model.model, run.processor, self.cache_dir / "features")
        examples = CachedFeatures(features)
        if run.book is None:
            return examples
        return ExamplesWithBook(examples, run.book, run.model.config, run.processor.tag_tokenizer)


@dataclass
class Run:
    """A trained run.

    Args:
        name: Name of its folder.
        summary: Its training summary.
        spec: What the registry says about its model type.
        model: Its model, in evaluation mode.
        processor: Its processor.
        book: The training examples that an open-book model retrieves from, `None` for other models.
    """

    name: str
    summary: dict
    spec: ModelSpec
    model: OPTSGPreTrainedModel
    processor: OPTSGProcessor
    book: ExampleRetriever | None

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Load a run from the folder that `examples/train.py` wrote."""
        summary = read_summary(folder)
        spec = MODEL_TYPES[summary["arguments"]["model_type"]]
        return cls(
            folder.name,
            summary,
            spec,
            spec.model.from_pretrained(folder).eval(),
            OPTSGProcessor.from_pretrained(folder),
            ExampleRetriever.load(folder / "book") if (folder / "book").exists() else None,
        )

    @property
    def arguments(self) -> dict:
        """Training arguments."""
        return self.summary["arguments"]

    def rows(self) -> dict[str, dict]:
        """Return the rows of the model in a comparison: for each decoding its name and the arguments of `generate`."""
        model_type, decodings = self.arguments["model_type"], self.spec.decodings
        if len(decodings) == 1:
            return {model_type: {} if decodings[0] is None else {"decoding": decodings[0]}}
        return {f"{model_type}, {decoding}": {"decoding": decoding} for decoding in decodings}
