r"""Measures how much a book of the training examples improves trained models.

    python -m experiments.icon_tagging.tag_book --checkpoints checkpoints/optsg-icon-small \
        --output experiments/icon_tagging/results/tag_book.json

For each checkpoint, a book is made from the training examples, and its fusion with the model is fitted on the
validation split, for each metric of `--metrics`. The test split is scored with these settings. Rows:

- `model`: the model without a book. Only its threshold is fitted.
- `book`: the book without the model's predictions.
- `model and book`: both, fused.
- `model and book, only SOURCE` and `model and book, N neighbours`: ablations, on the validation split only.

Checkpoints are not changed. Checkpoints that are already in the output file are skipped.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset

from dataset_scripts.icon_tagging.splits import split_key
from experiments.icon_tagging.runs import F1_METRICS, Benchmark, Run, make_parser, write_result
from modeling_optsg.book import BookQueries, TagBook, embed_examples, encoder_fingerprint
from modeling_optsg.book.votes import SOURCES, VECTOR_SOURCES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import NO_TAG_LIMIT
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import environment, novel_hits

METRICS = (*F1_METRICS, "tags_per_example")
OPERATING_POINTS = ("full_f1@micro_f1>=52", "full_f1+micro_f1")
NEIGHBOURS = (5, 10, 50)
SPLITS = ("train", "validation", "test")


class BookExperiment:
    """A run, the book of its training examples, and its predictions.

    Args:
        run: The trained run.
        benchmark: The dataset.
    """

    def __init__(self, run: Run, benchmark: Benchmark):
        self.run, self.benchmark = run, benchmark
        model, processor = run.model, run.processor
        decoding = {"decoding": "parallel"} if "parallel" in run.spec.decodings else {}
        self.queries, self.predictions = {}, {}
        for split in SPLITS:
            rows = benchmark.splits[split]
            features = CachedFeatures(
                cache_tower_features(rows, model.model, processor, benchmark.cache_dir / "features")
            )
            self.queries[split] = embed_examples(model, processor, features)
            if split != "train":
                options = {"threshold": 0.0, "max_tags": NO_TAG_LIMIT, "progress": False} | decoding
                self.predictions[split] = predict_tags(model, processor, features, **options)
        rows = benchmark.splits["train"]
        titles = rows["title"][:]
        columns = {"id": list(map(str, range(len(rows)))), "title": titles, "tags": rows["tags"][:]}
        self.examples = Dataset.from_dict(columns | {"group": list(map(split_key, titles))})
        self.fingerprint = encoder_fingerprint(model, processor)

    def score(self, metric: str) -> dict[str, dict]:
        """Return the metrics of all rows at one operating point."""
        model = {"validation": self._fit_threshold(metric)}
        threshold = model["validation"].pop("threshold")
        kept = [[tag for tag in tags if tag["score"] >= threshold] for tags in self.predictions["test"]]
        rows = {"model": model | self._score_on_test(kept)}
        for name, predictions in (("book", None), ("model and book", self.predictions)):
            rows[name] = self._score_book(metric, predictions)
        for name in SOURCES:
            queries = {split: only(name, queries) for split, queries in self.queries.items()}
            rows[f"model and book, only {name}"] = {"validation": self._fit_book(metric, queries)[1]}
        for number in NEIGHBOURS:
            fitted = self._fit_book(metric, self.queries, num_neighbours=number)[1]
            rows[f"model and book, {number} neighbours"] = {"validation": fitted}
        return rows

    def _fit_threshold(self, metric: str) -> dict:
        threshold, metrics = self.benchmark.evaluator("validation").best_threshold(
            self.predictions["validation"], metric
        )
        return {"threshold": threshold} | _select(metrics)

    def _fit_book(
        self,
        metric: str,
        queries: dict[str, BookQueries],
        predictions: dict[str, list[list[dict]]] | None = None,
        **options: int,
    ) -> tuple[TagBook, dict]:
        predictions = self.predictions if predictions is None else predictions
        book = TagBook(self.examples, queries["train"], self.fingerprint)
        references = self.benchmark.splits["validation"]["tags"][:]
        metrics = book.fit(queries["validation"], references, predictions["validation"], metric=metric, **options)
        return book, _select(metrics)

    def _score_book(self, metric: str, predictions: dict[str, list[list[dict]]] | None) -> dict[str, dict]:
        if predictions is None:
            predictions = {split: [[] for _ in tags] for split, tags in self.predictions.items()}
        book, validation = self._fit_book(metric, self.queries, predictions)
        found = book.look_up(self.queries["test"])
        fused = [book.predict(tags, own) for tags, own in zip(predictions["test"], found, strict=True)]
        kept = [[tag for tag in tags if tag["score"] >= book.threshold] for tags in fused]
        settings = {"temperatures": book.temperatures, "threshold": book.threshold, "score": book.score.to_dict()}
        return {"settings": settings, "validation": validation} | self._score_on_test(kept)

    def _score_on_test(self, kept: Sequence[Sequence[dict]]) -> dict[str, dict]:
        references = self.benchmark.splits["test"]["tags"]
        return {
            "test": _select(self.benchmark.evaluator("test").score(kept)),
            "novel": novel_hits(kept, references),
        }


def only(source: str, queries: BookQueries) -> BookQueries:
    """Return queries with only one source."""
    vectors = {
        name: queries.vectors[name] if name == source else torch.zeros_like(queries.vectors[name])
        for name in VECTOR_SOURCES
    }
    return BookQueries(vectors, queries.titles if source == "words" else [""] * len(queries))


def _select(metrics: dict) -> dict:
    return {name: metrics[name] for name in METRICS}


def main(argv: Sequence[str] | None = None) -> None:
    """Score the given checkpoints and add the results to the output file."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", required=True, help="output folders of examples/train.py"
    )
    parser.add_argument("--metrics", nargs="+", default=OPERATING_POINTS, help="validation metrics to maximise")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    benchmark = Benchmark(arguments.dataset, arguments.cache_dir)
    output = arguments.output
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {}
    for folder in arguments.checkpoints:
        if folder.name in runs:
            continue
        experiment = BookExperiment(Run.load(folder), benchmark)
        runs[folder.name] = {metric: experiment.score(metric) for metric in arguments.metrics}
        for metric, rows in runs[folder.name].items():
            for name, row in rows.items():
                print(folder.name, metric, name, json.dumps(row.get("test", row["validation"])), flush=True)
        write_result({"runs": runs} | environment(), output)


if __name__ == "__main__":
    main()
